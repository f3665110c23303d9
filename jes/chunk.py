"""How many members a device holds at once, and how many prompts of each.

As `config.chunk` and `config.slots` say; where they leave it open, from the memory: by
an estimate of what a member takes, and where that decides, by what one has taken.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jes.ask import rollout
from jes.core.mesh import MODEL, POPULATION, mesh_of, on_mesh_of
from jes.core.noise import generation_key
from jes.core.tree import is_quantized
from jes.examiner import padded_lengths
from jes.io import memory
from jes.io.progress import console
from jes.setup import Setup, pick

ROOM = 2
"""What the estimate allows is taken if so many times the memory would be there too."""

LEAST = 0.5
"""Of the estimate: less than that is not believed, since memory that was used before
may have served again. (Measured on a CPU: 0.6 to 1.)"""

BOUNDLESS = 2**62


class Held(NamedTuple):
    """What is held at once.

    Attributes:
      chunk: members, on each device.
      slots: prompts of each that are answered at a time; 0 for all.
    """

    chunk: int
    slots: int


def choose(setup: Setup) -> Held:
    """What a run holds, as set or as its memory allows.

    Where all that is worth holding fits with room to spare, the estimate will do.
    Elsewhere a member answers the prompts of the first generation to be measured.
    """
    budget = budget_for_members(setup)
    held = fitting(setup, budget)
    if fitting(setup, budget // ROOM) == fitting(setup, BOUNDLESS):
        return held
    console.print("a member answers, to see how much memory it takes ...")
    setup = with_slots(setup, held.slots)
    mesh = mesh_of(setup.pretrained.params)
    taken = memory.growth(one_member(setup), 1 if mesh is None else mesh.size)
    if taken is None:
        return held
    rows = rows_at_once(setup)
    estimate = memory.bytes_per_member(*member_shape(setup, rows))
    held = fitting(setup, int(budget / max(taken / estimate, LEAST)))
    console.print(
        f"{taken / 1e9:.3g} GB with {rows} rows at a time, of {budget / 1e9:.3g} GB: "
        f"{held.chunk} members at once, {held.slots or 'all'} prompts of each"
    )
    return held


def fitting(setup: Setup, budget: int) -> Held:
    """What is held of the members, by the estimate of each.

    Args:
      setup: of the run.
      budget: bytes to spend on them on a device.
    """
    examiner, config = setup.examiner, setup.config
    rows = rows_of_member(setup)
    mesh = mesh_of(setup.pretrained.params)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    members = -(-config.population // (jax.process_count() * devices))
    chunk = min(config.chunk, members)
    slots = 0
    if examiner.mode == "generate" and config.slots < rows:
        slots = config.slots or memory.choose_slots(
            *member_shape(setup, rows), budget=budget // max(chunk, 1)
        )
    chunk = chunk or memory.choose_chunk(
        *member_shape(setup, slots or rows), population=members, budget=budget
    )
    return Held(chunk, slots)


def one_member(setup: Setup) -> Callable[[], jax.Array]:
    """What answers as one member on each device, to the first generation's prompts."""
    params, noise = setup.pretrained.params, setup.evolution.noise
    key = generation_key(jax.random.key(setup.config.seed), 0)
    answer, *_ = rollout(setup.examiner, pick(setup, 0))

    def work() -> jax.Array:
        with on_mesh_of(params) as devices:
            return answer(params, key, jnp.zeros(devices, int), noise=noise)

    return work


def with_slots(setup: Setup, slots: int) -> Setup:
    """The set-up with so many slots for members that are trained."""
    examiner = dataclasses.replace(setup.examiner, slots=slots)
    return setup._replace(examiner=examiner)


def rows_at_once(setup: Setup) -> int:
    """How many of a member's rows are there at a time."""
    return setup.examiner.slots or rows_of_member(setup)


def rows_of_member(setup: Setup) -> int:
    """How many rows of tokens a member has in a generation."""
    rows = setup.config.prompts or len(setup.train)
    if setup.examiner.mode == "likelihood":
        rows *= max(len(question.choices) for question in setup.train)
    if setup.examiner.task.meta is not None:
        rows *= 2
    return rows


def member_shape(setup: Setup, rows: int) -> tuple[Any, ...]:
    """The arguments of `memory.bytes_per_member`, with so many rows at a time."""
    examiner = setup.examiner
    quantized = is_quantized(setup.pretrained.params)
    noise = setup.evolution.noise
    weights = memory.weight_bytes(
        setup.pretrained.config,
        setup.parameters,
        examiner.dtype,
        noise if quantized or noise.rank else None,
        by_layer=examiner.draw == "layer",
    )
    prefix, rest = padded_lengths(examiner, setup.train)
    return (
        setup.pretrained.config,
        weights // model_devices(setup),
        examiner.dtype,
        rows,
        rest,
        examiner.max_new_tokens,
        prefix,
    )


def budget_for_members(setup: Setup) -> int:
    """Bytes of a device to spend on the members that are held at once."""
    if setup.config.memory_gb:
        return int(setup.config.memory_gb * 1e9)
    # The centre, its anchor and one update are there too: float32, or a byte a code;
    # and the form of the centre that members with noise of low rank share.
    size = 1 if is_quantized(setup.pretrained.params) else 4
    size *= 4 if setup.evolution.rank else 3
    return memory.free_bytes() - size * setup.parameters // model_devices(setup)


def model_devices(setup: Setup) -> int:
    """How many devices a model is spread over."""
    mesh = mesh_of(setup.pretrained.params)
    return 1 if mesh is None else mesh.shape[MODEL]
