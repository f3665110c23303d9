"""Noise that is drawn where it is used, a layer at a time.

A member is then the centre, which all share, and a key for each leaf: nothing of the
size of a model. The numbers are those of `draw_members`, bit for bit, because a number
of a leaf's noise depends on the leaf's key and the number's place alone. The price is
that they are drawn again wherever the weight is used: once in a scoring pass, but for
every token in decoding.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jes.core.low_rank import has_matrices, is_stack
from jes.core.mesh import by_member
from jes.core.noise import DISTRIBUTIONS_AT, Noise, PyTree, leaf_key, leaf_noise
from jes.core.placement import not_before
from jes.core.random import Place, places

BLOCKS = 16
"""Of an embedding: one has about as many weights as a layer then."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyNoise:
    """How a member's weight differs, not drawn yet: scale times noise.

    Attributes:
      key: uint32 [..., 2], data of the leaf's key.
      scale: float32 [...], σ with the member's sign.
      matrix: int32 [...], which matrix of a stack, or 0.
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
        """The same, but not to be drawn before `x` is there."""
        return dataclasses.replace(self, key=not_before(x, self.key))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    """A member's weight itself: of vectors, which take no memory to speak of."""

    weight: jax.Array


@by_member(own=["members"], shared=["params", "key"])
def draw_later(
    params: PyTree, key: jax.Array, members: jax.Array, noise: Noise, dtype: Any
) -> PyTree:
    """How a chunk of members differ from the centre, as what is to be drawn.

    Args:
      params: the centre, layers stacked under 'layers'.
      key: the generation key.
      members: int [C], member numbers.
      noise: how members differ from it.
      dtype: of the members' weights.

    Returns:
      The tree of the parameters: for matrices a `LazyNoise` with a leading axis [C],
      or of a stack [C, L]; for vectors an `Own`.
    """

    def draw(member: jax.Array) -> PyTree:
        direction_key, sign = noise.direction(key, member)

        def one(path: tuple[Any, ...], leaf: jax.Array) -> LazyNoise | Own:
            scale, matrix = noise.sigma * sign, jnp.int32(0)
            if not has_matrices(path, leaf.shape):
                drawn = leaf_noise(direction_key, path, leaf.shape, noise)
                return Own((leaf.astype(jnp.float32) + scale * drawn).astype(dtype))
            data = jax.random.key_data(leaf_key(direction_key, path))
            if is_stack(path):
                count = leaf.shape[0]
                matrix = jnp.arange(count)
                data = jnp.broadcast_to(data, (count, *data.shape))
                scale = jnp.broadcast_to(scale, count)
            settings = noise.distribution, jnp.dtype(dtype), noise.partitioned
            return LazyNoise(data, scale, matrix, *settings)

        return jax.tree_util.tree_map_with_path(one, params)

    return jax.vmap(draw)(members)


def add(weight: jax.Array, drawn: LazyNoise) -> jax.Array:
    """The member's weight, with all of its noise."""
    size, spread = weight.size, drawn.partitioned
    place = places(weight.shape, drawn.matrix, size, partitioned=spread)
    return _sum(weight, drawn, place)


def add_rows(table: jax.Array, drawn: LazyNoise, rows: jax.Array) -> jax.Array:
    """Some rows of the member's matrix [V, D] alone: int [...] -> [..., D]."""
    width = table.shape[1]
    spread = drawn.partitioned
    place = places((width,), rows[..., None], width, partitioned=spread)
    return _sum(table[rows], drawn, place)


def use_blocks(
    weight: jax.Array,
    drawn: LazyNoise,
    axis: int,
    use: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Uses a member's matrix in blocks, of which one is there at a time.

    Args:
      weight: matrix [I, O].
      drawn: its noise.
      axis: that is cut into blocks, `BLOCKS` of them or a divisor of that.
      use: function of a block.

    Returns:
      What `use` gives for each, stacked.
    """
    count = math.gcd(weight.shape[axis], BLOCKS)
    length = weight.shape[axis] // count

    def one(number: jax.Array) -> jax.Array:
        start = number * length
        block = jax.lax.dynamic_slice_in_dim(weight, start, length, axis)
        row, column = (start, 0) if axis == 0 else (0, start)
        rows = row + jnp.arange(block.shape[0])[:, None]
        width, spread = weight.shape[1], drawn.partitioned
        place = places(block.shape[1:], rows, width, column, spread)
        return use(_sum(block, drawn, place))

    return jax.lax.map(one, jnp.arange(count))


def _sum(weight: jax.Array, drawn: LazyNoise, place: Place) -> jax.Array:
    key = jax.random.wrap_key_data(drawn.key, impl="threefry2x32")
    noise = DISTRIBUTIONS_AT[drawn.distribution](key, place).reshape(weight.shape)
    total = weight.astype(jnp.float32) + drawn.scale * noise
    return total.astype(drawn.dtype)
