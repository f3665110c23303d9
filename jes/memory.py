"""How many members a device holds at once, and how many prompts each answers at a time.

`config.chunk` and `config.slots` say so. What they leave open is chosen from the
compiler's own analysis of the programs of a rollout. JAX keeps what is compiled for
the analysis, and the rollout then runs it: where the first try fits the memory, nothing
is compiled twice.
"""

import ctypes
import dataclasses
import os
import platform
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jes.core.mesh import POPULATION, mesh_of
from jes.core.noise import Noise, PyTree
from jes.core.programs import Abstract, Analysis, TooLargeError, bytes_of
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.experiment import Experiment, pick
from jes.questions import Batch, Evaluation, batch_of, rows_of
from jes.rollout import answer, dtype_of_centre, prepare_rollout
from jes.update import first_state

SHARE = {"cpu": 0.6}
"""Of the free memory to plan with, 0.9 elsewhere: allocators leave gaps, and on a CPU
the machine has other work and compiling takes memory too."""
CPU_ROWS = 64
"""Prompts that keep a CPU busy. More members at once overflow its caches (measured:
16 members of 64 prompts each take 1.4 times as long at once as one after the other).
The same holds for noise of low rank, whose products with the weights members share: of
64 prompts each, eight members at once take 1.4 times as long as one."""
LONG_ANSWERS = 256
"""New tokens from which answers are expected to differ much in length."""
MMAP_THRESHOLD = 4 * 2**20
"""Bytes of a block above which glibc returns it to the system when it is freed."""
FRACTION = "XLA_CLIENT_MEM_FRACTION"
"""Variable that says how much of a GPU JAX takes."""
CGROUPS = (
    ("/sys/fs/cgroup/", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder, limit and use of a container's memory, in version 2 and in version 1."""


class Held(NamedTuple):
    """Members held at once on each device, and prompts that each answers at a time.

    `slots` is 0 where it answers all of them at once.
    """

    chunk: int
    slots: int


class Peak(NamedTuple):
    """Bytes of a device that are needed at most; at least so many, if not complete."""

    bytes: int
    complete: bool


def choose(experiment: Experiment) -> Held:
    """What a run holds at once: as set, or as much as is useful and fits.

    Raises:
      InputError: if not even one member with one prompt at a time fits.
    """
    evaluation, settings = experiment.evaluation, experiment.settings
    questions = pick(experiment, 0)  # all generations have their shape
    rows = rows_of(batch_of(evaluation, questions))
    places = jax.process_count() * devices_of(experiment.pretrained.params)
    members = -(-settings.population // places)
    sizes = slot_sizes(evaluation, settings.slots, rows)
    chunk = min(settings.chunk, members)
    if chunk and len(sizes) == 1:
        return Held(chunk, *sizes)
    budget, params = budget_for_members(experiment), centre_like(experiment)
    noise = experiment.evolution.noise

    def peak(slots: int, chunk: int) -> Peak:
        in_slots = dataclasses.replace(evaluation, slots=slots)
        batch = batch_of(in_slots, questions)
        return peak_of(in_slots, params, noise, batch, budget, chunk)

    useful = useful_members(members, sizes[0] or rows)
    held, least = first_that_fits(peak, sizes, members, useful, budget, chunk)
    if not held.chunk:
        raise too_large(chunk or 1, held.slots or rows, least, budget)
    return held


def slot_sizes(
    evaluation: Evaluation, slots: int, rows: int, platform: str = ""
) -> list[int]:
    """Prompts that a member may answer at a time, best first: as set, or by choice."""
    if slots or evaluation.mode != "generate":
        return [slots if slots < rows else 0]
    return slot_choices(rows, evaluation.max_new_tokens, platform)


def first_that_fits(
    peak: Callable[[int, int], Peak],
    sizes: Sequence[int],
    members: int,
    useful: int,
    budget: int,
    chunk: int = 0,
) -> tuple[Held, Peak]:
    """The first number of slots with which a member fits, and how many members do.

    Args:
      peak: of so many slots and members.
      sizes: numbers of slots, best first.
      members: of a device.
      useful: of them at once, with the first of `sizes`.
      budget: bytes.
      chunk: members to hold at once; 0 chooses.

    Returns:
      What fits, with a chunk of 0 if nothing does; and the peak of the fewest members
      that were tried with these slots.
    """
    for slots in sizes:
        of_members = partial(peak, slots)
        if chunk:
            least = of_members(chunk)
            fitting = chunk if least.bytes <= budget else 0
        else:
            fitting, least = most_that_fit(of_members, members, useful, budget)
            useful = 1  # fewer slots are for memory that does not hold one member
        if fitting:
            break
    return Held(fitting, slots), least


def chunk_of(
    evaluation: Evaluation,
    params: PyTree,
    noise: Noise | None,
    batch: Batch,
    members: int,
    memory_gb: float,
) -> int:
    """How many of so many members to hold at once while they answer a batch.

    Args:
      evaluation, params, noise, batch: as for `peak_of`.
      members: on each device.
      memory_gb: to use, in GB; 0 for what is free.

    Raises:
      InputError: if not even one fits.
    """
    budget, rows = int(memory_gb * 1e9) or free_bytes(), rows_of(batch)
    peak = partial(peak_of, evaluation, params, noise, batch, budget)
    useful = useful_members(members, rows)
    chunk, least = most_that_fit(peak, members, useful, budget)
    if not chunk:
        raise too_large(1, rows, least, budget)
    return chunk


def too_large(members: int, rows: int, least: Peak, budget: int) -> InputError:
    """The error that says what is needed, what there is, and what takes less."""
    return InputError(
        f"{members} member(s) with {rows} prompts at a time take at least "
        f"{least.bytes / 1e9:.3g} GB, and {max(budget, 0) / 1e9:.3g} GB can be used "
        "for them: fewer or shorter prompts and answers, rank=1 or draw='layer' take "
        f"less; memory_gb sets another limit{_reserved()}"
    )


def _reserved() -> str:
    """What to say of a GPU of which JAX takes only a part."""
    if jax.default_backend() != "gpu" or FRACTION in os.environ:
        return ""
    return f". JAX takes three quarters of a GPU; {FRACTION}=0.95 makes it take more"


def peak_of(
    evaluation: Evaluation,
    params: PyTree,
    noise: Noise | None,
    batch: Batch,
    budget: int,
    members: int,
) -> Peak:
    """Analyses how so many members on each device answer a batch, beside θ.

    Nothing more is compiled as soon as more than the budget, in bytes, is needed.
    """
    return analyse(Analysis(budget), evaluation, params, noise, batch, members)


def analyse(
    analysis: Analysis,
    evaluation: Evaluation,
    params: PyTree,
    noise: Noise | None,
    batch: Batch,
    members: int,
) -> Peak:
    """The same, in an analysis that then has what was compiled."""
    abstract = jax.tree.map(analysis.stand_in, params)
    like = jax.ShapeDtypeStruct((members * devices_of(params),), jnp.int32)
    numbers: Any = Abstract(analysis, like, None)
    try:
        rollout = prepare_rollout(evaluation, abstract, noise, mesh_of(params))
        answer(rollout, jax.random.key(0), numbers, batch)
    except TooLargeError:
        return Peak(analysis.peak, complete=False)
    return Peak(analysis.peak, complete=True)


def most_that_fit(
    peak: Callable[[int], Peak], members: int, useful: int, budget: int
) -> tuple[int, Peak]:
    """How many of all members to hold at once, in chunks of about the same size.

    The peak grows about linearly with the members: a line through two analyses says
    what to analyse next. What is chosen has been analysed.

    Returns:
      The members, 0 if not even one fits; and the peak of the fewest that were tried.
    """
    chunk = evenly(members, useful)
    found = peak(chunk)
    one = peak(1) if found.bytes > budget and chunk > 1 else found
    while found.bytes > budget and chunk > 1 and one.bytes <= budget:
        fitting = budget // one.bytes  # where nothing better is known
        if found.complete:
            slope = max(1, (found.bytes - one.bytes) / (chunk - 1))
            fitting = 1 + int((budget - one.bytes) / slope)
        chunk = evenly(members, min(chunk - 1, fitting))
        found = one if chunk == 1 else peak(chunk)
    return (chunk if found.bytes <= budget else 0), one


def useful_members(members: int, rows: int, platform: str = "") -> int:
    """How many members with so many rows each are worth holding at once."""
    cpu = (platform or jax.default_backend()) == "cpu"
    return evenly(members, -(-CPU_ROWS // rows) if cpu else members)


def evenly(members: int, most: int) -> int:
    """The size of equal chunks with at most so many members each."""
    return -(-members // -(-members // most))


def slot_choices(rows: int, new: int, platform: str = "") -> list[int]:
    """How many prompts a member may answer at a time, best first; 0 for all.

    All, where answers are short. Else, or where that does not fit, a fourth, so that
    most of the time all slots are in use; then half as many again and again.
    """
    slots = -(-rows // 4)
    if (platform or jax.default_backend()) == "cpu":
        slots = min(slots, CPU_ROWS)
    choices = [slots] if slots < rows else []
    while slots > 1:
        slots = -(-slots // 2)
        choices.append(slots)
    return choices if choices and new >= LONG_ANSWERS else [0, *choices]


def devices_of(params: PyTree) -> int:
    """How many devices members are spread over."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.shape[POPULATION]


def budget_for_members(experiment: Experiment) -> int:
    """Bytes of a device to use for the members that are held at once.

    As set; else what is free, less the anchor and the state of the optimizer, which a
    run makes after this.
    """
    if experiment.settings.memory_gb:
        return int(experiment.settings.memory_gb * 1e9)
    params, evolution = experiment.pretrained.params, experiment.evolution
    later = [jax.eval_shape(partial(first_state, evolution), params)]
    if evolution.anchor in ("device", "bfloat16"):
        later.append(anchor_like(experiment))
    if evolution.whole_numbers:  # θ, beside the displacement
        later.append(centre_like(experiment))
    return free_bytes() - bytes_of(later)


def anchor_like(experiment: Experiment) -> PyTree:
    """Shapes, dtypes and places of the anchor, as `keep_anchor` makes it."""
    pretrained, place = experiment.pretrained, experiment.evolution.anchor
    if is_quantized(pretrained.params):
        return pretrained.params
    dtype = "bfloat16" if place == "bfloat16" else pretrained.stored_dtype
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding
        ),
        pretrained.params,
    )


def centre_like(experiment: Experiment) -> PyTree:
    """Shapes, dtypes and places of θ as members are asked with it."""
    params, evolution = experiment.pretrained.params, experiment.evolution
    if not evolution.whole_numbers:
        return params
    dtype = dtype_of_centre(experiment.evaluation, evolution)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        params,
    )


def free_bytes() -> int:
    """Memory to plan with: of an accelerator, or a device's part of the machine's.

    Raises:
      InputError: for an accelerator that does not say how much it has.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    elif jax.default_backend() != "cpu":
        raise InputError(
            "the devices do not say how much memory they have (XLA's allocator "
            "'platform' does not): say how much to use with memory_gb"
        )
    else:
        found = re.search(r"MemAvailable: *(\d+) kB", _text("/proc/meminfo"))
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = min([1024 * int(found[1]) if found else pages, *_free_in_container()])
        free //= jax.local_device_count()  # which share it
    return int(SHARE.get(jax.default_backend(), 0.9) * free)


def _free_in_container() -> list[int]:
    """What the limits of a container leave; empty where there are none."""
    free = []
    for folder, limit, used in CGROUPS:
        most, now = _text(folder + limit).strip(), _text(folder + used).strip()
        # Files that are only cached can be dropped.
        cached = re.search(r"^inactive_file (\d+)", _text(f"{folder}memory.stat"), re.M)
        if most.isdigit() and now.isdigit():
            free.append(int(most) - int(now) + (int(cached[1]) if cached else 0))
    return free


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def rows_of_gradient(
    config: Any, parameters: int, prompt: int, new: int, *, budget: int
) -> int:
    """How many answers to take a gradient of at once; at least 1. An estimate.

    The activations of every layer are kept for the backward pass, and four arrays of
    logits; a gradient of all `parameters` and two moments come on top. `config` is a
    `ModelConfig`; `prompt` and `new` are tokens, `budget` is in bytes.
    """
    tokens = prompt + new
    hidden = tokens * (3 * config.intermediate_size + 8 * config.hidden_size) * 4
    scores = 2 * config.num_attention_heads * tokens * tokens * 4
    logits = 4 * new * config.vocab_size * 4
    row = config.num_hidden_layers * (hidden + scores) + logits
    return max(1, (budget - 3 * 4 * parameters) // row)


def give_back_freed_blocks() -> None:
    """Makes glibc return freed blocks, such as a member's layers, to the system.

    It raises the threshold for that by itself, up to 32 MB, and then keeps what is
    below: 4 GB in all with a model of 0.5B parameters. Does nothing elsewhere.
    """
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # in malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_threshold, MMAP_THRESHOLD)
