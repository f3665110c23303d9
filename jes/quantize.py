"""Rounds the weights of a model to codes of 4 or 8 bits, each to the nearest.

    python -m jes.quantize --model=tiny --out=FOLDER --bits=4 --group-size=32
    python -m jes.quantize --model=Qwen/Qwen2.5-0.5B-Instruct --out=FOLDER --w8a8

Only the matrices of the layers are rounded, not embedding, norms, biases and head. The
folder is in the format of GPTQ (version 1), or with --w8a8 of compressed-tensors (int8
weights, int8 activations), which vLLM and `jes.load` read.

Deliberate simplification: no calibration data. GPTQ itself adjusts the weights that it
rounds later to compensate for earlier ones, and loses less at 4 bits.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jes.config import DTYPES
from jes.core.codes import BITS, Codes, pack
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.command_line import guarded
from jes.io.console import console
from jes.models import compressed_tensors, gptq
from jes.models.partition import place
from jes.models.quantized import Quantized, dequantize
from jes.models.safetensors_files import locate, weight_files
from jes.models.weights import Pretrained, is_kernel, load

GROUP_SIZE = 128
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
"""Smallest scale: that of groups of zeros, or of values that round to 0 in float16."""

FORMS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},
    "int8": {"bits": 8},
    "w8a8": {"bits": 8, "int8_activations": True},
}
"""What `config.quantize` can be, as settings of `quantize`."""


def quantize(
    params: Mapping[str, Any],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    int8_activations: bool = False,
) -> dict[str, Any]:
    """Rounds the kernels of the layers to the nearest code; all else is unchanged.

    Symmetric: (code - 2^(bits-1)) * scale, where the scale is the largest absolute
    value of a group over 2^(bits-1) - 1. Otherwise (code - zero) * scale, where the
    codes cover the values of a group and 0. Scales are rounded to float16 before the
    codes are computed. With `int8_activations`: code * scale with codes -127..127 and a
    float32 scale for each output.

    Args:
      params: parameters with stacked layers, floats.
      bits: 4 or 8.
      group_size: how many inputs share a scale for each output; -1 for all. By default
        128, or all with `int8_activations`.
      symmetric: whether 0 is the middle code of every group.
      int8_activations: W8A8, which needs 8 bits, no groups and symmetry.

    Raises:
      InputError: for settings that do not go together, a group size that does not
        divide the inputs of a layer, or weights that are quantised, not finite or too
        large.
    """
    if is_quantized(params):
        raise InputError("the weights are quantised already: leave out `quantize`")
    form: dict[str, Any] = {"bits": bits, "group_size": group_size}
    form |= {"symmetric": symmetric, "int8_activations": int8_activations}
    leaves = flatten_dict(dict(params), sep="/")
    for path in filter(is_kernel, leaves):
        leaf = rounded(path, leaves[path], **form)
        if not jnp.isfinite(leaf.scales).all():
            raise InputError(f"{path} holds weights that are not finite, or too large")
        leaves[path] = leaf
    return unflatten_dict(leaves, sep="/")


def rounded(
    path: str,
    leaf: jax.Array,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    int8_activations: bool = False,
) -> Quantized:
    """A stack of kernels [L, I, O] as codes; settings and errors as of `quantize`."""
    if bits not in BITS:
        raise InputError(f"bits must be one of {BITS}, not {bits}")
    if int8_activations and (bits, symmetric) != (8, True):
        raise InputError("int8_activations take symmetric weights of 8 bits")
    if int8_activations and group_size not in (None, -1):
        raise InputError(
            f"int8_activations take one scale an output, not groups of {group_size}"
        )
    if int8_activations:
        return _round_channels(leaf)
    rows = leaf.shape[1]
    size = GROUP_SIZE if group_size is None else group_size
    size = rows if size == -1 else size
    if size < 1 or rows % size:
        raise InputError(
            f"{path} has {rows} inputs, which group_size={size} does not divide"
        )
    return _round_groups(leaf, bits, size, symmetric)


def rounding_error(params: Mapping[str, Any], quantized: Mapping[str, Any]) -> float:
    """RMS of the rounding errors over the RMS of the weights that were rounded."""
    before, after = (flatten_dict(dict(p), sep="/") for p in (params, quantized))
    sums = np.zeros(2)
    for path, leaf in after.items():
        for i in range(leaf.shape[0] if isinstance(leaf, Quantized) else 0):
            sums += _squares(before[path][i], jax.tree.map(lambda x, i=i: x[i], leaf))
    return float((sums[0] / sums[1]) ** 0.5) if sums[1] else 0.0


@jax.jit
def _squares(before: jax.Array, after: Quantized) -> tuple[jax.Array, jax.Array]:
    before = before.astype(jnp.float32)
    return ((dequantize(after) - before) ** 2).sum(), (before**2).sum()


@partial(jax.jit, static_argnames=("bits", "size", "symmetric"))
def _round_groups(stack: jax.Array, bits: int, size: int, symmetric: bool) -> Quantized:
    """A stack [L, I, O] of floats, in groups of `size` inputs."""
    highest = 2**bits - 1

    def one(matrix: jax.Array) -> Quantized:
        rows, columns = matrix.shape
        groups = matrix.astype(jnp.float32).reshape(rows // size, size, columns)
        if symmetric:
            spread = jnp.abs(groups).max(1) / (highest // 2)
            scales = _stored_scales(spread)
            zeros = jnp.full(scales.shape, highest // 2 + 1, jnp.int16)
        else:
            top = jnp.maximum(groups.max(1), 0)
            # A zero point of 0 would be stored as -1: keep at least one code below.
            bottom = jnp.minimum(groups.min(1), -top / (highest - 1))
            scales = _stored_scales((top - bottom) / highest)
            zeros = jnp.round(-bottom / scales.astype(jnp.float32))
            zeros = jnp.clip(zeros, 1, highest).astype(jnp.int16)
        steps = jnp.round(groups / scales[:, None].astype(jnp.float32))
        values = jnp.clip(steps + zeros[:, None], 0, highest).astype(jnp.uint8)
        return Quantized(pack(values.reshape(rows, columns), bits), scales, zeros)

    return jax.lax.map(one, stack)


def _stored_scales(scales: jax.Array) -> jax.Array:
    return jnp.maximum(scales.astype(jnp.float16), jnp.float16(SMALLEST))


@jax.jit
def _round_channels(stack: jax.Array) -> Quantized:
    """A stack [L, I, O] of floats, for int8 activations."""

    def one(matrix: jax.Array) -> Quantized:
        matrix = matrix.astype(jnp.float32)
        scales = jnp.abs(matrix).max(0, keepdims=True) / 127
        scales = jnp.where(scales == 0, SMALLEST, scales)
        codes = jnp.clip(jnp.round(matrix / scales), -127, 127).astype(jnp.int8)
        return Quantized(Codes(codes, 8, signed=True), scales, int8_activations=True)

    return jax.lax.map(one, stack)


def quantize_model(pretrained: Pretrained, **settings: Any) -> Pretrained:
    """A model with rounded weights and a config.json that says so; see `quantize`."""
    params = quantize(pretrained.params, **settings)
    described = compressed_tensors.to_config()
    if not settings.get("int8_activations"):
        size = settings.get("group_size") or GROUP_SIZE
        described = gptq.to_config(
            settings["bits"], size, settings.get("symmetric", True)
        )
    hf_config = {**pretrained.hf_config, "quantization_config": described}
    return dataclasses.replace(pretrained, params=params, hf_config=hf_config)


def load_base(
    name: str,
    form: str = "",
    group_size: int = GROUP_SIZE,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Pretrained:
    """The model that a run starts from: of float32 weights, or quantised.

    Args:
      name, mesh: as in `jes.load`.
      form: one of `FORMS`, to round a float model; '' for the model as stored.
      group_size: of int4 and int8.
      dtype: of the floats of a quantised model, which are not trained.

    Raises:
      InputError: for an unknown form, or weights that cannot be rounded.
    """
    if form and form not in FORMS:
        raise InputError(f"weights are rounded to one of {(*FORMS,)}, not {form!r}")
    pretrained = load(name, mesh=None if form else mesh)
    if form:
        size = None if form == "w8a8" else group_size
        pretrained = quantize_model(pretrained, group_size=size, **FORMS[form])
    if not is_quantized(pretrained.params):
        return pretrained
    params = with_dtype(pretrained.params, jnp.dtype(dtype))
    params = place(params, mesh)
    return dataclasses.replace(pretrained, params=params)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="folder, hub id, or 'tiny'")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--bits", type=int, choices=BITS, help="by default 4")
    parser.add_argument(
        *("--group-size", "--group_size"), type=int, help="of inputs; -1 for all"
    )
    parser.add_argument("--asymmetric", action="store_true", help="a zero a group")
    parser.add_argument("--w8a8", action="store_true", help="int8 activations too")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of all else; by default that of the model"
    )
    args = parser.parse_args()
    guarded(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Rounds a model, and prints the error and the size of the files."""
    folder = locate(args.model)
    pretrained = load(folder)
    rounded = quantize_model(
        pretrained,
        bits=args.bits or (8 if args.w8a8 else 4),
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        int8_activations=args.w8a8,
    )
    rounded.save(args.out, dtype=args.dtype or pretrained.stored_dtype)
    before, after = (
        sum(path.stat().st_size for path in weight_files(f)) / 1e6
        for f in (folder, args.out)
    )
    console.print(
        f"model in {args.out}: {after:.2f} MB of weights, {before / after:.2f} times "
        f"less than the {before:.2f} MB of {folder}"
    )
    error = rounding_error(pretrained.params, rounded.params)
    console.print(f"RMS rounding error: {100 * error:.2f} % of the RMS of the weights")


if __name__ == "__main__":
    main()
