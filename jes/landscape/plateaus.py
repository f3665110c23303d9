"""Curvature from the plateaus of training curves: CLSS (2602.00170, Algorithm 2).

On a quadratic a run settles (α/4) d_eff κ below the optimum, so the slope of plateaus
over the effective noise κ is the effective dimension. The authors do not rely on it for
language models, whose curves have no clean plateaus; unstationary runs are rejected.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jes.errors import InputError

LEAST = 2
"""R_min, valid runs that a population needs."""


class Plateaus(NamedTuple):
    """What the tails of training curves say about the curvature."""

    effective_dimension: float
    standard_error: float  # of the dimension, from the spread of runs
    intercept: float  # of the gap; minus slope x noise of the largest population
    populations: np.ndarray  # [P], those fitted, ascending
    plateau: np.ndarray  # [P], mean tails of valid runs
    plateau_error: np.ndarray  # [P], their standard errors
    valid: Mapping[int, np.ndarray]  # of every population, bool [runs]


def clss(
    curves: Mapping[int, np.ndarray],
    *,
    alpha: float,
    window: int,
    stationarity: float,
    kappa: Mapping[int, float] | None = None,
) -> Plateaus:
    r"""d_eff from the plateaus of runs with several populations.

    Rejects runs whose last two windows differ, then populations with too few valid
    runs. Regresses the gap to the plateau of the largest population, with an
    intercept, on the effective noise: :math:`d_{eff} = (4/\alpha)` slope. Leave runs
    that strayed from the reference point (Loc of Algorithm 2) out of `curves`.

    Args:
      curves: objective of the centre by population N, [runs, T].
      alpha: learning rate.
      window: w, generations of a tail.
      stationarity: largest difference between means of the last two windows.
      kappa: effective noise by population, by default 1/N (σ of 1): σ²/N for the
        linear model, S/(σN) for z-scored fitness, where S is the standard deviation
        of members' rewards on the plateau.

    Raises:
      InputError: for curves that are too short, or fewer than two populations left.
    """
    valid = {n: _stationary(curve, window, stationarity) for n, curve in curves.items()}
    kept = sorted(n for n, runs in valid.items() if runs.sum() >= LEAST)
    if len(kept) < 2:
        counts = {n: int(runs.sum()) for n, runs in valid.items()}
        raise InputError(
            f"a slope needs two populations with {LEAST} valid runs; valid are "
            f"{counts}: train longer, or allow more than {stationarity} between windows"
        )
    tails = [np.asarray(curves[n])[valid[n], -window:].mean(-1) for n in kept]
    plateau = np.array([tail.mean() for tail in tails])
    error = np.array([tail.std(ddof=1) / len(tail) ** 0.5 for tail in tails])
    noise = np.array([1 / n if kappa is None else kappa[n] for n in kept])
    # Least squares is linear in the plateaus, and so propagates their errors.
    weights = (noise - noise.mean()) / ((noise - noise.mean()) ** 2).sum()
    gap = plateau[-1] - plateau
    slope = float(weights @ gap)
    return Plateaus(
        effective_dimension=4 / alpha * slope,
        standard_error=float(4 / alpha * np.sqrt((weights**2) @ error**2)),
        intercept=float(gap.mean() - slope * noise.mean()),
        populations=np.array(kept),
        plateau=plateau,
        plateau_error=error,
        valid=valid,
    )


def _stationary(curves: np.ndarray, window: int, stationarity: float) -> np.ndarray:
    """Which runs are stationary at their end: bool [runs]."""
    curves = np.asarray(curves, float)
    if curves.ndim != 2 or curves.shape[1] < 2 * window:
        raise InputError(
            f"curves must be [runs, at least {2 * window} generations], not of shape "
            f"{curves.shape}"
        )
    last = curves[:, -window:].mean(-1)
    before = curves[:, -2 * window : -window].mean(-1)
    return np.abs(last - before) <= stationarity
