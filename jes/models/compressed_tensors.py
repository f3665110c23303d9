"""W8A8 matrices in files of compressed-tensors (format 'int-quantized').

A linear layer `P` with I inputs and O outputs is `P.weight` int8 [O, I] and
`P.weight_scale` float [O, 1]. The model rounds inputs to int8 with one scale a token
as they come, so the files hold nothing about them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jes.core.codes import Codes
from jes.models.config import check_setting, check_unset
from jes.models.quantized import Quantized
from jes.models.quantized_files import check_finite, scales_problem
from jes.models.safetensors_files import Expected, transposed

FORMAT = "int-quantized"

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
    """int8 weights with one scale an output, int8 activations; a `Format`."""

    def __str__(self) -> str:
        return "compressed-tensors with int8 weights, a scale for each output"

    def parts(self, rows: int, columns: int) -> dict[str, Expected]:
        """The parts of a matrix [rows, columns]."""
        dtypes = ("I8", "I32", "I64")
        return {
            "weight": Expected((columns, rows), ("I8",)),
            "weight_scale": Expected((columns, 1)),
            "weight_zero_point": Expected((columns, 1), dtypes, False, zero=True),
        }

    def unpack(self, parts: Mapping[str, Any]) -> Quantized:
        """A matrix, of numpy arrays."""
        scales = check_finite("weight_scale", parts["weight_scale"])
        codes = Codes(transposed(parts["weight"]), bits=8, signed=True)
        return Quantized(codes, transposed(scales), int8_activations=True)

    def pack(self, stack: Quantized, index: int, part: str) -> np.ndarray:
        """A part of one matrix of a stack."""
        values = stack.codes.data if part == "weight" else stack.scales
        return transposed(np.asarray(values[index]))

    def problem(self, stack: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""
        codes = stack.codes
        if not (stack.int8_activations and codes.signed and codes.bits == 8):
            return "is not W8A8"
        if stack.zeros is not None or stack.groups is not None:
            return "has zeros or groups, which W8A8 lacks"
        layers, _, columns = stack.shape
        return scales_problem(stack, (layers, 1, columns))


def from_config(config: Mapping[str, Any]) -> Int8:
    """Reads `quantization_config`.

    Raises:
      ValueError: naming a setting that is not supported.
    """
    check_setting("format", config.get("format"), FORMAT)
    sparsity = config.get("sparsity_config") or {}
    check_setting("sparsity_config.format", sparsity.get("format", "dense"), "dense")
    check_unset(config, "kv_cache_scheme", "transform_config")
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
    check_unset(group, "output_activations", path=path)
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
