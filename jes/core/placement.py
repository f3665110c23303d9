"""Memory placement and scheduling barriers."""

from collections.abc import Callable

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


def kept(make: Callable[[], jax.Array], count: jax.Array) -> jax.Array:
    """What `make` returns, as an array in memory.

    XLA would compute each of its numbers again for each of many that follow from it.
    (The CPU compiler removes an optimization barrier, but not a loop that it does not
    know to run once.) `count` is a traced int32 that is never negative.
    """

    def in_loop(count: jax.Array) -> jax.Array:
        like = jax.eval_shape(make)
        once = 1 + (count < 0).astype(jnp.int32)
        start = jnp.zeros(like.shape, like.dtype)
        return jax.lax.fori_loop(0, once, lambda *_: make(), start)

    return jax.lax.platform_dependent(
        count, cpu=in_loop, default=lambda _: jax.lax.optimization_barrier(make())
    )
