"""A population: perturbed in chunks of members, evaluated chunk by chunk.

All kinds of perturbation make a `Members`: weights of each member's own; low-rank
factors; noise for the layers to draw; changed codes of a quantised model; or nothing.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jes.core.codes import Codes, Overlay, allowed, pick
from jes.core.lazy_noise import LazyNoise, MemberWeight
from jes.core.low_rank import LowRank, draw_low_rank
from jes.core.members import Members, by_member
from jes.core.mesh import model_is_spread
from jes.core.noise import (
    DISTRIBUTIONS,
    Noise,
    PyTree,
    codes_noise,
    leaf_key,
    leaf_noise,
)
from jes.core.programs import program
from jes.core.stack import STACK, has_matrices, is_stack, unstacked
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
    apart: bool = False,
    mesh: Mesh | None = None,
    sigmas: jax.typing.ArrayLike | None = None,
) -> Members:
    """A chunk of members of a generation.

    Of floats, σ is an input of what is compiled: another σ compiles nothing anew.

    Args:
      params: θ, layers stacked. Where members share it, it is theirs as it is.
      key: the generation key.
      members: int [M], member numbers.
      noise: how members differ; None for the model itself.
      dtype: of the members' own arrays.
      draw: 'member' draws all noise now, 'layer' leaves that of matrices to the layers
        (of floats with full-rank noise).
      apart: whether weights of the members' own have one subtree a layer.
      mesh: to spread the members over.
      sigmas: float [M], a σ for each member of floats; by default that of the noise.
    """
    given = params, key, members
    variables = {"params": params, "noise": {}}
    if noise is not None:
        noise = dataclasses.replace(noise, partitioned=model_is_spread(mesh))
        if is_quantized(params):
            variables["noise"] = draw_overlays(*given, noise, mesh=mesh)
        elif noise.rank or draw == "layer":
            some = draw_factors if noise.rank else draw_lazily
            dtype = jnp.dtype(dtype)
            variables["noise"] = some(*given, noise, dtype, sigmas, mesh=mesh)
        else:
            whole = draw_members_apart if apart else draw_members
            own = whole(*given, noise, jnp.dtype(dtype), sigmas, mesh=mesh)
            variables = {"params": own}
    return Members(variables, sampling_keys(key, members), mesh)


@program
def sampling_keys(key: jax.Array, members: jax.Array) -> jax.Array:
    """A key for each member to sample its answers with: [M]."""
    sampling_key = jax.random.fold_in(key, zlib.crc32(b"sampling"))
    return jax.vmap(partial(jax.random.fold_in, sampling_key))(members)


def _of_members(leaf_of_member: Callable) -> Callable:
    """Decorator: makes trees of members, [M, ...], of a function of a leaf.

    The function takes the path, the leaf, the direction key, ±σ (±1 where the leaf is
    quantised), the `Noise` and the dtype; and `layer`, an int32 scalar, where it is to
    take a stack of layers for that one alone. The result takes the arguments of
    `perturb_members` but `draw`, in the order of below.
    """

    def compiled(
        params: PyTree,
        key: jax.Array,
        members: jax.Array,
        sigmas: jax.Array,
        noise: Noise,
        dtype: Any,
        layer: jax.Array | None = None,
    ) -> PyTree:
        alone = {} if layer is None else {"layer": layer}

        def draw_member(member: jax.Array, sigma: jax.Array) -> PyTree:
            own, sign = noise.direction(key, member)
            return map_leaves(
                lambda path, leaf: leaf_of_member(
                    path, leaf, own, sigma * sign, noise, dtype, **alone
                ),
                params,
            )

        return jax.vmap(draw_member)(members, sigmas)

    compiled.__name__ = leaf_of_member.__name__
    shared = ["params", "key", "layer"]
    spread = by_member(own=["members", "sigmas"], shared=shared)(compiled)
    run = program(spread, static_argnames=("noise", "dtype", "mesh"))

    @functools.wraps(leaf_of_member)
    def draw(
        params: PyTree,
        key: jax.Array,
        members: jax.Array,
        noise: Noise,
        dtype: Any = jnp.float32,
        sigmas: jax.typing.ArrayLike | None = None,
        layer: jax.Array | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> PyTree:
        if is_quantized(params):  # what is drawn depends on σ
            sigmas = 1.0
        else:
            sigmas = noise.sigma if sigmas is None else sigmas
            noise = dataclasses.replace(noise, sigma=1.0)
        sigmas = np.broadcast_to(np.asarray(sigmas, np.float32), np.shape(members))
        return run(params, key, members, sigmas, noise, dtype, layer, mesh=mesh)

    return draw


@_of_members
def draw_members(path, leaf, key, scale, noise, dtype):
    """The weights of members; the sum is taken in float32, before the cast."""
    return _sum(path, leaf, key, scale, noise).astype(leaf.dtype).astype(dtype)


@_of_members
def draw_layer(path, leaf, key, scale, noise, dtype, layer):
    """The same of one layer, with the same numbers."""
    leaf = jax.lax.dynamic_index_in_dim(leaf, layer)
    drawn = _sum(path, leaf, key, scale, noise, layer)
    return drawn[0].astype(leaf.dtype).astype(dtype)


def draw_members_apart(
    params: PyTree, key: jax.Array, members: Any, *settings: Any, mesh: Any = None
) -> PyTree:
    """`draw_members` with one subtree a layer; no stack of a member's own is made."""

    def draw_stack(stack: PyTree, number: int) -> PyTree:
        given = {STACK: stack}, key, members, *settings, jnp.int32(number)
        return draw_layer(*given, mesh=mesh)[STACK]

    layers = unstacked({STACK: params[STACK]}, draw_stack)
    rest = {name: leaf for name, leaf in params.items() if name != STACK}
    return layers | draw_members(rest, key, members, *settings, mesh=mesh)


@_of_members
def draw_factors(path, leaf, key, scale, noise, dtype):
    """Noise of low rank, σε: a `LowRank` for matrices, arrays for vectors.

    Only shapes are read of the parameters.
    """
    if not has_matrices(path, leaf.shape):
        return (scale * leaf_noise(key, path, leaf.shape, noise)).astype(dtype)
    draw = DISTRIBUTIONS[noise.distribution]
    low = draw_low_rank(leaf_key(key, path), leaf.shape, noise.rank, draw)
    return LowRank(low.a.astype(dtype), (scale * low.b).astype(dtype))


@_of_members
def draw_lazily(path, leaf, key, scale, noise, dtype):
    """Noise for the layers to draw: `LazyNoise` for matrices, else `MemberWeight`."""
    if not has_matrices(path, leaf.shape):
        return MemberWeight(_sum(path, leaf, key, scale, noise).astype(dtype))
    matrix = jnp.int32(0)
    data = jax.random.key_data(leaf_key(key, path))
    if is_stack(path):
        count = leaf.shape[0]
        matrix = jnp.arange(count)
        data = jnp.broadcast_to(data, (count, *data.shape))
        scale = jnp.broadcast_to(scale, count)
    settings = noise.distribution, jnp.dtype(dtype), noise.partitioned
    return LazyNoise(data, scale, matrix, *settings)


def _sum(path, leaf, key, scale, noise, part=None):
    drawn = leaf_noise(key, path, leaf.shape, noise, part)
    return leaf.astype(jnp.float32) + scale * drawn


def draw_overlays(
    params: PyTree,
    key: jax.Array,
    members: jax.typing.ArrayLike,
    noise: Noise,
    *,
    mesh: Mesh | None = None,
) -> PyTree:
    """How members of a quantised model differ from it; see `perturb_members`.

    Returns:
      The tree of the parameters with an `Overlay` of arrays [M, ...] for codes (moves
      out of their range left out, 2602.03120 Eq. 4), what to add for scales that are
      trained, and None for all that is frozen.
    """
    trained, _ = split(params, scales=noise.scale_sigma > 0)
    return _draw_overlays(trained, key, members, noise, mesh=mesh)


@_of_members
def _draw_overlays(path, leaf, key, sign, noise, _):
    if not is_codes(leaf):
        return noise.scale_sigma * sign * leaf_noise(key, path, leaf.shape, noise)

    def one(codes: Codes, matrix: jax.typing.ArrayLike) -> Overlay:
        positions, values = codes_noise(key, path, matrix, codes.size, noise)
        moves = (sign * values[0]).astype(jnp.int16)
        return Overlay(positions, allowed(codes, pick(codes, positions), moves))

    return (
        one(leaf, 0)
        if leaf.ndim == 2
        else jax.vmap(one)(leaf, jnp.arange(leaf.shape[0]))
    )


def evaluate(
    rollout: Callable[[np.ndarray], Any],
    score: Callable[[Any], Any],
    members: np.ndarray,
    chunk: int,
) -> Any:
    """Scores members; the device works on a chunk while the host scores another.

    Args:
      rollout: computes the outputs of one chunk of member numbers [M].
      score: makes a tree of arrays [M] from outputs that are ready. It runs in a thread
        of its own, because a rollout may need the host too, to schedule its prompts.
      members: int [N], member numbers.
      chunk: M.
    """
    pending: list[Future] = []
    with ThreadPoolExecutor(1) as scorer:
        for some in chunks(members, chunk):
            # Two chunks at once would need twice the memory.
            outputs = jax.block_until_ready(rollout(some))
            if pending:
                pending[-1].result()
            pending.append(scorer.submit(score, outputs))
            del outputs
        scores = [scored.result() for scored in pending]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(members)], *scores)
