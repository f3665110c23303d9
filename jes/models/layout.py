"""Which tensors of a model folder hold which leaf of the parameters.

A stacked leaf has one tensor a layer; a quantised one has several, and its format says
which: `jes.models.gptq`, `jes.models.compressed_tensors`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jes.models import compressed_tensors, gptq
from jes.models.config import ModelConfig
from jes.models.quantized import Quantized
from jes.models.qwen import Decoder
from jes.models.safetensors_files import (
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    copy_transposed,
    dtype_name,
    room,
)

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Path of a leaf, and its tensor's name."""


class Format(Protocol):
    """How files hold the matrices of linear layers, [I, O] or stacked [L, I, O]."""

    def tensors(
        self, layer: str, rows: int, columns: int, *, biased: bool
    ) -> dict[str, Expected]:
        """The tensors of a linear layer by their names; what is there and what may be.

        Raises:
          WeightsError: if the format cannot hold that shape.
        """

    def read(
        self,
        layers: Sequence[str],
        shape: tuple[int, int, int],
        tensors: Mapping[str, Tensor],
    ) -> Quantized:
        """The stacked matrices of the named linear layers.

        Raises:
          WeightsError: naming a tensor whose values cannot be meant.
        """

    def problems(self, leaf: Quantized) -> list[str]:
        """Why the format cannot hold a stack of matrices; nothing if it can."""

    def write(self, layer: str, leaf: Quantized, index: int) -> dict[str, Tensor]:
        """The tensors of a linear layer, matrix `index` of the stack `leaf`."""


FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": gptq.from_config,
    "compressed-tensors": compressed_tensors.from_config,
}
"""`quant_method`, and what reads the rest of `quantization_config`."""


def quantized_format(hf_config: Mapping[str, Any]) -> Format | None:
    """The format of quantised weights; None where config.json speaks of none.

    Raises:
      ValueError: naming a setting of `quantization_config` that is not supported.
    """
    settings = hf_config.get("quantization_config")
    if not settings:
        return None
    try:
        method = settings.get("quant_method")
        if method not in FORMATS:
            raise ValueError(
                f"quant_method={method!r} is not supported; supported: "
                f"{', '.join(FORMATS)}"
            )
        return FORMATS[method](settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"quantization_config: {error}") from error


@functools.cache
def leaf_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every leaf of the parameters, by its path ('layers/mlp/up/kernel')."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    leaves = flatten_dict(variables["params"], sep="/")
    return MappingProxyType({path: leaf.shape for path, leaf in leaves.items()})


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a float folder, by its Hugging Face name."""
    return {n: tensor.shape for n, tensor in expected_tensors(config, None).items()}


def expected_tensors(
    config: ModelConfig, quantized: Format | None
) -> dict[str, Expected]:
    """What the tensors of a folder are to be, by their Hugging Face names.

    Raises:
      WeightsError: if the format cannot hold the shapes of the model.
    """
    expected: dict[str, Expected] = {}
    leaves = leaf_shapes(config)
    for path, shape in leaves.items():
        one = shape[1:] if _stacked(path) else shape
        for name in _tensor_names(path, shape):
            if quantized and is_kernel(path):
                biased = path.replace("kernel", "bias") in leaves
                rows, columns = one
                layer = _layer_name(name)
                expected |= quantized.tensors(layer, rows, columns, biased=biased)
            else:
                expected[name] = Expected(one[::-1] if _transposed(path) else one)
    return expected


def check_tensors(
    what: str,
    config: ModelConfig,
    quantized: Format | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises one `WeightsError` for all tensors that are not as they are to be."""

    def harmless(name: str) -> bool:
        # Old files hold the rotary frequencies; tied ones may hold the head twice.
        tied_head = name == "lm_head.weight" and config.tie_word_embeddings
        return tied_head or name.endswith("rotary_emb.inv_freq")

    expected = expected_tensors(config, quantized)
    found = {name: t for name, t in tensors.items() if not harmless(name)}
    problems = []
    for name, tensor in found.items():
        wanted = expected.get(name, Expected(tensor.shape))
        if tensor.dtype not in wanted.dtypes:
            problems.append(
                f"dtype: {name} is {tensor.dtype}, expected {_one_of(wanted.dtypes)}"
            )
        elif wanted.zero and tensor.read().any():
            problems.append(f"values: {name} is to be all zero, but is not")
    needed = {n: e.shape for n, e in expected.items() if e.needed or n in found}
    check(what, needed, {name: t.shape for name, t in found.items()}, problems)


def check_leaves(
    config: ModelConfig, quantized: Format | None, leaves: Mapping[str, Any]
) -> None:
    """Raises one `WeightsError` for all leaves that files cannot hold."""
    problems = []
    for path, leaf in leaves.items():
        if isinstance(leaf, Quantized) != bool(quantized and is_kernel(path)):
            has = "quantised" if isinstance(leaf, Quantized) else "not quantised"
            says = quantized or "floats"
            problems.append(f"{path} is {has}, but the config says {says}")
        elif isinstance(leaf, Quantized) and quantized:
            problems += [f"{path} {problem}" for problem in quantized.problems(leaf)]
    found = {path: leaf.shape for path, leaf in leaves.items()}
    what = "the parameters do not fit the config"
    check(what, leaf_shapes(config), found, problems)
    expected_tensors(config, quantized)


def check(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    problems: list[str],
) -> None:
    """Raises one error for everything that is missing, unexpected or misshapen."""
    problems = [
        *problems,
        *(f"missing: {n} {expected[n]}" for n in expected if n not in found),
        *(f"unexpected: {n} {found[n]}" for n in found if n not in expected),
        *(
            f"shape: {n} is {found[n]}, expected {expected[n]}"
            for n in expected
            if n in found and found[n] != expected[n]
        ),
    ]
    if problems:
        raise WeightsError("\n  ".join([f"{what}:", *problems]))


def read_leaf(
    path: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    quantized: Format | None,
    sharding: Any = None,
) -> Any:
    """One leaf on the device, filled tensor by tensor.

    Args:
      path, shape: of the leaf.
      tensors: those of the folder.
      dtype: of a float leaf.
      quantized: the format of quantised leaves.
      sharding: where a float leaf goes to; by default the default device.
    """
    names = _tensor_names(path, shape)
    if quantized and is_kernel(path):
        layers, rows, columns = shape
        stack = (layers, rows, columns)
        return quantized.read([_layer_name(name) for name in names], stack, tensors)
    leaf = room(shape, dtype)
    for row, name in zip(leaf if _stacked(path) else leaf[None], names, strict=True):
        values = tensors[name].read()
        if _transposed(path):
            copy_transposed(values, row)
        else:
            row[...] = values
    return jax.device_put(leaf, sharding)


def written_tensors(
    leaves: Mapping[str, Any], dtype: np.dtype, quantized: Format | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files, in the order of `NAMES`, by their names.

    Args:
      leaves: those of the parameters by their paths.
      dtype: to write float leaves in.
      quantized: the format of quantised leaves.
    """
    if dtype not in FLOATS.values():
        raise WeightsError(f"weights are not saved as {dtype}, only as {[*FLOATS]}")
    for path in NAMES:
        if path not in leaves:
            continue
        leaf = leaves[path]
        for i, name in enumerate(_tensor_names(path, leaf.shape)):
            if quantized and is_kernel(path):
                yield from quantized.write(_layer_name(name), leaf, i).items()
                continue
            index = i if _stacked(path) else ...
            shape = leaf.shape[1:] if _stacked(path) else leaf.shape
            read = functools.partial(_values, leaf, index, _transposed(path), dtype)
            shape_on_disk = shape[::-1] if _transposed(path) else shape
            yield name, Tensor(shape_on_disk, dtype_name(dtype), read)


def is_kernel(path: str) -> bool:
    """Whether a leaf is the weights of linear layers, which can be quantised."""
    return path.endswith("kernel")


def _stacked(path: str) -> bool:
    return path.startswith("layers/")


def _transposed(path: str) -> bool:
    """Whether the file has [out, in] where the leaf has [in, out]."""
    return is_kernel(path) or path == "lm_head"


def _tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    if _stacked(path):
        return [NAMES[path].format(layer) for layer in range(shape[0])]
    return [NAMES[path]]


def _layer_name(name: str) -> str:
    return name.removesuffix(".weight")


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _values(leaf: Any, index: Any, transposed: bool, dtype: np.dtype) -> np.ndarray:
    values = np.asarray(leaf[index])
    if not transposed:
        return np.ascontiguousarray(values, dtype)
    out = np.empty(values.shape[::-1], dtype)
    copy_transposed(values, out)
    return out
