"""Tables and figures of the studies, drawn again from the data that is committed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.errors import InputError
from jes.studies import esma, forgetting, rise_then_decay
from jes.studies.grid import (
    band,
    grouped,
    mean_error,
    precision,
    read_csv,
    split,
    t_factor,
    table,
    write_csv,
)

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"
FORGETTING = [
    "forgetting",
    "forgetting_last",
    "qes_float4",
    "qes_float8",
    "qes_int4",
    "qes_int8",
    "qes_w8a8",
]
STUDIES = {
    **dict.fromkeys(FORGETTING, (forgetting.draw, "results", "forgetting")),
    "forgetting_chain": (forgetting.draw_chain, "chain", "chain"),
    "esma": (esma.draw, "results", "metacognition"),
    "esma_int4": (esma.draw, "results", "metacognition"),
    "rise": (rise_then_decay.draw, "rise", "rise"),
}
"""Folder -> what draws it, and the names of its table and of its figure."""


@pytest.mark.parametrize("name", STUDIES)
def test_committed_tables_are_drawn_from_their_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, words, picture = STUDIES[name]
    # Rendering takes seconds; what figures show is tested below.
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    for path in RESULTS.joinpath(name).iterdir():
        if path.suffix in (".csv", ".json"):
            shutil.copy(path, tmp_path)
    text = draw(tmp_path)
    assert text == (RESULTS / name / f"{words}.md").read_text()
    assert (tmp_path / f"{words}.md").read_text() == text
    assert (tmp_path / f"{picture}.png").is_file()
    assert (RESULTS / name / f"{picture}.png").is_file()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.csv")), ids=str)
def test_rows_are_written_as_they_were_read(path: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", read_csv(path))
    assert (tmp_path / "rows.csv").read_bytes() == path.read_bytes()


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """Label -> [x, y] of the labelled lines and error bars of a panel."""
    found = {
        line.get_label(): line.get_xydata().T
        for line in axes.lines
        if not line.get_label().startswith("_")
    }
    for container in axes.containers:
        found[container.get_label()] = container.lines[0].get_xydata().T
    return found


def test_the_figure_of_forgetting_shows_the_curves() -> None:
    curves = json.loads((RESULTS / "forgetting" / "curves.json").read_text())
    rows = read_csv(RESULTS / "forgetting" / "results.csv")
    figure = forgetting.figure(rows, curves, "tiny/min")
    course, trade, norms, kl = figure.axes
    for axes, x, y in (
        (course, "answers", "target"),
        (kl, "answers", "kl_prior"),
        (norms, "generation", "norm"),
    ):
        for method, line in lines(axes).items():
            seeds = curves[method].values()
            mean = np.mean([seed[y] for seed in seeds], axis=0)
            np.testing.assert_allclose(line, [curves[method]["0"][x], mean])
    assert list(lines(norms)) == list(curves)
    assert "l2:3" not in lines(course)  # one of each kind, to be told apart
    ends = grouped(rows, "method")
    assert list(lines(trade)) == list(ends)
    for method, ((x,), (y,)) in lines(trade).items():
        assert x == pytest.approx(np.mean([row["target"] for row in ends[method]]))
        assert y == pytest.approx(np.mean([row["prior"] for row in ends[method]]))


def test_a_panel_of_what_was_not_measured_is_left_out() -> None:
    curves = json.loads((RESULTS / "qes_int4" / "curves.json").read_text())
    rows = read_csv(RESULTS / "qes_int4" / "results.csv")
    assert len(forgetting.figure(rows, curves, "tiny/min").axes) == 3


def test_the_figure_of_a_chain_shows_its_stages() -> None:
    rows = read_csv(RESULTS / "forgetting_chain" / "chain.csv")
    columns = ["tiny/min", "tiny/last", "tiny/rotate", "priors"]
    figure = forgetting.chain_figure(rows, columns)
    for axes, (method, found) in zip(
        figure.axes, grouped(rows, "method").items(), strict=True
    ):
        assert axes.get_title() == method
        for column, (x, y) in lines(axes).items():
            stages = grouped(found, "stage")
            assert list(x) == list(stages) == [0, 1, 2, 3]
            means = [np.mean([row[column] for row in stages[s]]) for s in stages]
            np.testing.assert_allclose(y, means)
        assert list(lines(axes)) == columns


def test_the_figure_of_esma_shows_every_row() -> None:
    rows = read_csv(RESULTS / "esma" / "results.csv")
    groups = grouped(rows, "task", "method", "yes_by")
    ways, tasks = list(grouped(rows, "method", "yes_by")), list(grouped(rows, "task"))
    figure = esma.figure(groups, ways, tasks)
    for axes, metric in zip(figure.axes, esma.PANELS, strict=True):
        assert list(lines(axes)) == tasks
        for task, (x, _) in lines(axes).items():
            found = [groups[task, *way] for way in ways]
            means = [np.mean([row[metric] for row in rows]) for rows in found]
            np.testing.assert_allclose(x, means)


def test_the_figure_of_rise_then_decay_shows_the_curves() -> None:
    results = json.loads((RESULTS / "rise" / "rise.json").read_text())
    methods = {name: list(of.values()) for name, of in results.items()}
    figure = rise_then_decay.figure(methods)
    for axes, key in zip(figure.axes, ("train", "held_out"), strict=True):
        assert list(lines(axes)) == list(methods)
        for method, line in lines(axes).items():
            curves = [one["curves"] for one in methods[method]]
            mean = np.mean([curve[key] for curve in curves], axis=0)
            np.testing.assert_allclose(line, [curves[0]["generation"], mean])


def test_bands_are_one_standard_error() -> None:
    axes = Figure().subplots()
    band(axes, [0, 1], [[1.0, 3.0], [2.0, 5.0]], color="C0")
    (area,) = axes.collections
    corners = area.get_paths()[0].vertices
    assert {tuple(point) for point in corners.round(6)} == {
        (0, 1.0),
        (0, 2.0),
        (1, 3.0),
        (1, 5.0),
    }


def test_means_errors_and_intervals() -> None:
    assert mean_error([1.0, 2.0, 3.0], ".1f") == "2.0 ± 0.6"
    assert mean_error([2.0], ".1f") == "2.0"
    assert mean_error([], ".1f") == ""
    # From tables of Student's t.
    assert t_factor(3) == pytest.approx(4.3027, abs=1e-4)
    assert t_factor(10) == pytest.approx(2.2622, abs=1e-4)
    text = precision(3, 400)
    assert "over 3 seeds" in text
    assert "2 degrees of freedom) is ± 4.3 of these" in text
    assert "standard error of 2.5 points" in text
    assert precision(1) == ""


def test_tables_and_cells(tmp_path: Path) -> None:
    rows = [{"method": "l2:1", "seed": 3, "x": 1 / 3}, {"method": "es", "y": np.nan}]
    write_csv(tmp_path / "rows.csv", rows)
    text = (tmp_path / "rows.csv").read_text()
    assert text.splitlines() == ["method,seed,x,y", "l2:1,3,0.333333,", "es,,,nan"]
    first, second = read_csv(tmp_path / "rows.csv")
    assert first == {"method": "l2:1", "seed": 3, "x": 0.333333, "y": None}
    assert np.isnan(second["y"])
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    with pytest.raises(InputError, match="no data to draw from"):
        read_csv(tmp_path / "others.csv")
    with pytest.raises(InputError, match="--seeds=1,1: an entry is empty or repeated"):
        split("1,1", "seeds")
