"""A member's weights where the model uses them: those that all share, and its own part.

The collection 'noise' has the tree of the parameters, with None or nothing where a
member is like the centre. A deviation is

- an array of the shape of the weight, which is added to it;
- `LazyNoise`, such an array that is drawn where it is used;
- `Own`, the member's weight itself;
- `LowRank`, for a matrix: its product is that of the centre, one for all members, and
  a thin one;
- what `jes.models.quantized` takes, for quantised weights.

Axis letters: I inputs, O outputs of a matrix, r rank, V words, D hidden.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jes.core.lazy_noise import LazyNoise, Own, add, add_rows, use_blocks
from jes.core.low_rank import LowRank
from jes.models.quantized import Quantized, matmul

FEW = 8
"""Ranks up to which a weighted sum of rows is written out."""
LANES = 16
"""Numbers that a CPU adds at once, at most."""


def deviated(weight: jax.Array, noise: Any) -> jax.Array:
    """A weight of a member, in full."""
    if noise is None:
        return weight
    if isinstance(noise, Own):
        return noise.weight
    if isinstance(noise, LazyNoise):
        return add(weight, noise)
    if isinstance(noise, LowRank):
        noise = noise.full().astype(weight.dtype)
    return weight + noise


def times(x: jax.Array, weight: Any, noise: Any) -> jax.Array:
    """x @ weight of a member, [..., I] -> [..., O] in the dtype of x."""
    if isinstance(weight, Quantized):
        return matmul(x, weight, noise)
    if isinstance(noise, LowRank):
        shared = x @ weight
        return shared + thin_product(x, noise.a, noise.b).astype(shared.dtype)
    if isinstance(noise, LazyNoise):
        noise = noise.after(x)
    return x @ deviated(weight, noise)


def thin_product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x @ a^T) @ b for factors [r, I] and [r, O]: [B, T, I] -> float32 [B, T, O]."""
    if len(a) == 1 and x.shape[1] == 1:
        parts = jax.lax.platform_dependent(x, a, cpu=_inner_halved, default=_inner)
    else:
        parts = _inner(x, a)
    return weighted(parts, b)


def _inner(x, a):
    return jnp.einsum("bti,ki->btk", x, a, preferred_element_type=jnp.float32)


def _inner_halved(x, a):
    """With a single vector, summed by halves: one pass over vectors of several lanes.

    XLA for CPUs makes a sum of products of the product with one vector, in a library
    that takes long for it (15 us, this 0.5, for 32 members and 128 inputs).
    """
    products = x.astype(jnp.float32) * a.astype(jnp.float32)[None]
    while products.shape[-1] > LANES and products.shape[-1] % 2 == 0:
        first, second = jnp.split(products, 2, axis=-1)
        products = first + second
    return products.sum(-1, keepdims=True)


def weighted(parts: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums of the rows [r, O], by weights: [B, T, r] -> float32 [B, T, O].

    A few rows one by one, in the same pass as what is computed of the sum.
    """
    parts, rows = parts.astype(jnp.float32), rows.astype(jnp.float32)
    if len(rows) > FEW:
        return jnp.einsum("btk,ko->bto", parts, rows)
    each = [parts[..., k, None] * rows[k][None, None] for k in range(len(rows))]
    return sum(each[1:], each[0])


def look_up(table: jax.Array, noise: Any, tokens: jax.Array) -> jax.Array:
    """Rows of a member's embedding [V, D]: int [B, T] -> [B, T, D]."""
    if isinstance(noise, LazyNoise):
        return add_rows(table, noise, tokens)
    if isinstance(noise, LowRank):
        own = weighted(jnp.moveaxis(noise.a[:, tokens], 0, -1), noise.b)
        return table[tokens] + own.astype(table.dtype)
    return deviated(table, noise)[tokens]


def word_scores(
    x: jax.Array, weight: jax.Array, noise: Any, *, tied: bool
) -> jax.Array:
    """Products with all words: [B, T, D] -> float32 [B, T, V].

    Args:
      x: the stream.
      weight: the embedding [V, D] if `tied`, else a matrix [D, V].
      noise: how a member's weight differs.
      tied: the embedding comes first in its product: under vmap, XLA for the CPU
        writes a transposed second factor out in full, half a gigabyte a token for
        151936 words.
    """
    if isinstance(noise, LowRank):
        a, b = (noise.b, noise.a) if tied else (noise.a, noise.b)
        return word_scores(x, weight, None, tied=tied) + thin_product(x, a, b)
    equation, words = ("vd,btd->vbt", 0) if tied else ("btd,dv->btv", -1)

    def scores(weight: jax.Array) -> jax.Array:
        factors = (weight, x) if tied else (x, weight)
        return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)

    if isinstance(noise, LazyNoise):
        blocks = use_blocks(weight, noise.after(x), 0 if tied else 1, scores)
        logits = jnp.concatenate(blocks, words)
    else:
        logits = scores(deviated(weight, noise))
    return jnp.moveaxis(logits, words, -1)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A weight of a module as the member has it; for its `__call__`."""
    weight = module.param(name, init, shape)
    return deviated(weight, module.get_variable("noise", name))
