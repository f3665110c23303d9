"""Integer codes of quantised weights: packed storage, ranges, bounded moves.

A code is an integer of 4 or 8 bits on a fixed grid; the grid's spacing is 1 in all that
`jes.core` and `jes.transforms` compute. What a code is worth is the model's business.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (4, 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Matrices of codes, alone [I, O] or stacked [L, I, O].

    Attributes:
      data: 8 bits: the codes, uint8 or, if signed, int8. 4 bits: uint8 [..., I/2, O];
        a byte holds the codes of rows 2i (low half) and 2i + 1.
      bits: 4 or 8.
      signed: whether codes run from -2^(bits-1), not from 0.
    """

    data: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes, unpacked."""
        *stack, rows, columns = self.data.shape
        return (*stack, rows * (8 // self.bits), columns)

    @property
    def ndim(self) -> int:
        """2, or 3 for a stack."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """How many codes."""
        return math.prod(self.shape)

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        lowest = -(2 ** (self.bits - 1)) if self.signed else 0
        return lowest, lowest + 2**self.bits - 1


class Overlay(NamedTuple):
    """How a member's codes differ from the centre's.

    Attributes:
      positions: int32 [K], in the flattened matrix, ascending; those beyond its end
        mean nothing. None for all of them.
      moves: int16 [K], or of all codes; within their range.
    """

    positions: jax.Array | None
    moves: jax.Array


def unpack(codes: Codes) -> jax.Array:
    """The codes as uint8, or int8 if signed, in their shape."""
    if codes.bits == 8:
        return codes.data
    halves = jnp.stack([codes.data & 15, codes.data >> 4], axis=-2)
    return halves.reshape(codes.shape)


def pack(values: jax.Array, bits: int, signed: bool = False) -> Codes:
    """Stores integers as codes; traced ones are taken to be in range.

    Raises:
      ValueError: for bits other than 4 or 8, signed codes of 4 bits, an odd number of
        rows at 4 bits, or integers out of range.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    codes = Codes(values.astype(jnp.int8 if signed else jnp.uint8), bits, signed)
    if not isinstance(values, jax.core.Tracer) and values.size:
        found, possible = (int(values.min()), int(values.max())), codes.range
        if found[0] < possible[0] or found[1] > possible[1]:
            raise ValueError(
                f"codes of {bits} bits are {possible[0]}..{possible[1]}, not "
                f"{found[0]}..{found[1]}"
            )
    if bits == 8:
        return codes
    if signed:
        raise ValueError("codes of 4 bits are unsigned")
    if values.shape[-2] % 2:
        raise ValueError(f"{values.shape[-2]} rows cannot be packed in pairs")
    return Codes(codes.data[..., 0::2, :] | codes.data[..., 1::2, :] << 4, bits)


def pick(codes: Codes, positions: jax.Array | None) -> jax.Array:
    """Codes at int32 positions of one flattened matrix, or all; 0 beyond its end."""
    if positions is None:
        return unpack(codes).reshape(-1)
    columns = codes.shape[-1]
    row, column = positions // columns, positions % columns
    if codes.bits == 8:
        return codes.data.at[row, column].get(mode="fill", fill_value=0).astype(int)
    byte = codes.data.at[row // 2, column].get(mode="fill", fill_value=0)
    return (byte >> (4 * (row % 2)).astype(jnp.uint8) & 15).astype(int)


def moved(codes: Codes, overlay: Overlay | None) -> jax.Array:
    """The codes of one matrix as a member has them, uint8 or int8 [I, O]."""
    values = unpack(codes)
    if overlay is None:
        return values
    # Bytes add modulo 256, and an overlay leads to no code out of range.
    flat, moves = values.reshape(-1), overlay.moves.astype(values.dtype)
    if overlay.positions is None:
        flat = flat + moves
    else:
        flat = flat.at[overlay.positions].add(
            moves, mode="drop", unique_indices=True, indices_are_sorted=True
        )
    return flat.reshape(values.shape)


def allowed(codes: Codes, values: jax.Array, moves: jax.Array) -> jax.Array:
    """The gate of 2602.03120 Eq. (4): moves that leave the range become 0.

    Codes (`values`, of the range of `codes`) and moves may have any numeric dtype, and
    moves may be larger than the range.
    """
    after = values.astype(jnp.float32) + moves.astype(jnp.float32)
    lowest, highest = codes.range
    return jnp.where((lowest <= after) & (after <= highest), moves, 0)


def matrix_numbers(
    shape: tuple[int, ...], part: jax.typing.ArrayLike | None
) -> jax.Array:
    """Numbers of the matrices [L], or of one alone [1], within their whole stack.

    Of a part of a stack, `part` is the number among parts of this shape.
    """
    numbers = jnp.arange(math.prod(shape[:-2]))
    return numbers if part is None else numbers + part * len(numbers)


def difference(codes: Codes, moves: jax.Array) -> Codes:
    """Moves that keep every code in range, as what `optax.apply_updates` adds.

    That adds bytes, modulo 256, so it is the difference of the packed bytes.
    """
    values = unpack(codes)
    after = (values.astype(jnp.int32) + moves.astype(jnp.int32)).astype(values.dtype)
    packed = pack(after, codes.bits, codes.signed)
    return dataclasses.replace(codes, data=packed.data - codes.data)
