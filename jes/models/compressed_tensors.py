"""W8A8 matrices as compressed-tensors files hold them (format 'int-quantized').

A linear layer `P` with I inputs and O outputs is `P.weight` int8 [O, I] and
`P.weight_scale` float [O, 1]. Inputs are rounded to int8 as they come, with a scale
for each token, so that nothing about them is in the files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jes.core.codes import Codes
from jes.models.quantized import Quantized
from jes.models.safetensors_files import (
    DTYPES,
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    copy_transposed,
    dtype_name,
    read_finite,
    room,
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
"""How weights are rounded."""

ACTIVATIONS = WEIGHTS | {"strategy": "token", "dynamic": True}
"""How the inputs of linear layers are rounded."""

DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}
"""What settings are that are not there."""


@dataclasses.dataclass(frozen=True)
class Int8:
    """int8 weights with a scale for each output, int8 activations."""

    def __str__(self) -> str:
        return "compressed-tensors with int8 weights, a scale for each output"

    def tensors(
        self, layer: str, rows: int, columns: int, *, biased: bool
    ) -> dict[str, Expected]:
        """The tensors of a linear layer with weights [rows, columns]."""
        del biased
        zero_point = Expected(
            (columns, 1), ("I8", "I32", "I64"), needed=False, zero=True
        )
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
        """The stacked matrices [L, I, O] of the named linear layers.

        Raises:
          WeightsError: naming a tensor whose values cannot be meant.
        """
        first = tensors[f"{layers[0]}.weight_scale"]
        data = room(shape, INT8)
        scales = room((shape[0], 1, shape[2]), DTYPES[first.dtype])
        for i, layer in enumerate(layers):
            name = f"{layer}.weight_scale"
            if tensors[name].dtype != first.dtype:
                raise WeightsError(
                    f"{name} is {tensors[name].dtype}, but that of {layers[0]} is "
                    f"{first.dtype}"
                )
            copy_transposed(tensors[f"{layer}.weight"].read(), data[i])
            scales[i] = read_finite(name, tensors).T
        return Quantized(
            codes=Codes(jax.device_put(data), bits=8, signed=True),
            scales=jax.device_put(scales),
            int8_activations=True,
        )

    def problems(self, leaf: Quantized) -> list[str]:
        """Why the format cannot hold a stack of matrices; nothing if it can."""
        if not (leaf.int8_activations and leaf.codes.signed and leaf.codes.bits == 8):
            return ["is not W8A8"]
        layers, _, columns = leaf.shape
        if leaf.zeros is not None or leaf.groups is not None:
            return ["has zeros or groups, which W8A8 lacks"]
        if leaf.scales.shape != (layers, 1, columns):
            return [f"has scales {leaf.scales.shape}, not one for each output"]
        if leaf.scales.dtype not in FLOATS.values():
            return [f"has scales of {leaf.scales.dtype}, not {', '.join(FLOATS)}"]
        return []

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""
        _, rows, columns = leaf.shape
        return {
            f"{layer}.weight": Tensor(
                (columns, rows), "I8", partial(_transposed, leaf.codes.data, index)
            ),
            f"{layer}.weight_scale": Tensor(
                (columns, 1),
                dtype_name(leaf.scales.dtype),
                partial(_transposed, leaf.scales, index),
            ),
        }


def from_config(config: Mapping[str, Any]) -> Int8:
    """Reads `quantization_config`.

    Raises:
      ValueError: naming a setting that is not supported.
    """
    if config.get("format") != FORMAT:
        raise ValueError(f"format={config.get('format')!r}: supported is {FORMAT!r}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config={sparsity!r} is not supported")
    _refuse("", config, "kv_cache_scheme", "transform_config")
    foreign = sorted(set(config.get("ignore") or ()) - {"lm_head", "re:.*lm_head"})
    if foreign:
        raise ValueError(f"ignore={foreign!r}: all linear layers have to be quantised")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ValueError(f"config_groups={groups!r}: there has to be one group")
    ((name, group),) = groups.items()
    path = f"config_groups.{name}."
    if group.get("targets") != ["Linear"]:
        targets = group.get("targets")
        raise ValueError(f"{path}targets={targets!r}: supported is ['Linear']")
    if group.get("format") not in (None, FORMAT):
        raise ValueError(f"{path}format={group['format']!r}: supported is {FORMAT!r}")
    _refuse(path, group, "output_activations")
    _check(f"{path}weights", group.get("weights"), WEIGHTS)
    _check(f"{path}input_activations", group.get("input_activations"), ACTIVATIONS)
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


def _refuse(path: str, config: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if config.get(field):
            raise ValueError(f"{path}{field}={config[field]!r} is not supported")


def _check(path: str, found: Any, supported: Mapping[str, Any]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}={found!r} is not supported")
    for field, wanted in supported.items():
        value = found.get(field, DEFAULTS.get(field))
        if value != wanted:
            raise ValueError(f"{path}.{field}={value!r}: supported is {wanted!r}")


def _transposed(stack: Any, index: int) -> np.ndarray:
    values = np.asarray(stack[index])
    out = np.empty(values.shape[::-1], values.dtype)
    copy_transposed(values, out)
    return out
