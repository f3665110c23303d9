"""What the file formats of quantised weights share.

A format (`jes.models.gptq`, `jes.models.compressed_tensors`) stores a linear layer in
several tensors, `<layer>.<part>`. It describes the parts of one matrix; reading,
checking and writing stacks of them is here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jes.models.quantized import Quantized
from jes.models.safetensors_files import (
    DTYPES,
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    aligned_empty,
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

    def pack(self, stack: Quantized, index: int) -> dict[str, Callable[[], np.ndarray]]:
        """Functions that compute the parts of one matrix of a stack."""

    def problem(self, stack: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""


def layer_tensors(
    form: Format, layer: str, rows: int, columns: int
) -> dict[str, Expected]:
    """The tensors of a linear layer, by name.

    Raises:
      WeightsError: if the format does not support that shape.
    """
    try:
        parts = form.parts(rows, columns)
    except ValueError as error:
        raise WeightsError(f"{layer} has {error}") from error
    return {f"{layer}.{part}": expected for part, expected in parts.items()}


def read_stack(
    form: Format,
    layers: Sequence[str],
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
) -> Quantized:
    """The stacked matrices [L, I, O] of the named layers, on the device.

    Raises:
      WeightsError: naming a tensor with invalid values or another dtype than the rest.
    """
    stack, parts = None, form.parts(*shape[1:])
    for i, layer in enumerate(layers):
        found = {p: tensors.get(f"{layer}.{p}") for p in parts}
        first = {p: tensors.get(f"{layers[0]}.{p}") for p in parts}
        for part, tensor in found.items():
            other = first[part]
            if tensor and other and tensor.dtype != other.dtype:
                raise WeightsError(
                    f"{layer}.{part} is {tensor.dtype}, but {layers[0]}.{part} "
                    f"{other.dtype}"
                )
        try:
            matrix = form.unpack({p: t.read() for p, t in found.items() if t})
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
    form: Format, layer: str, stack: Quantized, index: int
) -> dict[str, Tensor]:
    """The tensors of one matrix of a stack, by name."""
    _, rows, columns = stack.shape
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {}
    for part, read in form.pack(stack, index).items():
        shape, dtypes, *_ = form.parts(rows, columns)[part]
        dtype = dtypes[0] if len(dtypes) == 1 else names[np.dtype(stack.scales.dtype)]
        tensors[f"{layer}.{part}"] = Tensor(shape, dtype, read)
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


def check_setting(path: str, value: Any, *supported: Any) -> None:
    """Raises a `ValueError` unless the value is one of those supported."""
    if value not in supported:
        names = ", ".join(map(repr, supported))
        raise ValueError(f"{path}={value!r} is not supported; supported: {names}")


def check_unset(path: str, config: Mapping[str, Any], *fields: str) -> None:
    """Raises a `ValueError` if one of these fields has a value."""
    for field in fields:
        if config.get(field):
            raise ValueError(f"{path}{field}={config[field]!r} is not supported")
