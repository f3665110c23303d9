"""The figure of a model's answers about itself."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import expit

from jes.metacognition.answers import Answers
from jes.metacognition.signal_detection import auroc2

BINS = 10
"""Of the calibration: bins of as many questions each."""


def answers_figure(answers: Mapping[str, Answers]) -> Figure:
    """For each task the ROC of the confidence, the rate of yes, and the calibration."""
    made = Figure(figsize=(12, 3.6 * len(answers)), layout="constrained")
    grid = made.subplots(len(answers), 3, squeeze=False)
    for (name, each), (left, middle, right) in zip(answers.items(), grid, strict=True):
        roc(left, each)
        left.set_title(f"{name}: telling right from wrong answers", fontsize="medium")
        yes_by_correctness(middle, each)
        calibration(right, each)
    for axes in grid.ravel():
        axes.spines[["top", "right"]].set_visible(False)
    return made


def roc(axes: Axes, answers: Answers) -> None:
    """Yes when right against yes when wrong: generated, and over all thresholds."""
    right = answers.correct
    axes.plot([0, 1], [0, 1], ":", color="gray")
    if np.isfinite(answers.confidence).all() and 0 < right.mean() < 1:
        order = np.argsort(-answers.confidence, kind="stable")
        last = np.append(np.diff(answers.confidence[order]) != 0, True)
        hits = np.cumsum(right[order])[last] / right.sum()
        alarms = np.cumsum(~right[order])[last] / (~right).sum()
        area = auroc2(answers.confidence, right)
        axes.plot(
            np.append(0, alarms),
            np.append(0, hits),
            label=f"by log p(yes) - log p(no), area {area:.2f}",
        )
    if 0 < right.mean() < 1:
        point = answers.yes[~right].mean(), answers.yes[right].mean()
        axes.plot(*point, "o", label="as answered")
        axes.legend(frameon=False, fontsize="small", loc="lower right")
    axes.set(xlabel="yes, of the wrong", ylabel="yes, of the right")


def yes_by_correctness(axes: Axes, answers: Answers) -> None:
    """What is said about right and about wrong answers; bars add up to 100 %."""
    groups = {"right": answers.correct, "wrong": ~answers.correct}
    labels = [f"{name}\n({group.sum()})" for name, group in groups.items()]
    said = {
        "clearly yes": answers.yes & ~answers.other,
        "clearly no": ~answers.yes & ~answers.other,
        "other": answers.other,
    }
    bottom = np.zeros(len(groups))
    for name, chosen in said.items():
        shares = [
            100 * chosen[group].mean() if group.any() else 0.0
            for group in groups.values()
        ]
        axes.bar(labels, shares, bottom=bottom, width=0.5, label=name)
        bottom += shares
    axes.set_title("what it says, by whether the answer is right", fontsize="medium")
    axes.set(ylabel="%", ylim=(0, 119))  # room for the legend
    axes.legend(frameon=False, fontsize="small", ncol=3, loc="upper center")


def calibration(axes: Axes, answers: Answers) -> None:
    """Share of right answers against the confidence, in bins of as many questions."""
    axes.set_title("calibration", fontsize="medium")
    axes.plot([0, 1], [0, 1], ":", color="gray")
    axes.set(xlabel="confidence, p(yes) / (p(yes) + p(no))", ylabel="share right")
    if not np.isfinite(answers.confidence).all():
        return
    order = np.argsort(answers.confidence, kind="stable")
    for chosen in np.array_split(order, min(BINS, len(order))):
        share = answers.correct[chosen].mean()
        error = np.sqrt(share * (1 - share) / len(chosen))
        at = expit(answers.confidence[chosen]).mean()
        axes.errorbar(at, share, error, fmt="o", color="C0", capsize=2)
