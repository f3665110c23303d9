"""Where a program has arrays, and from when on."""

import jax
import jax.numpy as jnp


def on_device(leaf: jax.Array) -> jax.Array:
    """The array in the device's memory; itself where it is there already.

    Only then untouched: `jax.device_put` would tie all that is computed from it to the
    device it is on, and a program that sees its own results so is compiled once more.
    """
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
        return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf


def not_before(x: jax.Array, bits: jax.Array) -> jax.Array:
    """The same integers, but nothing can be made of them before `x` is there.

    For what is made of them in each layer for a moment. A compiler would make it for
    all layers at once, before the first token, and keep it over all tokens. (A barrier
    does not help: the one for CPUs takes it out too early.)

    Args:
      x: floats [...], at least one.
      bits: integers [...].
    """
    impossible = x[(0,) * x.ndim] < -jnp.inf
    return bits ^ impossible.astype(bits.dtype)
