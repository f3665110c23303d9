"""Pictures of a run."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.metrics import read_rows


def training_curves(workdir: Path) -> Path:
    """Draws `curves.png`: reward (or loss), held-out accuracy, distance from start."""
    metrics = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    learned, accuracy, distance = figure.subplots(1, 3)

    generations = [row["generation"] + 1 for row in metrics]
    if all("fitness_mean" in row for row in metrics):
        _rewards(learned, generations, metrics)
    else:  # learned from labels, not from rewards
        learned.plot(generations, [row["loss"] for row in metrics], label="labels")
        _label(learned, "training loss", "nats a token")

    _accuracies(accuracy, evaluations)
    _label(accuracy, "held-out accuracy", "%")

    norm = [row["displacement_norm"] for row in metrics]
    drift = [row["displacement_norm_drift"] for row in metrics]
    distance.plot(generations, norm, label="measured")
    if None not in drift:
        distance.plot(generations, drift, "--", label="the walk of noise alone")
    _label(distance, "distance from the base model", "‖θ - θ₀‖")

    path = workdir / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _rewards(axes: Axes, generations: list[int], metrics: list[dict[str, Any]]) -> None:
    """The mean of the members, their spread, and the best."""
    mean = [row["fitness_mean"] for row in metrics]
    spread = [row["fitness_std"] for row in metrics]
    best = [row["fitness_max"] for row in metrics]
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axes.fill_between(generations, low, high, alpha=0.25, label="± one std")
    axes.plot(generations, mean, label="mean of the members")
    axes.plot(generations, best, linewidth=0.8, label="best member")
    _label(axes, "training reward", "reward")


def _accuracies(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """A line a task; bars are one binomial standard error over the examples."""
    for task in dict.fromkeys(row["task"] for row in evaluations):
        rows = [row for row in evaluations if row["task"] == task]
        rows = [row for row in rows if row["accuracy"] is not None]
        share = [row["accuracy"] for row in rows]
        error = [
            100 * (a * (1 - a) / row["examples"]) ** 0.5
            for a, row in zip(share, rows, strict=True)
        ]
        at = [row["generation"] for row in rows]
        percent = [100 * a for a in share]
        axes.errorbar(at, percent, error, marker="o", capsize=3, label=task)
    axes.set_ylim(-2, 102)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("generation")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
