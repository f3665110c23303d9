"""Noise of ±1, one random bit each: variance 1, fourth moment 1 (3 of a normal number).

The cheapest of all, and whole numbers, whose sums are exact: `jes.core.whole_numbers`.
Rows r, of the last axis, are in groups of 32; a vector is one column. An entry is bit
r % 32 of the word of `jax.random.bits(key)` at the place of the entry above it, in the
first row of the group. So 32 rows share a row of words, and along a row the bit is the
same: neighbours that share a word would take a CPU many times as long.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.random import Place, bits_at, places

GROUP = 32
"""Rows whose signs share words: one for each bit."""


def sign(
    key: jax.Array, shape: tuple[int, ...], place: Place | None = None
) -> jax.Array:
    """±1 with equal probability, float32; arguments as of `random.random_bits`."""
    if place is None and math.prod(shape) >= 2**32:
        return jax.vmap(lambda part: sign(key, shape[1:], places(shape[1:], part)))(
            jnp.arange(shape[0])
        )
    words, bits_of = layout(shape, places(shape) if place is None else place)
    # Not once for each entry: CPUs see that by themselves, and remove the barrier.
    drawn = jax.lax.optimization_barrier(bits_at(key, words))
    one = ~bits_of(drawn) << np.uint32(31) | np.float32(1).view(np.uint32)
    return jax.lax.bitcast_convert_type(one, jnp.float32)


def layout(
    shape: tuple[int, ...], place: Place
) -> tuple[Place, Callable[[jax.Array], jax.Array]]:
    """The places of the words of signs, and a function of the words to their bits.

    Its results are uint32 of the shape, with 1 for +1 as the lowest bit.
    """
    group, row, width = np.uint32(GROUP), place.row, place.width
    assert row is not None
    if place.whole and len(shape) > 1 and shape[-2] % GROUP == 0:
        groups = (*shape[:-2], shape[-2] // GROUP, GROUP, width)
        words = place.at(lambda numbers: numbers.reshape(groups)[..., :1, :])
        shift = jnp.arange(GROUP, dtype=jnp.uint32).reshape(
            *[1] * len(shape[1:]), -1, 1
        )
        return words, lambda drawn: (drawn >> shift).reshape(shape)
    if place.whole and len(shape) == 2 and row.ndim == 1:  # not partitioned
        # From the first row of the group that the first row is in.
        row = row.reshape(shape)[:, 0]
        before = row[0] % group
        rows = jax.lax.iota(jnp.uint32, shape[0]) + before
        count = -(-(shape[0] + GROUP - 1) // GROUP)
        high, low = place.high.reshape(-1)[0], place.low.reshape(-1)[0]
        above = before * np.uint32(width)
        high, low = high - (low < above).astype(jnp.uint32), low - above
        inner = jnp.arange(count, dtype=jnp.uint32)[:, None] * np.uint32(GROUP * width)
        inner = low + inner + jnp.arange(width, dtype=jnp.uint32)[None]
        words = Place(high + (inner < low).astype(jnp.uint32), inner)
        shift = (rows % group)[:, None]
        return words, lambda drawn: drawn[(rows // group).astype(jnp.int32)] >> shift
    shift = jnp.broadcast_to(row % group, place.low.shape)
    above = shift * np.uint32(width)
    high = place.high - (place.low < above).astype(jnp.uint32)
    words = Place(high, place.low - above)
    return words, lambda drawn: (drawn >> shift).reshape(shape)
