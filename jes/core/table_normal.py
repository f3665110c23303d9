"""Normal numbers from a table: 16 random bits look one of 65,536 values up.

A normal number by the inverse of erf takes a polynomial of float32 arithmetic, which
costs more than its random bits; a look-up costs less than they do. The values are the
means of the normal distribution over 65,536 intervals of equal probability, scaled so
that their variance is 1. Of the rest of the distribution that leaves

    fourth moment 2.99983 (3), sixth moment 14.9912 (15), largest |x| 4.3875,

and it is symmetric: one bit is the sign, the others choose among 32,768 values, which
are 128 KB and stay in the cache of a core. What it is not: there is nothing beyond
4.3875 (of normal numbers one in 87,000 is), and equal numbers are frequent.

To evolution strategies the difference is nothing that can be seen: of a quadratic the
mean of the estimate depends on the variance and the third moment, which are exact, its
variance on the fourth and sixth too, of which 1/16,000 and 1/1,700 are missing.

The gather is for CPUs. GPUs, and TPUs above all, gather slowly from a table that is
not in registers: there the same distribution, but for its last digits, is `erf_inv` at
the middles of the 65,536 intervals, or `standard_normal`, which is exact and needs no
memory either. No accelerator has been measured.
"""

import functools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.normal import Place, bits_at, random_bits

HALF = 2**15
"""Positive values, and as many negative ones: what 16 bits choose from."""


def table_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent numbers of about the standard normal distribution, in float32.

    Numbers 2i and 2i + 1, in row-major order, come from the low and the high half of
    word i of `jax.random.bits(key)`. So a number depends on the key and on its position
    alone, whatever slice is computed, and not on the size of the array.

    Args:
      key: typed PRNG key.
      shape: of the result.
    """
    size = math.prod(shape)
    words = random_bits(key, (-(-size // 2),))
    # Fused with its use on the CPU, this keeps no array of bits, but draws each word
    # twice. To keep them saves up to a fifth of the time, for half the memory of the
    # result: not worth it where the result itself is never in memory.
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return _look_up(halves).reshape(shape)


def table_at(key: jax.Array, place: Place) -> jax.Array:
    """The entries at these places of what `table_normal` gives for any shape."""
    one, half = np.uint32(1), np.uint32(16)
    low = (place.low >> one) | (place.high << np.uint32(31))
    words = bits_at(key, Place(place.high >> one, low))
    odd = (place.low & one).astype(bool)
    return _look_up(jnp.where(odd, words >> half, words).astype(jnp.uint16))


def _look_up(bits: jax.Array) -> jax.Array:
    """The values that uint16 bits stand for: the sign first, then the place."""
    place = bits & np.uint16(HALF - 1)
    size = jnp.asarray(positive_values()).at[place].get(mode="promise_in_bounds")
    sign = (bits & np.uint16(HALF)).astype(jnp.uint32) << np.uint32(16)
    signed = jax.lax.bitcast_convert_type(size, jnp.uint32) | sign
    return jax.lax.bitcast_convert_type(signed, jnp.float32)


@functools.cache
def positive_values() -> np.ndarray:
    r"""The upper half of the table, in rising order: float32 [32768], read-only.

    The mean of a normal number between :math:`a` and :math:`b` is
    :math:`(\varphi(a) - \varphi(b)) / P(a, b)`.
    """
    normal = NormalDist()
    edges = np.array([normal.inv_cdf(0.5 + 0.5 * k / HALF) for k in range(HALF)])
    squares = np.append(edges, np.inf) ** 2 / 2
    # φ(a) - φ(b) as a product, which loses no digits where a and b are close.
    density = np.exp(-squares[:-1]) / math.sqrt(2 * math.pi)
    means = 2 * HALF * density * -np.expm1(-np.diff(squares))
    values = (means / np.sqrt(np.mean(means**2))).astype(np.float32)
    values.setflags(write=False)
    return values
