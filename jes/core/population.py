"""A population: perturbed in chunks of members, evaluated chunk by chunk.

All kinds of perturbation make a `Members`: weights of each member's own; low-rank
factors; noise for the layers to draw; changed codes of a quantised model; or nothing.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jes.core.codes import Codes, Overlay, allowed, pick
from jes.core.lazy_noise import draw_lazily
from jes.core.low_rank import LowRank, draw_low_rank, has_matrices
from jes.core.members import Members, by_member
from jes.core.mesh import model_is_spread
from jes.core.noise import (
    DISTRIBUTIONS,
    Noise,
    PyTree,
    codes_noise,
    leaf_key,
    leaf_noise,
    perturb_member,
)
from jes.core.programs import program
from jes.core.tree import is_codes, is_quantized, map_leaves, split


def chunks(members: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Member numbers in arrays of one length `size` (one shape, one compilation).

    The last array is filled up by repeating the last member.
    """
    for start in range(0, len(members), size):
        here = np.arange(start, start + size)
        yield members[np.minimum(here, len(members) - 1)]


def perturb_members(
    params: PyTree,
    key: jax.Array,
    members: jax.typing.ArrayLike,
    noise: Noise | None,
    *,
    dtype: Any = jnp.float32,
    draw: str = "member",
    mesh: Mesh | None = None,
) -> Members:
    """A chunk of members of a generation.

    Args:
      params: θ, layers stacked. Where members share it, it is theirs as it is.
      key: the generation key.
      members: int [M], member numbers.
      noise: how members differ; None for the model itself.
      dtype: of the members' own arrays.
      draw: 'member' draws all noise now, 'layer' leaves that of matrices to the layers
        (of floats with full-rank noise).
      mesh: to spread the members over.
    """
    dtype = jnp.dtype(dtype)
    if noise is not None:
        noise = dataclasses.replace(noise, partitioned=model_is_spread(mesh))
    drawn, variables = (params, key, members, noise), {"params": params}
    if noise is None:
        variables["noise"] = {}
    elif is_quantized(params):
        variables["noise"] = draw_overlays(*drawn, mesh=mesh)
    elif noise.rank:
        variables["noise"] = draw_factors(*drawn, dtype, mesh=mesh)
    elif draw == "layer":
        variables["noise"] = draw_lazily(*drawn, dtype, mesh=mesh)
    else:
        variables["params"] = draw_members(*drawn, dtype, mesh=mesh)
    return Members(variables, _sampling_keys(key, members), mesh)


@program
def _sampling_keys(key: jax.Array, members: jax.Array) -> jax.Array:
    """A key for each member to sample its answers with: [M]."""
    sampling_key = jax.random.fold_in(key, zlib.crc32(b"sampling"))
    return jax.vmap(partial(jax.random.fold_in, sampling_key))(members)


@program(static_argnums=(3, 4), static_argnames="mesh")
@by_member(own=["members"], shared=["params", "key"])
def draw_members(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise, dtype: Any
) -> PyTree:
    """The weights of members, stacked [M, ...]; the sum is taken before the cast."""

    def draw(member: jax.Array) -> PyTree:
        weights = perturb_member(params, key, member, noise)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), weights)

    return jax.vmap(draw)(members)


@program(static_argnums=3, static_argnames="mesh")
@by_member(own=["members"], shared=["params", "key"])
def draw_overlays(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise
) -> PyTree:
    """How members of a quantised model differ from it, as noise for `perturb_members`.

    Returns:
      The tree of the parameters with an `Overlay` of arrays [M, ...] for codes (moves
      out of their range left out, 2602.03120 Eq. 4), what to add for scales that are
      trained, and None for all that is frozen.
    """
    trained, _ = split(params, scales=noise.scale_sigma > 0)

    def draw(member: jax.Array) -> PyTree:
        direction_key, sign = noise.direction(key, member)

        def difference(path: tuple[Any, ...], leaf: Any) -> Any:
            if not is_codes(leaf):
                drawn = leaf_noise(direction_key, path, leaf.shape, noise)
                return noise.scale_sigma * sign * drawn

            def overlay(codes: Codes, matrix: jax.typing.ArrayLike) -> Overlay:
                size = codes.size
                at, values = codes_noise(direction_key, path, matrix, size, noise)
                moves = (sign * values[0]).astype(jnp.int16)
                return Overlay(at, allowed(codes, pick(codes, at), moves))

            if leaf.ndim == 2:
                return overlay(leaf, 0)
            return jax.vmap(overlay)(leaf, jnp.arange(leaf.shape[0]))

        return map_leaves(difference, trained)

    return jax.vmap(draw)(members)


@program(static_argnums=(3, 4), static_argnames="mesh")
@by_member(own=["members"], shared=["params", "key"])
def draw_factors(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise, dtype: Any
) -> PyTree:
    """Noise σε of low rank in the tree of the parameters, of which it reads shapes.

    A `LowRank` of factors [M, ..., r, I] and [M, ..., r, O] for matrices [..., I, O],
    and arrays [M, ...] for vectors.
    """

    def draw(member: jax.Array) -> PyTree:
        direction_key, sign = noise.direction(key, member)
        scale = noise.sigma * sign

        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            if not has_matrices(path, leaf.shape):
                drawn = leaf_noise(direction_key, path, leaf.shape, noise)
                return (scale * drawn).astype(dtype)
            own = leaf_key(direction_key, path)
            low = draw_low_rank(
                own, leaf.shape, noise.rank, DISTRIBUTIONS[noise.distribution]
            )
            return LowRank(low.a.astype(dtype), (scale * low.b).astype(dtype))

        return jax.tree_util.tree_map_with_path(one, params)

    return jax.vmap(draw)(members)


def evaluate(
    rollout: Callable[[np.ndarray], Any],
    score: Callable[[Any], Any],
    members: np.ndarray,
    chunk: int,
) -> Any:
    """Scores members; the device works on a chunk while the host scores another.

    Scores are computed in a thread of their own, because a rollout may need the host
    too, to schedule its prompts.

    Args:
      rollout: starts one chunk of member numbers [M] on the device and returns its
        outputs, which need not be ready.
      score: makes a tree of arrays [M] from outputs that are ready.
      members: int [N], all member numbers; the result is a tree of arrays [N].
      chunk: M.
    """
    scores: list[Any] = []
    with ThreadPoolExecutor(1) as scorer:
        scoring = None
        for some in chunks(members, chunk):
            # Two chunks at once would need twice the memory.
            outputs = jax.block_until_ready(rollout(some))
            if scoring is not None:
                scores.append(scoring.result())
            scoring = scorer.submit(score, outputs)
        if scoring is not None:
            scores.append(scoring.result())
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(members)], *scores)
