"""The notebooks run from a clean checkout, and are committed with their outputs."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
every = pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem
)


def cells(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@every
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, cell after cell, in the folder of the notebooks."""
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        source = "".join(cell["source"])
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
    assert names["plt"].get_fignums()
    names["plt"].close("all")


@every
def test_a_notebook_has_its_outputs(path: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1))  # run once, from top to bottom
    kinds = {out["output_type"] for cell in cells(path) for out in cell["outputs"]}
    assert "error" not in kinds
    assert "display_data" in kinds
    assert "/tmp/" not in path.read_text()
