"""Pictures of a run."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.metrics import read_rows


def training_curves(workdir: Path) -> Path:
    """Draws `curves.png`: reward (or loss), held-out accuracy, distance from start."""
    metrics = read_rows(workdir / "metrics.jsonl")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    learned, accuracy, distance = figure.subplots(1, 3)

    def values(name: str) -> np.ndarray:
        return np.array([row[name] for row in metrics], float)  # None is NaN

    at = [row["generation"] + 1 for row in metrics]
    rewarded = all("fitness_mean" in row for row in metrics)
    if rewarded:
        mean, spread = values("fitness_mean"), values("fitness_std")
        low, high = mean - spread, mean + spread
        learned.fill_between(at, low, high, alpha=0.25, label="± one std")
        learned.plot(at, mean, label="mean of the members")
        learned.plot(at, values("fitness_max"), linewidth=0.8, label="best member")
    else:  # learned from labels, not from rewards
        learned.plot(at, values("loss"), label="labels")

    _accuracies(accuracy, read_rows(workdir / "evaluations.jsonl"))

    drift = values("displacement_norm_drift")
    distance.plot(at, values("displacement_norm"), label="measured")
    if not np.isnan(drift).any():
        distance.plot(at, drift, "--", label="the walk of noise alone")

    reward = (
        ("training reward", "reward") if rewarded else ("training loss", "nats a token")
    )
    for axes, (title, unit) in (
        (learned, reward),
        (accuracy, ("held-out accuracy", "%")),
        (distance, ("distance from the base model", "‖θ - θ₀‖")),
    ):
        axes.set(title=title, xlabel="generation", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(workdir / "curves.png", dpi=120)
    return workdir / "curves.png"


def _accuracies(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """A line a task; bars are one binomial standard error over the examples."""
    for task in dict.fromkeys(row["task"] for row in evaluations):
        rows = [row for row in evaluations if row["task"] == task]
        share = np.array([row["accuracy"] for row in rows], float)
        error = (share * (1 - share) / [row["examples"] for row in rows]) ** 0.5
        at, percent = [row["generation"] for row in rows], 100 * share
        axes.errorbar(at, percent, 100 * error, marker="o", capsize=3, label=task)
    axes.set_ylim(-2, 102)
