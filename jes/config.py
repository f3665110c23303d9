"""Every setting of a run: its default, its check, and its frozen form.

A config file in `configs/` starts from `default()` and changes some settings; the
command line changes more of them (`--config.alpha=0.01`). `freeze` checks them all and
gives the `Settings` that the rest of the package reads.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import ml_collections

from jes.core.anchor import PLACES
from jes.core.evolution import SCHEDULES, Evolution
from jes.core.fitness import METHODS as SHAPINGS
from jes.core.noise import DISTRIBUTIONS
from jes.errors import InputError
from jes.io.tracker import TRACKERS
from jes.metacognition.objectives import OBJECTIVES
from jes.questions import DRAWS, MODES
from jes.sampling.generate import Sampling
from jes.tasks.own import Asking
from jes.tasks.rewards import Rewarding, weights_of
from jes.tasks.task import Data
from jes.update import ROUNDINGS, make_optimizer

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that answer. The master copy, which is trained, is float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoSettings:
    """The policy gradient that ES is compared with; `population` is its group size."""

    learning_rate: float = 1e-6
    minibatch: int = 0  # answers per optimizer step; 0 for all


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Supervised fine-tuning on META, the baseline of ESMA (2602.02605).

    A generation is one optimizer step, on `prompts` questions.
    """

    learning_rate: float = 2e-5
    loss: str = "answer"  # or 'all': on the tokens of the question too, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `jes.train`; `freeze` checks them."""

    # What is trained, on what.
    seed: int = 0
    method: str = "es"  # or a baseline: 'grpo', 'sft'
    model: str = "tiny"  # a folder, a hub id; 'tiny' or 'tiny-knowing' (embedded)
    quantize: str = ""  # 'int4', 'int8' or 'w8a8' rounds a float model first
    group_size: int = 128  # int4 and int8: weights that share a scale
    dtype: str = "float32"  # of the weights that answer; the master copy is float32
    task: str = "tiny/min"  # a name, or one's own: 'mytask.py', 'package.module:name'
    mode: str = "generate"  # or 'likelihood', for a task with choices
    data: Data = Data()  # noqa: RUF009  frozen

    # A task of one's own: see `jes.tasks.own` and `jes.tasks.rewards`.
    prompt: str = ""  # template over the columns of a row, or a column
    system: str = ""  # system message
    chat_template: str = ""  # a file, in place of the model's own
    template_kwargs: str = ""  # JSON, such as {"enable_thinking": true}
    reward_weights: str = ""  # of named rewards: 'right=1,brief=0.1'
    reward_errors: str = "stop"  # or 'zero': an answer whose reward fails earns 0
    reward_timeout: float = 60.0  # seconds; 0 for no limit
    reward_concurrency: int = 16  # answers that an `async` reward scores at a time
    accept_changes: bool = False  # go on though rows, prompts or reward have changed

    # Evolution (2509.24372).
    generations: int = 100
    population: int = 30
    sigma: float = 0.001  # 0 chooses σ, and α with it: see `jes.sigma`
    alpha: float = 0.0005
    alpha_half_life: int = 0  # generations after which α is halved, each time; 0 never
    sigma_half_life: int = 0  # the same for σ
    alpha_cosine: int = 0  # generations over which α falls along a cosine; 0 never
    sigma_cosine: int = 0  # the same for σ
    cosine_floor: float = 0.1  # what is left of them at its end, as a share
    antithetic: bool = False
    noise: str = "normal"  # or 'table': nearly normal, faster on CPUs; or 'sign': ±1,
    # far cheaper, and the same weights on any machine
    draw: str = "member"  # or 'layer': drawn again for each layer and pass, less memory
    rank: int = 0  # of the noise of a matrix (2511.16652), such as 1; 0 for full rank
    shaping: str = "zscore"  # or 'centered_rank', 'pair_zscore', 'none'
    objective: str = "reward"  # or one of `OBJECTIVES`, for ESMA (2602.02605)
    shuffle_fitness: bool = False  # control: steps as long, in random directions

    # Anchored weight decay (2605.30148): a pull back to the base model.
    decay: str = "none"  # or 'l2', 'l1'
    decay_coefficient: float = 0.0  # λ; L2 removes the share alpha x λ per generation
    anchor: str = "device"  # 'bfloat16' (rounded), 'host' (in its memory) or 'none'

    # Quantised weights (2602.03120): how updates are rounded to whole codes. 'replay'
    # recomputes the residual from the last `window` generations, 'residual' keeps it,
    # 'naive' drops it, 'quzo' rounds at random; 'none' is for a float model. Sigma is
    # in codes then, and alpha is that of Eq. 6, divided by sigma.
    rounding: str = "none"
    residual_decay: float = 0.9  # γ
    window: int = 50  # K
    residual_dtype: str = "float32"  # of 'residual'; or 'bfloat16', 'float16'
    initial_residual: str = "zero"  # or 'uniform', as in the published code
    residual_clip: float = 0.0  # 0 for none; 1.5 in the published code
    divide_by_population: bool = True  # the 1/N of Eq. 5, not in the published code
    scale_sigma: float = 0.0  # of the scales, in units of these; 0 keeps them frozen
    scale_alpha: float = 0.0

    grpo: GrpoSettings = GrpoSettings()
    sft: SftSettings = SftSettings()

    # Questions and answers of one generation.
    prompts: int = 0  # prompts per generation, drawn anew each time; 0 for all
    max_new_tokens: int = 0  # 0 for the task's own
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    buckets: tuple[int, ...] = (
        *(16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048),
    )  # prompt lengths in tokens to pad to

    # Memory: members held at once on each device, and, by continuous batching, the
    # prompts that a member answers at once. 0 chooses from the free memory.
    chunk: int = 0
    memory_gb: float = 0.0  # 0 for what is free
    slots: int = 0
    slice_tokens: int = 32  # most tokens decoded before finished slots are refilled

    # Devices of a process. A model is spread over `model_parallel` of them, and the
    # members over the rest.
    devices: int = 0  # 0 for all
    model_parallel: int = 1
    # Devices that each hold the whole float model compute a part of the update each
    # and exchange it, instead of drawing all the noise. Hosts still send scores only.
    share_update: bool = False

    # Evaluation on held-out examples: before, every `eval_every` generations, after.
    eval_every: int = 50
    eval_train: bool = False  # on the training examples too
    eval_tasks: tuple[str, ...] = ()  # beside the task itself, such as prior tasks
    eval_batch: int = 256
    kl_prompts: int = 0  # of each evaluated task, for the KL to the base model
    kl_max_new_tokens: int = 256
    keep: str = "last"  # or 'best': model-best/ too, the best held-out reward so far
    patience: int = 0  # evaluations without a better one until the run ends; 0: never
    checkpoint_every: int = 25
    tracker: str = ""  # 'wandb' or 'trackio', beside TensorBoard

    @property
    def root(self) -> jax.Array:
        """The root key of the run."""
        return jax.random.key(self.seed)

    @cached_property
    def evolution(self) -> Evolution:
        """The settings of the update."""
        names = {field.name for field in dataclasses.fields(Evolution)}
        own = {name: getattr(self, name) for name in names - {"distribution", "unit"}}
        if not self.sigma:  # until they are chosen
            own |= {"sigma": Settings.sigma, "alpha": Settings.alpha}
        return Evolution(**own, distribution=self.noise)

    @property
    def asking(self) -> Asking:
        """How a task of one's own asks; `chat` is up to the model."""
        names = [field.name for field in dataclasses.fields(Rewarding)]
        values = {name: getattr(self, f"reward_{name}") for name in names}
        return Asking(
            prompt=self.prompt, system=self.system, rewarding=Rewarding(**values)
        )

    @cached_property
    def sampling(self) -> Sampling:
        """How members sample their answers."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


AT_LEAST: dict[str, int] = {
    **dict.fromkeys(("generations", "eval_every", "checkpoint_every", "eval_batch"), 1),
    **dict.fromkeys(("kl_max_new_tokens", "model_parallel", "slice_tokens"), 1),
    **dict.fromkeys(("prompts", "max_new_tokens", "chunk", "slots", "kl_prompts"), 0),
    **dict.fromkeys(("memory_gb", "devices", *SCHEDULES), 0),
    **dict.fromkeys(("data.train_examples", "data.test_examples", "seed"), 0),
    **dict.fromkeys(("grpo.minibatch", "reward_timeout"), 0),
    **{"reward_concurrency": 1, "patience": 0},
}
FINITE = (
    "reward_timeout",
    "alpha",
    "temperature",
    "memory_gb",
    "scale_alpha",
    "residual_clip",
)
POSITIVE = ("grpo.learning_rate", "sft.learning_rate")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("es", "grpo", "sft"),
    "quantize": ("", "int4", "int8", "w8a8"),
    "dtype": DTYPES,
    "mode": MODES,
    "noise": tuple(DISTRIBUTIONS),
    "draw": DRAWS,
    "shaping": tuple(SHAPINGS),
    "objective": ("reward", *OBJECTIVES),
    "decay": ("none", "l2", "l1"),
    "anchor": PLACES,
    "rounding": tuple(ROUNDINGS),
    "sft.loss": ("answer", "all"),
    "keep": ("last", "best"),
    "reward_errors": ("stop", "zero"),
    "tracker": ("", *TRACKERS),
}
ES_ALONE = ("rounding", "decay", "shuffle_fitness", "slots", "share_update")
UNUSED: dict[str, tuple[str, ...]] = {
    "es": (),
    "grpo": (*ES_ALONE, "model_parallel", "top_k", "top_p"),
    "sft": (*ES_ALONE, "model_parallel", "objective", "temperature", "top_k", "top_p"),
}
"""Settings that a method has no use for: they must be left at their defaults."""


def default() -> ml_collections.ConfigDict:
    """The default settings, for a config file to change; others cannot be added."""
    return ml_collections.ConfigDict(dataclasses.asdict(Settings())).lock()


get_config = default
"""This module is a config file, for a command line without one."""


def freeze(config: Mapping[str, Any]) -> Settings:
    """The settings of a run, checked; settings of other programs are left out.

    Raises:
      InputError: for settings that no run can have, whatever its model and tasks.
    """
    nested = {"data": Data, "grpo": GrpoSettings, "sft": SftSettings}
    values = {field.name: config[field.name] for field in dataclasses.fields(Settings)}
    for group, kind in nested.items():
        known = {field.name for field in dataclasses.fields(kind)}
        for name in sorted(set(values[group]) - known):
            raise InputError(f"there is no setting {group}.{name}")
        values[group] = kind(**values[group])
    values["buckets"] = tuple(values["buckets"])
    names = [name for entry in values["eval_tasks"] for name in entry.split(",")]
    values["eval_tasks"] = tuple(name for name in names if name)  # a,b is one entry
    settings = Settings(**values)
    _check_values(settings)
    for name in UNUSED[settings.method]:
        expected, given = getattr(Settings(), name), getattr(settings, name)
        if given != expected:
            raise InputError(
                f"{name}={given!r} is not for method {settings.method!r}: it must be "
                f"{expected!r}"
            )
    for message, applies in (_conflicts(settings) | _float_only(settings)).items():
        if applies:
            raise InputError(message)
    try:  # the parts of the update and the sampler check the rest
        evolution = settings.evolution
        evolution.noise.check_population(evolution.population)
        make_optimizer(evolution)
        settings.sampling  # noqa: B018
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    return settings


def _check_values(settings: Settings) -> None:
    """Raises InputError for a value that is wrong by itself."""

    def value(name: str) -> Any:
        group, _, inner = name.rpartition(".")
        return getattr(getattr(settings, group) if group else settings, inner)

    for name in FINITE:
        if not math.isfinite(value(name)):
            raise InputError(f"{name} must be finite, not {value(name)}")
    for name, least in AT_LEAST.items():
        if value(name) < least:
            raise InputError(f"{name} must be at least {least}, not {value(name)}")
    for name in POSITIVE:
        if not 0 < value(name) < math.inf:
            raise InputError(f"{name} must be positive, not {value(name)}")
    for name, choices in CHOICES.items():
        if value(name) not in choices:
            raise InputError(f"{name} must be one of {choices}, not {value(name)!r}")
    if settings.seed >= 2**32:
        raise InputError(f"seed must be below {2**32}, not {settings.seed}")
    weights_of(settings.reward_weights)
    buckets = settings.buckets
    if not buckets or any(not isinstance(b, int) or b < 1 for b in buckets):
        raise InputError(f"buckets are prompt lengths in tokens, not {buckets}")


def _conflicts(s: Settings) -> dict[str, Any]:
    """What is said of settings that do not go together, and whether it applies."""
    grpo, decays, generates = (
        s.method == "grpo",
        s.decay != "none",
        s.mode == "generate",
    )
    return {
        "anchor='none' cannot be combined with a decay, kl_prompts or method 'grpo'": (
            s.anchor == "none" and (decays or s.kl_prompts or grpo)
        ),
        "method 'grpo' samples its answers: use mode 'generate'": (
            grpo and not generates
        ),
        "method 'grpo' compares answers: population must be at least 2": (
            grpo and s.population < 2
        ),
        "noise 'sign' is for method 'es' and full rank: rank=0": (
            s.noise == "sign" and (s.rank or s.method != "es")
        ),
        "noise 'sign' moves whole numbers from an exact anchor: 'device' or 'host'": (
            s.noise == "sign" and s.anchor in ("none", "bfloat16")
        ),
        "slots are for mode 'generate'": s.slots and not generates,
        "decay_coefficient does nothing without decay='l2' or 'l1'": (
            s.decay_coefficient and not decays
        ),
        f"decay={s.decay!r} does nothing with decay_coefficient=0: set it too": (
            decays and not s.decay_coefficient
        ),
        "scale_sigma and scale_alpha go together: set both or none": (
            bool(s.scale_sigma) != bool(s.scale_alpha)
        ),
        f"scale_sigma is not for rounding={s.rounding!r}": (
            s.scale_sigma and s.rounding in ("none", "quzo")
        ),
        "scale_sigma cannot be combined with a decay, which is in codes": (
            s.scale_sigma and decays
        ),
        "rounding 'replay' needs a constant alpha and sigma: no half-life or cosine": (
            s.rounding == "replay" and s.evolution.changes
        ),
        f"cosine_floor is a share above 0, of at most 1: not {s.cosine_floor}": (
            not 0 < s.cosine_floor <= 1
        ),
        "shaping 'pair_zscore' needs antithetic=True": (
            s.shaping == "pair_zscore" and not s.antithetic
        ),
    }


def _float_only(s: Settings) -> dict[str, Any]:
    """The same, of settings that quantised models do not have."""
    codes, parallel, share = s.rounding != "none", s.model_parallel > 1, s.share_update
    return {
        "share_update is for rounding 'none' and model_parallel=1": (
            share and (codes or parallel)
        ),
        f"sigma={s.sigma} is in codes, of which there are 256: it must be smaller": (
            codes and s.sigma >= 2**8
        ),
        "sigma=0 ('auto') is for float models: a sigma of codes is in codes": (
            codes and not s.sigma
        ),
        f"noise={s.noise!r} is for float models: codes have a noise of whole numbers": (
            codes and s.noise != "normal"
        ),
        f"rank={s.rank} is for float models: set rank=0": codes and s.rank,
        "model_parallel is for float models: codes are kept whole on each device": (
            codes and parallel
        ),
        f"draw={s.draw!r} is for float models with noise of full rank": (
            s.draw != "member" and (codes or s.rank)
        ),
    }
