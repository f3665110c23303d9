"""Objectives of ESMA: fitness by agreement of yes with correct answers (2602.02605)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jes.metacognition.signal_detection import Counts, d_prime

CELLS: dict[str, tuple[float, float, float, float]] = {
    "esma": (2, 1, 1, 0),
    "alignment": (1, 1, 0, 0),
    "correct": (1, 0, 1, 0),
    "multilevel": (3, 2, 1, 0),
    "ml2": (4, 2, 1, 0),
    "ml4": (2, 1, 0, 0),
    "ml5": (5, 2, 0, -10),
}
"""Points for (right and yes, wrong and no, right and no, wrong and yes), by the names
that the published code has or had (2602.02605); its `ml3` is `esma`."""


def _points(cells: tuple[float, ...]) -> Callable[..., np.ndarray]:
    def fitness(*shares: Any) -> Any:
        a, b, c, d = (n * share for n, share in zip(cells, shares, strict=True))
        return a + b + c + d

    return fitness


def _d_prime(right_yes: Any, wrong_no: Any, right_no: Any, wrong_yes: Any) -> Any:
    return d_prime(Counts(right_yes, right_no, wrong_yes, wrong_no), "clip")


OBJECTIVES: dict[str, Callable[..., np.ndarray]] = {
    **{name: _points(cells) for name, cells in CELLS.items()},
    "d_prime": _d_prime,
}
"""Name -> function of the shares of the four cases, in the order of `CELLS`. `d_prime`
has the paper's clip; it is NaN, which drops the member, where all answers are right or
all are wrong."""


def objective_fitness(objective: str, score: Any) -> np.ndarray:
    """Fitness of members under an objective.

    Args:
      objective: a name in `OBJECTIVES`, or 'reward' for the reward of the task.
      score: `jes.scoring.Score` of arrays [N].

    Returns:
      float64 [N].
    """
    if objective == "reward":
        return score.reward
    right_no = score.accuracy - score.hits
    wrong_no = 1 - score.accuracy - score.false_alarms
    return OBJECTIVES[objective](score.hits, wrong_no, right_no, score.false_alarms)
