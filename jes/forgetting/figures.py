"""The figure of a forgetting study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, dict[int, dict[str, Any]]]
"""Method -> seed -> what it came to; see `jes.forgetting.report.result`."""


def study_figure(results: Results, target: str) -> Figure:
    """Course of the accuracies, the trade-off, norms with their laws, and KL.

    A method has one colour in all panels; the courses are of the first of each kind.
    """
    made = Figure(figsize=(13, 9), layout="constrained")
    course, trade, norms, kl = made.subplots(2, 2).ravel()
    runs = [method for method in results if has_curve(results[method])]
    colors = {method: f"C{number % 10}" for number, method in enumerate(runs)}
    few = main_methods(runs)
    for method in runs:
        curves = [one["curve"] for one in results[method].values()]
        color, answers = colors[method], curves[0]["answers"]
        if method in few:
            band(course, answers, curves, "target", color, "-", method)
            band(course, answers, curves, "prior", color, "--")
            band(kl, answers, curves, "kl_prior", color, "-", method)
        band(norms, curves[0]["generation"], curves, "norm", color, "-", method)
        if None not in curves[0]["law"]:
            at, law = curves[0]["generation"], curves[0]["law"]
            norms.plot(at, law, ":", color="black", linewidth=1)
    trade_off(trade, results, colors)
    caption(course, f"target {target} (solid) and mean of the priors (dashed)")
    course.set(xlabel="sampled answers, thousands", ylabel="held-out accuracy, %")
    course.set_ylim(-2, 124)  # room for the legend
    for axes in (course, kl):  # some methods take many times the answers of others
        axes.set_xscale("symlog", linthresh=50)
        axes.set_xlim(left=0)
    course.legend(frameon=False, fontsize="small", loc="upper center", ncol=4)
    caption(norms, "distance from the base model; dotted: the law of pure drift")
    norms.set(xlabel="generation", ylabel="‖θ - θ₀‖")
    kl.set_yscale("symlog", linthresh=1e-2)
    kl.set_ylim(bottom=0)
    caption(kl, "KL(base || tuned) on the base model's answers to the priors")
    kl.set(xlabel="sampled answers, thousands", ylabel="nats a token")
    measured = [np.asarray(line.get_ydata(), float) for line in kl.lines]
    if all(np.isnan(values).all() for values in measured):
        kl.remove()  # it was not measured
    return made


def has_curve(of_seed: dict[int, dict[str, Any]]) -> bool:
    """Whether these are runs, and not what was computed from runs."""
    return all("curve" in one for one in of_seed.values())


def main_methods(runs: Sequence[str]) -> list[str]:
    """Few enough to be told apart: of each kind the first."""
    kinds: dict[str, str] = {}
    for method in runs:
        kinds.setdefault(method.partition(":")[0], method)
    return list(kinds.values())


def trade_off(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    """Target against priors at the end; gray lines join a kind of decay from λ = 0 on.

    Controls are hollow, in the colour of the method that they are matched to.
    """
    paths: dict[str, list[tuple[float, float, float]]] = {}
    for method, of_seed in results.items():
        x, x_error = spread([one["target"] for one in of_seed.values()])
        y, y_error = spread([one["prior"] for one in of_seed.values()])
        run = method in colors
        axes.errorbar(
            x,
            y,
            y_error,
            x_error,
            marker="o" if run else "s" if method.startswith("shrunk") else "^",
            markerfacecolor=None if run else "none",
            linestyle="none",
            color=colors[method if run else method.split()[-1]],
            capsize=2,
            label=method,
        )
        kind, _, value = method.partition(":")
        if kind in ("l1", "l2"):
            paths.setdefault(kind, []).append((float(value), x, y))
        elif method == "es":
            for decay in ("l1", "l2"):
                paths.setdefault(decay, []).append((0.0, x, y))
    for points in paths.values():
        _, xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color="gray", linewidth=0.8, zorder=0)
    caption(axes, "at the end: target against priors (hollow: controls)")
    axes.legend(frameon=False, fontsize="x-small", ncol=2)
    axes.set(xlabel="target accuracy, %", ylabel="mean prior accuracy, %")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean (0 where there is one value)."""
    count = len(values)
    error = np.std(values, ddof=1) / count**0.5 if count > 1 else 0.0
    return float(np.mean(values)), float(error)


def band(
    axes: Axes,
    at: Sequence[float],
    curves: Sequence[dict[str, list]],
    key: str,
    color: str,
    style: str,
    name: str | None = None,
) -> None:
    """Mean over the seeds' curves, with a band of one standard error."""
    values = np.array([curve[key] for curve in curves], float)
    mean = values.mean(0)
    axes.plot(at, mean, style, color=color, label=name)
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        low, high = mean - error, mean + error
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)


def caption(axes: Axes, title: str) -> None:
    """A title, a legend, and no box."""
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
