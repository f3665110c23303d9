"""The decoder against `transformers`, live and stored, and against itself."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CONFIGS, GOLDENS, Batch, make_batch, torch_logits
from random_checkpoint import write_checkpoint, write_json

from jes.models import weights
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.shards import Tensor, write_tensors

TOLERANCE = 1e-4
"""Bound of the absolute error of a float32 logit; the logits have a deviation of 0.6."""

FAMILIES = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(autouse=True)
def full_precision():
    """Accelerators multiply float32 in fewer bits unless told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """`load` of a random float32 model of a family, made once."""
    loaded: dict[str, weights.Pretrained] = {}

    def get(family: str) -> weights.Pretrained:
        if family not in loaded:
            folder = tmp_path_factory.mktemp(family)
            write_checkpoint(folder, CONFIGS[family], dtype="float32")
            loaded[family] = weights.load(folder)
        return loaded[family]

    return get


def jes_logits(pretrained: weights.Pretrained, batch: Batch) -> np.ndarray:
    logits, _ = jax.jit(pretrained.model.apply)(
        {"params": pretrained.params}, batch.tokens, batch.positions
    )
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def assert_close(got: np.ndarray, want: np.ndarray, real: np.ndarray) -> None:
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=TOLERANCE)


@FAMILIES
def test_stored_logits(family, tmp_path):
    golden = np.load(GOLDENS / f"{family}.npz")
    tensors = {
        name.removeprefix("tensor/"): Tensor(values.shape, "F16", lambda v=values: v)
        for name, values in golden.items()
        if name.startswith("tensor/")
    }
    write_json(tmp_path / "config.json", json.loads(str(golden["config"])))
    write_tensors(tmp_path, tensors, max_shard_bytes=10**9)
    batch = Batch(golden["tokens"], golden["positions"])
    got = jes_logits(weights.load(tmp_path), batch)
    assert_close(got, golden["logits"], batch.real)


@FAMILIES
def test_goldens_are_of_these_configs(family):
    golden = np.load(GOLDENS / f"{family}.npz")
    assert json.loads(str(golden["config"])) == CONFIGS[family]


@FAMILIES
def test_model_of_transformers(family, tmp_path):
    """Made, initialised and saved in PyTorch; loaded and run here."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "config.json", CONFIGS[family])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path / "old"), dtype=torch.float32
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape)
        if parameter.ndim == 2:
            values *= parameter.shape[1] ** -0.5
        else:
            values = 0.2 * values + (1 if name.endswith("norm.weight") else 0)
        parameter.data.copy_(values)
    model.save_pretrained(tmp_path / "torch")
    batch = make_batch(seed=1)
    want = torch_logits(tmp_path / "torch", batch)
    loaded = weights.load(tmp_path / "torch")
    assert_close(jes_logits(loaded, batch), want, batch.real)


@FAMILIES
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4096])
def test_model_for_transformers(family, max_shard_bytes, tmp_path):
    """Initialised and saved here; loaded and run in PyTorch."""
    pytest.importorskip("torch")
    config = ModelConfig.from_hf(CONFIGS[family])
    batch = make_batch(seed=2)
    model = Decoder(config)
    params = model.init(jax.random.key(0), batch.tokens)["params"]
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    logits, _ = model.apply({"params": params}, batch.tokens, batch.positions)
    weights.save(
        tmp_path / "jes", params, CONFIGS[family], {}, max_shard_bytes=max_shard_bytes
    )
    want = torch_logits(tmp_path / "jes", batch)
    assert_close(np.asarray(logits), want, batch.real)


def decode(model, params, batch: Batch, prompt: int) -> np.ndarray:
    """Logits of the batch: `prompt` tokens at once, then one at a time."""
    logits, cache = model.apply(
        {"params": params}, batch.tokens[:, :prompt], batch.positions[:, :prompt]
    )
    cache = cache.extended(batch.tokens.shape[1] - prompt)
    step = jax.jit(model.apply)
    pieces = [logits]
    for t in range(prompt, batch.tokens.shape[1]):
        now = slice(t, t + 1)
        logits, cache = step(
            {"params": params}, batch.tokens[:, now], batch.positions[:, now], cache
        )
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


@FAMILIES
@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_cached_decoding_is_the_full_pass(family, layout, pretrained):
    loaded = pretrained(family)
    model, params, batch = loaded.model, loaded.params, make_batch()
    want = jes_logits(loaded, batch)
    if layout == "unrolled":
        model, params = model.unrolled(), model.unrolled_params(params)
        full, _ = model.apply({"params": params}, batch.tokens, batch.positions)
        assert_close(np.asarray(full), want, batch.real)
    assert_close(decode(model, params, batch, prompt=14), want, batch.real)


@FAMILIES
def test_left_padding_changes_nothing(family, pretrained):
    loaded = pretrained(family)
    batch = make_batch()
    together = jes_logits(loaded, batch)
    for row in range(len(batch.tokens)):
        alone, _ = loaded.model.apply(
            {"params": loaded.params}, batch.tokens[row][batch.real[row]][None]
        )
        got = together[row][batch.real[row]]
        np.testing.assert_allclose(got, alone[0], rtol=0, atol=TOLERANCE)
    # Nor does what the padding holds: not a bit.
    other = np.where(batch.real, batch.tokens, 0)
    again = jes_logits(loaded, batch._replace(tokens=other))
    np.testing.assert_array_equal(again[batch.real], together[batch.real])


@FAMILIES
def test_last_positions_alone(family, pretrained):
    loaded, batch = pretrained(family), make_batch()
    logits, _ = loaded.model.apply(
        {"params": loaded.params}, batch.tokens, batch.positions, last=3
    )
    want = jes_logits(loaded, batch)[:, -3:]
    assert_close(np.asarray(logits), want, batch.real[:, -3:])


@FAMILIES
def test_bfloat16(family, pretrained):
    """Near the same weights in float32: 2 layers round some 20 times to 2**-9."""
    loaded, batch = pretrained(family), make_batch()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    logits, cache = loaded.model.apply(
        {"params": params}, batch.tokens, batch.positions
    )
    assert logits.dtype == jnp.float32
    assert cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
    want, _ = loaded.model.apply({"params": rounded}, batch.tokens, batch.positions)
    error = np.asarray(logits - want)[batch.real]
    deviation = np.asarray(want)[batch.real].std()
    assert np.sqrt(np.mean(error**2)) < 20**0.5 * 2**-9 * 3 * deviation
    decoded = decode(loaded.model, params, batch, prompt=14)
    error = (decoded - np.asarray(want))[batch.real]
    assert np.sqrt(np.mean(error**2)) < 20**0.5 * 2**-9 * 3 * deviation


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in Path(GOLDENS).iterdir()) < 300_000
