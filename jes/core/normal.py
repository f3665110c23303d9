"""`jax.random.normal`, fused: the same numbers, with no arrays in between.

On the CPU, jax compiles its random bits to a loop over rounds that passes over several
arrays of the size of the result. Written out, rounds and all, the bits, the normal
number and whatever uses it are one pass: half the time for large arrays, no memory
beside the result, and a slice of the result computes that slice only.
"""

import math

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


def _fusible(key: jax.Array, shape: tuple[int, ...]) -> bool:
    threefry = str(jax.random.key_impl(key)) == "threefry2x32"
    return threefry and math.prod(shape) < 2**32


def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """As many bits as the shape has entries; one axis, or those of the shape."""
    first, second = jax.random.key_data(key)
    # In one dimension up to the end: a counter of several dimensions is arithmetic
    # that the compiler moves out of loops over keys, and keeps in memory there.
    counter = jax.lax.iota(jnp.uint32, math.prod(shape))
    if model_is_spread():
        # But only of such a one can a device compute a part.
        counter = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            counter += np.uint32(math.prod(shape[axis + 1 :])) * along
    left, right = threefry_2x32(first, second, jnp.zeros_like(counter), counter)
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
