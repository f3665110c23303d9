"""Runs of quantised models: what is left, resumed, replayed, exported and refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from small_run import get_config, outcome, rows

import jes
from jes import experiment, train
from jes.config import freeze
from jes.core import ledger as ledgers
from jes.core.codes import Codes, moved, unpack
from jes.core.population import draw_overlays
from jes.core.tree import is_codes, is_quantized, merge, split, values_of
from jes.errors import InputError
from jes.export import rebuild
from jes.models.quantized import Quantized
from jes.models.weights import fingerprint
from jes.quantize import quantize, quantize_model
from jes.rollout import ask, examine


def config_of(model: Path, form: str = "int4", **changes: Any) -> Any:
    config = get_config(str(model))
    config.quantize = form
    config.group_size = 32
    config.rounding = "replay"
    config.antithetic = True
    config.sigma = 0.5
    config.alpha = 1.0
    config.window = 3
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    workdir = tmp_path_factory.mktemp("quantized") / "run"
    train.run(config_of(small_model), workdir)
    return workdir


def test_a_run_trains_codes_and_nothing_else(
    quantized_run: Path, small_model: Path
) -> None:
    base = quantize(jes.load(small_model).params, bits=4, group_size=32)
    tuned = jes.load(quantized_run / "model").params
    before, after = split(base), split(tuned)
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    changed = [
        (unpack(a) != unpack(b)).mean()
        for a, b in zip(
            jax.tree.leaves(before[0], is_leaf=is_codes),
            jax.tree.leaves(after[0], is_leaf=is_codes),
            strict=True,
        )
    ]
    assert len(changed) == 7
    assert min(changed) > 0.01
    found = rows(quantized_run / "metrics.jsonl")
    assert all(0 <= row["codes_changed"] <= 1 for row in found)
    assert sum(row["codes_changed"] for row in found) > 0
    assert found[-1]["displacement_norm"] > 0
    far = rows(quantized_run / "distances.jsonl")[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(before[0], is_leaf=is_codes))
    squares = sum(
        float(((values_of(a) - values_of(b)) ** 2).sum())
        for a, b in zip(
            jax.tree.leaves(before[0], is_leaf=is_codes),
            jax.tree.leaves(after[0], is_leaf=is_codes),
            strict=True,
        )
    )
    assert far["norm"] == pytest.approx(squares**0.5, rel=1e-5)
    assert far["norm/scales"] == 0
    assert count == 2 * (32 * 32) + 2 * (32 * 16) + 3 * (32 * 64)


def test_the_ledger_is_enough(quantized_run: Path) -> None:
    rebuilt = rebuild(ledgers.read(quantized_run / "ledger.jsonl"))
    assert fingerprint(rebuilt.params) == outcome(quantized_run).fingerprint


@pytest.mark.parametrize(
    ("bits", "sigma"),
    slow_except({(4, 0.6)}, [(4, 0.6), (8, 60.0), (4, 0.05), (8, 0.05)]),
)
def test_members_answer_as_their_own_models(
    bits: int, sigma: float, small_model: Path
) -> None:
    """Sharing the centre's codes changes nothing: each member written out, alone."""
    config = config_of(small_model, f"int{bits}", sigma=sigma, alpha=sigma)
    made = experiment.make_experiment(freeze(config))
    params, noise = made.pretrained.params, made.evolution.noise
    key = jes.generation_key(jax.random.key(0), 3)
    questions = made.train[:16]
    together = ask(
        made.evaluation,
        params,
        key,
        questions,
        noise=noise,
        population=4,
        chunk=4,
    )
    overlays = draw_overlays(params, key, jnp.arange(4), noise)

    def member(number: int) -> Any:
        def one(leaf: Any, overlay: Any) -> Any:
            if not isinstance(leaf, Quantized):
                return leaf
            own = jax.tree.map(lambda x: x[number], overlay.codes)
            codes = jes.pack_codes(jax.vmap(moved)(leaf.codes, own), bits)
            return dataclasses.replace(leaf, codes=codes)

        def whole(node: Any) -> bool:
            return isinstance(node, Quantized) or node is None

        return jax.tree.map(one, params, overlays, is_leaf=whole)

    alone = [
        examine(made.evaluation, member(i), questions, batch_size=16).reward
        for i in range(4)
    ]
    np.testing.assert_allclose(together.reward, alone, atol=1e-12)
    assert len(set(alone)) > 1 or sigma / 2**bits < 0.01


@pytest.mark.slow
def test_scales_are_trained_if_asked(tmp_path: Path, small_model: Path) -> None:
    config = config_of(small_model, scale_sigma=1e-4, scale_alpha=1e-3)
    train.run(config, tmp_path / "run")
    base = quantize(jes.load(small_model).params, bits=4, group_size=32)
    tuned = jes.load(tmp_path / "run" / "model").params
    up = base["layers"]["mlp"]["up"]["kernel"], tuned["layers"]["mlp"]["up"]["kernel"]
    assert up[1].scales.dtype == up[0].scales.dtype == jnp.float16
    assert (up[0].scales != up[1].scales).mean() > 0.5
    np.testing.assert_array_equal(up[0].zeros, up[1].zeros)
    assert rows(tmp_path / "run" / "distances.jsonl")[-1]["norm/scales"] > 0
    rebuilt = rebuild(ledgers.read(tmp_path / "run" / "ledger.jsonl"))
    assert fingerprint(rebuilt.params) == outcome(tmp_path / "run").fingerprint


def test_likelihood_and_kl_of_a_quantised_model(
    tmp_path: Path, small_model: Path
) -> None:
    config = config_of(
        small_model,
        generations=2,
        task="tiny/max",
        mode="likelihood",
        kl_prompts=4,
        kl_max_new_tokens=4,
        buckets=(24,),
    )
    summary = train.run(config, tmp_path / "run")
    assert summary["distance"]["kl/tiny/max/full"] > 0


@pytest.mark.parametrize("rounding", ["replay", "residual"])
@pytest.mark.slow
def test_decay_keeps_codes_nearer(
    rounding: str, tmp_path: Path, small_model: Path
) -> None:
    norms = {}
    for decay in ("none", "l2"):
        config = config_of(small_model, rounding=rounding, decay=decay, alpha=2.0)
        config.residual_decay = 1.0
        config.decay_coefficient = 0.25 if decay == "l2" else 0.0
        train.run(config, tmp_path / decay)
        norms[decay] = rows(tmp_path / decay / "metrics.jsonl")[-1]["displacement_norm"]
    assert norms["l2"] < 0.8 * norms["none"]


def test_without_an_anchor_nothing_is_measured(
    tmp_path: Path, small_model: Path
) -> None:
    config = config_of(small_model, anchor="none", generations=2)
    summary = train.run(config, tmp_path / "run")
    assert summary["distance"] is None
    assert summary["displacement_norm"] is None
    assert not rows_if_any(tmp_path / "run" / "distances.jsonl")


def rows_if_any(path: Path) -> list[dict[str, Any]]:
    return rows(path) if path.exists() else []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounding": "none"}, "is quantised: set rounding to one of 'replay'"),
        (
            {"quantize": ""},
            "is a float model, which rounding='replay' is not for",
        ),
        ({"quantize": "int3"}, "one of ('', 'int4', 'int8', 'w8a8'), not 'int3'"),
        ({"group_size": 48}, "has 32 inputs, which group_size=48 does not divide"),
        ({"rounding": "round"}, "rounding must be one of"),
        (
            {"method": "grpo", "decay": "none"},
            "rounding='replay' is not for method 'grpo'",
        ),
        ({"residual_decay": 1.5}, "must be in [0, 1], not 1.5"),
        ({"window": 0}, "at least 1 generation, not 0"),
        ({"initial_residual": "phase"}, "one of ('zero', 'uniform'), not 'phase'"),
        ({"rounding": "residual", "residual_dtype": "int8"}, "not 'int8'"),
        ({"residual_clip": -1.0}, "cannot be cut at -1.0"),
        ({"scale_sigma": 0.1}, "scale_sigma and scale_alpha go together"),
        ({"scale_sigma": -0.1, "scale_alpha": 1.0}, "scale_sigma cannot be -0.1"),
        (
            {"rounding": "quzo", "scale_sigma": 0.1, "scale_alpha": 0.1},
            "scale_sigma is not for rounding='quzo'",
        ),
        (
            {"shaping": "pair_zscore", "antithetic": False},
            "'pair_zscore' needs antithetic=True",
        ),
        (
            {"anchor": "none", "decay": "l2", "decay_coefficient": 0.1},
            "anchor='none' cannot be combined with a decay",
        ),
    ],
)
def test_settings_that_cannot_be(
    changes: dict[str, Any], message: str, tmp_path: Path, small_model: Path
) -> None:
    config = config_of(small_model)
    for name, value in changes.items():
        config[name] = value
    with pytest.raises(InputError) as caught:
        train.run(config, tmp_path / "run")
    assert message in str(caught.value)


def test_a_rate_that_moves_most_codes_is_warned_of(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(small_model, alpha=20.0)
    experiment.make_experiment(freeze(config))
    said = " ".join(capsys.readouterr().out.split())
    assert "alpha / sigma = 40 is large" in said
    assert re.search(r"noise alone will change about \d+ % of the codes every", said)
    quiet = config_of(small_model, alpha=0.05)
    experiment.make_experiment(freeze(quiet))
    assert "alpha" not in capsys.readouterr().out


def test_a_folder_trains_as_what_was_rounded_here(
    quantized_run: Path, tmp_path: Path, small_model: Path
) -> None:
    """A GPTQ folder as the model gives the same run as rounding it on the way."""
    rounded = quantize_model(jes.load(small_model), bits=4, group_size=32)
    rounded.save(tmp_path / "gptq")
    config = config_of(tmp_path / "gptq", quantize="")
    train.run(config, tmp_path / "run")
    assert outcome(tmp_path / "run").fitness == outcome(quantized_run).fitness
    assert outcome(tmp_path / "run").fingerprint == outcome(quantized_run).fingerprint
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert settings["quantization_config"]["bits"] == 4


def test_splitting_and_merging_lose_nothing(small_model: Path) -> None:
    params = jes.load(small_model).params
    codes = quantize(params, bits=8, group_size=32)
    assert is_quantized(codes)
    assert not is_quantized(params)
    for tree in (params, codes):
        back = merge(*split(tree))
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
    trained = jax.tree.leaves(split(codes)[0], is_leaf=is_codes)
    assert {type(leaf) for leaf in trained} == {Codes}
