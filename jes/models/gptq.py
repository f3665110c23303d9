"""Quantised matrices in GPTQ files.

A linear layer `P` with I inputs, O outputs and G groups of inputs is

- `P.qweight` int32 [I * bits / 32, O]: codes of consecutive inputs in a word, the
  first in the lowest bits;
- `P.qzeros` int32 [G, O * bits / 32]: zero points, packed along the outputs, stored
  minus 1 unless the format is 'gptq_v2';
- `P.scales` float [G, O];
- `P.g_idx` int32 [I]: the group of each input.

Words are little-endian, and a byte of `qweight` is a byte of `Codes`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jes.core.codes import BITS, Codes
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
    WeightsError,
    aligned_empty,
    dtype_name,
)

OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is subtracted from zero points when stored, by `checkpoint_format`."""

REFUSED = ("dynamic", "modules_in_block_to_quantize", "lm_head", "is_marlin_format")
"""Settings that make layers differ, or order the words differently."""

UINT8, INT16, INT32 = np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Settings of a GPTQ folder; methods as of `quantized_files.Format`.

    Attributes:
      bits: of a code, 4 or 8.
      group_size: inputs that share a scale; -1 for all.
      symmetric: whether every zero point is the middle code.
      act_order: whether `g_idx` is needed, for groups of inputs that are not
        consecutive (desc_act).
      offset: what is subtracted from zero points when stored.
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

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return 2 ** (self.bits - 1)

    def group_count(self, rows: int) -> int:
        """The number of groups of so many inputs."""
        return 1 if self.group_size == -1 else rows // self.group_size

    def tensors(self, layer: str, rows: int, columns: int) -> dict[str, Expected]:
        """The tensors of a linear layer with weights [rows, columns], by name."""
        per_word = 32 // self.bits
        for count, what in ((rows, "inputs"), (columns, "outputs")):
            if count % per_word:
                raise WeightsError(
                    f"{layer} has {count} {what}, which do not fill words of "
                    f"{per_word} codes: GPTQ with {self.bits} bits cannot store it"
                )
        if self.group_size != -1 and rows % self.group_size:
            raise WeightsError(
                f"{layer} has {rows} inputs, which group_size={self.group_size} "
                "does not divide"
            )
        groups = self.group_count(rows)
        return {
            f"{layer}.qweight": Expected((rows // per_word, columns), ("I32",)),
            f"{layer}.qzeros": Expected((groups, columns // per_word), ("I32",)),
            f"{layer}.scales": Expected((groups, columns)),
            f"{layer}.g_idx": Expected((rows,), ("I32",), needed=self.act_order),
        }

    def read(
        self,
        layers: Sequence[str],
        shape: tuple[int, int, int],
        tensors: Mapping[str, Tensor],
    ) -> Quantized:
        """The stacked matrices [L, I, O] of the named linear layers."""
        count, rows, columns = shape
        grouped = (count, self.group_count(rows), columns)
        data = aligned_empty((count, rows * self.bits // 8, columns), UINT8)
        zeros = aligned_empty(grouped, INT16)
        groups = aligned_empty((count, rows), INT32)
        for i, layer in enumerate(layers):
            words = tensors[f"{layer}.qweight"].read().view(UINT8)
            for byte in range(4):
                data[i, byte::4] = words[:, byte::4]
            zeros[i] = self._read_zeros(f"{layer}.qzeros", tensors)
            groups[i] = self._read_groups(f"{layer}.g_idx", tensors, rows)
        scales = read_scales([f"{layer}.scales" for layer in layers], tensors, grouped)
        in_order = (groups == self._consecutive(rows)).all()
        return Quantized(
            codes=Codes(jax.device_put(data), self.bits),
            scales=jax.device_put(scales),
            zeros=jax.device_put(zeros),
            groups=None if in_order else jax.device_put(groups),
        )

    def problem(self, leaf: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""
        if leaf.zeros is None or leaf.codes.signed or leaf.int8_activations:
            return "is W8A8, not GPTQ"
        if leaf.codes.bits != self.bits:
            return f"has codes of {leaf.codes.bits} bits, not {self.bits}"
        layers, rows, columns = leaf.shape
        if problem := scales_problem(leaf, (layers, self.group_count(rows), columns)):
            return problem
        if leaf.zeros.shape != leaf.scales.shape:
            return f"has zeros {leaf.zeros.shape}, expected {leaf.scales.shape}"
        zeros = np.asarray(leaf.zeros)
        if self.symmetric and (zeros != self.middle).any():
            return "is not symmetric, but sym=True"
        lowest, highest = self.offset, self.offset + 2**self.bits - 1
        if zeros.min() < lowest or zeros.max() > highest:
            return f"has zeros outside of {lowest}..{highest}"
        return ""

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""
        _, rows, columns = leaf.shape

        def groups() -> np.ndarray:
            if leaf.groups is None:
                return self._consecutive(rows)
            return np.ascontiguousarray(leaf.groups[index])

        values: dict[str, tuple[np.dtype, Callable[[], np.ndarray]]] = {
            "qweight": (INT32, partial(_pack_rows, leaf.codes, index)),
            "qzeros": (INT32, partial(self._pack_zeros, leaf, index)),
            "scales": (
                np.dtype(leaf.scales.dtype),
                lambda: np.ascontiguousarray(leaf.scales[index]),
            ),
            "g_idx": (INT32, groups),
        }
        shapes = self.tensors(layer, rows, columns)
        out = {}
        for part, (dtype, read) in values.items():
            name = f"{layer}.{part}"
            out[name] = Tensor(shapes[name].shape, dtype_name(dtype), read)
        return out

    def _read_zeros(self, name: str, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The zero points, int16 [G, O]."""
        packed = tensors[name].read().view(UINT8)
        parts = (packed & 15, packed >> 4) if self.bits == 4 else (packed,)
        stored = np.stack(parts, axis=-1).reshape(len(packed), -1)
        zeros = stored.astype(np.int16) + np.int16(self.offset)
        if self.symmetric and (zeros != self.middle).any():
            raise WeightsError(
                f"{name} is not {self.middle} throughout, but the quantization_config "
                "says sym=True"
            )
        return zeros

    def _pack_zeros(self, leaf: Quantized, index: int) -> np.ndarray:
        """The inverse of `_read_zeros`."""
        assert leaf.zeros is not None
        stored = (np.asarray(leaf.zeros[index]) - self.offset).astype(np.uint8)
        packed = stored[:, 0::2] | stored[:, 1::2] << 4 if self.bits == 4 else stored
        return np.ascontiguousarray(packed).view(np.int32)

    def _consecutive(self, rows: int) -> np.ndarray:
        """The group of each input where groups are of consecutive inputs."""
        return np.arange(rows, dtype=np.int32) // (rows // self.group_count(rows))

    def _read_groups(
        self, name: str, tensors: Mapping[str, Tensor], rows: int
    ) -> np.ndarray:
        """The group of each input, int32 [I].

        Used even where desc_act=False: some writers set that for inputs that were
        reordered after the groups were made.
        """
        if name not in tensors:
            return self._consecutive(rows)
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
    check_unset("", config, *REFUSED)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    check_setting("bits", config.get("bits"), *BITS)
    check_setting("checkpoint_format", version, *OFFSETS)
    check_setting("pack_dtype", config.get("pack_dtype") or "int32", "int32")
    check_setting("sym", config.get("sym", True), True, False)
    check_setting("desc_act", config.get("desc_act", False), True, False)
    size = config.get("group_size")
    if not isinstance(size, int) or not (size == -1 or size > 0):
        raise ValueError(f"group_size={size!r}: must be positive, or -1 for one group")
    return Gptq(
        bits=int(config["bits"]),
        group_size=size,
        symmetric=config.get("sym", True),
        act_order=config.get("desc_act", False),
        offset=OFFSETS[version],
    )


def to_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` of matrices with consecutive groups."""
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


def _pack_rows(codes: Codes, index: int) -> np.ndarray:
    """Words [W, O] of bytes [4 W, O]."""
    data = np.asarray(codes.data[index])
    words = np.empty((data.shape[0] // 4, data.shape[1]), np.int32)
    for byte in range(4):
        words.view(np.uint8)[:, byte::4] = data[byte::4]
    return words
