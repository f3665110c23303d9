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
from collections.abc import Mapping
from typing import Any

import numpy as np

from jes.core.codes import BITS, Codes
from jes.models.config import check_setting, check_unset
from jes.models.quantized import Quantized
from jes.models.quantized_files import check_finite, scales_problem
from jes.models.safetensors_files import Expected

OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is subtracted from zero points when stored, by `checkpoint_format`."""

REFUSED = ("dynamic", "lm_head", "is_marlin_format")
"""Settings that make layers differ, or order the words differently."""
MODULES = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}
"""The matrices of a layer, all of which must be quantised."""


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Settings of a GPTQ folder, a `quantized_files.Format`.

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

    def parts(self, rows: int, columns: int) -> dict[str, Expected]:
        """The parts of a matrix [rows, columns]."""
        per_word = 32 // self.bits
        for count, what in ((rows, "inputs"), (columns, "outputs")):
            if count % per_word:
                raise ValueError(
                    f"{count} {what}, which do not fill words of {per_word} codes: "
                    f"GPTQ with {self.bits} bits cannot store it"
                )
        if self.group_size != -1 and rows % self.group_size:
            raise ValueError(
                f"{rows} inputs, which group_size={self.group_size} does not divide"
            )
        groups = self.group_count(rows)
        return {
            "qweight": Expected((rows // per_word, columns), ("I32",)),
            "qzeros": Expected((groups, columns // per_word), ("I32",)),
            "scales": Expected((groups, columns)),
            "g_idx": Expected((rows,), ("I32",), needed=self.act_order),
        }

    def unpack(self, parts: Mapping[str, Any]) -> Quantized:
        """A matrix, of numpy arrays."""
        words = parts["qweight"].view(np.uint8)
        data: Any = np.empty((4 * words.shape[0], words.shape[1] // 4), np.uint8)
        for byte in range(4):
            data[byte::4] = words[:, byte::4]
        packed = parts["qzeros"].view(np.uint8)
        halves = (packed & 15, packed >> 4) if self.bits == 4 else (packed,)
        stored = np.stack(halves, axis=-1).reshape(len(packed), -1)
        zeros: Any = stored.astype(np.int16)
        zeros += self.offset
        if self.symmetric and (zeros != self.middle).any():
            raise ValueError(
                f"qzeros is not {self.middle} throughout, but the quantization_config "
                "says sym=True"
            )
        rows = len(data) * 8 // self.bits
        groups = parts.get("g_idx", self._consecutive(rows))
        self._check_groups(groups)
        scales = check_finite("scales", parts["scales"])
        return Quantized(Codes(data, self.bits), scales, zeros, groups)

    def pack(self, stack: Quantized, index: int, part: str) -> np.ndarray:
        """A part of one matrix of a stack."""
        if part == "qweight":
            data = np.asarray(stack.codes.data[index])
            words = np.empty((data.shape[0] // 4, data.shape[1]), np.int32)
            for byte in range(4):
                words.view(np.uint8)[:, byte::4] = data[byte::4]
            return words
        if part == "qzeros":
            assert stack.zeros is not None
            zeros: Any = np.asarray(stack.zeros[index])
            stored = (zeros - self.offset).astype(np.uint8)
            if self.bits == 4:
                stored = stored[:, 0::2] | stored[:, 1::2] << 4
            return np.ascontiguousarray(stored).view(np.int32)
        if part == "scales":
            return np.ascontiguousarray(stack.scales[index])
        if stack.groups is None:
            return self._consecutive(stack.shape[1])
        return np.ascontiguousarray(stack.groups[index])

    def problem(self, stack: Quantized) -> str:
        """Why the format cannot store a stack of matrices; '' if it can."""
        if stack.zeros is None or stack.codes.signed or stack.int8_activations:
            return "is W8A8, not GPTQ"
        if stack.codes.bits != self.bits:
            return f"has codes of {stack.codes.bits} bits, not {self.bits}"
        layers, rows, columns = stack.shape
        if problem := scales_problem(stack, (layers, self.group_count(rows), columns)):
            return problem
        if stack.zeros.shape != stack.scales.shape:
            return f"has zeros {stack.zeros.shape}, expected {stack.scales.shape}"
        zeros = np.asarray(stack.zeros)
        if self.symmetric and (zeros != self.middle).any():
            return "is not symmetric, but sym=True"
        lowest, highest = self.offset, self.offset + 2**self.bits - 1
        if zeros.min() < lowest or zeros.max() > highest:
            return f"has zeros outside of {lowest}..{highest}"
        return ""

    def _consecutive(self, rows: int) -> np.ndarray:
        """The group of each input where groups are of consecutive inputs."""
        return np.arange(rows, dtype=np.int32) // (rows // self.group_count(rows))

    def _check_groups(self, groups: np.ndarray) -> None:
        """Groups must be of equal size.

        They count even where desc_act=False: some writers set that for inputs that
        were reordered after the groups were made.
        """
        rows = len(groups)
        count = self.group_count(rows)
        if groups.min() < 0 or groups.max() >= count:
            raise ValueError(
                f"g_idx names groups {groups.min()} to {groups.max()}, but with {rows} "
                f"inputs there are groups 0 to {count - 1} ({self})"
            )
        sizes = np.bincount(groups, minlength=count)
        if (sizes != rows // count).any():
            raise ValueError(
                f"g_idx has groups of {sizes.min()} to {sizes.max()} inputs, not all "
                f"of {rows // count}"
            )


def from_config(config: Mapping[str, Any]) -> Gptq:
    """Reads `quantization_config`.

    Raises:
      ValueError: naming a setting that is not supported.
    """
    check_unset(config, *REFUSED)
    blocks = config.get("modules_in_block_to_quantize")
    if blocks and {name for block in blocks for name in block} != MODULES:
        check_unset(config, "modules_in_block_to_quantize")
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
