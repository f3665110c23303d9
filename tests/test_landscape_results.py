"""Committed tables and figures of studies, drawn again from their stored data."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from jes.studies import probe, sparsity, spectrum

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"


def data_of(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def lines_of(axes: Axes) -> dict[str, np.ndarray]:
    """Points [T, 2] of the labelled lines."""
    return {str(line.get_label()): line.get_xydata() for line in axes.get_lines()}


@pytest.mark.parametrize(
    ("study", "data", "text"),
    [
        (probe, "probe/probe.json", "probe.md"),
        (probe, "probe_min/probe.json", "probe.md"),
        (spectrum, "spectrum/spectrum.json", "spectrum.md"),
        (sparsity, "esma/sparsity/results.json", "results.md"),
    ],
)
def test_committed_tables_are_those_of_their_data(
    study: ModuleType, data: str, text: str, tmp_path: Path
) -> None:
    source = RESULTS / data
    shutil.copy(source, tmp_path)
    drawn = study.draw(tmp_path)
    assert drawn == (source.parent / text).read_text()
    assert (tmp_path / text).read_text() == drawn
    pictures = {path.name for path in source.parent.glob("*.png")}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures


def test_the_figure_of_probes_shows_their_gains() -> None:
    data = data_of("probe/probe.json")
    best, relative, share, mean, honest, change = probe.figure(data).axes
    rows = {
        (one["model"], one["sigma"]): one
        for one in data["results"]
        if one["sigma"] != "sham"
    }
    curves = [container.lines[0].get_xydata() for container in best.containers]
    assert len(curves) == len(rows) == 12
    for curve, one in zip(curves, rows.values(), strict=True):
        points = np.transpose([one["sizes"], 100 * np.array(one["best"])])
        np.testing.assert_allclose(curve, points)
    # Only curves that rise above 0 are drawn relative to their end; and chance, 0.9.
    rising = [one for one in rows.values() if one["best"][-1] > 0]
    assert len(relative.get_lines()) == len(rising) + 2
    chance = lines_of(relative)["any Gaussian"]
    assert chance[-2:, 1] == pytest.approx([2.043 / 2.249, 1], abs=1e-3)
    tiny = [one for (model, _), one in rows.items() if model == "tiny"]
    for axes, key in ((share, "improving"), (mean, "mean")):
        drawn = axes.containers[-1].lines[0].get_xydata()
        points = [[one["sigma"], 100 * one[key]] for one in tiny]
        np.testing.assert_allclose(drawn, points)
    nano = rows["runs/sizes/nano", 0.01]
    fresh = lines_of(honest)["on fresh prompts"]
    assert fresh[2] == pytest.approx([0.01, 100 * nano["fresh"][3]])
    changed = lines_of(change)["tiny"]
    assert changed[:, 0] == pytest.approx([100 * one["other"] for one in tiny])


def test_the_figures_of_spectra_show_eigenvalues_and_overlaps() -> None:
    (model,) = data_of("spectrum/spectrum.json")["models"]
    density, pairs, overlaps = spectrum.figure(model).axes
    lines = lines_of(density)
    np.testing.assert_allclose(
        lines["top, by Lanczos"][:, 0], model["top"]["values"], rtol=1e-12
    )
    grid, shares = lines["SLQ"].T
    assert np.trapezoid(shares, grid) == pytest.approx(1, abs=1e-3)
    drawn = lines_of(pairs)["sigma 0.01"][:, 1]
    values = np.array(model["operators"]["reward, sigma 0.01"]["eigenvalues"])
    np.testing.assert_allclose(drawn, values / np.abs(values).max())
    row = model["overlaps"][-1]
    at = lines_of(overlaps)["in the top subspace"][-1]
    assert at[0] == pytest.approx(row["top"]["share"] / row["top"]["expected"])
    (axes,) = spectrum.dimensions([model]).axes
    dots = axes.containers[0].lines[0].get_xydata()
    found = model["indices"] | model["shapes"]
    finite = [one["dimension"] for one in found.values() if one["dimension"]]
    assert dots[:, 0] == pytest.approx(finite)


def test_the_figure_of_sparsity_shows_every_part_from_base_to_run() -> None:
    rows = data_of("esma/sparsity/results.json")["rows"]
    by_share, by_norm, alignment, rates = sparsity.figure(rows).axes
    lines = lines_of(by_share)
    assert list(lines) == list(dict.fromkeys(row["part"] for row in rows))
    top = {row["share"]: row for row in rows if row["part"] == "top"}
    ends = top[0.0]["d_prime"], top[1.0]["d_prime"]
    for part, line in lines.items():
        assert (line[0, 0], line[-1, 0]) == (0, 100)
        expected = ends[::-1] if part == "top removed" else ends
        if part not in sparsity.WALKS:
            assert (line[0, 1], line[-1, 1]) == expected
    np.testing.assert_allclose(
        lines["top"], [[100 * share, row["d_prime"]] for share, row in top.items()]
    )
    first = by_norm.get_lines()[0].get_xydata()
    assert first[-2:, 0] == pytest.approx([100 * top[0.5]["norm_share"], 100])
    assert alignment.get_lines()[0].get_ydata()[-1] == 100 * top[1.0]["alignment"]
    dashed = rates.get_lines()[1].get_ydata()
    assert dashed[0] == pytest.approx(100 * 2 / 384)
