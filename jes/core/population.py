"""Evaluating a population: members in chunks, `vmap` inside, a host loop outside."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jes.core.noise import Noise, PyTree, perturb_member


def chunks(population: int, size: int) -> Iterator[np.ndarray]:
    """Member numbers in arrays of one length `size` (one shape, one compilation).

    The last array is filled up by repeating the last member.
    """
    for start in range(0, population, size):
        yield np.minimum(np.arange(start, start + size), population - 1)


def chunk_size(
    population: int, bytes_per_member: int, budget: int, most: int | None = None
) -> int:
    """How many members to hold at once: what fits, spread evenly over the chunks.

    Args:
      population: number of members.
      bytes_per_member: memory of one member's weights, cache and activations.
      budget: bytes to spend; one member is held even where it does not fit.
      most: members that are worth holding at once, if there is a limit to it.
    """
    fitting = min(population, budget // max(bytes_per_member, 1))
    most = max(1, fitting if most is None else min(fitting, most))
    return -(-population // -(-population // most))


def draw_members(
    params: PyTree,
    key: jax.Array,
    members: jax.Array,
    noise: Noise | None,
    dtype: Any,
) -> PyTree:
    """The weights of a chunk of members, stacked [C, ...].

    Args:
      params: the centre θ.
      key: the generation key.
      members: int [C], member numbers.
      noise: how members differ from the centre; None for the centre itself.
      dtype: of the members' weights; the perturbed sum is taken before the cast.
    """

    def draw(member: jax.Array) -> PyTree:
        weights = params
        if noise is not None:
            weights = perturb_member(params, key, member, noise)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), weights)

    return jax.vmap(draw)(members)


def evaluate(
    rollout: Callable[[np.ndarray], Any],
    score: Callable[[Any], Sequence[Any]],
    population: int,
    chunk: int,
) -> list[Any]:
    """Scores every member; the device works on a chunk while the host scores another.

    Args:
      rollout: dispatches one chunk of member numbers [C] to the device and returns
        its outputs without waiting for them.
      score: waits for those outputs and gives one score a member of the chunk.
      population: number of members.
      chunk: members in a chunk.

    Returns:
      One score a member, in order.
    """
    scores: list[Any] = []
    waiting = None
    for members in chunks(population, chunk):
        jax.block_until_ready(waiting)  # two chunks at once need twice the memory
        running = rollout(members)
        if waiting is not None:
            scores.extend(score(waiting))
        waiting = running
    scores.extend(score(waiting))
    return scores[:population]
