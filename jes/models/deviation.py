"""A member's weights where the model uses them: those that all share, and its own part.

The collection 'noise' has the tree of the parameters, with None or nothing where a
member is like the centre. A deviation is

- an array of the shape of the weight, which is added to it;
- what `jes.models.quantized` takes, for quantised weights.

Axis letters: I inputs, O outputs of a matrix, V words, D hidden.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jes.models.quantized import Quantized, matmul


def deviated(weight: jax.Array, noise: Any) -> jax.Array:
    """A weight of a member, in full."""
    return weight if noise is None else weight + noise


def times(x: jax.Array, weight: Any, noise: Any) -> jax.Array:
    """x @ weight of a member, [..., I] -> [..., O]."""
    if isinstance(weight, Quantized):
        return matmul(x, weight, noise)
    return x @ deviated(weight, noise)


def look_up(table: jax.Array, noise: Any, tokens: jax.Array) -> jax.Array:
    """Rows of a member's embedding [V, D]: int [B, T] -> [B, T, D]."""
    return deviated(table, noise)[tokens]


def word_scores(x: jax.Array, table: jax.Array, noise: Any) -> jax.Array:
    """Products with all rows of a member's embedding: [B, T, D] -> float32 [B, T, V].

    The embedding comes first: under vmap, XLA for the CPU writes a transposed second
    factor out in full, half a gigabyte a token for 151936 words.
    """
    table = deviated(table, noise)
    logits = jnp.einsum("vd,btd->vbt", table, x, preferred_element_type=jnp.float32)
    return jnp.moveaxis(logits, 0, -1)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A weight of a module as the member has it; may be called in its `__call__`."""
    weight = module.param(name, init, shape)
    return deviated(weight, module.get_variable("noise", name))
