"""Products with a member's weights: those that all share, and its noise.

The Flax collection 'noise' has the tree of the parameters, with None or nothing where a
member has the shared weight. Noise of a weight is

- an array of its shape, which is added to it;
- `LazyNoise`, such an array that is drawn where the weight is used;
- `MemberWeight`, the member's weight itself;
- `LowRank`, for a matrix: members share its product and add thin products;
- what `jes.models.quantized` takes, for quantised weights.

Axis letters: B batch, T tokens, I inputs, O outputs, r rank, V vocabulary, D hidden.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jes.core.lazy_noise import LazyNoise, MemberWeight, add, add_rows, map_blocks
from jes.core.low_rank import LowRank
from jes.models.quantized import Quantized, quantized_matmul

FEW = 8
"""Ranks up to which a weighted sum of rows is written out, to fuse with its use."""
LANES = 16
"""Numbers that a CPU adds at once, at most."""


def member_weight(weight: jax.Array, noise: Any) -> jax.Array:
    """A weight of a member, in full."""
    if noise is None:
        return weight
    if isinstance(noise, MemberWeight):
        return noise.weight
    if isinstance(noise, LazyNoise):
        return add(weight, noise)
    if isinstance(noise, LowRank):
        noise = noise.full().astype(weight.dtype)
    return weight + noise


def matmul(x: jax.Array, weight: Any, noise: Any) -> jax.Array:
    """x @ weight of a member, [..., I] -> [..., O] in the dtype of x."""
    if isinstance(weight, Quantized):
        return quantized_matmul(x, weight, noise)
    if isinstance(noise, LowRank):
        shared = x @ weight
        return shared + thin_product(x, noise.a, noise.b).astype(shared.dtype)
    if isinstance(noise, LazyNoise):
        noise = noise.after(x)
    return x @ member_weight(weight, noise)


def thin_product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x @ a^T) @ b for factors [r, I] and [r, O]: [B, T, I] -> float32 [B, T, O]."""
    if len(a) == 1 and x.shape[1] == 1:
        inner = jax.lax.platform_dependent(x, a, cpu=_inner_halved, default=_inner)
    else:
        inner = _inner(x, a)
    return sum_rows(inner, b)


def _inner(x, a):
    return jnp.einsum("bti,ki->btk", x, a, preferred_element_type=jnp.float32)


def _inner_halved(x, a):
    """`_inner` for one vector, summed by halves.

    The library that XLA for CPUs calls takes 15 us, this 0.5, for 32 members of 128.
    """
    products = x.astype(jnp.float32) * a.astype(jnp.float32)[None]
    while products.shape[-1] > LANES and products.shape[-1] % 2 == 0:
        first, second = jnp.split(products, 2, axis=-1)
        products = first + second
    return products.sum(-1, keepdims=True)


def sum_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Weighted sums of rows [r, O]: weights [B, T, r] -> float32 [B, T, O]."""
    weights, rows = weights.astype(jnp.float32), rows.astype(jnp.float32)
    if len(rows) > FEW:
        return jnp.einsum("btk,ko->bto", weights, rows)
    each = [weights[..., k, None] * rows[k][None, None] for k in range(len(rows))]
    return sum(each[1:], each[0])


def embed(table: jax.Array, noise: Any, tokens: jax.Array) -> jax.Array:
    """Rows of a member's embedding [V, D]: int [B, T] -> [B, T, D]."""
    if isinstance(noise, LazyNoise):
        return add_rows(table, noise, tokens)
    if isinstance(noise, LowRank):
        own = sum_rows(jnp.moveaxis(noise.a[:, tokens], 0, -1), noise.b)
        return table[tokens] + own.astype(table.dtype)
    return member_weight(table, noise)[tokens]


def unembed(x: jax.Array, weight: jax.Array, noise: Any, *, tied: bool) -> jax.Array:
    """Logits of all tokens: [B, T, D] -> float32 [B, T, V].

    The weight is the embedding [V, D] if `tied`, else a matrix [D, V].
    """
    if isinstance(noise, LowRank):
        a, b = (noise.b, noise.a) if tied else (noise.a, noise.b)
        return unembed(x, weight, None, tied=tied) + thin_product(x, a, b)
    # The embedding comes first in its product: under vmap, XLA for the CPU writes a
    # transposed second factor out in full, half a gigabyte a token for 151936 tokens.
    equation, axis = ("vd,btd->vbt", 0) if tied else ("btd,dv->btv", -1)

    def product(weight: jax.Array) -> jax.Array:
        factors = (weight, x) if tied else (x, weight)
        return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)

    if isinstance(noise, LazyNoise):
        cut = 0 if tied else 1
        logits = map_blocks(weight, noise.after(x), cut, product, axis)
    else:
        logits = product(member_weight(weight, noise))
    return jnp.moveaxis(logits, axis, -1)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter of a module as the member has it; for its `__call__`."""
    weight = module.param(name, init, shape)
    return member_weight(weight, module.get_variable("noise", name))
