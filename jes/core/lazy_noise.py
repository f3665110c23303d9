"""Noise that a layer draws when it uses a weight, so one layer's is held at a time.

A member is then the shared weights and a key for each leaf. The numbers are those of
`draw_members`, bit for bit, because a number depends on its leaf's key and its position
alone. But noise is drawn again wherever a weight is used: once in a scoring pass, for
every token in decoding.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jes.core.noise import DISTRIBUTIONS
from jes.core.placement import not_before
from jes.core.random import Place, places

BLOCKS = 16
"""Of an embedding: a block then has about as many weights as a layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyNoise:
    """What to draw a weight's noise from: scale times noise of the key.

    Attributes:
      key: uint32 [..., 2], data of the leaf's key.
      scale: float32 [...], σ with the member's sign.
      matrix: int32 [...], number of the matrix in a stack, or 0.
      distribution: of `jes.core.noise.DISTRIBUTIONS`.
      dtype: of the member's weight.
      partitioned: see `Noise.partitioned`.
    """

    key: jax.Array
    scale: jax.Array
    matrix: jax.Array
    distribution: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    partitioned: bool = dataclasses.field(default=False, metadata={"static": True})

    def after(self, x: jax.Array) -> "LazyNoise":
        """The same, not to be drawn before `x` is computed."""
        return dataclasses.replace(self, key=not_before(x, self.key))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberWeight:
    """A member's weight in full, in place of noise: of vectors, which are small."""

    weight: jax.Array


def add(weight: jax.Array, noise: LazyNoise) -> jax.Array:
    """The member's whole weight."""
    place = places(weight.shape, noise.matrix, partitioned=noise.partitioned)
    return _sum(weight, noise, place)


def add_rows(table: jax.Array, noise: LazyNoise, rows: jax.Array) -> jax.Array:
    """Some rows of the member's matrix [V, D] alone: int [...] -> [..., D]."""
    width = table.shape[1]
    place = places((width,), rows[..., None], partitioned=noise.partitioned)
    return _sum(table[rows], noise, place)


def map_blocks(
    weight: jax.Array,
    noise: LazyNoise,
    axis: int,
    function: Callable[[jax.Array], jax.Array],
    out_axis: int,
) -> jax.Array:
    """Applies a function to a member's matrix [I, O] one block at a time.

    The axis, which is the `out_axis` of results, is cut into `BLOCKS` blocks, or a
    divisor of that. Where devices share it, a block has a part of each device's.
    """
    size, width = weight.shape[axis], weight.shape[1]
    shares = math.gcd(size, BLOCKS) if noise.partitioned else 1
    count = math.gcd(size // shares, BLOCKS)
    length = size // shares // count
    shape = list(weight.shape)
    shape[axis] = shares * length
    apart = weight.reshape(*weight.shape[:axis], shares, -1, *weight.shape[axis + 1 :])
    numbers = jnp.arange(size).reshape(shares, -1)

    def one(number: jax.Array) -> jax.Array:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=number * length)
        own = cut(numbers, slice_size=length, axis=1).reshape(-1)
        block = cut(apart, slice_size=length, axis=axis + 1).reshape(shape)
        rows, start = (own, 0) if axis == 0 else (jnp.arange(shape[0]), own)
        if axis:  # columns are counted from the first
            start -= jnp.arange(len(own))
        place = places((shape[1],), rows[:, None], width, start, noise.partitioned)
        return function(_sum(block, noise, place))

    found = jax.lax.map(one, jnp.arange(count))
    at = out_axis % (found.ndim - 1)
    cut = (*found.shape[: at + 1], shares, length, *found.shape[at + 2 :])
    merged = jnp.moveaxis(found.reshape(cut), 0, at + 1)
    return merged.reshape(*found.shape[1 : at + 1], size, *found.shape[at + 2 :])


def _sum(weight: jax.Array, noise: LazyNoise, place: Place) -> jax.Array:
    key = jax.random.wrap_key_data(noise.key, impl="threefry2x32")
    drawn = DISTRIBUTIONS[noise.distribution](key, weight.shape, place)
    total = weight.astype(jnp.float32) + noise.scale * drawn
    return total.astype(noise.dtype)
