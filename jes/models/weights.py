"""A Hugging Face folder as a pytree of parameters, and back, without PyTorch."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jes.models.config import ModelConfig
from jes.models.hub import locate
from jes.models.layout import (
    Format,
    check_leaves,
    check_tensors,
    leaf_shapes,
    quantized_format,
    read_leaf,
    written_tensors,
)
from jes.models.partition import leaf_sharding, place
from jes.models.qwen import Decoder
from jes.models.safetensors_files import (
    WeightsError,
    open_tensors,
    read_json,
    replaced,
    write_tensors,
)

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
    path_or_hub_id: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Reads a Hugging Face folder of a Qwen2, Qwen3 or Llama model.

    Where the folder is quantised (GPTQ with 4 or 8 bits, or W8A8 of
    compressed-tensors), the kernels of the layers are `Quantized` with all the bits of
    the files. Peak memory is the parameters in `dtype` and one tensor of the file.

    Args:
      path_or_hub_id: a folder, 'tiny' for the embedded model, or a hub id.
      dtype: dtype of float parameters, whatever the dtype in the files.
      mesh: devices to spread the parameters over, see `jes.models.partition`; by
        default they are on one.

    Raises:
      WeightsError: if the folder cannot be found or read, names an architecture or a
        quantisation that is not supported, or its tensors are not those of its
        config.json. One error lists all tensors that are missing, unexpected or have
        another shape.
    """
    folder = locate(path_or_hub_id)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is not a model folder: it holds no config.json")
    hf_config = read_json(folder / "config.json")
    config, quantized = _configs(hf_config, str(folder / "config.json"))
    tensors = open_tensors(folder)
    what = f"the tensors in {folder} are not those of its config.json"
    if quantized:
        what += f", {quantized}"
    check_tensors(what, config, quantized, tensors)

    def where(path: str) -> Any:
        return None if mesh is None else leaf_sharding(path, config, mesh)

    leaves = {
        path: read_leaf(path, shape, tensors, np.dtype(dtype), quantized, where(path))
        for path, shape in leaf_shapes(config).items()
    }
    tokenizer = _load_tokenizer(folder)
    files = {n: (folder / n).read_bytes() for n in COPIED if (folder / n).is_file()}
    return Pretrained(
        model=Decoder(config),
        params=place(unflatten_dict(leaves, sep="/"), config, mesh),
        tokenizer=tokenizer,
        config=config,
        hf_config=hf_config,
        eos_ids=_eos_ids(folder, hf_config, tokenizer),
        files=files,
    )


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
      hf_config: contents of config.json; its dtype field is set. Its
        `quantization_config` says in which format quantised kernels are written.
      files: other files by name: generation_config.json, the tokenizer.
      dtype: float32, float16 or bfloat16, of all that is not quantised; by default
        that of the parameters.
      max_shard_bytes: above it the weights are split into several files.

    Raises:
      WeightsError: if `params` do not fit `hf_config`, if `folder` holds something
        else than a model, or if it cannot be written.
    """
    leaves = flatten_dict(dict(params), sep="/")
    config, quantized = _configs(hf_config, "config.json")
    check_leaves(config, quantized, leaves)
    dtype = np.dtype(dtype or leaves["embed/embedding"].dtype)
    tensors = dict(written_tensors(leaves, dtype, quantized))
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


def _configs(
    hf_config: Mapping[str, Any], source: str
) -> tuple[ModelConfig, Format | None]:
    """The shape of the model, and the format of quantised weights."""
    try:
        return ModelConfig.from_hf(hf_config), quantized_format(hf_config)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{source}: {error}") from error


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
