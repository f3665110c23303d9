"""The command that looks at the curvature around models."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from small_run import EMBEDDED, SHAPE, rows

from jes.models.shapes import QWEN2
from jes.studies import probe, spectrum

NANO = {"hidden_size": 8, "intermediate_size": 12}
CONFIG = """
from jes.studies.probe import default

def get_config(model):
    config = default()
    config.models = (model,)
    config.task = "tiny/reverse"
    config.data.train_examples = 40
    config.buckets = (16, 24)
    config.chunk = 4
    config.curvature.examples = 6
    config.curvature.probes = 2
    config.curvature.steps = 12
    config.curvature.top = 3
    config.curvature.exact = 2
    config.curvature.sigmas = (0.02, 0.2)
    config.curvature.directions = 10
    config.curvature.shuffles = 3
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and a model of about 1,500 random weights."""
    folder = tmp_path_factory.mktemp("spectrum")
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    shape = QWEN2 | SHAPE | NANO | {"vocab_size": vocabulary}
    write_checkpoint(folder / "nano", shape, tokenizer=EMBEDDED, dtype="float32")
    (folder / "config.py").write_text(CONFIG)
    return folder


def study(place: Path, out: str, model: str = "nano", run: str = "", **more) -> None:
    """What the command does, after flags."""
    scope: dict = {}
    exec((place / "config.py").read_text(), scope)
    config = scope["get_config"](str(place / model))
    for name, value in more.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    workdir = place / out
    workdir.mkdir(exist_ok=True)
    spectrum.study(config, workdir, Path(run) if run else None)


@pytest.fixture(scope="module")
def results(place: Path) -> Path:
    """What the command leaves, killed once between members."""
    original, calls = spectrum.values_of, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum, "values_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(place, "out")
    path = place / "out" / "0-nano" / "results.jsonl"
    (place / "killed.jsonl").write_bytes(path.read_bytes())
    assert not (place / "out" / "spectrum.json").exists()
    with path.open("a") as file:
        file.write('{"kind": "mem')  # as a kill can leave it
    study(place, "out")
    return place / "out"


def test_the_command_goes_on_after_a_kill(results: Path, place: Path) -> None:
    path = results / "0-nano" / "results.jsonl"
    assert path.read_text().startswith((place / "killed.jsonl").read_text())
    # Ten pairs in chunks of four members, for two sigmas.
    expected = ["quadrature"] * 2 + ["exact", "dense", "centre"] + ["members"] * 10
    kinds = [row["kind"] for row in rows(path)]
    assert kinds == expected
    assert [row["kind"] for row in rows(place / "killed.jsonl")] == expected[:8]
    firsts = [row["first"] for row in rows(path) if row["kind"] == "members"]
    assert firsts == [0, 4, 8, 12, 16] * 2


def test_estimates_of_one_thing_agree(results: Path) -> None:
    """Lanczos and ARPACK with the whole Hessian; traces within their errors."""
    (report,) = json.loads((results / "spectrum.json").read_text())["models"]
    (dense,) = (
        np.array(row["values"])
        for row in rows(results / "0-nano" / "results.jsonl")
        if row["kind"] == "dense"
    )
    assert len(dense) == report["parameters"] < 3000
    largest = dense[np.argsort(-np.abs(dense))]
    np.testing.assert_allclose(report["exact"], largest[:2], rtol=2e-3)
    assert report["top"]["values"][0] == pytest.approx(largest[0], rel=1e-3)
    shapes = report["shapes"]
    whole = shapes["whole Hessian of the surrogate"]
    assert whole["trace"] == pytest.approx(dense.sum())
    slq = shapes["SLQ of the surrogate"]
    # Two probes know their error badly: t of one degree of freedom, 99 %.
    assert abs(slq["trace"] - whole["trace"]) < 64 * slq["trace_error"]
    index = report["indices"]["pairs, surrogate, sigma 0.02"]
    assert index["trace_low"] < index["trace"] < index["trace_high"]
    assert set(report["operators"]) == {
        f"{objective}, sigma {sigma}"
        for objective in ("reward", "surrogate")
        for sigma in (0.02, 0.2)
    }
    one = report["operators"]["surrogate, sigma 0.02"]
    assert len(one["eigenvalues"]) == 10
    assert {"measured", "rewards", "pairs"} <= set(one)
    names = [row["what"] for row in report["overlaps"]]
    assert names[0] == "all perturbations"
    assert names[-1] == "gradient of the surrogate"
    assert "best 10 %, reward, sigma 0.2" in names
    for row in report["overlaps"]:
        assert row["top"]["expected"] == 3 / report["parameters"]
    text = (results / "spectrum.md").read_text()
    assert text.count("rewards shuffled") == 4
    for name in ("spectrum-0.png", "dimensions.png"):
        assert (results / name).is_file()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["jes", *arguments])
    try:
        spectrum.main()
    except SystemExit as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curvature__examples": 41}, "examples=41, but tiny/reverse has 40 training"),
        ({"curvature__probes": 0}, "curvature.probes must be at least 1, not 0"),
        ({"curvature__steps": 10**6}, "curvature.steps: .*nano has [0-9]+ weights"),
        ({"curvature__extreme": 0.7}, "a share, at most 0.5: not 0.7"),
        ({"curvature__sigmas": ()}, "curvature.sigmas is empty"),
        ({"curvature__sigmas": (0.1, -1.0)}, "must be positive, not -1.0"),
        ({"task": "tiny/knows"}, "task tiny/knows asks two questions"),
        ({"task": "tiny/none"}, "there is no task 'tiny/none'"),
        ({"models": ()}, "models is empty, or has an entry twice"),
        ({"model": "none"}, "there is no folder"),
        ({"run": "nowhere"}, "nowhere is not a run folder"),
        ({"out": "out", "seed": 3}, "belongs to a run with other settings:\n  seed"),
        ({"out": "."}, "is not empty and holds no run"),
    ],
)
def test_what_cannot_be_is_refused(
    change: dict, message: str, results: Path, place: Path, tmp_path: Path
) -> None:
    given = {"out": str(tmp_path / "out")} | change
    with pytest.raises(spectrum.InputError, match=message):
        study(place, **given)


def test_quantised_models_and_other_weights_are_refused(
    results: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(probe, "is_quantized", lambda params: True)
        with pytest.raises(spectrum.InputError, match="nano is quantised"):
            study(place, "quantised")
    monkeypatch.setattr(spectrum, "fingerprint", lambda params: "another")
    with pytest.raises(spectrum.InputError, match="has results of another model"):
        study(place, "out")
