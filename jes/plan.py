"""Says what a run takes on accelerators that are not there: nothing is loaded or run.

    python -m jes.plan --config=configs/arc_c.py --target=h100 [--config.NAME=VALUE ...]
    python -m jes.plan --config.model=qwen2.5-7b --target=v5e:8 --prompt_tokens=40-200

The programs of a generation are compiled by the accelerator's own compiler, which says
what they hold: a table of them, and how many members and prompts at a time fit. Where
not even one member does, other settings are tried, and the first that fit are named. By
the rates of the data sheet follow the least time of a generation and of the run.

The model may be one of the shapes in `jes.models.shapes`, a folder or a model of the
hub, of which only config.json is read, or a GGUF file. Prompts have as many tokens as
`--prompt_tokens` says. Targets: h100, h200, a100, v5e, v5p, v6e, tpu7x, and cpu for
this machine; h100:8 for eight of them in one host.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from rich.table import Table

from jes.config import Settings, freeze
from jes.core.accelerators import SHARE, TARGETS, TPU, Target, devices_of
from jes.core.integer_noise import entries
from jes.core.mesh import make_mesh
from jes.core.noise import PyTree
from jes.core.programs import (
    Abstract,
    Analysis,
    Compiled,
    TooLargeError,
    bytes_of,
)
from jes.errors import InputError
from jes.io import command_line
from jes.io.console import console, doing
from jes.memory import (
    Held,
    Peak,
    analyse,
    first_that_fits,
    free_bytes,
    slot_sizes,
    useful_members,
)
from jes.models.config import ModelConfig
from jes.models.partition import leaf_sharding
from jes.models.qwen import Decoder
from jes.models.safetensors_files import WeightsError
from jes.models.shapes import SHAPES
from jes.models.weights import is_kernel, leaf_shapes, read_config
from jes.quantize import FORMS, rounded
from jes.questions import Batch, Evaluation, Question, batch_of, rows_of, texts_in
from jes.rollout import dtype_of_centre
from jes.sampling.packing import text_tokens
from jes.scoring import Score
from jes.tasks.rewards import Reward
from jes.tasks.task import Task
from jes.update import first_state, tell

CHOICES = 4
"""Of a question, where they are scored by likelihood."""


class Work(NamedTuple):
    """What a part of a generation takes of each device at least.

    Attributes:
      operations: of the matrix units, floating-point.
      words: of the other units, 32-bit integer.
      bytes: read or written in the device's memory.
    """

    operations: float = 0.0
    words: float = 0.0
    bytes: float = 0.0

    def seconds(self, target: Target) -> float:
        """By the data sheet; other units do a fiftieth of what matrix units do."""
        return max(
            self.operations / target.rate,
            self.words / (target.rate / 50),
            self.bytes / target.bandwidth,
        )


class Plan(NamedTuple):
    """What a run takes on each device.

    Attributes:
      settings: of the run.
      held: bytes by name of what is held over the whole run.
      programs: of a generation, for `fitting.chunk` members at once.
      fitting: members and prompts at a time; a chunk of 0 if not even one member fits.
      peak: bytes, at most at a time; at least, where nothing fits.
      memory: bytes that there are.
      work: of a generation, by part.
      sent: bytes that a device sends in a generation: to others of its host, and its
        host to others.
    """

    settings: Settings
    held: dict[str, int]
    programs: list[Compiled]
    fitting: Held
    peak: int
    memory: float
    work: dict[str, Work]
    sent: dict[str, float]


def model_config(name: str) -> ModelConfig:
    """The shape of a model: by name, or that of a folder, a file or on the hub.

    Raises:
      InputError: if there is none.
    """
    try:
        return ModelConfig.from_hf(SHAPES.get(name) or read_config(name))
    except WeightsError as error:
        raise InputError(f"{error}; shapes: {', '.join(SHAPES)}") from error
    except ValueError as error:
        raise InputError(f"--config.model: {name}: {error}") from error


def stand_ins(
    analysis: Analysis,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: Any = jnp.float32,
    form: dict[str, Any] | None = None,
) -> PyTree:
    """θ, or its displacement, of a shape alone; `form` is that of quantised kernels."""
    leaves = {}
    for path, shape in leaf_shapes(config).items():
        like: Any = jax.ShapeDtypeStruct(shape, dtype)
        place = leaf_sharding(path, shape, mesh) if mesh else None
        if form and is_kernel(path):
            like = jax.eval_shape(partial(rounded, path, **form), like)
            place = NamedSharding(mesh, PartitionSpec()) if mesh else None
        stand_in = partial(Abstract, analysis, sharding=place)
        leaves[path] = jax.tree.map(stand_in, like)
    return unflatten_dict(leaves, sep="/")


def form_of(settings: Settings) -> dict[str, Any] | None:
    """How the kernels are quantised, as keyword arguments of `rounded`.

    Raises:
      InputError: where only the files would say.
    """
    if settings.quantize:
        form = FORMS[settings.quantize]
        own = {} if "int8_activations" in form else {"group_size": settings.group_size}
        return form | own
    if settings.rounding != "none":
        raise InputError("--config.quantize: say how the weights are quantised")
    return None


def questions(
    settings: Settings, config: ModelConfig, tokens: tuple[int, int]
) -> tuple[Evaluation, list[Question]]:
    """How a task asks, and questions whose prompts have from .. to so many tokens."""
    fewest, most = tokens
    task = Task(
        name="plan",
        train=(),
        test=(),
        prompt=lambda example: "",
        reward=lambda example, text: Reward(0.0),
        choices=lambda example: ["a"] * CHOICES,
        answer=lambda example: 0,
        max_new_tokens=settings.sampling.max_new_tokens or 64,
    )
    evaluation = Evaluation(
        model=Decoder(config),
        tokenizer=None,
        task=task,
        sampling=dataclasses.replace(settings.sampling, eos_ids=(0,)),
        mode=settings.mode,
        dtype=settings.dtype,
        draw=settings.draw,
        buckets=(most,) if fewest == most else (*settings.buckets, most),
        parts=(),
        slots=settings.slots,
        slice_tokens=settings.slice_tokens,
    )
    lengths = np.linspace(fewest, most, settings.prompts or 64).round().astype(int)
    choices = [[1 + i] for i in range(CHOICES)] if settings.mode != "generate" else []
    return evaluation, [Question({}, [1] * n, choices) for n in lengths]


def plan(settings: Settings, target: str, tokens: tuple[int, int]) -> Plan:
    """What a run takes on a target, 'h100' or 'v5e:4', with prompts of so many tokens.

    Where what is held over the whole run is too large already, nothing is compiled.

    Raises:
      InputError: as `model_config` and `form_of`, for what is not planned, and for a
        target that is not known, or whose compiler is not installed.
    """
    if settings.method != "es":
        raise InputError("--config.method: jes.plan is for ES")
    name, _, count = target.partition(":")
    if not (count or "1").isdecimal():
        raise InputError(f"--target: {count!r} is no number of devices")
    config, form = model_config(settings.model), form_of(settings)
    try:
        devices = devices_of(name, int(count or 1))
        mesh = make_mesh(settings.model_parallel, devices)
    except ValueError as error:
        raise InputError(str(error)) from error
    evaluation, asked = questions(settings, config, tokens)
    evolution = settings.evolution
    memory = free_bytes() if name == "cpu" else TARGETS[name].memory * SHARE

    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
    place = everywhere or SingleDeviceSharding(devices[0])
    analysis = Analysis(elsewhere=place)
    dtype = dtype_of_centre(evaluation, evolution)
    params = stand_ins(analysis, config, mesh, dtype, form)
    held, centre = {"weights": bytes_of(params)}, params
    if evolution.whole_numbers:
        centre = stand_ins(analysis, config, mesh, jnp.int32)
        held["displacement"] = bytes_of(centre)
    state = jax.eval_shape(lambda tree: first_state(evolution, tree), centre)
    if bytes_of(state):
        held["optimizer"] = bytes_of(state)
    if settings.anchor in ("device", "bfloat16"):
        small = settings.anchor == "bfloat16" or settings.dtype == "bfloat16"
        base = stand_ins(analysis, config, mesh, form=form)
        held["anchor"] = bytes_of(base) // (1 + (small and form is None))
    free = int(memory) - sum(held.values())
    if free <= 0:
        return Plan(settings, held, [], Held(0, 0), sum(held.values()), memory, {}, {})

    found: dict[tuple[int, int], Analysis] = {}

    def peak(slots: int, chunk: int) -> Peak:
        found[slots, chunk] = mine = Analysis(free, elsewhere=place)
        in_slots = dataclasses.replace(evaluation, slots=slots)
        batch = batch_of(in_slots, asked)
        return analyse(mine, in_slots, params, evolution.noise, batch, chunk)

    members = -(-settings.population * settings.model_parallel // len(devices))
    whole = batch_of(dataclasses.replace(evaluation, slots=0), asked)
    rows, platform = rows_of(whole), devices[0].platform
    chunk = min(settings.chunk, members)
    sizes = slot_sizes(evaluation, settings.slots, rows, platform)
    useful = useful_members(members, sizes[0] or rows, platform)
    fitting, _ = first_that_fits(peak, sizes, members, useful, free, chunk)
    last = found[fitting.slots, fitting.chunk or chunk or 1]

    key: Any = Abstract(analysis, jax.eval_shape(jax.random.key, 0), None)
    like = jax.ShapeDtypeStruct((settings.population,), jnp.float32)
    fitness: Any = Abstract(analysis, like, None)
    anchor = None if settings.decay == "none" else params
    if evolution.whole_numbers:
        fitness = np.zeros(settings.population, np.float32)
    state = jax.tree.map(lambda leaf: Abstract(analysis, leaf, None), state)
    analysis.budget, share = free, settings.share_update
    try:
        tell(evolution, centre, state, key, fitness, anchor, share=share)
    except TooLargeError:
        fitting = fitting._replace(chunk=0)

    peak_bytes = sum(held.values()) + int(max(last.peak, analysis.peak))
    return Plan(
        settings=settings,
        held=held,
        programs=[*last.compiled, *analysis.compiled],
        fitting=fitting,
        peak=peak_bytes,
        memory=memory,
        work=work_of(settings, config, len(devices), whole, fitting.chunk),
        sent=sent_by(settings, config, len(devices), whole),
    )


def tokens_of(settings: Settings, batch: Batch) -> tuple[int, int, int]:
    """Prompt tokens of text, prompts, and steps of decoding of each member."""
    new = settings.sampling.max_new_tokens or 64
    steps = new - 1 if settings.mode == "generate" else 0
    return text_tokens(texts_in(batch)), rows_of(batch), steps


def work_of(
    settings: Settings,
    config: ModelConfig,
    devices: int,
    batch: Batch,
    chunk: int,
) -> dict[str, Work]:
    """The least work of a generation on each device, if all answers are full-length.

    A random number is 110 operations of Threefry; 32 signs share one. Of codes only
    those that may move are drawn. Members that share weights read them together.
    """
    sizes = leaf_shapes(config)
    every = sum(map(math.prod, sizes.values()))
    table = config.vocab_size * config.hidden_size
    layers = every - table * (1 if config.tie_word_embeddings else 2)
    text, rows, steps = tokens_of(settings, batch)
    each = settings.population / devices
    width = jnp.dtype(settings.dtype).itemsize
    weights = width * (layers + table)
    if settings.quantize:
        weights = FORMS[settings.quantize]["bits"] / 8 * layers + width * table
    shared = settings.rank or settings.draw == "layer" or settings.quantize
    passes = each / max(1, chunk) if shared else each
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = each * rows * width * slot * (text / rows + steps / 2)
    operations = 4 + 110 / 32 if settings.noise == "sign" else 110
    drawn: float = every * operations
    if settings.quantize:
        drawn = 110.0 * entries(layers, settings.sigma)
    elif settings.rank:
        drawn = 0.0
    times = 1 + steps if settings.draw == "layer" and not settings.quantize else 1
    part = settings.model_parallel
    product = 2 * settings.population * settings.rank * every / part
    shares = devices // part if settings.share_update else 1
    return {
        "drawing": Work(words=each * times * drawn),
        "reading": Work(
            operations=each * 2 * (layers * text + table * rows),
            bytes=passes * weights,
        ),
        "decoding": Work(
            operations=each * steps * rows * 2 * (layers + table),
            bytes=steps * (passes * weights + cache),
        ),
        "update": Work(
            operations=product, words=settings.population * drawn / (part * shares)
        ),
    }


def sent_by(
    settings: Settings, config: ModelConfig, devices: int, batch: Batch
) -> dict[str, float]:
    """Bytes that a device sends to others in a generation, and a host to others.

    A model over n devices sums activations twice a layer: each sends 2 (n-1)/n of them.
    (Devices that share a head sum its scores too, which is not counted.)
    """
    text, rows, steps = tokens_of(settings, batch)
    part = settings.model_parallel
    each = settings.population * part / devices
    width = jnp.dtype(settings.dtype).itemsize
    sums = 2 * config.num_hidden_layers * config.hidden_size * width
    sent = each * (text + steps * rows) * sums * 2 * (part - 1) / part
    if settings.share_update and part == 1:
        sent += 4 * sum(map(math.prod, leaf_shapes(config).values())) / devices
    return {
        "devices": sent,
        "hosts": 8 * (len(Score._fields) - 1) * settings.population,
    }


def others(settings: Settings, devices: int) -> Iterator[dict[str, Any]]:
    """Changes of settings that take less memory of a device, the cheapest first.

    The anchor in the host's memory costs nothing but with a decay; noise drawn in the
    layers is drawn again for each token; a model over devices sends activations.
    """
    nothing: list[dict[str, Any]] = [{}]
    anchors, draws, parts = nothing[:], nothing[:], nothing[:]
    if settings.anchor in ("device", "bfloat16"):
        anchors.append({"anchor": "host"})
    if not settings.rank and not settings.quantize:
        draws.append({"draw": "layer"})
    if not settings.quantize:
        counts = [n for n in range(2, devices + 1) if devices % n == 0]
        parts += [{"model_parallel": n} for n in counts if n > settings.model_parallel]
    for part, draw, anchor in itertools.product(parts, draws, anchors):
        if part or draw or anchor:
            yield part | draw | anchor


def advised(
    settings: Settings, target: str, tokens: tuple[int, int]
) -> tuple[dict[str, Any], Plan]:
    """The plan, or where nothing fits, the first that does, and what it changes."""
    found = plan(settings, target, tokens)
    count = int(target.partition(":")[2] or 1)
    for changes in others(settings, count) if not found.fitting.chunk else ():
        other = plan(dataclasses.replace(settings, **changes), target, tokens)
        if other.fitting.chunk:
            return changes, other
    return {}, found


def seconds_of(found: Plan, target: str) -> dict[str, float]:
    """The least seconds of the parts of a generation; empty for this machine."""
    sheet = TARGETS[target.partition(":")[0]]
    if not sheet.rate:
        return {}
    return {name: work.seconds(sheet) for name, work in found.work.items()}


def tables(found: Plan, target: str, changes: dict[str, Any]) -> list[Any]:
    """The plan for people."""
    programs = Table(
        "program", "compiled s", *(f"{n} GB" for n in Compiled._fields[2:])
    )
    for each in found.programs:
        sizes = (f"{size / 1e9:.2f}" for size in each[2:])
        programs.add_row(each.name.strip("_"), f"{each.seconds:.0f}", *sizes)
    whole = Table("each device", target)
    for name, size in found.held.items():
        whole.add_row(f"{name} GB", f"{size / 1e9:.2f}")
    needed = f"{found.peak / 1e9:.2f} of {found.memory / 1e9:.1f}"
    whole.add_row("peak GB", needed if found.programs else f"more than {needed}")
    chunk, slots = found.fitting
    whole.add_row("members at once", str(chunk or "none fits"))
    if slots:
        whole.add_row("prompts at a time", str(slots))
    for name, sent in found.sent.items():
        whole.add_row(f"sent between {name}, GB a generation", f"{sent / 1e9:.3g}")
    parts = Table("a generation", "operations", "GB", "at least s")
    seconds = seconds_of(found, target)
    for name, work in found.work.items():
        counted = f"{work.operations + work.words:.2g}", f"{work.bytes / 1e9:.3g}"
        parts.add_row(name, *counted, f"{seconds.get(name, math.nan):.3g}")
    shown: list[Any] = [programs, whole]
    if seconds:
        run = sum(seconds.values()) * found.settings.generations / 3600
        parts.add_section()
        parts.add_row("all", "", "", f"{sum(seconds.values()):.3g}")
        whole.add_row("run, without evaluations, at least h", f"{run:.3g}")
        shown.append(parts)
    if changes:
        named = " ".join(f"--config.{name}={value}" for name, value in changes.items())
        shown.append(f"It does not fit as set. The first settings that do: {named}")
    elif not chunk:
        shown.append(
            "Nothing fits. Less takes a model quantised to int4, noise of rank=1, "
            "fewer prompts, shorter answers, or more devices."
        )
    return shown


def lengths_in(text: str) -> tuple[int, int]:
    """'128' or '40-200' as the fewest and the most tokens of a prompt.

    Raises:
      InputError: for anything else.
    """
    fewest, _, most = text.partition("-")
    most = most or fewest
    if not (fewest.isdecimal() and most.isdecimal() and 0 < int(fewest) <= int(most)):
        raise InputError(f"--prompt_tokens: '128' or '40-200', not {text!r}")
    return int(fewest), int(most)


@contextlib.contextmanager
def _quiet_compilers() -> Iterator[None]:
    """Without what they write about devices that are not there, past Python."""
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def main() -> None:
    """The command line."""
    config_flag = command_line.config_flag()
    target = flags.DEFINE_string("target", "h100", "What to plan for, such as h100:8.")
    tokens = flags.DEFINE_string("prompt_tokens", "128", "Of a prompt, or 40-200.")
    as_json = flags.DEFINE_bool("json", False, "Print the plan as JSON.")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        given = freeze(config_flag.value), target.value, lengths_in(tokens.value)
        with doing(f"compiling for {target.value}"), _quiet_compilers():
            changes, found = advised(*given)
        if as_json.value:
            shown = {
                "changes": changes,
                "held": found.held,
                "programs": [each._asdict() for each in found.programs],
                **found.fitting._asdict(),
                "peak": found.peak,
                "memory": found.memory,
                "work": {name: work._asdict() for name, work in found.work.items()},
                "seconds": seconds_of(found, target.value),
                "sent": found.sent,
            }
            print(json.dumps(shown))
        else:
            console.print(*tables(found, target.value, changes))

    os.environ.update(TPU, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("jax").setLevel(logging.ERROR)
    command_line.start(command, [Settings])


if __name__ == "__main__":
    main()
