"""From settings to what a run works with: the model, its tasks, the encoded prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jes.config import DTYPES
from jes.core.anchor import PLACES
from jes.core.mesh import make_mesh
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.console import console
from jes.metacognition.objectives import OBJECTIVES
from jes.models.weights import Pretrained
from jes.quantize import load_base
from jes.questions import Evaluation, Question, longest, padded_lengths, prepare
from jes.sampling.generate import GREEDY, Sampling
from jes.sampling.kl import Answers, sample_answers
from jes.sampling.prompts import bucket
from jes.tasks import load_task
from jes.update import (
    ROUNDINGS,
    Evolution,
    count_trained,
    flip_rate,
    make_optimizer,
)

ON_TRAIN = " (train)"
"""After a task's name: an evaluation on the examples that are trained on."""
MANY_FLIPS = 0.1
"""Share of the codes that noise moves in a generation, from which to warn."""


class Experiment(NamedTuple):
    """What stays the same over a run.

    Attributes:
      config: all settings.
      evolution: those of the update.
      pretrained: the base model.
      parameters: how many of its weights are trained.
      evaluation: how members are examined on the task that is trained.
      train: its questions.
      evaluations: the trained task and those beside it, with held-out questions; with
        `eval_train` the training questions too, see `ON_TRAIN`.
      base_answers: of the base model to some of these, for the KL.
    """

    config: ml_collections.ConfigDict
    evolution: Evolution
    pretrained: Pretrained
    parameters: int
    evaluation: Evaluation
    train: list[Question]
    evaluations: dict[str, tuple[Evaluation, list[Question]]]
    base_answers: dict[str, Answers]

    @property
    def answers_a_generation(self) -> int:
        """How many answers are sampled and scored in one generation."""
        answers = 1 if self.config.method == "sft" else self.config.population
        return answers * (self.config.prompts or len(self.train))


def make_evolution(config: ml_collections.ConfigDict) -> Evolution:
    """The settings of the update, checked."""
    try:
        fields = [field.name for field in dataclasses.fields(Evolution)]
        settings = {**config, "law": config.noise}
        evolution = Evolution(**{name: settings[name] for name in fields})
        evolution.noise.check_population(evolution.population)
        make_optimizer(evolution)
        half_lives = evolution.alpha_half_life, evolution.sigma_half_life
        if evolution.rounding == "replay" and any(half_lives):
            raise ValueError("rounding 'replay' is for a constant alpha and sigma")
        if evolution.shaping == "pair_zscore" and not evolution.antithetic:
            raise ValueError("shaping 'pair_zscore' needs antithetic pairs")
        if evolution.rounding != "none" and evolution.law != "normal":
            raise ValueError(
                f"noise={evolution.law!r} is for weights of floats: the noise of codes "
                "is of integers, and has a law of its own"
            )
        if evolution.rounding != "none" and evolution.rank:
            raise ValueError(
                f"rank={evolution.rank} is for weights of floats: the noise of codes "
                "is of integers, entry by entry; set rank=0"
            )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    return evolution


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a setting that no run can have."""
    for name in (
        "generations",
        "eval_every",
        "checkpoint_every",
        "eval_batch",
        "kl_max_new_tokens",
        "model_parallel",
        "slice_tokens",
    ):
        if config[name] < 1:
            raise InputError(f"{name} must be at least 1, not {config[name]}")
    for name in (
        "prompts",
        "max_new_tokens",
        "chunk",
        "memory_gb",
        "kl_prompts",
        "alpha_half_life",
        "sigma_half_life",
        "devices",
        "slots",
    ):
        if config[name] < 0:
            raise InputError(f"{name} cannot be negative: {config[name]}")
    for name, value in config.data.items():
        if isinstance(value, int) and value < 0:
            raise InputError(f"data.{name} cannot be negative: {value}")
    for name in ("alpha", "temperature", "memory_gb", "scale_alpha", "residual_clip"):
        if not np.isfinite(config[name]):
            raise InputError(f"{name} must be finite, not {config[name]}")
    if config.objective not in ("reward", *OBJECTIVES):
        names = ", ".join(["reward", *OBJECTIVES])
        raise InputError(f"objective must be one of {names}: {config.objective!r}")
    if config.anchor not in PLACES:
        raise InputError(f"anchor must be one of {PLACES}, not {config.anchor!r}")
    if config.anchor == "none" and (config.decay != "none" or config.kl_prompts):
        raise InputError("anchor='none' leaves nothing to decay to, or to take a KL to")
    if config.scale_sigma and config.rounding in ("none", "quzo"):
        raise InputError(f"scale_sigma is not for rounding={config.rounding!r}")
    if config.scale_sigma and config.decay != "none":
        raise InputError("a decay is in codes: it cannot be of trained scales too")
    if config.rounding != "none" and config.sigma >= 2**8:
        raise InputError(f"sigma={config.sigma} is in codes, of which there are 256")
    if bool(config.scale_sigma) != bool(config.scale_alpha):
        raise InputError("scale_sigma and scale_alpha go together")
    if config.decay_coefficient and config.decay == "none":
        raise InputError("decay_coefficient without decay='l2' or 'l1' does nothing")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, not {config.seed}")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype must be one of {DTYPES}, not {config.dtype!r}")
    if config.slots and (config.method != "es" or config.mode != "generate"):
        raise InputError("slots are for method 'es' and mode 'generate'")
    if config.share_update and (
        config.method != "es" or config.rounding != "none" or config.model_parallel > 1
    ):
        raise InputError(
            "share_update is for method 'es', rounding 'none' and model_parallel=1"
        )
    if not config.buckets or any(
        not isinstance(bucket, int) or bucket < 1 for bucket in config.buckets
    ):
        raise InputError(f"buckets are prompt lengths in tokens, not {config.buckets}")


def make_experiment(
    config: ml_collections.ConfigDict, evolution: Evolution
) -> Experiment:
    """Loads the model and the tasks, and encodes all prompts."""
    pretrained = load_trainable(config, evolution)
    if pretrained.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer, which tasks need")

    trained = make_evaluation(
        config,
        pretrained,
        config.task,
        mode=config.mode,
        max_new_tokens=config.max_new_tokens,
        sampling=make_sampling(config),
        slice_tokens=config.slice_tokens,
    )
    if config.objective != "reward" and trained.task.meta is None:
        raise InputError(
            f"objective {config.objective!r} is for tasks that ask 'do you know', and "
            f"{config.task} does not"
        )
    train = prepare(trained, trained.task.train)
    if not train:
        raise InputError(f"task {config.task} has no training examples")
    if config.prompts > len(train):
        raise InputError(
            f"prompts={config.prompts}, but {config.task} has {len(train)} to train on"
        )
    # One shape for the whole run: that of the longest prompt.
    trained_on = one_bucket(trained, train)
    # Members may sample their answers; what is reported is the greedy answer's.
    greedy = dataclasses.replace(trained, sampling=GREEDY)
    evaluations = make_evaluations(config, pretrained, greedy)
    if config.eval_train:
        evaluations[f"{config.task}{ON_TRAIN}"] = greedy, train
    parameters = count_trained(pretrained.params, evolution)
    answers = {
        name: base_answers(config, pretrained, questions)
        for name, (_, questions) in evaluations.items()
        if config.kl_prompts
    }
    return Experiment(
        config,
        evolution,
        pretrained,
        parameters,
        trained_on,
        train,
        evaluations,
        answers,
    )


def load_trainable(
    config: ml_collections.ConfigDict, evolution: Evolution
) -> Pretrained:
    """The base model, in a form that the settings can train.

    Raises:
      InputError: for `rounding` without codes, or codes without it.
    """
    pretrained = load_base(
        config.model,
        config.quantize,
        config.group_size,
        config.dtype,
        choose_devices(config),
    )
    quantized = is_quantized(pretrained.params)
    if quantized and config.model_parallel > 1:
        raise InputError("model_parallel is for models of floats: codes stay whole")
    if quantized == (evolution.rounding == "none"):
        ways = ", ".join(repr(name) for name in ROUNDINGS if name != "none")
        raise InputError(
            f"{config.model} is quantised: set rounding to one of {ways}"
            if quantized
            else f"{config.model} has floats for weights, which rounding="
            f"{evolution.rounding!r} is not for: set quantize to 'int4', 'int8', 'w8a8'"
        )
    if config.draw != "member" and (quantized or config.rank):
        raise InputError(f"draw={config.draw!r} is for floats with noise of full rank")
    if quantized:
        warn_of_flips(evolution)
    return pretrained


def choose_devices(config: ml_collections.ConfigDict) -> Mesh | None:
    """The devices of this process that a run uses, as a mesh; None for one.

    Raises:
      InputError: if there are too few, or `model_parallel` does not divide them.
    """
    devices = jax.local_devices()
    if config.devices > len(devices):
        raise InputError(f"devices={config.devices}, but there are {len(devices)}")
    if config.method != "es":
        if config.model_parallel > 1:
            raise InputError(f"method {config.method!r} runs on one device")
        return None
    try:
        return make_mesh(config.model_parallel, devices[: config.devices or None])
    except ValueError as error:
        raise InputError(str(error)) from error


def warn_of_flips(evolution: Evolution) -> None:
    """Says so where noise alone would move many of the codes every generation."""
    share = flip_rate(evolution)
    if share > MANY_FLIPS:
        console.print(
            f"[yellow]alpha / sigma = {evolution.alpha / evolution.sigma:.3g} is "
            f"large: about {100 * share:.0f} % of the codes will move every "
            "generation by noise alone; a smaller alpha moves fewer[/yellow]"
        )


def make_evaluations(
    config: ml_collections.ConfigDict, pretrained: Pretrained, trained: Evaluation
) -> dict[str, tuple[Evaluation, list[Question]]]:
    """The held-out questions of the trained task, and of those beside it."""
    evaluated = {config.task: trained}
    evaluated |= {
        name: make_evaluation(config, pretrained, name) for name in config.eval_tasks
    }
    evaluations = {
        name: (each, prepare(each, each.task.test)) for name, each in evaluated.items()
    }
    for name, (_, test) in evaluations.items():
        if not test:
            raise InputError(f"task {name} has no examples to evaluate on")
    return evaluations


def base_answers(
    config: ml_collections.ConfigDict,
    pretrained: Pretrained,
    questions: Sequence[Question],
) -> Answers:
    """What the base model says to some of the questions: fixed by the seed."""
    params = with_dtype(pretrained.params, jnp.dtype(config.dtype))
    return sample_answers(
        pretrained.model,
        params,
        [question.prompt for question in questions[: config.kl_prompts]],
        config.kl_max_new_tokens,
        key=jax.random.key(config.seed),
        eos_ids=pretrained.eos_ids,
        batch_size=config.eval_batch,
        buckets=config.buckets,
    )


def make_evaluation(
    config: ml_collections.ConfigDict,
    pretrained: Pretrained,
    name: str,
    **settings: Any,
) -> Evaluation:
    """How the model is examined on the task of this name."""
    task = load_task(
        name,
        root=config.data.root,
        seed=config.seed,
        train=config.data.train,
        test=config.data.test,
    )
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        eos_ids=pretrained.eos_ids,
        dtype=config.dtype,
        draw=config.draw,
        buckets=tuple(config.buckets),
        **settings,
    )


def make_sampling(config: ml_collections.ConfigDict) -> Sampling:
    """How training samples its answers, checked."""
    try:
        return Sampling(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def one_bucket(evaluation: Evaluation, questions: Sequence[Question]) -> Evaluation:
    """The evaluation with the one prompt length that holds all questions.

    Or, where they begin alike, with one for that and one for the rest.
    """
    prefix, rest = padded_lengths(evaluation, questions)
    return dataclasses.replace(
        evaluation,
        buckets=(bucket(longest(questions), evaluation.buckets),),
        parts=(prefix, rest) if prefix else (),
    )


def pick(experiment: Experiment, generation: int) -> list[Question]:
    """The questions of a generation: drawn without replacement, or all of them."""
    count, questions = experiment.config.prompts, experiment.train
    if not count or count == len(questions):
        return questions
    rng = np.random.default_rng([experiment.config.seed, generation])
    return [questions[i] for i in rng.choice(len(questions), count, replace=False)]
