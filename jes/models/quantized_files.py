"""What the file formats of quantised weights share.

A format (`jes.models.gptq`, `jes.models.compressed_tensors`) stores a linear layer in
several tensors, `<layer>.<part>`. It describes the parts of one matrix; reading,
checking and writing stacks of them is here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from jes.models.quantized import Quantized
from jes.models.safetensors_files import (
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    aligned_empty,
    dtype_name,
)


class Format(Protocol):
    """How files hold the matrix [I, O] of a linear layer."""

    def parts(self, rows: int, columns: int) -> dict[str, Expected]:
        """The parts of a matrix [rows, columns].

        Raises:
          ValueError: if the format does not support that shape.
        """

    def unpack(self, parts: Mapping[str, Any]) -> Quantized:
        """A matrix, of numpy arrays.

        Raises:
          ValueError: naming a part with invalid values.
        """

    def pack(self, stack: Quantized, index: int, part: str) -> np.ndarray:
        """A part of one matrix of a stack."""

    def problem(self, stack: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""


def layer_tensors(
    form: Format, name: str, rows: int, columns: int
) -> dict[str, Expected]:
    """The tensors of the layer whose weights are called `name` if not quantised.

    Raises:
      WeightsError: if the format does not support that shape.
    """
    layer = name.removesuffix(".weight")
    try:
        parts = form.parts(rows, columns)
    except ValueError as error:
        raise WeightsError(f"{layer} has {error}") from error
    return {f"{layer}.{part}": expected for part, expected in parts.items()}


def read_stack(
    form: Format,
    names: Sequence[str],
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
) -> Quantized:
    """The stacked matrices [L, I, O] of layers, on the device.

    Raises:
      WeightsError: naming a tensor with invalid values or another dtype than the rest.
    """
    stack, parts = None, form.parts(*shape[1:])
    layers = [name.removesuffix(".weight") for name in names]
    first = {part: tensors.get(f"{layers[0]}.{part}") for part in parts}
    for i, layer in enumerate(layers):
        found = {p: t for p in parts if (t := tensors.get(f"{layer}.{p}"))}
        for part, tensor in found.items():
            if (other := first[part]) and tensor.dtype != other.dtype:
                raise WeightsError(
                    f"{layer}.{part} is {tensor.dtype}, but {layers[0]}.{part} "
                    f"{other.dtype}"
                )
        try:
            matrix = form.unpack({part: t.read() for part, t in found.items()})
        except ValueError as error:
            raise WeightsError(f"{layer}.{error}") from error
        if stack is None:
            stack = jax.tree.map(
                lambda a: aligned_empty((len(layers), *a.shape), a.dtype), matrix
            )
        for whole, one in zip(*map(jax.tree.leaves, (stack, matrix)), strict=True):
            whole[i] = one
    assert stack is not None
    if stack.groups is not None:
        rows, groups = shape[1], stack.scales.shape[1]
        if (stack.groups == np.arange(rows) // (rows // groups)).all():
            stack = dataclasses.replace(stack, groups=None)
    return jax.device_put(stack)


def layer_to_write(
    form: Format, name: str, stack: Quantized, index: int
) -> dict[str, Tensor]:
    """The tensors of one matrix of a stack, by name."""
    tensors, layer = {}, name.removesuffix(".weight")
    for part, expected in form.parts(*stack.shape[1:]).items():
        if not expected.zero:
            float_dtype = dtype_name(stack.scales.dtype)
            dtype = float_dtype if len(expected.dtypes) > 1 else expected.dtypes[0]
            read = partial(form.pack, stack, index, part)
            tensors[f"{layer}.{part}"] = Tensor(expected.shape, dtype, read)
    return tensors


def check_finite(part: str, values: Any) -> Any:
    """The values; raises a `ValueError` if some are not finite."""
    if not np.isfinite(values).all():
        raise ValueError(f"{part} holds values that are not finite")
    return values


def scales_problem(stack: Quantized, shape: tuple[int, ...]) -> str:
    """Why the scales of a stack cannot be stored; '' if they can."""
    if stack.scales.shape != shape:
        return f"has scales {stack.scales.shape}, expected {shape}"
    if stack.scales.dtype not in FLOATS.values():
        return f"has scales of {stack.scales.dtype}, not {', '.join(FLOATS)}"
    return ""
