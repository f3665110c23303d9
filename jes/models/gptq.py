"""Quantised matrices as GPTQ files hold them.

A linear layer `P` with I inputs, O outputs and G groups of inputs is

- `P.qweight` int32 [I * bits / 32, O]: codes of consecutive inputs in a word, the
  first in the lowest bits;
- `P.qzeros` int32 [G, O * bits / 32]: the codes of weight zero, packed along the
  outputs, less one but for the format 'gptq_v2';
- `P.scales` float [G, O];
- `P.g_idx` int32 [I]: the group of each input.

A word is four bytes here, lowest first, and a byte of `qweight` is a byte of `Codes`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jes.core.codes import BITS, Codes
from jes.models.quantized import Quantized
from jes.models.safetensors_files import (
    DTYPES,
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    dtype_name,
    read_finite,
    room,
)

VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format`, and what the codes of weight zero are stored less."""

REFUSED = ("dynamic", "modules_in_block_to_quantize", "lm_head", "is_marlin_format")
"""Settings that make layers differ, or words of another order."""

UINT8, INT16, INT32 = np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Settings of a GPTQ folder.

    Attributes:
      bits: of a code, 4 or 8.
      group_size: inputs that share a scale; -1 for all.
      symmetric: whether every code of weight zero is the middle one.
      act_order: whether inputs are in groups in an order of their own (desc_act).
      offset: what the codes of weight zero are stored less.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    offset: int

    def __str__(self) -> str:
        size = self.group_size
        groups = "one group" if size == -1 else f"groups of {size}"
        order = ", desc_act" if self.act_order else ""
        return f"GPTQ with {self.bits} bits and {groups}{order}"

    def group_count(self, rows: int) -> int:
        """How many groups so many inputs are in."""
        return 1 if self.group_size == -1 else rows // self.group_size

    def tensors(
        self, layer: str, rows: int, columns: int, *, biased: bool
    ) -> dict[str, Expected]:
        """The tensors of a linear layer with weights [rows, columns].

        Raises:
          WeightsError: if the format cannot hold that shape.
        """
        per_word = 32 // self.bits
        for count, what in ((rows, "inputs"), (columns, "outputs")):
            if count % per_word:
                raise WeightsError(
                    f"{layer} has {count} {what}, which do not fill words of "
                    f"{per_word} codes: GPTQ with {self.bits} bits cannot hold it"
                )
        if self.group_size != -1 and rows % self.group_size:
            raise WeightsError(
                f"{layer} has {rows} inputs, which group_size={self.group_size} "
                "does not divide"
            )
        groups = self.group_count(rows)
        tensors = {
            "qweight": Expected((rows // per_word, columns), ("I32",)),
            "qzeros": Expected((groups, columns // per_word), ("I32",)),
            "scales": Expected((groups, columns)),
            "g_idx": Expected((rows,), ("I32",), needed=self.act_order),
        }
        if not biased:  # AutoGPTQ gave a bias to every layer
            tensors["bias"] = Expected((columns,), needed=False, zero=True)
        return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}

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
        rows, columns = shape[1:]
        grouped = (shape[0], self.group_count(rows), columns)
        data = room((shape[0], rows * self.bits // 8, columns), UINT8)
        scales = room(grouped, _common_dtype(layers, tensors))
        zeros = room(grouped, INT16)
        groups = room(shape[:2], INT32)
        for i, layer in enumerate(layers):
            _unpack_rows(tensors[f"{layer}.qweight"].read(), data[i])
            scales[i] = read_finite(f"{layer}.scales", tensors)
            zeros[i] = self._read_zeros(f"{layer}.qzeros", tensors)
            groups[i] = self._read_groups(f"{layer}.g_idx", tensors, rows)
        in_order = (groups == self._groups_in_order(rows)).all()
        return Quantized(
            codes=Codes(jax.device_put(data), self.bits),
            scales=jax.device_put(scales),
            zeros=jax.device_put(zeros),
            groups=None if in_order else jax.device_put(groups),
        )

    def problems(self, leaf: Quantized) -> list[str]:
        """Why the format cannot hold a stack of matrices; nothing if it can."""
        if leaf.zeros is None or leaf.codes.signed or leaf.int8_activations:
            return ["is W8A8, not GPTQ"]
        if leaf.codes.bits != self.bits:
            return [f"has codes of {leaf.codes.bits} bits, not {self.bits}"]
        layers, rows, columns = leaf.shape
        if leaf.scales.shape != (layers, self.group_count(rows), columns):
            return [f"has scales {leaf.scales.shape}, not {self}"]
        if leaf.zeros.shape != leaf.scales.shape:
            return [f"has zeros {leaf.zeros.shape}, not those of its scales"]
        if leaf.scales.dtype not in FLOATS.values():
            return [f"has scales of {leaf.scales.dtype}, not {', '.join(FLOATS)}"]
        zeros = np.asarray(leaf.zeros)
        if self.symmetric and (zeros != 2 ** (self.bits - 1)).any():
            return ["is not symmetric, but sym=True"]
        lowest, highest = self.offset, self.offset + 2**self.bits - 1
        if zeros.min() < lowest or zeros.max() > highest:
            return [f"has zeros outside of {lowest}..{highest}"]
        return []

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""
        _, rows, columns = leaf.shape
        shapes = self.tensors(layer, rows, columns, biased=True)
        reads = {
            "qweight": (INT32, partial(_pack_rows, leaf.codes, index)),
            "qzeros": (INT32, partial(self._pack_zeros, leaf, index)),
            "scales": (leaf.scales.dtype, partial(_layer, leaf.scales, index)),
            "g_idx": (INT32, partial(self._groups, leaf, index)),
        }
        return {
            f"{layer}.{name}": Tensor(
                shapes[f"{layer}.{name}"].shape, dtype_name(dtype), read
            )
            for name, (dtype, read) in reads.items()
        }

    def _read_zeros(self, name: str, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The codes of weight zero, int16 [G, O]."""
        packed = tensors[name].read().view(np.uint8)
        parts = (packed & 15, packed >> 4) if self.bits == 4 else (packed,)
        stored = np.stack(parts, axis=-1).reshape(len(packed), -1)
        zeros = stored.astype(np.int16) + np.int16(self.offset)
        if self.symmetric and (zeros != 2 ** (self.bits - 1)).any():
            raise WeightsError(
                f"{name} is not {2 ** (self.bits - 1)} throughout, but the "
                "quantization_config says sym=True"
            )
        return zeros

    def _pack_zeros(self, leaf: Quantized, index: int) -> np.ndarray:
        """The reverse."""
        assert leaf.zeros is not None
        stored = (np.asarray(leaf.zeros[index]) - self.offset).astype(np.uint8)
        packed = stored[:, 0::2] | stored[:, 1::2] << 4 if self.bits == 4 else stored
        return np.ascontiguousarray(packed).view(np.int32)

    def _groups_in_order(self, rows: int) -> np.ndarray:
        return np.arange(rows, dtype=np.int32) // (rows // self.group_count(rows))

    def _groups(self, leaf: Quantized, index: int) -> np.ndarray:
        if leaf.groups is None:
            return self._groups_in_order(leaf.shape[1])
        return _layer(leaf.groups, index)

    def _read_groups(
        self, name: str, tensors: Mapping[str, Tensor], rows: int
    ) -> np.ndarray:
        """The group of each input, int32 [I].

        They count even where desc_act=False: some writers set it for groups that were
        made first and inputs that were put in order afterwards.
        """
        if name not in tensors:
            return self._groups_in_order(rows)
        groups, count = tensors[name].read(), self.group_count(rows)
        if groups.min() < 0 or groups.max() >= count:
            raise WeightsError(
                f"{name} names groups {groups.min()} to {groups.max()}, but with "
                f"{rows} inputs there are groups 0 to {count - 1} ({self})"
            )
        sizes = np.bincount(groups, minlength=count)
        if (sizes != rows // count).any():
            raise WeightsError(
                f"{name} has groups of {sizes.min()} to {sizes.max()} inputs, not all "
                f"of {rows // count}"
            )
        return groups


def from_config(config: Mapping[str, Any]) -> Gptq:
    """Reads `quantization_config`.

    Raises:
      ValueError: naming a setting that is not supported.
    """
    for field in REFUSED:
        if config.get(field):
            raise ValueError(f"{field}={config[field]!r} is not supported")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    settings = {
        "bits": (config.get("bits"), BITS),
        "checkpoint_format": (version, tuple(VERSIONS)),
        "pack_dtype": (config.get("pack_dtype") or "int32", ("int32",)),
        "sym": (config.get("sym", True), (True, False)),
        "desc_act": (config.get("desc_act", False), (True, False)),
    }
    for field, (value, supported) in settings.items():
        if value not in supported:
            names = ", ".join(map(str, supported))
            raise ValueError(f"{field}={value!r} is not supported; supported: {names}")
    size = config.get("group_size")
    if not isinstance(size, int) or not (size == -1 or size > 0):
        raise ValueError(f"group_size={size!r}: must be positive, or -1 for one group")
    return Gptq(
        bits=int(config["bits"]),
        group_size=size,
        symmetric=config.get("sym", True),
        act_order=config.get("desc_act", False),
        offset=VERSIONS[version],
    )


def to_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` of matrices with groups in order."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "static_groups": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def _common_dtype(layers: Sequence[str], tensors: Mapping[str, Tensor]) -> np.dtype:
    """Dtype of the scales, which a stack can have only one of."""
    first = f"{layers[0]}.scales"
    for layer in layers:
        name = f"{layer}.scales"
        if tensors[name].dtype != tensors[first].dtype:
            raise WeightsError(
                f"{name} is {tensors[name].dtype}, but {first} {tensors[first].dtype}"
            )
    return DTYPES[tensors[first].dtype]


def _unpack_rows(words: np.ndarray, data: np.ndarray) -> None:
    """Bytes [4 W, O] of words [W, O]."""
    parts = words.view(np.uint8)
    for byte in range(4):
        data[byte::4] = parts[:, byte::4]


def _pack_rows(codes: Codes, index: int) -> np.ndarray:
    """The reverse."""
    data = np.asarray(codes.data[index])
    words = np.empty((data.shape[0] // 4, data.shape[1]), np.int32)
    for byte in range(4):
        words.view(np.uint8)[:, byte::4] = data[byte::4]
    return words


def _layer(stack: Any, index: int) -> np.ndarray:
    return np.ascontiguousarray(stack[index])
