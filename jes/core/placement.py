"""Arrays in the memory of the host, for programs on the device."""

import jax


def on_device(leaf: jax.Array) -> jax.Array:
    """The array in the device's memory; itself where it is there already.

    Only then untouched: `jax.device_put` would tie all that is computed from it to the
    device it is on, and a program that sees its own results so is compiled once more.
    """
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
        return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf
