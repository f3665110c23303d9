"""Model folders: what is read, what is written, and what is refused."""

import json
import resource
import shutil
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CONFIGS
from random_checkpoint import GENERATION, write_checkpoint, write_json

from jes.models import safetensors_files, weights
from jes.models.config import ModelConfig
from jes.models.safetensors_files import (
    INDEX,
    SINGLE,
    Tensor,
    WeightsError,
    open_tensors,
    read_json,
    write_tensors,
)
from jes.models.shapes import SHAPES


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tied bfloat16 model without a tokenizer."""
    write_checkpoint(tmp_path / "model", CONFIGS["qwen2"])
    return tmp_path / "model"


def edit_json(path: Path, **fields: object) -> None:
    write_json(path, read_json(path) | fields)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(folder).items()}


def rewrite(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    tensors = {
        name: Tensor(a.shape, names[a.dtype.name], partial(np.asarray, a))
        for name, a in arrays.items()
    }
    write_tensors(folder, tensors, max_shard_bytes=10**9)


def assert_refused(folder: str | Path, *parts: str) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.load(folder)
    for part in parts:
        assert part in str(caught.value)


def assert_same_params(got, want) -> None:
    chex.assert_trees_all_equal(got, want, strict=True)
    chex.assert_trees_all_equal_dtypes(got, want)


# Reading.


@pytest.mark.parametrize("family", CONFIGS)
def test_every_leaf_is_its_tensor(family, tmp_path):
    write_checkpoint(tmp_path, CONFIGS[family], dtype="float32")
    loaded = weights.load(tmp_path)
    arrays = read_all(tmp_path)
    params = loaded.params
    np.testing.assert_array_equal(
        params["embed"]["embedding"], arrays["model.embed_tokens.weight"]
    )
    for i in range(2):
        np.testing.assert_array_equal(
            params["layers"]["mlp"]["down"]["kernel"][i],
            arrays[f"model.layers.{i}.mlp.down_proj.weight"].T,
        )
        np.testing.assert_array_equal(
            params["layers"]["mlp_norm"]["scale"][i],
            arrays[f"model.layers.{i}.post_attention_layernorm.weight"],
        )
    tied = CONFIGS[family]["tie_word_embeddings"]
    assert ("lm_head" in params) == (not tied)
    if not tied:
        np.testing.assert_array_equal(params["lm_head"], arrays["lm_head.weight"].T)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(stored, dtype, tmp_path):
    write_checkpoint(tmp_path, CONFIGS["qwen2"], dtype=stored)
    params = weights.load(tmp_path, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    name = "model.layers.1.self_attn.v_proj.weight"
    got = params["layers"]["attention"]["v"]["kernel"][1]
    np.testing.assert_array_equal(got, read_all(tmp_path)[name].astype(dtype).T)


def test_what_the_folder_says(folder):
    loaded = weights.load(folder)
    assert loaded.tokenizer is None
    assert loaded.config == ModelConfig.from_hf(CONFIGS["qwen2"])
    assert loaded.model.config == loaded.config
    assert loaded.hf_config["model_type"] == "qwen2"
    assert loaded.eos_ids == (151645, 151643)
    assert set(loaded.files) == {"generation_config.json"}


def test_eos_ids_from_each_place(folder):
    edit_json(folder / "generation_config.json", eos_token_id=7)
    assert weights.load(folder).eos_ids == (7,)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=[0, 5])
    assert weights.load(folder).eos_ids == (0, 5)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=0)
    assert weights.load(folder).eos_ids == (0,)
    edit_json(folder / "config.json", eos_token_id=None)
    assert weights.load(folder).eos_ids == ()


def test_a_tied_head_in_the_file_is_ignored(folder):
    arrays = read_all(folder)
    assert "lm_head.weight" not in arrays
    without = weights.load(folder).params
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    rewrite(folder, arrays)
    assert_same_params(weights.load(folder).params, without)


def test_config_of_transformers_4(folder):
    """Rope settings apart or together are the same model."""
    old = weights.load(folder).config
    config = read_json(folder / "config.json")
    theta = config.pop("rope_theta")
    rope = {"rope_theta": theta, "rope_type": "default"}
    write_json(folder / "config.json", config | {"rope_parameters": rope})
    assert weights.load(folder).config == old


# Writing, and reading again.


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "max_shard_bytes"), [("float32", 10**9), ("bfloat16", 3000)]
)
def test_round_trip_is_exact(family, dtype, max_shard_bytes, tmp_path):
    write_checkpoint(tmp_path / "a", CONFIGS[family], dtype=dtype)
    loaded = weights.load(tmp_path / "a", dtype=dtype)
    loaded.save(tmp_path / "b", max_shard_bytes=max_shard_bytes)
    again = weights.load(tmp_path / "b", dtype=dtype)
    assert_same_params(again.params, loaded.params)
    assert weights.fingerprint(again.params) == weights.fingerprint(loaded.params)
    assert (again.config, again.eos_ids) == (loaded.config, loaded.eos_ids)
    assert again.hf_config == loaded.hf_config
    shards = list((tmp_path / "b").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9)
    arrays, want = read_all(tmp_path / "b"), read_all(tmp_path / "a")
    assert arrays.keys() == want.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, want[name])


def test_shards_are_as_small_as_asked(folder):
    arrays = read_all(folder)
    largest = max(a.nbytes for a in arrays.values())
    loaded = weights.load(folder, dtype=jnp.bfloat16)
    loaded.save(folder, max_shard_bytes=largest)
    index = read_json(folder / INDEX)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    assert not (folder / SINGLE).exists()
    for shard in set(index["weight_map"].values()):
        names = [n for n, s in index["weight_map"].items() if s == shard]
        assert 0 < sum(arrays[n].nbytes for n in names) <= largest


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_on_disk_is_in_the_config(field, folder):
    config = read_json(folder / "config.json")
    config.pop("torch_dtype")
    write_json(folder / "config.json", config | {field: "float16"})
    loaded = weights.load(folder)
    loaded.save(folder)
    assert read_json(folder / "config.json")[field] == "float32"
    loaded.save(folder, dtype=jnp.bfloat16)
    assert read_json(folder / "config.json")[field] == "bfloat16"
    assert {a.dtype.name for a in read_all(folder).values()} == {"bfloat16"}


def test_a_saved_tokenizer_is_the_same_files(folder, tmp_path):
    make_tokenizer(folder)
    loaded = weights.load(folder)
    assert loaded.tokenizer.encode("b ab") == [1, 3, 0, 1]
    loaded.save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert weights.load(tmp_path / "saved").tokenizer.encode("b ab") == [1, 3, 0, 1]


def test_eos_of_the_tokenizer_is_the_last_resort(folder):
    make_tokenizer(folder)
    assert weights.load(folder).eos_ids == (151645, 151643)
    (folder / "generation_config.json").unlink()
    assert weights.load(folder).eos_ids == (2,)


def make_tokenizer(folder: Path) -> None:
    """One token a character, which is not how Qwen2 splits a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"a": 0, "b": 1, "<end>": 2, " ": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    write_json(folder / "tokenizer_config.json", fields)


def test_saving_over_a_model_replaces_all_of_it(folder):
    loaded = weights.load(folder)
    loaded.save(folder, max_shard_bytes=3000)
    loaded.save(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", SINGLE}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_refuses_to_replace_other_things(folder, tmp_path):
    loaded = weights.load(folder)
    run = tmp_path / "run"
    run.mkdir()
    loaded.save(run)  # an empty folder is free
    (run / "metrics.jsonl").write_text("{}")
    with pytest.raises(WeightsError, match=r"more than a model \(metrics\.jsonl\)"):
        loaded.save(run)
    assert (run / "metrics.jsonl").read_text() == "{}"
    with pytest.raises(WeightsError, match="which is a file"):
        loaded.save(run / "metrics.jsonl")


def test_saving_refuses_params_of_another_shape(folder):
    loaded = weights.load(folder)
    params = dict(loaded.params, lm_head=jnp.zeros((24, 48)), final_norm={})
    with pytest.raises(WeightsError) as caught:
        weights.save(folder, params, loaded.hf_config, {})
    assert "missing: final_norm/scale (24,)" in str(caught.value)
    assert "unexpected: lm_head (24, 48)" in str(caught.value)
    with pytest.raises(WeightsError, match="not saved as float64"):
        loaded.save(folder, dtype=np.float64)


@pytest.mark.parametrize("before", ["nothing", "a model"])
def test_a_full_disk_leaves_no_half_model(before, folder, tmp_path):
    """A limit on the size of a file fails the write as a full disk does."""
    target = tmp_path / "target"
    loaded = weights.load(folder)
    if before == "a model":
        loaded.save(target, dtype=jnp.float16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(WeightsError, match=r"could not save .*target"):
            loaded.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {"model"} if before == "nothing" else {"model", "target"}
    assert {path.name for path in tmp_path.iterdir()} == left
    if before == "a model":
        assert weights.load(target).hf_config["torch_dtype"] == "float16"


def test_a_kill_leaves_no_half_model(folder, tmp_path, monkeypatch):
    """What lies there while the weights are written, and what the next save does."""
    loaded = weights.load(folder)
    seen: list[str] = []

    def killed(unfinished: Path, *_: object) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        (unfinished / SINGLE).write_bytes(b"half")
        shutil.copytree(unfinished, tmp_path / "kept")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            loaded.save(tmp_path / "target")
    assert sorted(seen) == [".target.partial", "model"]
    assert_refused(tmp_path / "kept", "holds no config.json")
    (tmp_path / "kept").rename(tmp_path / ".target.partial")
    # Killed between the two renames: the old model is only under its other name.
    shutil.copytree(folder, tmp_path / ".target.old")
    loaded.save(tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "target"}
    assert_same_params(weights.load(tmp_path / "target").params, loaded.params)


# What is refused.


def test_no_such_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", "there is no folder", "nowhere")
    assert_refused("nowhere", "there is no folder 'nowhere'", "Qwen/Qwen2.5")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "is a file; a model is a folder")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert_refused(folder, "it holds no config.json")


@pytest.mark.parametrize("contents", ["{", "[1]", "\udcff"])
def test_broken_config(contents, folder):
    path = folder / "config.json"
    path.write_bytes(contents.encode(errors="surrogateescape"))
    assert_refused(folder, str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
        ({"architectures": None}, "supported are Qwen2ForCausalLM"),
        ({"hidden_size": None}, "missing: hidden_size"),
        ({"num_key_value_heads": 4}, "6 query heads do not divide among 4"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "llama3"}}, "without factor, low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quant_method=None is not supported"),
    ],
)
def test_unsupported_config(fields, message, folder):
    edit_json(folder / "config.json", **fields)
    assert_refused(folder, "config.json: ", message)


def test_folder_without_weights(folder):
    (folder / SINGLE).unlink()
    assert_refused(folder, "holds no weights", SINGLE)
    (folder / "pytorch_model.bin").touch()
    assert_refused(folder, "it holds pytorch_model.bin", "save_pretrained")


def test_missing_shards(folder):
    weights.load(folder).save(folder, max_shard_bytes=6000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    shards[0].unlink()
    shards[2].unlink()
    found = f"names {len(shards)} shards, of which 2 are not there"
    assert_refused(folder, found, f"{shards[0].name}, {shards[2].name}")
    (folder / INDEX).write_text("{}")
    assert_refused(folder, "has no 'weight_map'")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(kept, folder):
    contents = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(contents[:kept])
    assert_refused(folder, str(folder / SINGLE), "is truncated or not a safetensors")


def test_all_wrong_tensors_in_one_error(folder):
    arrays = read_all(folder)
    del arrays["model.norm.weight"]
    del arrays["model.layers.1.self_attn.k_proj.bias"]
    arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
    arrays["model.embed_tokens.weight"] = np.zeros((50, 24), np.float32)
    arrays["model.layers.0.mlp.down_proj.weight"] = np.zeros((40, 24), np.float32)
    rewrite(folder, arrays)
    assert_refused(
        folder,
        "missing: model.norm.weight (24,)",
        "missing: model.layers.1.self_attn.k_proj.bias (8,)",
        "unexpected: model.layers.2.mlp.up_proj.weight (40, 24)",
        "shape: model.embed_tokens.weight is (50, 24), expected (48, 24)",
        "shape: model.layers.0.mlp.down_proj.weight is (40, 24), expected (24, 40)",
    )


def test_tensors_of_another_dtype(folder):
    from safetensors.numpy import save_file

    arrays = {name: a.astype(np.float32) for name, a in read_all(folder).items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)
    save_file(arrays, folder / SINGLE)
    assert_refused(folder, "dtype: model.norm.weight is I8, expected F32, F16, BF16")


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert_refused(folder, f"the tokenizer in {folder} cannot be read")


# The hub, which tests cannot reach, and the embedded model.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_hub_out_of_reach(cache):
    assert_refused(
        "someone/model",
        "there is no folder 'someone/model'",
        "no network, or the hub does not answer",
        "give the path of a folder",
        "configs/tiny.py",
    )


def add_to_cache(cache: Path, source: Path) -> Path:
    """Lays out a download of someone/model as the hub's client does."""
    repository = cache / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_hub_copy_in_the_cache(cache, folder):
    snapshot = add_to_cache(cache, folder)
    assert safetensors_files.locate("someone/model") == snapshot
    loaded = weights.load("someone/model")
    assert_same_params(loaded.params, weights.load(folder).params)
    (snapshot / SINGLE).unlink()  # an interrupted download is no copy
    assert_refused("someone/model", "no network")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "it is gated (accept its terms"),
        ("RepositoryNotFoundError", "no such model, or it is private"),
    ],
)
def test_hub_refuses(kind, message, cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_: object, **__: object) -> None:
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert_refused("someone/model", message, "configs/tiny.py")


def test_tiny_is_the_embedded_model(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(safetensors_files.EMBEDDED, "tiny", folder)
    assert safetensors_files.locate("tiny") == folder
    monkeypatch.setitem(safetensors_files.EMBEDDED, "tiny", tmp_path / "gone")
    assert_refused("tiny", "this installation of jes lacks")


# Fingerprints, and the random checkpoints that other tests use.


def test_fingerprint_sees_one_bit(folder):
    params = weights.load(folder).params
    before = weights.fingerprint(params)
    assert len(before) == 64
    flipped = jax.tree.map(np.array, params)
    flipped["layers"]["mlp"]["up"]["kernel"].view(np.uint32)[1, 2, 3] ^= 1
    assert weights.fingerprint(flipped) != before
    flipped["layers"]["mlp"]["up"]["kernel"].view(np.uint32)[1, 2, 3] ^= 1
    assert weights.fingerprint(flipped) == before


def test_fingerprint_sees_path_dtype_and_shape():
    ones = np.ones((2, 3), np.float32)
    trees = [
        {"a": ones},
        {"b": ones},
        {"a": ones.T},
        {"a": ones.view(np.int32)},
        {"a": {"a": ones}},
        {"a": ones, "b": np.zeros((), np.float32)},
    ]
    assert len({weights.fingerprint(tree) for tree in trees}) == len(trees)
    two = {"a": ones, "b": 2 * ones}
    assert weights.fingerprint(two) == weights.fingerprint(dict(reversed(two.items())))
    assert weights.fingerprint(two) == weights.fingerprint(jax.tree.map(jnp.array, two))


def test_fingerprint_of_a_known_model():
    """Ledgers hold fingerprints: what they are computed from must never change."""
    params = {"b": {"scale": jnp.arange(3.0)}, "a": jnp.ones(2, jnp.bfloat16)}
    assert weights.fingerprint(params) == (
        "35aedf49f52dfa1f1e8dab9b9dad239f80f8530550133c178d35aa02f0e21961"
    )


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("qwen2.5-0.5b", 0.494033),
        ("qwen2.5-1.5b", 1.543714),
        ("qwen2.5-3b", 3.085939),
        ("qwen2.5-7b", 7.615617),
        ("qwen3-0.6b", 0.596050),
    ],
)
def test_real_shapes_have_the_published_sizes(shape, billions):
    config = ModelConfig.from_hf(SHAPES[shape])
    leaves = weights.leaf_shapes(config).values()
    tensors = [t.shape for t in weights.expected_tensors(config).values()]
    for shapes in (leaves, tensors):
        count = sum(int(np.prod(s)) for s in shapes)
        assert count / 1e9 == pytest.approx(billions, abs=1e-6)


def test_random_checkpoint_copies_the_tokenizer(folder, tmp_path):
    make_tokenizer(folder)
    edit_json(folder / "generation_config.json", eos_token_id=2)
    write_checkpoint(tmp_path / "a", CONFIGS["qwen3"], tokenizer=folder)
    loaded = weights.load(tmp_path / "a")
    assert loaded.tokenizer.encode("b ab") == [1, 3, 0, 1]
    assert loaded.eos_ids == (2,)
    write_checkpoint(tmp_path / "b", CONFIGS["qwen3"])
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == (
        GENERATION
    )
