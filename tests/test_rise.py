"""Rise-then-decay: peaks, early stopping, and the command on a random model."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import get_config as small_config
from small_run import rows, run_jobs

from jes.studies.rise_then_decay import curves_of, outcome, smoothed, stop_early


def get_config(model: str) -> ConfigDict:
    """Four generations, looked at after each."""
    config = small_config(model)
    config.eval_train = True
    config.eval_every = 1
    config.prompts = 0
    config.data.train_examples = 16
    config.generations = 4
    return config


def test_smoothed_is_a_mean_of_neighbours():
    np.testing.assert_allclose(smoothed([0, 3, 6, 0]), [1.5, 3, 3, 3])
    np.testing.assert_allclose(smoothed([4.0]), [4.0])


def test_early_stopping_takes_the_first_best_that_lasts():
    curve = [1, 3, 2, 2, 5, 4, 4, 4, 9]
    assert stop_early(curve, patience=3) == (4, 7)  # and misses the 9
    assert stop_early(curve, patience=2) == (1, 3)
    assert stop_early(curve, patience=9) == (8, 8)
    assert stop_early([2, 2, 2], patience=5) == (0, 2)


def test_the_outcome_of_a_curve():
    found = outcome(
        {
            "generation": [0, 10, 20, 30, 40],
            "train": [30.0, 60.0, 66.0, 60.0, 30.0],
            "held_out": [20.0, 30.0, 33.0, 31.0, 10.0],
        }
    )
    assert (found["at"], found["peak"], found["end"]) == (20, 62.0, 45.0)
    assert found["decay"] == pytest.approx(17)
    assert (found["held_out"], found["held_out_stopped"]) == (10, 33)
    assert found["stopped_at"] == 40


def command(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        "jes.studies.rise_then_decay",
        f"--config={__file__}:{model}",
        f"--workdir={folder}",
        *more,
    ]


@pytest.mark.slow
def test_the_command(small_model: Path, tmp_path: Path):
    model = small_model
    methods = "--methods=n:4,n:6+half_alpha:2"
    jobs = [
        {"argv": command(model, tmp_path / "runs", methods, "--seeds=0,1")},
        {"argv": command(model, tmp_path / "no", "--config.eval_train=False")},
        {"argv": command(model, tmp_path / "no", "--methods=es,es")},
    ]
    done, blind, twice = run_jobs(jobs)
    assert done["status"] == 0, done["stderr"]
    results = json.loads((tmp_path / "runs" / "rise.json").read_text())
    assert list(results) == ["n:4", "n:6+half_alpha:2"]
    folder = tmp_path / "runs" / "n-4" / "seed-1"
    curves = curves_of(folder, "tiny/reverse")
    assert curves["generation"] == [0, 1, 2, 3, 4]
    on_train = [
        100 * row["accuracy"]
        for row in rows(folder / "evaluations.jsonl")
        if row["task"] == "tiny/reverse (train)"
    ]
    assert results["n:4"]["1"]["curves"]["train"] == pytest.approx(on_train)
    assert results["n:4"]["1"]["answers"] == 4 * 4 * 16 / 1000
    assert "over 2 seed(s)" in (tmp_path / "runs" / "rise.md").read_text()
    assert (tmp_path / "runs" / "rise.png").is_file()
    for result, said in ((blind, "eval_train=True"), (twice, "repeated")):
        assert result["status"] == 2
        assert said in result["stderr"]
