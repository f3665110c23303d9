"""The key-value cache: an explicit value that goes in and comes out of the model.

Axis letters: B batch, S slots, K key-value heads, H head dimension.

Keys are kept as [B, K, H, S] and values as [B, K, S, H], the orders in which the two
attention products read them. Each layer has arrays of its own: a decoding step writes
one slot of each in place; one array over all layers would be copied for every layer.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

PADDING = -1
"""Position of a slot that holds no token (left padding, or not yet written)."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      keys: one array a layer, [B, K, H, S].
      values: one array a layer, [B, K, S, H].
      positions: int32 [B, S], position of the token in each slot or `PADDING`.
      length: int32 scalar, the slot that the next token goes to.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    length: jax.Array

    def extended(self, slots: int) -> "Cache":
        """The same cache with room for `slots` more tokens."""
        return self._mapped(partial(_widened, more=(0, slots)))

    def blank(self, rows: int, slots: int) -> "Cache":
        """An empty cache of the same model, for other numbers of rows and slots."""

        def empty(leaf: jax.Array, axis: int, padding: int = 0) -> jax.Array:
            sizes = [rows, *leaf.shape[1:]]
            sizes[axis] = slots
            return jnp.full(sizes, padding, leaf.dtype)

        return self._mapped(empty)._replace(length=jnp.zeros_like(self.length))

    def with_rows(self, new: "Cache", rows: jax.Array) -> "Cache":
        """The same ring with some rows replaced (in place where XLA can).

        A cache is a ring when its `length` goes back to 0 after the last slot. New
        rows [F] are rolled so that their last token is right before `length`, and
        replace all slots of the old: masked values are multiplied by 0, which keeps a
        NaN. `rows`, int32 [F], are those to replace; B and above for none.
        """

        def rolled(leaf: jax.Array, axis: int, padding: int = 0) -> jax.Array:
            more = self.positions.shape[1] - leaf.shape[axis]
            return jnp.roll(_widened(leaf, axis, padding, (more, 0)), self.length, axis)

        keys, values, positions = jax.tree.map(
            lambda old, new: old.at[rows].set(new, mode="drop"),
            self[:3],
            new._mapped(rolled)[:3],
        )
        return Cache(keys, values, positions, self.length)

    def _mapped(self, function: Callable[..., jax.Array]) -> "Cache":
        """Applies a function of an array, its axis of slots, and its padding."""
        return self._replace(
            keys=tuple(function(keys, -1) for keys in self.keys),
            values=tuple(function(values, -2) for values in self.values),
            positions=function(self.positions, -1, PADDING),
        )


def _widened(
    leaf: jax.Array, axis: int, padding: int = 0, more: tuple[int, int] = (0, 0)
) -> jax.Array:
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = more
    return jnp.pad(leaf, widths, constant_values=padding)


def write(buffer: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """`buffer` with `new` from `slot` on along `axis` (in place where XLA can)."""
    return jax.lax.dynamic_update_slice_in_dim(
        buffer, new.astype(buffer.dtype), slot, axis
    )
