r"""Rise-then-decay: how training reward rises under fixed settings, and falls.

    python -m jes.studies.rise_then_decay --config=configs/rise_then_decay.py:quick
    python -m jes.studies.rise_then_decay --config=configs/rise_then_decay.py:tiny \
        --methods=n:10,n:30,n:100,grpo:1e-4,half_alpha:30,l2:1 --seeds=0,1,2

`jes.studies.grid` lists the methods. Every `eval_every` generations the center answers
the training questions (2602.00170, Fig. 1) and held-out ones.

Early stopping needs no further runs: it takes the weights of the best evaluation on
training questions once `PATIENCE` more have brought no better one. Held-out answers
have no part in the choice.

OUT gets rise.json, and drawn from it rise.md and rise.png.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jes.errors import InputError
from jes.experiment import ON_TRAIN
from jes.io.metrics import read_rows, write_json
from jes.studies.grid import Grid, band, mean_error, precision, run_study, table, tidy

PATIENCE = 6
SMOOTH = 3
"""Evaluations that a peak is the mean of: the highest of many is high by chance."""
COLUMNS = {
    "start": "start %",
    "peak": "peak %",
    "at": "at generation",
    "end": "end %",
    "decay": "decay",
    "held_out_start": "held-out start %",
    "held_out": "held-out end %",
    "held_out_stopped": "held-out, stopped early %",
    "stopped_at": "stopped at generation",
    "norm": "‖θ-θ₀‖ end",
    "answers": "answers, thousands",
}
"""Key of a result -> heading in the table."""


def collect(grid: Grid) -> None:
    """Trains the grid and writes rise.json: method -> seed -> result."""
    config = grid.config
    if not config.eval_train:
        raise InputError("the study evaluates training questions: set eval_train=True")
    if config.anchor == "none":
        raise InputError("the study measures distances: anchor='none' cannot be used")
    grid.run()
    results: dict[str, dict[int, Any]] = {}
    for method, seed in grid:
        summary = grid.summary(method, seed)
        curves = curves_of(grid.folder(method, seed), config.task)
        results.setdefault(method, {})[seed] = {
            "task": config.task,
            **outcome(curves),
            "norm": summary["displacement_norm"],
            "answers": summary["answers"] / 1000,
            "curves": curves,
        }
    write_json(grid.out / "rise.json", results)


def curves_of(folder: Path, task: str) -> dict[str, list[float]]:
    """Accuracies in percent of a run: `generation`, `train`, `held_out`."""
    rows = read_rows(folder / "evaluations.jsonl")
    found = {(row["task"], row["generation"]): row["accuracy"] or 0.0 for row in rows}
    curves = {"generation": sorted({generation for _, generation in found})}
    for name, of in (("train", task + ON_TRAIN), ("held_out", task)):
        curves[name] = [100 * found[of, at] for at in curves["generation"]]
    return curves


def smoothed(values: Sequence[float], width: int = SMOOTH) -> np.ndarray:
    """Means over `width` neighbors, an odd number; of fewer at the ends."""
    starts = range(-(width // 2), len(values) - width // 2)
    return np.array([np.mean(values[max(0, i) : i + width]) for i in starts])


def stop_early(values: Sequence[float], patience: int = PATIENCE) -> tuple[int, int]:
    """Indices of the best evaluation, and of the last: `patience` after the best."""
    best = 0
    for number, value in enumerate(values):
        if value > values[best]:
            best = number
        if number - best >= patience:
            return best, number
    return best, len(values) - 1


def outcome(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Peak and decay of a curve, and the result of early stopping; in percent."""
    train, at, held_out = (curves[key] for key in ("train", "generation", "held_out"))
    smooth = smoothed(train)
    top = int(smooth.argmax())
    best, last = stop_early(train)
    return {
        "start": train[0],
        "peak": float(smooth[top]),
        "at": at[top],
        "end": float(smooth[-1]),
        "decay": float(smooth[top] - smooth[-1]),
        "held_out_start": held_out[0],
        "held_out": held_out[-1],
        "held_out_stopped": held_out[best],
        "stopped_at": at[last],
    }


def draw(out: Path) -> str:
    """Writes rise.md and rise.png from rise.json."""
    results = json.loads((out / "rise.json").read_text())
    methods = {name: list(of_seed.values()) for name, of_seed in results.items()}
    first = next(iter(methods.values()))
    text = (
        f"Task `{first[0]['task']}`: accuracy on the training questions, peak and end "
        f"as means of {SMOOTH} looks; ± one standard error over {len(first)} seed(s)."
    )
    lines = [
        [name, *(mean_error([one[key] for one in found]) for key in COLUMNS)]
        for name, found in methods.items()
    ]
    text += "\n\n" + table(["method", *COLUMNS.values()], lines)
    if len(first) > 1:
        text += f"\n{precision(len(first))}\n"
    (out / "rise.md").write_text(text)
    figure(methods).savefig(out / "rise.png", dpi=120)
    return text


def figure(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training and held-out accuracy of every method."""
    made = Figure(figsize=(11, 4), layout="constrained")
    panels = made.subplots(1, 2, sharey=True)
    task = next(iter(methods.values()))[0]["task"]
    kinds = {"train": "training", "held_out": "held-out"}
    for axes, (key, kind) in zip(panels, kinds.items(), strict=True):
        for number, (name, found) in enumerate(methods.items()):
            curves = [one["curves"] for one in found]
            lines = [curve[key] for curve in curves]
            band(axes, curves[0]["generation"], lines, color=f"C{number}", label=name)
        title = f"{task}, {kind} questions"
        tidy(axes, title, "generation", "accuracy, %", legend=key == "held_out")
    return made


def main() -> None:
    """The command line."""
    run_study(collect, draw, methods="n:10,n:30", kind="decay")


if __name__ == "__main__":
    main()
