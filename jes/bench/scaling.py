"""The rows of `jes.bench` on how a generation's time grows with what it is given."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jes.bench.cases import Case, generation, random_model
from jes.bench.timing import Row, row_of, timed
from jes.core.evolution import Evolution
from jes.models.weights import Pretrained, load

USUAL = {"members": 8, "prompts": 64, "new": 8, "hidden": 128}
RANGES = {
    "members": (4, 8, 16, 32),
    "prompts": (16, 32, 64, 128),
    "new": (8, 16, 32, 64),
    "hidden": (64, 128, 256, 512),
}
NAMES = {
    "members": "members",
    "prompts": "prompts",
    "new": "new tokens",
    "hidden": "weights",
}


def rows(repeats: int) -> list[Row]:
    """Log-log slopes, by least squares of each repeat's times."""
    return [slope(name, sizes, repeats) for name, sizes in RANGES.items()]


def slope(name: str, sizes: tuple[int, ...], repeats: int) -> Row:
    """Of a generation's time against one thing, all else as usual."""
    given = [made(**{**USUAL, name: size}) for size in sizes]
    runs = [run for run, _ in given]
    for run in runs:
        run()  # compiles
    times = np.array([[timed(run)[0] for run in runs] for _ in range(repeats)])
    amounts = [count for _, count in given] if name == "hidden" else list(sizes)
    slopes = np.polyfit(np.log(amounts), np.log(times).T, 1)[0]
    what = f"slope of log time, {amounts[0]} to {amounts[-1]} {NAMES[name]}"
    ends = 1e3 * np.median(times, axis=0)[[-1, 0]]
    return row_of(what, "<= 1", slopes, ends)


def made(
    members: int, prompts: int, new: int, hidden: int
) -> tuple[Callable[[], Any], int]:
    """A generation, and how many weights its model has."""
    model = model_of(hidden)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    case = Case("", model, prompts, 24, new)
    return generation(
        case, Evolution(population=members, sigma=1e-3, alpha=0.0)
    ), weights


def model_of(hidden: int) -> Pretrained:
    """Random weights, four layers as wide as asked for."""
    return random_model(
        load("tiny"), hidden_size=hidden, intermediate_size=hidden * 11 // 4
    )
