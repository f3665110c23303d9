"""`jax.random.normal`, fused: the same numbers, with no arrays in between.

On the CPU, jax compiles its random bits to a loop over rounds that passes over several
arrays of the size of the result. Written out, rounds and all, the bits, the normal
number and whatever uses it are one pass: half the time for large arrays, no memory
beside the result, and a slice of the result computes that slice only.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.mesh import model_is_spread

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Of Threefry-2x32 (Salmon et al. 2011), by turns four rounds each."""


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `jax.random.normal(key, shape)` returns, bit for bit, in float32.

    (With `jax_threefry_partitionable`, jax's default, whatever the setting is.)
    Keys of other generators than threefry, and arrays too large for a 32-bit counter,
    are left to `jax.random.normal`.
    """
    if not _fusible(key, shape):
        return jax.random.normal(key, shape, jnp.float32)
    return normal_of_bits(_bits(key, shape)).reshape(shape)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `jax.random.bits(key, shape)` returns, bit for bit: uint32."""
    if not _fusible(key, shape):
        return jax.random.bits(key, shape, jnp.uint32)
    return _bits(key, shape).reshape(shape)


def normal_at(key: jax.Array, place: "Place") -> jax.Array:
    """The entries at these places of what `standard_normal` gives for any shape."""
    return normal_of_bits(bits_at(key, place))


def bits_at(key: jax.Array, place: "Place") -> jax.Array:
    """The words at these places of what `random_bits` gives for any shape.

    Raises:
      TypeError: for keys of other generators than threefry, which have no places.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError("noise can be drawn in parts from threefry keys only")
    first, second = jax.random.key_data(key)
    left, right = threefry_2x32(first, second, place.high, place.low)
    return left ^ right


class Place(NamedTuple):
    """Numbers of entries in row-major order, in 64 bits: high x 2^32 + low, uint32."""

    high: jax.Array
    low: jax.Array


def places(
    shape: tuple[int, ...],
    part: jax.typing.ArrayLike = 0,
    size: int = 0,
    start: jax.typing.ArrayLike = 0,
) -> Place:
    """Numbers of the entries of a part of an array.

    Args:
      shape: of the part.
      part: its number among parts of equal size; may be traced, or be numbers
        [..., 1] of several parts that have one axis.
      size: entries of a part.
      start: number of the first entry in the part.
    """
    inner = jnp.asarray(start, jnp.uint32) + _counter(shape)
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
    return Place(high + (total < low).astype(jnp.uint32), total)


def _fusible(key: jax.Array, shape: tuple[int, ...]) -> bool:
    threefry = str(jax.random.key_impl(key)) == "threefry2x32"
    return threefry and math.prod(shape) < 2**32


def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """As many bits as the shape has entries; one axis, or those of the shape."""
    counter = _counter(shape)
    return bits_at(key, Place(jnp.zeros_like(counter), counter))


def _counter(shape: tuple[int, ...]) -> jax.Array:
    """Numbers of the entries, uint32; one axis, or those of the shape."""
    # In one dimension up to the end: a counter of several dimensions is arithmetic
    # that the compiler moves out of loops over keys, and keeps in memory there.
    counter = jax.lax.iota(jnp.uint32, math.prod(shape))
    if model_is_spread():
        # But only of such a one can a device compute a part.
        counter = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            counter += np.uint32(math.prod(shape[axis + 1 :])) * along
    return counter


def threefry_2x32(
    first: jax.Array, second: jax.Array, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Twenty rounds on the counters (left, right) with the key (first, second)."""
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    left, right = left + keys[0], right + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            left = left + right
            turned = (right << np.uint32(rotation)) | (
                right >> np.uint32(32 - rotation)
            )
            right = left ^ turned
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + np.uint32(group + 1)
    return left, right


def normal_of_bits(bits: jax.Array) -> jax.Array:
    """Standard normal numbers from 32 random bits each, by the inverse of erf."""
    mantissa = (bits >> np.uint32(9)) | np.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(lowest, unit * (np.float32(1) - lowest) + lowest)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)
