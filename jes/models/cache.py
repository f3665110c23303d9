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


def write(buffer: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """`buffer` with `new` from `slot` on along `axis` (in place where XLA can)."""
    return jax.lax.dynamic_update_slice_in_dim(
        buffer, new.astype(buffer.dtype), slot, axis
    )
