"""Random numbers from Threefry keys: bits, normal numbers, and a table of them.

A number depends on its key and on its position in row-major order alone, so any part
of an array can be drawn without the rest.

`normal` gives the numbers of `jax.random.normal`, but fused: on CPUs jax compiles its
random bits to a loop that passes over several arrays of the size of the result. With
the rounds of Threefry unrolled, the bits, the number and whatever uses it are one pass,
in half the time and without an array in between.

`table` looks a number up from 16 random bits, which on CPUs costs less than the inverse
of erf. The values are the means of the normal distribution over 65,536 intervals of
equal probability, scaled to variance 1: symmetric, of fourth moment 2.99983 (3), sixth
moment 14.9912 (15) and largest |x| 4.3875, beyond which one normal number in 87,000
lies. On a quadratic the mean of the ES estimate depends on the variance and the third
moment, which are exact, and its variance on the fourth and sixth. GPUs and TPUs gather
slowly from such a table; no accelerator has been measured.
"""

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HALF = 2**15
"""Positive values of the table; there are as many negative ones."""
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Of Threefry-2x32 (Salmon et al. 2011): four rounds with each in turn."""


class Place(NamedTuple):
    """Positions in row-major order, in 64 bits: high x 2^32 + low, both uint32.

    Attributes:
      high, low: of the entries.
      row: uint32, the numbers of their rows, of the last axis of the array; of a vector
        the numbers of its entries.
      width: length of a row.
      whole: whether these are all entries of an array, or of one of equal parts.
    """

    high: jax.Array
    low: jax.Array
    row: jax.Array | None = None
    width: int = 1
    whole: bool = False

    def at(self, pick: Callable[[jax.Array], jax.Array]) -> "Place":
        """Some of these places, or more, by a function of arrays of them."""
        return self._replace(high=pick(self.high), low=pick(self.low))


def places(
    shape: tuple[int, ...],
    part: jax.typing.ArrayLike | None = None,
    size: int | None = None,
    start: jax.typing.ArrayLike = 0,
    partitioned: bool = False,
) -> Place:
    """Positions of the entries of an array, or of some of a larger one.

    Args:
      shape: of the entries.
      part: number of the part they are in, among parts of equal size; may be traced, or
        [..., 1] for several parts of one axis, or [R] for R of them, the first axis of
        the shape. None for a whole array, below 2^32.
      size: entries of a part; by default those of the shape.
      start: position of the first within the part.
      partitioned: see `Noise.partitioned`.
    """
    if part is not None and jnp.ndim(part) == 1:
        numbers = jnp.asarray(part).reshape(-1, *[1] * (len(shape) - 1))
        return places(shape[1:], numbers, size, start, partitioned)
    inner, row = _counter(shape, partitioned)
    width = shape[-1] if len(shape) > 1 else 1
    if part is None:
        return Place(jnp.zeros_like(inner), inner, row, width, whole=True)
    size = math.prod(shape) if size is None else size
    if whole := not jnp.ndim(part):
        row = row + jnp.asarray(part, jnp.uint32) * np.uint32(size // width)
    else:
        row, width = jnp.asarray(part, jnp.uint32), size
    inner = jnp.asarray(start, jnp.uint32) + inner
    if jnp.ndim(part):
        inner = inner.reshape((1,) * (jnp.ndim(part) - 1) + inner.shape)
    # part x size in 64 bits, from products of 16 bits each.
    bits, lowest = np.uint32(16), np.uint32(0xFFFF)
    high, low = jnp.asarray(part, jnp.uint32) >> bits, jnp.asarray(part, jnp.uint32)
    low, first, second = low & lowest, np.uint32(size >> 16), np.uint32(size % 2**16)
    least, one, other = low * second, low * first, high * second
    middle = (least >> bits) + (one & lowest) + (other & lowest)
    low = (least & lowest) | (middle << bits)
    high = high * first + (one >> bits) + (other >> bits) + (middle >> bits)
    total = low + inner
    high += (total < low).astype(jnp.uint32)
    return Place(high, total, row, width, whole)


def random_bits(
    key: jax.Array, shape: tuple[int, ...], place: Place | None = None
) -> jax.Array:
    """What `jax.random.bits(key, shape)` returns, bit for bit: uint32.

    (With `jax_threefry_partitionable`, jax's default, whatever the setting is. Keys of
    other generators and arrays too large for a 32-bit counter are left to jax.)

    Args:
      key: typed PRNG key.
      shape: of the result.
      place: of its entries in a larger array; None for the whole array.

    Raises:
      TypeError: for places with a key of another generator than Threefry.
    """
    return _bits(key, shape, place).reshape(shape)


def _bits(key: jax.Array, shape: tuple[int, ...], place: Place | None) -> jax.Array:
    """The same with the axes of the place: of a whole array, one."""
    if place is None and not (_is_threefry(key) and math.prod(shape) < 2**32):
        return jax.random.bits(key, shape, jnp.uint32)
    return bits_at(key, places(shape) if place is None else place)


def normal(
    key: jax.Array, shape: tuple[int, ...], place: Place | None = None
) -> jax.Array:
    """`jax.random.normal(key, shape)`, bit for bit; arguments as of `random_bits`."""
    return normal_of_bits(_bits(key, shape, place)).reshape(shape)


def table(
    key: jax.Array, shape: tuple[int, ...], place: Place | None = None
) -> jax.Array:
    """Numbers of the table, float32; arguments as of `random_bits`.

    Numbers 2i and 2i + 1, in row-major order, come from the low and the high half of
    word i of `jax.random.bits(key)`.
    """
    if place is not None:
        one, half = np.uint32(1), np.uint32(16)
        low = (place.low >> one) | (place.high << np.uint32(31))
        words = bits_at(key, Place(place.high >> one, low))
        halves = jnp.where((place.low & one).astype(bool), words >> half, words)
        return _look_up(halves.astype(jnp.uint16)).reshape(shape)
    size = math.prod(shape)
    words = random_bits(key, (-(-size // 2),))
    # Fused with its use on the CPU, this keeps no array of bits, but draws each word
    # twice. Keeping them saves up to a fifth of the time for half the memory of the
    # result: not worth it where the result itself is never in memory.
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return _look_up(halves).reshape(shape)


def uniform(
    key: jax.Array, shape: tuple[int, ...], place: Place | None = None
) -> jax.Array:
    """`jax.random.uniform(key, shape)`, bit for bit; arguments as of `random_bits`."""
    return _unit(random_bits(key, shape, place))


def bits_at(key: jax.Array, place: Place) -> jax.Array:
    """The words at these places of what `random_bits` gives for any shape."""
    if not _is_threefry(key):
        raise TypeError("noise can be drawn in parts from threefry keys only")
    first, second = jax.random.key_data(key)
    left, right = threefry_2x32(first, second, place.high, place.low)
    return left ^ right


def threefry_2x32(
    first: jax.Array, second: jax.Array, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Twenty rounds on the counters (left, right) with the key (first, second)."""
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    left, right = left + keys[0], right + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            left = left + right
            turned = right << np.uint32(rotation) | right >> np.uint32(32 - rotation)
            right = left ^ turned
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + np.uint32(group + 1)
    return left, right


def normal_of_bits(bits: jax.Array) -> jax.Array:
    """Standard normal numbers from 32 random bits each, by the inverse of erf."""
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    scaled = _unit(bits) * (np.float32(1) - lowest) + lowest
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(lowest, scaled))


@functools.cache
def positive_values() -> np.ndarray:
    """The upper half of the table, in rising order: float32 [32768], read-only."""
    gaussian = NormalDist()
    edges = np.array([gaussian.inv_cdf(0.5 + 0.5 * k / HALF) for k in range(HALF)])
    squares = np.append(edges, np.inf) ** 2 / 2
    # The mean of a normal number in (a, b) is (φ(a) - φ(b)) / P(a, b). The difference
    # as a product loses no digits where a and b are close.
    density = np.exp(-squares[:-1]) / math.sqrt(2 * math.pi)
    means = 2 * HALF * density * -np.expm1(-np.diff(squares))
    values = (means / np.sqrt(np.mean(means**2))).astype(np.float32)
    values.setflags(write=False)
    return values


def _look_up(bits: jax.Array) -> jax.Array:
    """The numbers that uint16 bits stand for: the sign first, then the index."""
    index = bits & np.uint16(HALF - 1)
    size = jnp.asarray(positive_values()).at[index].get(mode="promise_in_bounds")
    sign = (bits & np.uint16(HALF)).astype(jnp.uint32) << np.uint32(16)
    signed = jax.lax.bitcast_convert_type(size, jnp.uint32) | sign
    return jax.lax.bitcast_convert_type(signed, jnp.float32)


def _unit(bits: jax.Array) -> jax.Array:
    """Uniform in [0, 1), from the upper 23 bits."""
    mantissa = (bits >> np.uint32(9)) | np.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)


def _is_threefry(key: jax.Array) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _counter(shape: tuple[int, ...], partitioned: bool) -> tuple[jax.Array, jax.Array]:
    """Positions of the entries and their rows, uint32; one axis, or the shape's."""
    if not partitioned:
        # With several axes a counter is arithmetic that the compiler moves out of
        # loops over keys, and keeps in memory there.
        counter = jax.lax.iota(jnp.uint32, math.prod(shape))
        if len(shape) < 2:
            return counter, counter
        flat = math.prod(shape[:-1]), shape[-1]
        return counter, jax.lax.broadcasted_iota(jnp.uint32, flat, 0).reshape(-1)
    counter = row = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        counter += np.uint32(math.prod(shape[axis + 1 :])) * along
        if axis < len(shape) - 1:
            row += np.uint32(math.prod(shape[axis + 1 : -1])) * along
    return counter, row if len(shape) > 1 else counter
