"""W8A8 matrices in files of compressed-tensors (format 'int-quantized').

A linear layer `P` with I inputs and O outputs is `P.weight` int8 [O, I] and
`P.weight_scale` float [O, 1]. The model rounds inputs to int8 with one scale a token
as they come, so the files hold nothing about them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jes.core.codes import Codes
from jes.models.quantized import Quantized
from jes.models.quantized_files import (
    check_setting,
    check_unset,
    read_scales,
    scales_problem,
)
from jes.models.safetensors_files import (
    Expected,
    Tensor,
    aligned_empty,
    copy_transposed,
    dtype_name,
    transposed,
)

FORMAT = "int-quantized"
INT8 = np.dtype(np.int8)

WEIGHTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
}
"""The supported rounding of weights."""

ACTIVATIONS = WEIGHTS | {"strategy": "token", "dynamic": True}
"""The supported rounding of the inputs of linear layers."""

DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}
"""Values of settings that may be left out."""


@dataclasses.dataclass(frozen=True)
class Int8:
    """int8 weights with one scale an output, int8 activations.

    Methods as of `quantized_files.Format`.
    """

    def __str__(self) -> str:
        return "compressed-tensors with int8 weights, a scale for each output"

    def tensors(self, layer: str, rows: int, columns: int) -> dict[str, Expected]:
        """The tensors of a linear layer with weights [rows, columns], by name."""
        dtypes = ("I8", "I32", "I64")
        zero_point = Expected((columns, 1), dtypes, needed=False, zero=True)
        return {
            f"{layer}.weight": Expected((columns, rows), ("I8",)),
            f"{layer}.weight_scale": Expected((columns, 1)),
            f"{layer}.weight_zero_point": zero_point,
        }

    def read(
        self,
        layers: Sequence[str],
        shape: tuple[int, int, int],
        tensors: Mapping[str, Tensor],
    ) -> Quantized:
        """The stacked matrices [L, I, O] of the named linear layers."""
        count, _, columns = shape
        data = aligned_empty(shape, INT8)
        for i, layer in enumerate(layers):
            copy_transposed(tensors[f"{layer}.weight"].read(), data[i])
        names = [f"{layer}.weight_scale" for layer in layers]
        scales = read_scales(names, tensors, (count, 1, columns))
        return Quantized(
            codes=Codes(jax.device_put(data), bits=8, signed=True),
            scales=jax.device_put(scales),
            int8_activations=True,
        )

    def problem(self, leaf: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""
        if not (leaf.int8_activations and leaf.codes.signed and leaf.codes.bits == 8):
            return "is not W8A8"
        if leaf.zeros is not None or leaf.groups is not None:
            return "has zeros or groups, which W8A8 lacks"
        layers, _, columns = leaf.shape
        return scales_problem(leaf, (layers, 1, columns))

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""
        data, scales = leaf.codes.data, leaf.scales

        def tensor(stack: Any) -> Tensor:
            dtype = np.dtype(stack.dtype)
            return Tensor(
                stack.shape[:0:-1],
                dtype_name(dtype),
                lambda: transposed(np.asarray(stack[index]), dtype),
            )

        return {
            f"{layer}.weight": tensor(data),
            f"{layer}.weight_scale": tensor(scales),
        }


def from_config(config: Mapping[str, Any]) -> Int8:
    """Reads `quantization_config`.

    Raises:
      ValueError: naming a setting that is not supported.
    """
    check_setting("format", config.get("format"), FORMAT)
    sparsity = config.get("sparsity_config") or {}
    check_setting("sparsity_config.format", sparsity.get("format", "dense"), "dense")
    check_unset("", config, "kv_cache_scheme", "transform_config")
    foreign = sorted(set(config.get("ignore") or ()) - {"lm_head", "re:.*lm_head"})
    if foreign:
        raise ValueError(f"ignore={foreign!r}: all linear layers must be quantised")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ValueError(f"config_groups={groups!r}: there must be one group")
    ((name, group),) = groups.items()
    path = f"config_groups.{name}."
    check_setting(f"{path}targets", group.get("targets"), ["Linear"])
    check_setting(f"{path}format", group.get("format"), None, FORMAT)
    check_unset(path, group, "output_activations")
    for part, supported in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
        found = group.get(part)
        if not isinstance(found, Mapping):
            raise ValueError(f"{path}{part}={found!r} is not supported")
        for field, wanted in supported.items():
            value = found.get(field, DEFAULTS.get(field))
            check_setting(f"{path}{part}.{field}", value, wanted)
    return Int8()


def to_config() -> dict[str, Any]:
    """The `quantization_config` of W8A8."""
    group = {
        "targets": ["Linear"],
        "weights": dict(WEIGHTS),
        "input_activations": dict(ACTIVATIONS),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
