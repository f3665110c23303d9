"""Memory placement and scheduling barriers."""

import jax
import jax.numpy as jnp


def on_device(leaf: jax.Array) -> jax.Array:
    """The array in the device's memory; itself where it is there already.

    `jax.device_put` would commit the array to its device, and with it all results: a
    program that gets its own results back would be compiled once more.
    """
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
        return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf


def not_before(x: jax.Array, bits: jax.Array) -> jax.Array:
    """The same integers, but XLA cannot use them before `x` is computed.

    XLA would hoist weights that layers compute from them out of the loop over tokens,
    and keep those of all layers. (The CPU compiler removes an optimization barrier.)
    """
    impossible = x[(0,) * x.ndim] < -jnp.inf
    return bits ^ impossible.astype(bits.dtype)
