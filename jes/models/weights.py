"""A Hugging Face folder as a pytree of parameters, and back, without PyTorch."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jes.models.config import ModelConfig
from jes.models.hub import locate
from jes.models.qwen import Decoder
from jes.models.shards import (
    DTYPES,
    Tensor,
    WeightsError,
    open_tensors,
    read_json,
    replaced,
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
"""Path of a leaf, and its tensor's name; a stacked leaf has one tensor a layer."""

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
"""Files that go with a model from folder to folder, byte for byte."""

MAX_SHARD_BYTES = 4_000_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and everything that its folder says about it.

    Attributes:
      model: the decoder; `model.apply({'params': params}, tokens)` gives logits.
      params: nested dict of arrays, layers stacked on a leading axis.
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

    @property
    def stored_dtype(self) -> str | None:
        """Name of the dtype that the files are in, if config.json says it."""
        return self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Writes a folder that `jes.load` and `transformers` read; see `save`."""
        save(
            folder,
            self.params,
            self.hf_config,
            self.files,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )


def load(
    path_or_hub_id: str | os.PathLike[str], dtype: DTypeLike = jnp.float32
) -> Pretrained:
    """Reads a Hugging Face folder of a Qwen2, Qwen3 or Llama model.

    Peak memory is the parameters in `dtype` and one tensor of the file.

    Args:
      path_or_hub_id: a folder, 'tiny' for the embedded model, or a hub id.
      dtype: dtype of the parameters, whatever the dtype in the files.

    Raises:
      WeightsError: if the folder cannot be found or read, names an architecture that
        is not supported, or its tensors are not those of its config.json. One error
        lists all tensors that are missing, unexpected or have another shape.
    """
    folder = locate(path_or_hub_id)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is not a model folder: it holds no config.json")
    hf_config = read_json(folder / "config.json")
    config = _model_config(hf_config, str(folder / "config.json"))
    tensors = open_tensors(folder)
    _check_tensors(folder, config, tensors)
    leaves = {
        path: _read_leaf(path, shape, tensors, np.dtype(dtype))
        for path, shape in leaf_shapes(config).items()
    }
    tokenizer = _load_tokenizer(folder)
    files = {n: (folder / n).read_bytes() for n in COPIED if (folder / n).is_file()}
    return Pretrained(
        model=Decoder(config),
        params=unflatten_dict(leaves, sep="/"),
        tokenizer=tokenizer,
        config=config,
        hf_config=hf_config,
        eos_ids=_eos_ids(folder, hf_config, tokenizer),
        files=files,
    )


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the parameters, by its path ('layers/mlp/up/kernel')."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    leaves = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the files, by its Hugging Face name."""
    shapes = {}
    for path, shape in leaf_shapes(config).items():
        stacked = path.startswith("layers/")
        for name in _tensor_names(path, shape):
            tensor_shape = shape[1:] if stacked else shape
            shapes[name] = tensor_shape[::-1] if _transposed(path) else tensor_shape
    return shapes


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
      folder: where to; a model that is there is replaced.
      params: parameters with stacked layers, in the shapes of `hf_config`.
      hf_config: contents of config.json; its dtype field is set.
      files: other files by name: generation_config.json, the tokenizer.
      dtype: float32, float16 or bfloat16; by default that of the parameters.
      max_shard_bytes: above it the weights are split into several files.

    Raises:
      WeightsError: if `params` do not fit `hf_config`, if `folder` holds something
        else than a model, or if it cannot be written.
    """
    leaves = flatten_dict(dict(params), sep="/")
    config = _model_config(hf_config, "config.json")
    found = {path: leaf.shape for path, leaf in leaves.items()}
    _check("the parameters do not fit the config", leaf_shapes(config), found)
    dtype = np.dtype(dtype or leaves["embed/embedding"].dtype)
    tensors = dict(_tensors(leaves, dtype))
    with replaced(Path(folder), ("config.json", *COPIED)) as partial_folder:
        write_tensors(partial_folder, tensors, max_shard_bytes)
        for name, contents in files.items():
            (partial_folder / name).write_bytes(contents)
        # Last: a folder without it is not a model.
        text = json.dumps(_with_dtype(hf_config, dtype), indent=2) + "\n"
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
        # Layer by layer: an array on an accelerator keeps the host copy of itself
        # that numpy asked for, but a slice of it is gone after the use.
        stacked = path.startswith("layers/")
        for index in range(leaf.shape[0]) if stacked else [...]:
            values = np.ascontiguousarray(np.asarray(leaf[index]))
            digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _model_config(hf_config: Mapping[str, Any], source: str) -> ModelConfig:
    if hf_config.get("quantization_config"):
        raise WeightsError(f"{source}: the weights are quantised; load a float model")
    try:
        return ModelConfig.from_hf(hf_config)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{source}: {error}") from error


def _tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    if path.startswith("layers/"):
        return [NAMES[path].format(layer) for layer in range(shape[0])]
    return [NAMES[path]]


def _transposed(path: str) -> bool:
    """Whether the file has [out, in] where the leaf has [in, out]."""
    return path.endswith("kernel") or path == "lm_head"


def _check(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    problems: list[str] | None = None,
) -> None:
    """Raises one error for everything that is missing, unexpected or misshapen."""
    problems = problems or []
    problems += [f"missing: {n} {expected[n]}" for n in expected if n not in found]
    problems += [f"unexpected: {n} {found[n]}" for n in found if n not in expected]
    problems += [
        f"shape: {n} is {found[n]}, expected {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    if problems:
        raise WeightsError("\n  ".join([f"{what}:", *problems]))


def _check_tensors(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> None:
    def harmless(name: str) -> bool:
        # Old files hold the rotary frequencies; tied ones may hold the head twice.
        tied_head = name == "lm_head.weight" and config.tie_word_embeddings
        return tied_head or name.endswith("rotary_emb.inv_freq")

    found = {name: t.shape for name, t in tensors.items() if not harmless(name)}
    dtypes = [
        f"dtype: {name} is {tensors[name].dtype}, expected one of {', '.join(DTYPES)}"
        for name in found
        if tensors[name].dtype not in DTYPES
    ]
    what = f"the tensors in {folder} are not those of its config.json"
    _check(what, tensor_shapes(config), found, dtypes)


def _read_leaf(
    path: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor], dtype: np.dtype
) -> jax.Array:
    """One leaf on the default device, filled tensor by tensor."""
    # On a 64-byte boundary the CPU backend takes the buffer over as it is.
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    leaf = raw[start : start + size].view(dtype).reshape(shape)
    rows = leaf if path.startswith("layers/") else leaf[None]
    for row, name in zip(rows, _tensor_names(path, shape), strict=True):
        values = tensors[name].read()
        if _transposed(path):
            _copy_transposed(values, row)
        else:
            row[...] = values
    return jax.device_put(leaf)


def _copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source.T` in blocks that suit the cache: 2 to 7 times faster."""
    for start in range(0, source.shape[0], 16):
        target[:, start : start + 16] = source[start : start + 16].T


def _tensors(
    leaves: Mapping[str, Any], dtype: np.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files, in the order of `NAMES`, by their names."""
    stored = {dtype: name for name, dtype in DTYPES.items()}
    if dtype not in stored:
        raise WeightsError(f"weights are not saved as {dtype}, only as {[*DTYPES]}")
    for path in NAMES:
        if path not in leaves:
            continue
        leaf = leaves[path]
        stacked = path.startswith("layers/")
        shape = leaf.shape[1:] if stacked else leaf.shape
        for i, name in enumerate(_tensor_names(path, leaf.shape)):
            read = partial(
                _values, leaf, i if stacked else ..., _transposed(path), dtype
            )
            shape_on_disk = shape[::-1] if _transposed(path) else shape
            yield name, Tensor(shape_on_disk, stored[dtype], read)


def _values(leaf: Any, index: Any, transposed: bool, dtype: np.dtype) -> np.ndarray:
    values = np.asarray(leaf[index])
    if not transposed:
        return np.ascontiguousarray(values, dtype)
    out = np.empty(values.shape[::-1], dtype)
    _copy_transposed(values, out)
    return out


def _with_dtype(hf_config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """`hf_config` with its dtype field, which transformers 5 renamed, set."""
    fields = [f for f in ("torch_dtype", "dtype") if f in hf_config] or ["dtype"]
    return {**hf_config, **dict.fromkeys(fields, dtype.name)}


def _load_tokenizer(folder: Path) -> Any:
    vocabularies = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in vocabularies):
        return None
    # Here, because the import takes seconds.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json says all about a tokenizer, but AutoTokenizer of transformers 5
    # takes only the vocabulary from it where config.json names a Qwen2.
    whole = (folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if whole else AutoTokenizer
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
    """What ends an answer: as in generation (an id or several), else in training."""
    path = folder / "generation_config.json"
    sources = [read_json(path) if path.is_file() else {}, hf_config]
    for source in sources:
        ids = source.get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if ids:
            return tuple(ids)
    eos_id = getattr(tokenizer, "eos_token_id", None)
    return () if eos_id is None else (eos_id,)
