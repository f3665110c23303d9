"""Pictures of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.metrics import read_rows


def training_curves(workdir: Path) -> Path:
    """Draws `curves.png`: reward (or loss), held-out results, distance from start.

    Held-out rewards have a panel where they are not the accuracies.
    """
    metrics = read_rows(workdir / "metrics.jsonl")
    evaluations = read_rows(workdir / "evaluations.jsonl")
    panels: dict[str, tuple[Callable[..., None], Any, str]] = {
        "training reward": (_rewards, metrics, "reward"),
        "held-out accuracy": (_accuracies, evaluations, "%"),
        "held-out reward": (_held_out, evaluations, "reward"),
        "distance from the base model": (_distances, metrics, "‖θ - θ₀‖"),
    }
    if not all("fitness_mean" in row for row in metrics):  # learned from labels
        named = {"training loss": (_losses, metrics, "nats a token")}
        panels = named | {k: v for k, v in panels.items() if k != "training reward"}
    if not any(row.get("accuracy") is not None for row in evaluations):
        del panels["held-out accuracy"]
    if all(row.get("reward") == row.get("accuracy") for row in evaluations):
        del panels["held-out reward"]
    figure = Figure(figsize=(11 * len(panels) / 3, 3.4), layout="constrained")
    for number, (title, (draw, rows, unit)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        draw(axes, rows)
        axes.set(title=title, xlabel="generation", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(workdir / "curves.png", dpi=120)
    return workdir / "curves.png"


def _values(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row.get(name) for row in rows], float)  # None is NaN


def _rewards(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    """Of the members, at the centre before each step."""
    at = _values(metrics, "generation") + 1
    mean, spread = _values(metrics, "fitness_mean"), _values(metrics, "fitness_std")
    axes.fill_between(at, mean - spread, mean + spread, alpha=0.25, label="± one std")
    axes.plot(at, mean, label="mean of the members")
    axes.plot(at, _values(metrics, "fitness_max"), linewidth=0.8, label="best member")


def _losses(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    at = _values(metrics, "generation") + 1
    axes.plot(at, _values(metrics, "loss"), label="labels")


def _distances(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    at, drift = _values(metrics, "generation") + 1, "displacement_norm_drift"
    axes.plot(at, _values(metrics, "displacement_norm"), label="measured")
    if not np.isnan(_values(metrics, drift)).any():
        axes.plot(at, _values(metrics, drift), "--", label="the walk of noise alone")


def _accuracies(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """A line a task; bars are one binomial standard error over the examples."""
    for task in dict.fromkeys(row["task"] for row in evaluations):
        rows = [row for row in evaluations if row["task"] == task]
        share = _values(rows, "accuracy")
        error = (share * (1 - share) / _values(rows, "examples")) ** 0.5
        at, percent = _values(rows, "generation"), 100 * share
        axes.errorbar(at, percent, 100 * error, marker="o", capsize=3, label=task)
    axes.set_ylim(-2, 102)


def _held_out(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """A line a task; bars are one standard error over the examples."""
    for task in dict.fromkeys(row["task"] for row in evaluations):
        rows = [row for row in evaluations if row["task"] == task]
        at, reward = _values(rows, "generation"), _values(rows, "reward")
        error = np.nan_to_num(_values(rows, "reward_error"))
        axes.errorbar(at, reward, error, marker="o", capsize=3, label=task)
