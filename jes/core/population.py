"""Evaluating a population: members in chunks, `vmap` inside, a host loop outside."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.codes import Codes, Overlay, allowed, pick
from jes.core.low_rank import LowRank, draw_low_rank, has_matrices
from jes.core.mesh import by_member
from jes.core.noise import (
    DISTRIBUTIONS,
    Noise,
    PyTree,
    codes_noise,
    leaf_key,
    leaf_noise,
    perturb_member,
)
from jes.core.tree import is_codes, map_leaves, split


def chunks(members: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Member numbers in arrays of one length `size` (one shape, one compilation).

    The last array is filled up by repeating the last member.
    """
    for start in range(0, len(members), size):
        here = np.arange(start, start + size)
        yield members[np.minimum(here, len(members) - 1)]


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


@by_member(own=["members"], shared=["params", "key"])
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


@by_member(own=["members"], shared=["params", "key"])
def draw_overlays(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise
) -> PyTree:
    """How a chunk of members of a quantised model differ from the centre.

    Args:
      params: the centre.
      key: the generation key.
      members: int [C], member numbers.
      noise: how members differ from it.

    Returns:
      The tree of the parameters with an `Overlay` of arrays [C, ...] for codes (moves
      out of their range left out, 2602.03120 Eq. 4), what to add for scales that are
      trained, and None for all that is frozen.
    """
    trained, _ = split(params, scales=noise.scale_sigma > 0)

    def draw(member: jax.Array) -> PyTree:
        direction_key, sign = noise.direction(key, member)

        def deviation(path: tuple[Any, ...], leaf: Any) -> Any:
            if not is_codes(leaf):
                drawn = leaf_noise(direction_key, path, leaf.shape, noise)
                return noise.scale_sigma * sign * drawn
            one = partial(_overlay, direction_key, path, sign=sign, noise=noise)
            if leaf.ndim == 2:
                return one(leaf, 0)
            return jax.vmap(one)(leaf, jnp.arange(leaf.shape[0]))

        return map_leaves(deviation, trained)

    return jax.vmap(draw)(members)


def _overlay(
    direction_key: jax.Array,
    path: tuple[Any, ...],
    codes: Codes,
    matrix: jax.typing.ArrayLike,
    *,
    sign: jax.Array,
    noise: Noise,
) -> Overlay:
    positions, values = codes_noise(direction_key, path, matrix, codes.size, noise)
    moves = (sign * values[0]).astype(jnp.int16)
    return Overlay(positions, allowed(codes, pick(codes, positions), moves))


@by_member(own=["members"], shared=["params", "key"])
def draw_deviations(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise, dtype: Any
) -> PyTree:
    """How a chunk of members with noise of low rank differ from the centre.

    Args:
      params: the centre θ; only shapes are read.
      key: the generation key.
      members: int [C], member numbers.
      noise: how members differ from it, with a rank.
      dtype: of the result.

    Returns:
      The tree of the parameters, σε: a `LowRank` of factors [C, ..., r, I] and
      [C, ..., r, O] for matrices [..., I, O], and arrays [C, ...] for vectors.
    """

    def draw(member: jax.Array) -> PyTree:
        direction_key, sign = noise.direction(key, member)
        scale = noise.sigma * sign

        def deviation(path: tuple[Any, ...], leaf: Any) -> Any:
            if not has_matrices(path, leaf.shape):
                drawn = leaf_noise(direction_key, path, leaf.shape, noise)
                return (scale * drawn).astype(dtype)
            own = leaf_key(direction_key, path)
            low = draw_low_rank(
                own, leaf.shape, noise.rank, DISTRIBUTIONS[noise.distribution]
            )
            return LowRank(low.a.astype(dtype), (scale * low.b).astype(dtype))

        return jax.tree_util.tree_map_with_path(deviation, params)

    return jax.vmap(draw)(members)


def evaluate(
    rollout: Callable[[np.ndarray], Any],
    score: Callable[[Any], Sequence[Any]],
    members: np.ndarray,
    chunk: int,
) -> list[Any]:
    """Scores members; the device works on a chunk while the host scores another.

    Scores are computed in a thread of their own, so that a rollout may keep the host
    busy too: it then gives its slices of work to the device between two scores.

    Args:
      rollout: gives one chunk of member numbers [C] to the device and returns its
        outputs, which need not be ready.
      score: gives one score a member of the chunk, from outputs that are ready.
      members: int [N], member numbers.
      chunk: members in a chunk.

    Returns:
      One score a member, in order.
    """
    scores: list[Any] = []
    with ThreadPoolExecutor(1) as scorer:
        scoring = None
        for some in chunks(members, chunk):
            # Two chunks at once would need twice the memory.
            outputs = jax.block_until_ready(rollout(some))
            if scoring is not None:
                scores.extend(scoring.result())
            scoring = scorer.submit(score, outputs)
        if scoring is not None:
            scores.extend(scoring.result())
    return scores[: len(members)]
