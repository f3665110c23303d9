"""`python -m jes.studies.esma`: runs, what models say of themselves, table, figure."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import get_config

from jes.errors import InputError
from jes.studies import esma
from jes.studies.grid import Grid, method_config

METHODS = ["es", "sft:1e-3:2", "objective:correct"]


def settings(model: Path) -> ConfigDict:
    config = get_config(str(model))
    config.task = "tiny/knows"
    config.eval_tasks = ("tiny/add",)  # of which nothing is asked about knowing
    config.data.update({"train_examples": 16, "test_examples": 12})
    config.prompts, config.buckets = 8, (32,)
    config.generations, config.eval_every = 2, 2
    return config


@pytest.fixture(scope="module")
def studied(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three methods and one seed: runs and report in one folder."""
    folder = tmp_path_factory.mktemp("study")
    config = settings(small_model)
    esma.collect(Grid(config, METHODS, [3], folder, folder))
    esma.draw(folder)
    return folder


@pytest.mark.slow
def test_the_table_has_the_base_and_every_method(studied: Path) -> None:
    with (studied / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [
        (m, way) for m in ["base", *METHODS] for way in ("answers", "threshold")
    ]
    assert [(row["method"], row["yes_by"]) for row in rows] == expected
    assert {row["task"] for row in rows} == {"tiny/knows"}
    assert {row["seed"] for row in rows} == {"3"}
    for row in rows:
        right, wrong = float(row["correct"]), float(row["wrong"])
        assert right + wrong == 12
        assert float(row["accuracy"]) == pytest.approx(right / 12)
    text = (studied / "results.md").read_text()
    assert text.count("\n| `") == len(expected)
    assert "| `base` + threshold |" in text
    assert (studied / "metacognition.png").is_file()


@pytest.mark.slow
def test_models_are_asked_once(
    studied: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(esma, "measure", never)
    grid = Grid(settings(small_model), METHODS, [3], studied, studied)
    again = {(row["method"], row["yes_by"]): row for row in esma.measure_all(grid)}
    path = grid.folder("es", 3) / "metacognition.json"
    kept = json.loads(path.read_text())["tasks"]["tiny/knows"]["answers"]
    head = {"method": "es", "seed": 3, "task": "tiny/knows", "yes_by": "answers"}
    np.testing.assert_equal(again["es", "answers"], head | esma.flat(kept))
    with pytest.raises(AssertionError, match="asked again"):
        esma.measure_all(Grid(grid.config, METHODS, [4], studied, studied))


def test_methods_change_what_they_name(small_model: Path) -> None:
    base = settings(small_model)
    base.objective = "esma"
    sft = method_config(base, "sft:3e-4:7", 1)
    assert (sft.method, sft.sft.learning_rate, sft.generations) == ("sft", 3e-4, 7)
    assert (sft.objective, sft.seed) == ("reward", 1)
    assert method_config(base, "objective:ml5", 1).objective == "ml5"
    with pytest.raises(InputError, match="is no method"):
        method_config(base, "sft:fast", 1)


def test_rows_of_the_table() -> None:
    """Means and standard errors, and nothing where a metric is undefined."""
    one = dict.fromkeys(esma.COLUMNS, 0.5) | {"auroc2": np.nan}
    two = one | {"d_prime": 1.5, "accuracy": 0.7}
    assert esma.cells([one, two], ("es", "threshold"), seeds=2) == [
        "`es` + threshold",
        "60.0 ± 10.0",
        *["50.0 ± 0.0"] * 3,
        "1.00 ± 0.50",
        "0.50 ± 0.00",
        "",
    ]
    assert esma.cells([one], ("es", "answers"), seeds=2) == ["`es`", *[""] * 7]
