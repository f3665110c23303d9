"""Quantised weight matrices, used directly by the decoder.

Axis letters: I rows (inputs), O columns (outputs), G groups of rows with one scale a
column, K entries of a perturbation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jes.core.codes import Codes, moved
from jes.core.placement import not_before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [I, O], or a stack [L, I, O]: (codes - zeros) * scales.

    Attributes:
      codes: the integers that are trained.
      scales: float [..., G, O]; group of a row is row // (I / G), or `groups[row]`.
      zeros: int16 [..., G, O], the codes of weight zero; None for signed codes, whose
        zero is 0. (Not uint8: files can mean 256.)
      groups: int32 [..., I], the group of each row where they are not in order (GPTQ's
        g_idx with desc_act); None where they are.
      int8_activations: whether inputs are rounded to int8 too, with a scale for each
        token, and the product is one of integers (W8A8).
    """

    codes: Codes
    scales: jax.Array
    zeros: jax.Array | None = None
    groups: jax.Array | None = None
    int8_activations: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, or of the stack."""
        return self.codes.shape


def dequantize(
    weight: Quantized, noise: Any = None, dtype: Any = jnp.float32
) -> jax.Array:
    """The matrix [I, O] in floats; computed in float32, then cast.

    The noise of a member has the same form: an `Overlay` for the codes, what to add to
    the scales or None, None for the rest.
    """
    codes, scales = _of_member(weight, noise)
    values = codes.astype(jnp.float32)
    if weight.zeros is not None:
        values -= _by_row(weight, weight.zeros.astype(jnp.float32))
    return (values * _by_row(weight, scales)).astype(dtype)


def _of_member(weight: Quantized, noise: Any) -> tuple[jax.Array, jax.Array]:
    """Codes, uint8 or int8 [I, O], and scales, float32 [G, O], of a member."""
    scales = weight.scales.astype(jnp.float32)
    if noise is None:
        return moved(weight.codes, None), scales
    if noise.scales is not None:
        scales += noise.scales
    return moved(weight.codes, noise.codes), scales


def _by_row(weight: Quantized, values: jax.Array) -> jax.Array:
    """Values of groups [G, O] for each row: [I, O]."""
    if weight.groups is not None:
        return values[weight.groups]
    count, columns = values.shape
    rows = weight.shape[0] // count
    wide = jnp.broadcast_to(values[:, None], (count, rows, columns))
    return wide.reshape(weight.shape)


def quantized_matmul(x: jax.Array, weight: Quantized, noise: Any = None) -> jax.Array:
    """x @ weight, [..., I] -> [..., O] in the dtype of x."""
    data = not_before(x, weight.codes.data)
    guarded = dataclasses.replace(weight.codes, data=data)
    weight = dataclasses.replace(weight, codes=guarded)
    if not weight.int8_activations:
        return x @ dequantize(weight, noise, x.dtype)
    codes, scales = _of_member(weight, noise)
    rounded, token_scales = round_tokens(x)
    products = jnp.matmul(rounded, codes, preferred_element_type=jnp.int32)
    scales = scales.reshape((1,) * (x.ndim - 1) + (-1,))
    return (products.astype(jnp.float32) * token_scales * scales).astype(x.dtype)


def round_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Dynamic int8 rounding, symmetric, with one scale a token.

    Returns:
      int8 [..., I] in -127..127 and float32 [..., 1], whose product is nearly x.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    scales = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales
