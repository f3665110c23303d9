"""GPTQ and W8A8 folders bit for bit, what is refused, and rounding to the nearest."""

import copy
import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_goldens import LLAMA, QWEN2, QWEN3, make_batch
from marks import slow_except
from random_checkpoint import write_json
from random_gptq_checkpoint import random_gptq_tensor
from safetensors.numpy import load_file, save_file
from test_evaluate_export import command

import jes
from jes import quantize as command_line
from jes.core.codes import pack, unpack
from jes.errors import InputError
from jes.models.quantized import Quantized, dequantize, quantized_matmul
from jes.models.safetensors_files import SINGLE, WeightsError, read_json
from jes.models.weights import NAMES, fingerprint, save
from jes.quantize import quantize, rounding_error
from jes.sampling.generate import generate
from jes.sampling.prompts import encode
from jes.tasks import load_task

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
GROUP = 16
KERNELS = [path for path in NAMES if path.endswith("kernel")]
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": 1.5,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "output_activations": None,
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
                "group_size": None,
                "observer": "mse",
                "observer_kwargs": {},
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
                "observer": None,
            },
        }
    },
}


# Writing and reading the formats without jes: plain numpy, loops and shifts.


def linear_shapes() -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer, by its name in the files."""
    parts = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 16),
        "self_attn.v_proj": (32, 16),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (32, 64),
        "mlp.up_proj": (32, 64),
        "mlp.down_proj": (64, 32),
    }
    return {f"model.layers.{i}.{p}": parts[p] for i, p in product(range(2), parts)}


def float_tensors(rng: np.random.Generator, biased: bool) -> dict[str, np.ndarray]:
    """Everything that is not quantised, float16."""
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(48, 32)),
        "lm_head.weight": rng.normal(size=(48, 32)) / 6,
        "model.norm.weight": 1 + rng.normal(size=32) / 5,
    }
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = 1 + rng.normal(size=32) / 5
    for layer, (_, outputs) in linear_shapes().items():
        if biased and layer.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{layer}.bias"] = rng.normal(size=outputs) / 5
    return {name: array.astype(np.float16) for name, array in tensors.items()}


def word_of(code: int, bits: int) -> int:
    """A word that holds a code again and again."""
    return sum(code << shift for shift in range(0, 32, bits))


def write_gptq(folder: Path, *, family: dict = QWEN2, seed: int = 0, **settings: Any):
    """A random model; any bits at all are a GPTQ matrix. Returns the tensors."""
    config = {"bits": 4, "sym": True, "desc_act": False, "group_size": GROUP}
    config |= {"quant_method": "gptq", "checkpoint_format": "gptq"} | settings
    bits, size = config["bits"], config["group_size"]
    rng = np.random.default_rng(seed)
    tensors = float_tensors(rng, "Qwen2" in family["architectures"][0])
    middle = 2 ** (bits - 1) - (config["checkpoint_format"] == "gptq")
    for layer, (rows, columns) in linear_shapes().items():
        groups = 1 if size == -1 else rows // size
        words = rng.integers(0, 2**32, (rows * bits // 32, columns), np.uint32)
        zeros = rng.integers(0, 2**32, (groups, columns * bits // 32), np.uint32)
        if config["sym"]:
            zeros[:] = word_of(middle, bits)
        order = np.repeat(np.arange(groups), rows // groups).astype(np.int32)
        if config["desc_act"]:
            order = rng.permutation(order)
        scales = rng.uniform(0.5, 2, (groups, columns)) / (rows**0.5 * 2 ** (bits - 2))
        tensors |= {
            f"{layer}.qweight": words.view(np.int32),
            f"{layer}.qzeros": zeros.view(np.int32),
            f"{layer}.scales": scales.astype(np.float16),
            f"{layer}.g_idx": order,
        }
    write_folder(folder, tensors, family | SHAPE, config)
    return tensors


def write_w8a8(folder: Path, scale_dtype: Any = ml_dtypes.bfloat16):
    """A random model of int8 weights. Returns the tensors."""
    rng = np.random.default_rng(1)
    tensors = float_tensors(rng, True)
    for layer, (rows, columns) in linear_shapes().items():
        codes = rng.integers(-128, 128, (columns, rows)).astype(np.int8)
        scales = rng.uniform(0.5, 2, (columns, 1)) / (rows**0.5 * 64)
        tensors[f"{layer}.weight"] = codes
        tensors[f"{layer}.weight_scale"] = scales.astype(scale_dtype)
    write_folder(folder, tensors, QWEN2 | SHAPE, W8A8)
    return tensors


def write_folder(folder: Path, tensors: dict, shape: dict, settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    described = {"torch_dtype": "float16", "quantization_config": settings}
    write_json(folder / "config.json", shape | described)


def matrix_of(tensors: dict[str, np.ndarray], layer: str, config: dict) -> np.ndarray:
    """The weights [I, O] of a GPTQ layer, one by one."""
    bits = config["bits"]
    per_word, mask = 32 // bits, 2**bits - 1
    offset = 1 if config["checkpoint_format"] == "gptq" else 0
    words = tensors[f"{layer}.qweight"].tolist()
    zeros = tensors[f"{layer}.qzeros"].tolist()
    scales = tensors[f"{layer}.scales"].astype(np.float32)
    group_of = tensors[f"{layer}.g_idx"].tolist()
    out = np.empty((len(group_of), scales.shape[1]), np.float32)
    for i, group in enumerate(group_of):
        for o in range(scales.shape[1]):
            code = words[i // per_word][o] >> (bits * (i % per_word)) & mask
            zero = zeros[group][o // per_word] >> (bits * (o % per_word)) & mask
            out[i, o] = np.float32(code - zero - offset) * scales[group, o]
    return out


def stacked(matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices by the names of layers as stacks by the paths of leaves."""
    names = {path: NAMES[path].removesuffix(".weight") for path in KERNELS}
    return {
        path: np.stack([matrices[name.format(i)] for i in range(2)])
        for path, name in names.items()
    }


def kernels(params: Any) -> dict[str, Quantized]:
    leaves = flatten_dict(dict(params), sep="/")
    return {path: leaf for path, leaf in leaves.items() if path in KERNELS}


def floats(stack: Quantized) -> np.ndarray:
    """The matrices of a stack, dequantised."""
    return np.asarray(jax.vmap(dequantize)(stack))


def assert_same_file(found: Path, wanted: dict[str, np.ndarray]) -> None:
    got = load_file(found / SINGLE)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def assert_same_logits(loaded: Any, floating: dict[str, np.ndarray]) -> None:
    """Of quantised kernels, and of these floats in their place."""
    tokens = jnp.asarray(make_batch().tokens)
    leaves = flatten_dict(dict(loaded.params), sep="/") | floating
    run = jax.jit(lambda params: loaded.model.apply({"params": params}, tokens)[0])
    got, want = run(loaded.params), run(unflatten_dict(leaves, sep="/"))
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


# Packing.


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [
        (4, range(8), 0x76543210),
        (4, range(8, 16), 0xFEDCBA98),  # the sign bit is a code's, too
        (8, (1, 2, 3, 255), 0xFF030201),
    ],
)
def test_words_of_the_paper(bits, codes, word, tmp_path):
    tensors = write_gptq(tmp_path, bits=bits)
    for layer in linear_shapes():
        tensors[f"{layer}.qweight"][:] = np.uint32(word).astype(np.int32)
    save_file(tensors, tmp_path / SINGLE)
    loaded = jes.load(tmp_path)
    for leaf in kernels(loaded.params).values():
        got = np.asarray(unpack(leaf.codes))
        wanted = np.resize(np.array(codes), leaf.shape[1])
        np.testing.assert_array_equal(got[1, :, 3], wanted)
    loaded.save(tmp_path, dtype="float16")
    assert_same_file(tmp_path, tensors)


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"4 bits are 0\.\.15, not 0\.\.16"):
        pack(np.array([[0], [16]]), 4)
    with pytest.raises(ValueError, match=r"8 bits are 0\.\.255, not -1\.\.0"):
        pack(np.array([[0], [-1]]), 8)
    with pytest.raises(ValueError, match=r"8 bits are -128\.\.127, not 0\.\.200"):
        pack(np.array([[0], [200]]), 8, signed=True)


# GPTQ.

CASES = list(product((4, 8), (True, False), (True, False), ("gptq", "gptq_v2")))


@pytest.mark.parametrize(("bits", "sym", "desc_act", "version"), CASES)
def test_gptq_is_read_and_written_bit_for_bit(bits, sym, desc_act, version, tmp_path):
    settings = {"bits": bits, "sym": sym, "desc_act": desc_act}
    settings |= {"checkpoint_format": version}
    tensors = write_gptq(tmp_path / "a", seed=bits, **settings)
    loaded = jes.load(tmp_path / "a", dtype="float16")
    wanted = stacked({n: matrix_of(tensors, n, settings) for n in linear_shapes()})
    for path, leaf in kernels(loaded.params).items():
        assert (leaf.codes.bits, leaf.scales.dtype) == (bits, jnp.float16)
        assert (leaf.groups is not None) == desc_act
        np.testing.assert_array_equal(floats(leaf), wanted[path], err_msg=path)
    loaded.save(tmp_path / "b")
    assert_same_file(tmp_path / "b", tensors)
    saved, config = (read_json(tmp_path / f / "config.json") for f in "ba")
    assert saved == config
    again = jes.load(tmp_path / "b", dtype="float16")
    assert fingerprint(again.params) == fingerprint(loaded.params)
    if version == "gptq" and desc_act and not sym:
        assert_same_logits(jes.load(tmp_path / "a"), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_group(bits, tmp_path):
    tensors = write_gptq(tmp_path / "a", bits=bits, group_size=-1, sym=False)
    loaded = jes.load(tmp_path / "a")
    config = {"bits": bits, "checkpoint_format": "gptq"}
    wanted = stacked({n: matrix_of(tensors, n, config) for n in linear_shapes()})
    for path, leaf in kernels(loaded.params).items():
        assert leaf.scales.shape[1] == 1
        np.testing.assert_array_equal(floats(leaf), wanted[path])
    loaded.save(tmp_path / "b", dtype="float16")
    assert_same_file(tmp_path / "b", tensors)


def test_zeros_of_version_1_reach_256(tmp_path):
    """What is stored as 255 is 256; some readers wrap around, and are wrong."""
    tensors = write_gptq(tmp_path, bits=8, sym=False)
    tensors["model.layers.0.mlp.up_proj.qzeros"][:] = -1
    save_file(tensors, tmp_path / SINGLE)
    zeros = jes.load(tmp_path).params["layers"]["mlp"]["up"]["kernel"].zeros
    assert (np.asarray(zeros[0]) == 256).all()


def test_float_leaves_are_in_the_dtype_asked_for(tmp_path):
    tensors = write_gptq(tmp_path / "a")
    loaded = jes.load(tmp_path / "a", dtype=jnp.bfloat16)
    others = flatten_dict(dict(loaded.params), sep="/")
    others = [leaf for path, leaf in others.items() if path not in KERNELS]
    assert {leaf.dtype for leaf in others} == {np.dtype(jnp.bfloat16)}
    assert loaded.stored_dtype == "float16"
    loaded.save(tmp_path / "b", max_shard_bytes=5000)
    config = read_json(tmp_path / "b" / "config.json")
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == loaded.hf_config["quantization_config"]
    shards = [load_file(p) for p in (tmp_path / "b").glob("*.safetensors")]
    assert len(shards) > 3
    got = {name: array for shard in shards for name, array in shard.items()}
    assert got["lm_head.weight"].dtype == ml_dtypes.bfloat16
    packed = [n for n in tensors if n.endswith(("qweight", "qzeros", "scales"))]
    for name in packed:
        np.testing.assert_array_equal(got[name], tensors[name])


@pytest.mark.parametrize("family", [QWEN3, LLAMA])
def test_biases_that_the_model_lacks_may_be_zero(family, tmp_path):
    """AutoGPTQ wrote them for every layer."""
    tensors = write_gptq(tmp_path, family=family)
    if family is QWEN3:
        for i, name in product(range(2), "qk"):
            scale = np.ones(8, np.float16)
            tensors[f"model.layers.{i}.self_attn.{name}_norm.weight"] = scale
    for layer, (_, columns) in linear_shapes().items():
        tensors[f"{layer}.bias"] = np.zeros(columns, np.float16)
    save_file(tensors, tmp_path / SINGLE)
    loaded = jes.load(tmp_path)
    assert not any("bias" in p for p in flatten_dict(dict(loaded.params), sep="/"))
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1e-3
    save_file(tensors, tmp_path / SINGLE)
    assert_refused(tmp_path, "values: model.layers.1.mlp.up_proj.bias must be all zero")


def test_g_idx_may_be_left_out_without_desc_act(tmp_path):
    tensors = write_gptq(tmp_path)
    before = fingerprint(jes.load(tmp_path).params)
    kept = {n: array for n, array in tensors.items() if not n.endswith("g_idx")}
    save_file(kept, tmp_path / SINGLE)
    loaded = jes.load(tmp_path)
    assert fingerprint(loaded.params) == before
    loaded.save(tmp_path, dtype="float16")
    assert_same_file(tmp_path, tensors)


def test_g_idx_counts_whatever_desc_act_says(tmp_path):
    tensors = write_gptq(tmp_path, desc_act=True, sym=False)
    with_order = fingerprint(jes.load(tmp_path).params)
    config = read_json(tmp_path / "config.json")
    config["quantization_config"]["desc_act"] = False
    write_json(tmp_path / "config.json", config)
    loaded = jes.load(tmp_path)
    assert fingerprint(loaded.params) == with_order
    loaded.save(tmp_path, dtype="float16")
    assert_same_file(tmp_path, tensors)


# W8A8.


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_w8a8_is_read_and_written_bit_for_bit(dtype, tmp_path):
    tensors = write_w8a8(tmp_path / "a", dtype)
    loaded = jes.load(tmp_path / "a")
    matrices = {
        layer: (
            tensors[f"{layer}.weight"].astype(np.float32)
            * tensors[f"{layer}.weight_scale"].astype(np.float32)
        ).T
        for layer in linear_shapes()
    }
    wanted = stacked(matrices)
    leaves = kernels(loaded.params)
    for path, leaf in leaves.items():
        assert leaf.int8_activations
        assert leaf.scales.dtype == dtype
        np.testing.assert_array_equal(floats(leaf), wanted[path], err_msg=path)
    loaded.save(tmp_path / "b", dtype="float16")
    assert_same_file(tmp_path / "b", tensors)
    saved, config = (read_json(tmp_path / f / "config.json") for f in "ba")
    assert saved == config
    if dtype != np.float16:
        return
    weight_only = flatten_dict(dict(loaded.params), sep="/") | {
        path: dataclasses.replace(leaf, int8_activations=False)
        for path, leaf in leaves.items()
    }
    params = unflatten_dict(weight_only, sep="/")
    assert_same_logits(dataclasses.replace(loaded, params=params), wanted)


def test_w8a8_products_are_those_of_integers(tmp_path):
    tensors = write_w8a8(tmp_path)
    stack = jes.load(tmp_path).params["layers"]["mlp"]["down"]["kernel"]
    name = "model.layers.1.mlp.down_proj"
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    steps = np.abs(x).max(1, keepdims=True) / np.float32(127)
    sums = np.round(x / steps).astype(np.int64) @ tensors[f"{name}.weight"].T.astype(
        int
    )
    scales = tensors[f"{name}.weight_scale"].astype(np.float32).T
    got = quantized_matmul(jnp.asarray(x), jax.tree.map(lambda a: a[1], stack))
    np.testing.assert_allclose(got, sums * steps * scales, rtol=1e-6, atol=1e-7)


def test_w8a8_zero_points_may_be_zero(tmp_path):
    tensors = write_w8a8(tmp_path)
    before = fingerprint(jes.load(tmp_path).params)
    for layer, (_, columns) in linear_shapes().items():
        tensors[f"{layer}.weight_zero_point"] = np.zeros((columns, 1), np.int8)
    save_file(tensors, tmp_path / SINGLE)
    assert fingerprint(jes.load(tmp_path).params) == before
    tensors["model.layers.0.mlp.up_proj.weight_zero_point"][2] = 1
    save_file(tensors, tmp_path / SINGLE)
    assert_refused(
        tmp_path, "values: model.layers.0.mlp.up_proj.weight_zero_point must"
    )


# What is refused.


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(WeightsError) as caught:
        jes.load(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    write_gptq(folder)
    return folder


@pytest.fixture(scope="module")
def w8a8_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("w8a8")
    write_w8a8(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "awq"},
            "quant_method='awq' is not supported; supported: 'gptq'",
        ),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method='fp8'"),
        ({"quant_method": None}, "quant_method=None"),
        ({"quant_method": ["gptq"]}, "quant_method=['gptq'] is not supported"),
        ({"bits": 3}, "bits=3 is not supported; supported: 4, 8"),
        ({"bits": None}, "bits=None is not supported"),
        ({"bits": "4"}, "bits='4' is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not"),
        ({"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        (
            {"dynamic": {"-:.*down.*": {}}},
            "dynamic={'-:.*down.*': {}} is not supported",
        ),
        (
            {"modules_in_block_to_quantize": [["q"]]},
            "modules_in_block_to_quantize=[['q",
        ),
        ({"lm_head": True}, "lm_head=True is not supported"),
        (
            {"pack_dtype": "int8"},
            "pack_dtype='int8' is not supported; supported: 'int32'",
        ),
        ({"sym": "yes"}, "sym='yes' is not supported"),
        ({"desc_act": 2}, "desc_act=2 is not supported"),
        ({"group_size": 0}, "group_size=0: must be positive, or -1"),
        ({"group_size": None}, "group_size=None: must be positive, or -1"),
        (
            {"group_size": 24},
            "has 32 inputs, which group_size=24 does not divide",
        ),
    ],
)
def test_gptq_settings(settings, message, gptq_folder, tmp_path):
    config = read_json(gptq_folder / "config.json")
    config["quantization_config"] |= settings
    write_json(tmp_path / "config.json", config)
    (tmp_path / SINGLE).symlink_to(gptq_folder / SINGLE)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "format",
            "pack-quantized",
            "format='pack-quantized' is not supported; supported: 'int-quan",
        ),
        ("format", "float-quantized", "format='float-quantized'"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme={'num_bits': 8} is not"),
        ("transform_config", {"a": 1}, "transform_config={'a': 1} is not supported"),
        (
            "sparsity_config",
            {"format": "sparse-24"},
            "sparsity_config.format='sparse-24' is not supp",
        ),
        (
            "ignore",
            ["model.layers.0.mlp.up_proj"],
            "ignore=['model.layers.0.mlp.up_proj",
        ),
        ("config_groups", {}, "config_groups={}: there must be one group"),
        ("config_groups", {"a": {}, "b": {}}, "there must be one group"),
        ("config_groups", {"a": 1}, "quantization_config: "),
        (
            "config_groups.group_0.targets",
            ["re:.*q"],
            "targets=['re:.*q'] is not supported",
        ),
        (
            "config_groups.group_0.format",
            "float-quantized",
            "group_0.format='float-quan",
        ),
        (
            "config_groups.group_0.output_activations",
            {"a": 1},
            "output_activations={'a",
        ),
        (
            "config_groups.group_0.input_activations",
            None,
            "input_activations=None is no",
        ),
        (
            "config_groups.group_0.weights.num_bits",
            4,
            "weights.num_bits=4 is not supported; supported: 8",
        ),
        (
            "config_groups.group_0.weights.type",
            "float",
            "weights.type='float' is not",
        ),
        (
            "config_groups.group_0.weights.symmetric",
            False,
            "weights.symmetric=False is not",
        ),
        (
            "config_groups.group_0.weights.strategy",
            "group",
            "weights.strategy='group' is not",
        ),
        (
            "config_groups.group_0.weights.group_size",
            128,
            "weights.group_size=128 is not",
        ),
        (
            "config_groups.group_0.weights.actorder",
            "group",
            "weights.actorder='group' is not",
        ),
        (
            "config_groups.group_0.input_activations.dynamic",
            False,
            "input_activations.dynamic=False is not supported; supported: True",
        ),
        (
            "config_groups.group_0.input_activations.strategy",
            "tensor",
            "input_activations.strategy='tensor' is not supported; supported: 'token'",
        ),
    ],
)
def test_w8a8_settings(path, value, message, w8a8_folder, tmp_path):
    config = read_json(w8a8_folder / "config.json")
    *parents, name = path.split(".")
    place = config["quantization_config"]
    for parent in parents:
        place = place[parent]
    place[name] = value
    write_json(tmp_path / "config.json", config)
    (tmp_path / SINGLE).symlink_to(w8a8_folder / SINGLE)
    assert_refused(tmp_path, message)


def test_all_wrong_tensors_in_one_error(tmp_path):
    tensors = write_gptq(tmp_path, desc_act=True)
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    del tensors[f"{first}.g_idx"], tensors[f"{second}.scales"]
    tensors[f"{second}.qweight"] = tensors[f"{second}.qweight"].astype(np.int8)
    tensors[f"{second}.weight"] = np.zeros((32, 64), np.float16)
    tensors["model.norm.weight"] = np.zeros(32, np.int32)
    save_file(tensors, tmp_path / SINGLE)
    assert_refused(
        tmp_path,
        "do not match its config.json, GPTQ with 4 bits and groups of 16, desc_act:",
        f"missing: {first}.g_idx (32,)",
        f"missing: {second}.scales (4, 32)",
        f"dtype: {second}.qweight is I8, expected I32",
        f"unexpected: {second}.weight (32, 64)",
        "dtype: model.norm.weight is I32, expected F32, F16, BF16",
    )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"bits": 8},
            ("8 bits and groups of 16", "up_proj.qweight is (4, 64), expected (8, 64)"),
        ),
        (
            {"group_size": 32},
            ("groups of 32", "up_proj.scales is (2, 64), expected (1, 64)"),
        ),
        (
            {"group_size": -1},
            ("one group", "up_proj.qzeros is (2, 8), expected (1, 8)"),
        ),
    ],
)
def test_tensors_of_other_settings(settings, parts, gptq_folder, tmp_path):
    config = read_json(gptq_folder / "config.json")
    config["quantization_config"] |= settings
    write_json(tmp_path / "config.json", config)
    (tmp_path / SINGLE).symlink_to(gptq_folder / SINGLE)
    assert_refused(tmp_path, *parts)


def test_float_tensors_in_a_quantised_folder_and_the_reverse(gptq_folder, tmp_path):
    config = read_json(gptq_folder / "config.json")
    config.pop("quantization_config")
    write_json(tmp_path / "config.json", config)
    (tmp_path / SINGLE).symlink_to(gptq_folder / SINGLE)
    assert_refused(tmp_path, "unexpected: model.layers.0.mlp.up_proj.qweight (4, 64)")
    write_json(tmp_path / "config.json", config | {"quantization_config": W8A8})
    assert_refused(tmp_path, "missing: model.layers.0.mlp.up_proj.weight_scale (64, 1)")


BROKEN = {
    "g_idx": (
        np.arange(32) // 8,
        "g_idx names groups 0 to 3, but with 32 inputs there",
    ),
    "g_idx ": (np.arange(32) // 16 - 1, "g_idx names groups -1 to 0"),
    "g_idx  ": (np.arange(32) // 20, "g_idx has groups of 12 to 20 inputs, not all of"),
    "scales": (np.full((2, 64), np.nan), "scales holds values that are not finite"),
    "scales ": (np.full((2, 64), np.inf), "scales holds values that are not finite"),
    "qzeros": (
        np.zeros((2, 8)),
        "qzeros is not 8 throughout, but the quantization_con",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_values_that_cannot_be_meant(case, gptq_folder, tmp_path):
    values, message = BROKEN[case]
    tensors = load_file(gptq_folder / SINGLE)
    name = f"model.layers.1.mlp.up_proj.{case.strip()}"
    tensors[name] = values.astype(tensors[name].dtype)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").symlink_to(gptq_folder / "config.json")
    assert_refused(tmp_path, f"model.layers.1.mlp.up_proj.{message}")


def test_scales_of_two_dtypes(gptq_folder, w8a8_folder, tmp_path):
    for folder, suffix in ((gptq_folder, "scales"), (w8a8_folder, "weight_scale")):
        tensors = load_file(folder / SINGLE)
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        tensors[name] = tensors[name].astype(np.float32)
        save_file(tensors, tmp_path / SINGLE)
        write_json(tmp_path / "config.json", read_json(folder / "config.json"))
        assert_refused(tmp_path, f"{name} is F32, but")


def test_w8a8_scales_that_are_not_finite(w8a8_folder, tmp_path):
    tensors = load_file(w8a8_folder / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][3] = np.nan
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").symlink_to(w8a8_folder / "config.json")
    assert_refused(tmp_path, f"{name} holds values that are not finite")


def test_saving_refuses_what_the_config_does_not_say(
    gptq_folder, w8a8_folder, tmp_path
):
    gptq, w8a8 = jes.load(gptq_folder), jes.load(w8a8_folder)

    def refused(params: Any, hf_config: Any, message: str) -> None:
        with pytest.raises(WeightsError) as caught:
            save(tmp_path / "out", params, hf_config, {})
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()

    def changed(**fields: Any) -> Any:
        leaves = flatten_dict(dict(gptq.params), sep="/")
        path = "layers/mlp/up/kernel"
        leaves[path] = dataclasses.replace(leaves[path], **fields)
        return unflatten_dict(leaves, sep="/")

    def settings(**fields: Any) -> Any:
        config = copy.deepcopy(dict(gptq.hf_config))
        config["quantization_config"] |= fields
        return config

    bare = {k: v for k, v in gptq.hf_config.items() if k != "quantization_config"}
    up = "layers/mlp/up/kernel "
    refused(gptq.params, bare, f"{up}is quantised, but the config says floats")
    refused(gptq.params, w8a8.hf_config, f"{up}is not W8A8")
    refused(w8a8.params, gptq.hf_config, f"{up}is W8A8, not GPTQ")
    refused(gptq.params, settings(bits=8), f"{up}has codes of 4 bits, not 8")
    refused(
        gptq.params,
        settings(group_size=32),
        f"{up}has scales (2, 2, 64), expected (2, 1, 64)",
    )
    up_kernel = gptq.params["layers"]["mlp"]["up"]["kernel"]
    seven = changed(zeros=up_kernel.zeros - 1)
    refused(seven, gptq.hf_config, f"{up}is not symmetric, but sym=True")
    none = changed(zeros=up_kernel.zeros - 8)
    refused(none, settings(sym=False), f"{up}has zeros outside of 1..16")
    floating = changed()
    floating["layers"]["mlp"]["up"]["kernel"] = jnp.zeros(up_kernel.shape)
    refused(floating, gptq.hf_config, f"{up}is not quantised, but the config says GPTQ")


def test_shapes_that_do_not_fill_words(tmp_path):
    """4 bits: words of 8 codes, so 36 inputs and 12 outputs are refused."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    shape = QWEN2 | SHAPE
    write_folder(tmp_path, {}, shape | {"hidden_size": 36}, settings)
    assert_refused(tmp_path, "has 36 inputs, which do not fill words of 8 codes")
    shape = shape | {"num_key_value_heads": 1, "head_dim": 12}
    write_folder(tmp_path, {}, shape, settings)
    assert_refused(tmp_path, "has 12 outputs, which do not fill words of 8 codes")


# Rounding to the nearest.


def model_with(stack: np.ndarray) -> dict[str, Any]:
    """Parameters with this kernel [L, I, O] and a bias."""
    other = {"bias": jnp.ones(3), "kernel": jnp.asarray(stack)}
    return {"layers": {"up": other}, "lm_head": jnp.ones((4, 2))}


def rounded(stack: np.ndarray, **settings: Any) -> Quantized:
    return quantize(model_with(stack), **settings)["layers"]["up"]["kernel"]


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0, -100.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_to_the_nearest(bits, symmetric, shift):
    """Half a step, and what float16 scales cost: 2^-11 of the codes' range."""
    stack = np.random.default_rng(bits).normal(shift, 1, (2, 64, 6)).astype(np.float32)
    leaf = rounded(stack, bits=bits, group_size=16, symmetric=symmetric)
    assert leaf.scales.dtype == jnp.float16
    zeros = np.asarray(leaf.zeros)
    assert (zeros == 2 ** (bits - 1)).all() or not symmetric
    assert zeros.min() >= 1
    assert zeros.max() <= 2**bits - 1
    steps = np.repeat(np.asarray(leaf.scales, np.float32), 16, axis=1)
    bound = (0.5 + 2**bits * 2**-11) * steps
    assert (np.abs(floats(leaf) - stack) <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_are_kept(bits, symmetric):
    rng = np.random.default_rng(0)
    high = 2 ** (bits - 1) - 1
    low = -high if symmetric else -high - 1
    codes = rng.integers(low, high + 1, (2, 32, 6))
    codes[:, 0::16], codes[:, 1::16] = low, high  # every group uses its whole range
    stack = (codes * 2.0**-5).astype(np.float32)
    leaf = rounded(stack, bits=bits, group_size=16, symmetric=symmetric)
    np.testing.assert_array_equal(floats(leaf), stack)
    channels = rounded(stack, bits=8, int8_activations=True)
    if bits == 8 and symmetric:
        np.testing.assert_allclose(floats(channels), stack, rtol=1e-6)


def test_w8a8_rounding():
    stack = np.random.default_rng(0).normal(size=(2, 64, 6)).astype(np.float32)
    leaf = rounded(stack, bits=8, int8_activations=True)
    codes = np.asarray(leaf.codes.data)
    assert (leaf.codes.signed, leaf.zeros, leaf.int8_activations) == (True, None, True)
    assert leaf.scales.dtype == jnp.float32
    assert (np.abs(codes).max(1) == 127).all()
    np.testing.assert_allclose(leaf.scales[:, 0], np.abs(stack).max(1) / 127, rtol=1e-6)
    bound = 0.5 * np.asarray(leaf.scales) * (1 + 1e-5)
    assert (np.abs(floats(leaf) - stack) <= bound).all()


def test_a_zero_of_its_own_helps_skewed_weights():
    """Of an exponential distribution a symmetric grid wastes half."""
    stack = np.random.default_rng(0).exponential(size=(1, 256, 8)).astype(np.float32)
    params = model_with(stack)
    errors = [
        rounding_error(params, quantize(params, bits=4, group_size=64, symmetric=s))
        for s in (True, False)
    ]
    squares = (floats(rounded(stack, bits=4, group_size=64)) - stack) ** 2
    assert errors[0] == pytest.approx(
        np.sqrt(squares.sum() / (stack**2).sum()), rel=1e-4
    )
    assert errors[1] < 0.55 * errors[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 8},
        {"bits": 4, "group_size": 8, "symmetric": False},
        {"bits": 8, "int8_activations": True},
    ],
)
def test_groups_of_zeros_and_of_tiny_weights(settings):
    stack = np.zeros((1, 16, 2), np.float32)
    stack[:, :8, 1] = 1e-9
    leaf = rounded(stack, **settings)
    assert (np.asarray(leaf.scales, np.float32) > 0).all()
    assert np.abs(floats(leaf) - stack).max() <= 1e-9
    assert (floats(leaf)[:, :, 0] == 0).all()


def test_quantize_leaves_the_rest_alone():
    stack = np.random.default_rng(0).normal(size=(1, 128, 2)).astype(np.float32)
    params = model_with(stack)
    out = quantize(params, bits=8)
    assert out["lm_head"] is params["lm_head"]
    assert out["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    assert isinstance(params["layers"]["up"]["kernel"], jax.Array)
    assert out["layers"]["up"]["kernel"].scales.shape == (1, 1, 2)
    assert quantize(params, bits=4, group_size=32)["layers"]["up"][
        "kernel"
    ].scales.shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(4, 8\), not 3"),
        ({"bits": 4}, "layers/up/kernel has 96 inputs, which group_size=128 does not"),
        ({"bits": 4, "group_size": 0}, "layers/up/kernel has 96 inputs, which group_"),
        ({"bits": 4, "int8_activations": True}, "take symmetric weights of 8 bits"),
        (
            {"bits": 8, "int8_activations": True, "symmetric": False},
            "take symmetric weights of 8 bits",
        ),
        (
            {"bits": 8, "int8_activations": True, "group_size": 32},
            "take one scale an output, not groups of 32",
        ),
    ],
)
def test_rounding_settings(settings, message):
    params = model_with(np.ones((1, 96, 2), np.float32))
    with pytest.raises(InputError, match=message):
        quantize(params, **settings)


def test_weights_that_cannot_be_rounded():
    for value in (np.nan, np.inf, 1e6):  # a scale of 1e6 / 7 is none in float16
        stack = np.full((1, 8, 2), value, np.float32)
        with pytest.raises(ValueError, match="layers/up/kernel holds weights that are"):
            rounded(stack, bits=4, group_size=8)
    params = quantize(model_with(np.ones((1, 8, 2), np.float32)), bits=4, group_size=8)
    with pytest.raises(ValueError, match="the weights are quantised already"):
        quantize(params, bits=4, group_size=8)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "smaller", "error"),
    [
        (("--bits=4", "--group_size=32"), 5.8, 9.7),
        (("--bits=8", "--group-size=32", "--asymmetric"), 3.3, 0.5),
        *slow_except((), [(("--w8a8",), 3.6, 0.7)]),
    ],
)
def test_command_line(arguments, smaller, error, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert command(command_line.main, monkeypatch, f"--out={out}", *arguments) is None
    printed = capsys.readouterr().out
    assert f"model in {out}: " in printed
    found = [float(word) for word in printed.split() if word.replace(".", "").isdigit()]
    assert found[1] == pytest.approx(smaller, abs=0.1)
    assert found[-1] == pytest.approx(error, abs=0.1)
    model = jes.load(out)
    assert (model.tokenizer is not None, model.stored_dtype) == (True, "float32")
    if "--asymmetric" not in arguments:  # which takes seconds to compile
        assert accuracy(model) >= 0.95


def accuracy(pretrained: Any) -> float:
    """Of 64 sums, of which the model knew every one before it was rounded."""
    task, tokenizer = load_task("tiny/add", test_examples=64), pretrained.tokenizer
    prompts = [encode(tokenizer, task.prompt(example)) for example in task.test]
    answers = generate(
        pretrained.model,
        pretrained.params,
        prompts,
        task.max_new_tokens,
        eos_ids=pretrained.eos_ids,
        buckets=(16,),
    )
    texts = map(tokenizer.decode, answers)
    right = [task.reward(e, t).correct for e, t in zip(task.test, texts, strict=True)]
    return float(np.mean(right))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--bits=4",),
            "mlp/down/kernel has 352 inputs, which group_size=128 does not",
        ),
        (("--w8a8", "--bits=4"), "int8_activations take symmetric weights of 8 bits"),
        (("--model=/no/such",), "there is no folder '/no/such'"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments, message, tmp_path, monkeypatch, capsys
):
    out = f"--out={tmp_path / 'out'}"
    assert command(command_line.main, monkeypatch, out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_random_gptq_tensors_are_plausible():
    """Of the script that writes a model of the real size."""
    words = random_gptq_tensor("a.qweight", (16, 256), 4, 128).view(np.uint32)
    codes = np.stack([words >> shift & 15 for shift in range(0, 32, 4)])
    assert codes.mean() == pytest.approx(8, abs=0.1)
    assert codes.std() == pytest.approx(2.5, abs=0.1)
    scales = random_gptq_tensor("a.scales", (2, 256), 4, 128)
    assert scales.mean() == pytest.approx(0.004, rel=0.05)
    groups = random_gptq_tensor("a.g_idx", (256,), 4, 128)
    np.testing.assert_array_equal(np.bincount(groups), [128, 128])
