"""One comparison: two functions timed in turn, and the ratio with its spread."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

Run = Callable[[], Any]


class Row(NamedTuple):
    """One comparison: medians, and the quartiles of the ratio over the repeats.

    `processor` is the median ratio of processor time, summed over threads; None where
    no time is measured.
    """

    what: str
    goal: str
    numerator: float
    denominator: float
    ratio: float
    low: float
    high: float
    processor: float | None = None
    unit: str = "ms"


def compare(
    what: str, goal: str, runs: Sequence[Run], repeats: int, scale: float = 1.0
) -> Row:
    """Times two functions in turn; the first call of each compiles and is left out.

    The ratio is that of the first to the second x scale.
    """
    for run in runs:
        run()
    times = np.array([[timed(run) for run in runs] for _ in range(repeats)])
    times *= np.array([[1], [scale]])
    ratios = times[:, 0] / times[:, 1]
    row = row_of(what, goal, ratios[:, 0], 1e3 * np.median(times[..., 0], axis=0))
    return row._replace(processor=float(np.median(ratios[:, 1])))


def row_of(
    what: str, goal: str, ratios: np.ndarray, sides: Any, unit: str = "ms"
) -> Row:
    """A row from the ratios of the repeats, and the medians of their two sides."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    first, second, ratio, low, high = map(float, (*sides, middle, low, high))
    return Row(what, goal, first, second, ratio, low, high, unit=unit)


def timed(run: Run) -> tuple[float, float]:
    """Seconds of a call, until its results are there: wall clock, and processor."""
    began, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - began, time.process_time() - busy


def table(measured: Sequence[Row]) -> Table:
    """The rows as a table."""
    columns = ("", "goal", "ratio", "quartiles", "processor", "numerator")
    shown = Table(*columns, "denominator")
    for row in measured:
        shown.add_row(
            row.what,
            row.goal,
            f"{row.ratio:.2f}",
            f"{row.low:.2f} - {row.high:.2f}",
            "" if row.processor is None else f"{row.processor:.2f}",
            f"{row.numerator:.1f} {row.unit}",
            f"{row.denominator:.1f} {row.unit}",
        )
    return shown
