"""The key-value cache: an explicit value that goes in and comes out of the model.

Axis letters: B batch, S slots, K key-value heads, H head dimension.

Keys are kept as [B, K, H, S] and values as [B, K, S, H], the orders in which the
two attention products read them, so that no product has to transpose the cache.
Each layer has arrays of its own: a decoding step then writes one slot of each in
place, where one array over all layers would be copied in and out of every layer.
"""

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
        return self._replace(
            keys=tuple(jnp.pad(k, [(0, 0)] * 3 + [(0, slots)]) for k in self.keys),
            values=tuple(
                jnp.pad(v, [(0, 0)] * 2 + [(0, slots), (0, 0)]) for v in self.values
            ),
            positions=jnp.pad(
                self.positions, [(0, 0), (0, slots)], constant_values=PADDING
            ),
        )

    def blank(self, rows: int, slots: int) -> "Cache":
        """An empty cache of the same model, for other numbers of rows and slots."""

        def shape(leaf: jax.Array, axis: int) -> tuple[int, ...]:
            sizes = [rows, *leaf.shape[1:]]
            sizes[axis] = slots
            return tuple(sizes)

        return Cache(
            tuple(jnp.zeros(shape(k, -1), k.dtype) for k in self.keys),
            tuple(jnp.zeros(shape(v, -2), v.dtype) for v in self.values),
            jnp.full(shape(self.positions, -1), PADDING, jnp.int32),
            jnp.zeros_like(self.length),
        )

    def with_rows(self, new: "Cache", rows: jax.Array) -> "Cache":
        """The same ring with some rows replaced (in place where XLA can).

        A cache is a ring when its `length` goes back to 0 after the last slot. New
        rows are rolled so that their last token is right before `length`, and replace
        all slots of the old: masked values are multiplied by 0, which keeps a NaN.

        Args:
          new: F rows with no more slots than these.
          rows: int32 [F], the rows to replace; B and above for none.
        """

        def rolled(leaf: jax.Array, axis: int, padding: int = 0) -> jax.Array:
            slots = self.positions.shape[1]
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (slots - leaf.shape[axis], 0)
            leaf = jnp.pad(leaf, widths, constant_values=padding)
            return jnp.roll(leaf, self.length, axis)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows].set(new, mode="drop")

        keys = zip(self.keys, new.keys, strict=True)
        values = zip(self.values, new.values, strict=True)
        return self._replace(
            keys=tuple(put(old, rolled(k, -1)) for old, k in keys),
            values=tuple(put(old, rolled(v, -2)) for old, v in values),
            positions=put(self.positions, rolled(new.positions, -1, PADDING)),
        )


def write(buffer: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """`buffer` with `new` from `slot` on along `axis` (in place where XLA can)."""
    return jax.lax.dynamic_update_slice_in_dim(
        buffer, new.astype(buffer.dtype), slot, axis
    )
