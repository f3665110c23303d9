"""How many members a device holds at once, and how many prompts of each.

As `config.chunk` and `config.slots` say; where they leave it open, from the memory: by
an estimate of what a member takes, and where that decides, by what one has taken.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jes.core.mesh import MODEL, POPULATION, mesh_of
from jes.core.noise import generation_key
from jes.core.tree import is_quantized
from jes.experiment import Experiment, pick
from jes.io import memory
from jes.io.console import console
from jes.questions import batch_of, padded_lengths
from jes.rollout import answer, prepare_rollout

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


def choose(experiment: Experiment) -> Held:
    """What a run holds, as set or as its memory allows.

    Where all that is worth holding fits with room to spare, the estimate will do.
    Elsewhere a member answers the prompts of the first generation to be measured.
    """
    budget = budget_for_members(experiment)
    held = fitting(experiment, budget)
    if fitting(experiment, budget // ROOM) == fitting(experiment, BOUNDLESS):
        return held
    console.print("a member answers, to see how much memory it takes ...")
    experiment = with_slots(experiment, held.slots)
    mesh = mesh_of(experiment.pretrained.params)
    taken = memory.growth(one_member(experiment), 1 if mesh is None else mesh.size)
    if taken is None:
        return held
    rows = rows_at_once(experiment)
    estimate = memory.bytes_per_member(*member_shape(experiment, rows))
    held = fitting(experiment, int(budget / max(taken / estimate, LEAST)))
    console.print(
        f"{taken / 1e9:.3g} GB with {rows} rows at a time, of {budget / 1e9:.3g} GB: "
        f"{held.chunk} members at once, {held.slots or 'all'} prompts of each"
    )
    return held


def fitting(experiment: Experiment, budget: int) -> Held:
    """What is held of the members, by the estimate of each.

    Args:
      experiment: of the run.
      budget: bytes to spend on them on a device.
    """
    evaluation, config = experiment.evaluation, experiment.settings
    rows = rows_of_member(experiment)
    mesh = mesh_of(experiment.pretrained.params)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    members = -(-config.population // (jax.process_count() * devices))
    chunk = min(config.chunk, members)
    slots = 0
    if evaluation.mode == "generate" and config.slots < rows:
        slots = config.slots or memory.choose_slots(
            *member_shape(experiment, rows), budget=budget // max(chunk, 1)
        )
    chunk = chunk or memory.choose_chunk(
        *member_shape(experiment, slots or rows), population=members, budget=budget
    )
    return Held(chunk, slots)


def one_member(experiment: Experiment) -> Callable[[], Any]:
    """What answers as one member on each device, to the first generation's prompts."""
    params, noise = experiment.pretrained.params, experiment.evolution.noise
    key = generation_key(experiment.settings.root, 0)
    mesh = mesh_of(params)
    batch = batch_of(experiment.evaluation, pick(experiment, 0))
    rollout = prepare_rollout(experiment.evaluation, params, noise, mesh)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    return lambda: answer(rollout, key, np.zeros(devices, int), batch)


def with_slots(experiment: Experiment, slots: int) -> Experiment:
    """The set-up with so many slots for members that are trained."""
    evaluation = dataclasses.replace(experiment.evaluation, slots=slots)
    return experiment._replace(evaluation=evaluation)


def rows_at_once(experiment: Experiment) -> int:
    """How many of a member's rows are there at a time."""
    return experiment.evaluation.slots or rows_of_member(experiment)


def rows_of_member(experiment: Experiment) -> int:
    """How many rows of tokens a member has in a generation."""
    rows = experiment.settings.prompts or len(experiment.train)
    if experiment.evaluation.mode == "likelihood":
        rows *= max(len(question.choices) for question in experiment.train)
    if experiment.evaluation.task.meta is not None:
        rows *= 2
    return rows


def member_shape(experiment: Experiment, rows: int) -> tuple[Any, ...]:
    """The arguments of `memory.bytes_per_member`, with so many rows at a time."""
    evaluation = experiment.evaluation
    quantized = is_quantized(experiment.pretrained.params)
    noise = experiment.evolution.noise
    weights = memory.weight_bytes(
        experiment.pretrained.config,
        experiment.parameters,
        evaluation.dtype,
        noise if quantized or noise.rank else None,
        by_layer=evaluation.draw == "layer",
    )
    prefix, rest = padded_lengths(evaluation, experiment.train)
    return (
        experiment.pretrained.config,
        weights // model_devices(experiment),
        evaluation.dtype,
        rows,
        rest,
        evaluation.max_new_tokens,
        prefix,
    )


def budget_for_members(experiment: Experiment) -> int:
    """Bytes of a device to spend on the members that are held at once."""
    if experiment.settings.memory_gb:
        return int(experiment.settings.memory_gb * 1e9)
    # The centre, its anchor and one update are there too: float32, or a byte a code;
    # and the form of the centre that members with noise of low rank share.
    size = 1 if is_quantized(experiment.pretrained.params) else 4
    size *= 4 if experiment.evolution.rank else 3
    return memory.free_bytes() - size * experiment.parameters // model_devices(
        experiment
    )


def model_devices(experiment: Experiment) -> int:
    """How many devices a model is spread over."""
    mesh = mesh_of(experiment.pretrained.params)
    return 1 if mesh is None else mesh.shape[MODEL]
