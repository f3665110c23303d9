"""What the file formats of quantised weights share.

The formats are `jes.models.gptq` and `jes.models.compressed_tensors`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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
    """How files hold the matrices of linear layers, [I, O] or stacked [L, I, O]."""

    def tensors(self, layer: str, rows: int, columns: int) -> dict[str, Expected]:
        """The tensors of a linear layer with weights [rows, columns], by name.

        Raises:
          WeightsError: if the format does not support that shape.
        """

    def read(
        self,
        layers: Sequence[str],
        shape: tuple[int, int, int],
        tensors: Mapping[str, Tensor],
    ) -> Quantized:
        """The stacked matrices of the named linear layers.

        Raises:
          WeightsError: naming a tensor with invalid values.
        """

    def problem(self, leaf: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""


def read_scales(
    names: Sequence[str], tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> np.ndarray:
    """The scales of a stack of layers, in `shape`.

    Raises:
      WeightsError: if dtypes differ, or values are not finite.
    """
    first = tensors[names[0]]
    scales = aligned_empty((len(names), *first.shape), DTYPES[first.dtype])
    for i, name in enumerate(names):
        if tensors[name].dtype != first.dtype:
            raise WeightsError(
                f"{name} is {tensors[name].dtype}, but {names[0]} {first.dtype}"
            )
        scales[i] = tensors[name].read()
        if not np.isfinite(scales[i]).all():
            raise WeightsError(f"{name} holds values that are not finite")
    return scales.reshape(shape)


def scales_problem(leaf: Quantized, shape: tuple[int, ...]) -> str:
    """Why the scales of a stack cannot be stored; '' if they can."""
    if leaf.scales.shape != shape:
        return f"has scales {leaf.scales.shape}, expected {shape}"
    if leaf.scales.dtype not in FLOATS.values():
        return f"has scales of {leaf.scales.dtype}, not {', '.join(FLOATS)}"
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
