"""σ chosen by a trial (`sigma='auto'`), and the schedules of σ and α."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_run import get_config, rows

import jes
from jes import export, sigma, train
from jes.api import configured
from jes.config import freeze
from jes.core import ledger as ledgers
from jes.core.drift import drift_norm, predicted_drift
from jes.core.evolution import Evolution
from jes.core.noise import generation_key
from jes.errors import InputError
from jes.experiment import Experiment, make_experiment, pick, settled
from jes.io import command_line
from jes.models.weights import fingerprint
from jes.rollout import ask, examine
from jes.sigma import LADDER, LOSS, choose_rates, sigma_of, trial_rewards
from jes.studies import sigma as study
from jes.studies.grid import Grid, read_csv, write_csv
from jes.update import _tell

B = 400


def rewards(shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Half of the prompts right; of those, so many lost at each σ, and others won.

    Any two rewards differ by about 1/2 in the mean. One of two members loses a share
    more by a tenth, and the other less: their spread grows with the shares.
    """
    base = np.repeat([1.0, 0.0], B // 2)
    own = np.tile(base, (len(LADDER), 2, 1))
    for step, share in enumerate(shares):
        count = round(share * B)
        for member, more in enumerate((count // 10, -(count // 10))):
            own[step, member, : count + more] = 0
            own[step, member, B // 2 : B // 2 + count] = 1
    return base, own


def test_sigma_is_where_members_lose_so_much() -> None:
    """A share lost of all prompts, of rewards that differ by 1/2, is twice that."""
    shares = [0.01, 0.02, 0.04, 0.06, 0.11, 0.16, 0.3, 0.4]
    assert LOSS == 0.27  # of 1/2 is 0.135: in the middle between the fifth and sixth
    base, own = rewards(shares)
    assert sigma_of(base, own) == pytest.approx(LADDER[4] * 2**0.5, rel=0.01)
    # As the update, it does not depend on the scale of rewards.
    assert sigma_of(3 + 7 * base, 3 + 7 * own) == pytest.approx(sigma_of(base, own))
    # Weights that overflow have no reward.
    own[5:, 0, 0] = np.nan
    assert sigma_of(base, own) == LADDER[4]
    # More lost at a smaller one was chance, or the reward likes what is broken.
    base, own = rewards(shares)
    own[[2, 4]] = own[[4, 2]]
    own[[3, 5]] = own[[5, 3]]
    own[5, 0, :80] = 0  # as much spread as before
    own[5, 1, :40] = 0
    assert LADDER[4] < sigma_of(base, own) < LADDER[6]


@pytest.mark.parametrize(
    ("shares", "step"),
    [([0.3] * 8, 0), (np.linspace(0.01, 0.1, 8), 7), ([*[0.01] * 6, 0.02, 0.5], 6.24)],
)
def test_sigma_stays_on_the_ladder(shares: list[float], step: float) -> None:
    found = np.log2(sigma_of(*rewards(shares)) / LADDER[0])
    assert found == pytest.approx(step, abs=0.05)


def test_where_there_is_nothing_to_lose() -> None:
    """Members earn more with σ, up to a point, and then less, though never less than 0.

    Two rewards differ by 0.33 or so, of which a fall of 0.27 is 0.09.
    """
    means = np.array([0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.36, 0.1])
    base, places = np.zeros(B), (np.arange(B) + 0.5) / B
    own = np.stack([[places < m * 0.9, places < m * 1.1] for m in means]).astype(float)
    # Spread is largest at the sixth; the seventh keeps the mean, the eighth does not.
    assert sigma_of(base, own) == LADDER[5]
    own[6, 0] = 0  # now at the seventh
    own[6, 1] = places < 0.72
    assert LADDER[6] <= sigma_of(base, own) < LADDER[6] * 1.5
    own[5] = places < 0.6  # of which it keeps too little
    own[6] = [places < 0.2, places < 0.3]
    assert LADDER[5] <= sigma_of(base, own) < LADDER[6]


def test_sigma_changes_some_reward() -> None:
    base, own = rewards([0.3] * 8)
    own[:3] = base
    assert sigma_of(base, own) == LADDER[3]
    own[:] = base
    with pytest.raises(InputError, match=r"no sigma from 0\.0005 to 0\.064 changed"):
        sigma_of(base, own)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """σ at which a model of random weights comes to answer right now and then."""
    monkeypatch.setattr(sigma, "LADDER", tuple(0.02 * 2.0**step for step in range(8)))
    return sigma.LADDER


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        ({"devices": 1}, 3),
        ({"devices": 2}, 3),
        ({"devices": 1, "rank": 1}, 17),
        ({"devices": 2, "draw": "layer"}, 3),
        ({"devices": 2, "model_parallel": 2}, 3),
    ],
)
def test_the_trial_asks_members_of_each_sigma(
    changes: dict, chunk: int, small_model: Path, wide: tuple[float, ...]
) -> None:
    """They earn what `ask` says of members with that σ, in chunks of any size.

    Of 17, two members share the prompts of the first generation; of 3 they do not.
    """
    config = get_config(str(small_model))
    config.update(sigma=0.0, prompts=16, **changes)
    experiment = make_experiment(freeze(config))
    base, own = trial_rewards(experiment, chunk, members=2)
    assert base.shape == (2, 16)
    assert own.shape == (len(wide), 2, 16)
    noise, key = experiment.evolution.noise, generation_key(jax.random.key(0), 0)
    for step in (0, 4, 7):
        for member in (0, 1):
            scores = ask(
                experiment.evaluation,
                experiment.pretrained.params,
                key,
                pick(experiment, member if chunk == 3 else 0),
                noise=dataclasses.replace(noise, sigma=wide[step]),
                population=2,
                chunk=2,
            )
            earned = own[step, member].mean()
            np.testing.assert_allclose(earned, scores.reward[member], rtol=1e-12)
    assert len({row.tobytes() for row in own.reshape(-1, 16)}) > 3
    itself = unperturbed_rewards(experiment, pick(experiment, 0))
    np.testing.assert_allclose(base[0].mean(), itself, rtol=1e-12)


def unperturbed_rewards(experiment: Experiment, questions: list[Any]) -> float:
    params = experiment.pretrained.params
    return examine(experiment.evaluation, params, questions).reward


def test_a_run_chooses_sigma_once(
    small_model: Path,
    tmp_path: Path,
    wide: tuple[float, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = get_config(str(small_model))
    config.update(sigma=0.0, generations=2)
    workdir = tmp_path / "run"
    train.run(config, workdir)
    experiment = make_experiment(freeze(config))
    expected = choose_rates(settled(experiment, {"slots": 0}), chunk=2)
    # Few generations: two members at each σ, though that is more than 4 % of the run.
    assert expected.asked == 2 * (len(wide) + 1)
    assert expected.alpha == pytest.approx(expected.sigma / 2 * (4 / 30) ** 0.5, 0.01)
    shown = capsys.readouterr().out
    said = f"sigma {expected.sigma:g}, alpha {expected.alpha:g}: chosen by 18 members"
    assert shown.count(said) == 1
    record = json.loads((workdir / "config.json").read_text())
    rates = {"sigma": expected.sigma, "alpha": expected.alpha}
    assert record["resolved"] == {"chunk": 2, "slots": 0, **rates}
    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert ledger.header["evolution"].items() >= rates.items()
    last = rows(workdir / "metrics.jsonl")[-1]["displacement_norm"]
    # It goes on with them, also where the memory is chosen anew.
    config.update(generations=3, chunk=1)
    train.run(config, workdir)
    assert "chosen by" not in capsys.readouterr().out
    record = json.loads((workdir / "config.json").read_text())
    assert record["resolved"] == {"chunk": 1, "slots": 0, **rates}
    rebuilt = export.rebuild(export.read_ledger(workdir))
    assert fingerprint(rebuilt.params) == fingerprint(
        jes.load(workdir / "model").params
    )
    assert rows(workdir / "metrics.jsonl")[-1]["displacement_norm"] > last
    assert f"{expected.sigma:g}" in (workdir / "model" / "README.md").read_text()


def test_auto_stands_for_0(small_model: Path) -> None:
    assert command_line.with_shipped("--config.sigma=auto") == "--config.sigma=0"
    given = ["train", "--config", "tiny", "--config.sigma", "auto", "--workdir", "x"]
    assert command_line.joined(given) == [
        *("train", "--config=tiny", "--config.sigma=auto", "--workdir", "x")
    ]
    assert configured({"sigma": "auto"}).sigma == 0
    codes = configured({"sigma": "auto", "rounding": "replay", "quantize": "int4"})
    with pytest.raises(InputError, match=r"sigma=0 \('auto'\) is for float models"):
        freeze(codes)


# Schedules.


def test_a_cosine_falls_to_its_floor() -> None:
    settings = {"alpha_cosine": 8, "sigma_cosine": 4, "cosine_floor": 0.2}
    evolution = Evolution(population=4, sigma=0.1, alpha=1.0, **settings)
    each = [evolution.at(generation) for generation in (0, 2, 4, 8, 100)]
    halves = 0.2 + 0.8 * np.cos(np.pi / 8) ** 2, 0.6, 0.2
    assert [one.alpha for one in each] == pytest.approx([1.0, *halves, 0.2])
    assert [one.sigma for one in each] == pytest.approx([0.1, 0.06, 0.02, 0.02, 0.02])
    squares = sum(evolution.at(t).alpha ** 2 for t in range(6))
    free = {"population": 4, "parameters": 50}
    law = drift_norm(alpha=1.0, generations=squares, **free)
    assert predicted_drift(evolution, 50, 6) == pytest.approx(law)


@pytest.mark.parametrize("changes", [{}, {"decay": "l2", "decay_coefficient": 0.5}])
def test_schedules_compile_nothing_anew_and_replay(
    changes: dict, small_model: Path, tmp_path: Path
) -> None:
    config = get_config(str(small_model))
    config.update(alpha_cosine=4, sigma_cosine=4, generations=2, **changes)
    train.run(config, tmp_path / "shorter")
    compiled = _tell._cache_size()
    config.update(generations=5)
    train.run(config, tmp_path / "run")
    assert _tell._cache_size() == compiled
    rebuilt = export.rebuild(export.read_ledger(tmp_path / "run"))
    saved = jes.load(tmp_path / "run" / "model").params
    assert fingerprint(rebuilt.params) == fingerprint(saved)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.cosine_floor=0", "cosine_floor is a share above 0"),
        ("--config.alpha_cosine=-1", "alpha_cosine must be at least 0, not -1"),
        ("--config.sigma=-1", "sigma must be positive and finite, not -1.0"),
    ],
)
def test_mistakes_are_one_line(
    flag: str,
    message: str,
    small_model: Path,
    tmp_path: Path,
) -> None:
    config = configured({"model": str(small_model)})
    name, _, value = flag.removeprefix("--config.").partition("=")
    config[name] = type(config[name])(float(value))
    with pytest.raises(InputError, match=message):
        train.run(config, tmp_path / "run")


# The study.


def test_the_study_compares_what_is_chosen_with_a_grid(
    small_model: Path, tmp_path: Path, wide: tuple[float, ...]
) -> None:
    config = get_config(str(small_model))
    config.update(generations=1)
    methods = ["sigma:0.1", "sigma:0.2", "sigma:auto"]
    study.collect(Grid(config, methods, [0, 1], tmp_path / "runs", tmp_path))
    found = read_csv(tmp_path / "sigma.csv")
    assert [row["method"] for row in found] == [m for m in methods for _ in (0, 1)]
    assert [row["sigma"] for row in found[:4]] == [0.1, 0.1, 0.2, 0.2]
    for row in found:
        folder = tmp_path / "runs" / row["method"].replace(":", "-")
        folder /= f"seed-{row['seed']}"
        ledger = ledgers.read(folder / "ledger.jsonl").header["evolution"]
        assert ledger["sigma"] == pytest.approx(row["sigma"], rel=1e-5)
        assert ledger["alpha"] == pytest.approx(row["alpha"], rel=1e-5)
        assert row["alpha"] == pytest.approx(row["sigma"] / 2 * (4 / 30) ** 0.5, 0.01)
        last = rows(folder / "evaluations.jsonl")[-1]
        assert row["after"] == pytest.approx(last["reward"], rel=1e-5)


def test_its_table(tmp_path: Path) -> None:
    row = {"task": "t", "before": 0.1, "examples": 64, "alpha": 0.1}
    after = {"sigma:1": (0.2, 0.4), "sigma:2": (0.5, 0.5), study.AUTO: (0.4, 0.5)}
    chosen = {"sigma:1": (1, 1), "sigma:2": (2, 2), study.AUTO: (1.5, 1.25)}
    lines = [
        {"method": name, "seed": seed, **row}
        | {"sigma": chosen[name][seed], "after": after[name][seed]}
        for name in after
        for seed in (0, 1)
    ]
    write_csv(tmp_path / "sigma.csv", lines)
    text = study.draw(tmp_path)
    assert text == (tmp_path / "sigma.md").read_text()
    assert "`t`, 0.100 ± 0.000 at the start, 64 examples" in text
    assert "| 1 | 0.300 ± 0.100 | 60 |" in text
    assert "| 2 | 0.500 ± 0.000 | 100 |" in text
    assert "| chosen: 1.5, 1.25 | 0.450 ± 0.050 | 90 |" in text
