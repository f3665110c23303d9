"""The decoder against `transformers`, live and stored, and against itself."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CONFIGS, GOLDENS, Batch, make_batch, torch_logits
from marks import slow_except
from random_checkpoint import write_checkpoint, write_json

from jes.models import weights
from jes.models.safetensors_files import Tensor, write_tensors

TOLERANCE = 1e-4
"""Bound of the error of a float32 logit; the logits have a deviation of 0.6."""

FAMILIES = pytest.mark.parametrize("family", CONFIGS)
SHORT = ["qwen2", "qwen3", "llama"]
ONE_EACH = pytest.mark.parametrize("family", SHORT)
"""Others differ in whether the head is tied, which is compared above."""
MOST_SLOW = pytest.mark.parametrize("family", slow_except(SHORT, CONFIGS))


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


@partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, positions, cache=None):
    """Compiled once for a model and a shape, whichever tests use it."""
    return model.apply({"params": params}, tokens, positions, cache)


def jes_logits(pretrained: weights.Pretrained, batch: Batch) -> np.ndarray:
    logits, _ = apply(pretrained.model, pretrained.params, *batch)
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def assert_close(got: np.ndarray, want: np.ndarray, real: np.ndarray) -> None:
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=TOLERANCE)


@FAMILIES
def test_stored_logits(family, tmp_path):
    golden = np.load(GOLDENS / f"{family}.npz")
    tensors = {
        name.removeprefix("tensor/"): Tensor(
            values.shape, "F16", partial(np.asarray, values)
        )
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
def test_model_for_transformers(family, pretrained, tmp_path):
    """Saved here, in shards; loaded and run in PyTorch."""
    pytest.importorskip("torch")
    pretrained(family).save(tmp_path / "jes", max_shard_bytes=4096)
    batch = make_batch(seed=2)
    want = torch_logits(tmp_path / "jes", batch)
    assert_close(jes_logits(pretrained(family), batch), want, batch.real)


def decode(model, params, batch: Batch, prompt: int) -> np.ndarray:
    """Logits of the batch: `prompt` tokens at once, then one at a time."""
    length = batch.tokens.shape[1]
    parts = [slice(0, prompt)] + [slice(t, t + 1) for t in range(prompt, length)]
    pieces, cache = [], None
    for part in parts:
        logits, cache = apply(
            model, params, batch.tokens[:, part], batch.positions[:, part], cache
        )
        if part.start == 0:
            cache = cache.extended(length - prompt)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


@MOST_SLOW
def test_cached_decoding_is_the_full_pass(family, pretrained):
    """In the layout that decoding uses, so unrolled and scanned layers agree too."""
    loaded, batch = pretrained(family), make_batch()
    params = loaded.model.unrolled_params(loaded.params)
    got = decode(loaded.model.unrolled(), params, batch, prompt=14)
    assert_close(got, jes_logits(loaded, batch), batch.real)


@pytest.mark.slow
@ONE_EACH
def test_cached_decoding_with_scanned_layers(family, pretrained):
    loaded, batch = pretrained(family), make_batch()
    got = decode(loaded.model, loaded.params, batch, prompt=14)
    assert_close(got, jes_logits(loaded, batch), batch.real)


@MOST_SLOW
def test_left_padding_changes_nothing(family, pretrained):
    loaded, batch = pretrained(family), make_batch()
    together = jes_logits(loaded, batch)
    row, real = 1, batch.real[1]
    assert 0 < real.sum() < len(real)
    alone, _ = apply(
        loaded.model, loaded.params, batch.tokens[row : row + 1, real], None
    )
    np.testing.assert_allclose(together[row][real], alone[0], rtol=0, atol=TOLERANCE)
    # Nor does what the padding holds: not a bit.
    other = batch._replace(tokens=np.where(batch.real, batch.tokens, 0))
    again = jes_logits(loaded, other)
    np.testing.assert_array_equal(again[batch.real], together[batch.real])


def test_last_positions_alone(pretrained):
    loaded, batch = pretrained("qwen2"), make_batch()
    logits, _ = loaded.model.apply({"params": loaded.params}, *batch, last=3)
    want = jes_logits(loaded, batch)[:, -3:]
    assert_close(np.asarray(logits), want, batch.real[:, -3:])


@ONE_EACH
def test_bfloat16(family, pretrained):
    """Near the same weights in float32.

    Some 20 roundings to 2**-9 of the value add up on the way through two layers; the
    bound is 3 times their root mean square.
    """
    loaded, batch = pretrained(family), make_batch()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    logits, cache = apply(loaded.model, params, *batch)
    assert logits.dtype == jnp.float32
    assert cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
    want = np.asarray(apply(loaded.model, rounded, *batch)[0])[batch.real]
    error = np.asarray(logits)[batch.real] - want
    assert np.sqrt(np.mean(error**2)) < 3 * 20**0.5 * 2**-9 * want.std()


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in Path(GOLDENS).iterdir()) < 300_000
