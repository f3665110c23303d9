"""Curvature from the plateaus of training curves: CLSS (2602.00170, Algorithm 2).

On a quadratic a run settles (α/4) d_eff κ below the optimum, so the slope of plateaus
over the effective noise κ is the effective dimension. The authors do not rely on it for
language models, whose curves have no clean plateaus; what is not one is rejected.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jes.errors import InputError


class Plateaus(NamedTuple):
    """What the tails of training curves say."""

    effective_dimension: float
    standard_error: float  # of the dimension, from the spread of runs
    intercept: float  # of the gap; minus slope x noise of the largest population
    populations: np.ndarray  # [P], those fitted, rising
    noise: np.ndarray  # [P], effective noise
    plateau: np.ndarray  # [P], mean tails of valid runs
    plateau_error: np.ndarray  # [P], their standard errors
    valid: Mapping[int, np.ndarray]  # of every population, bool [runs]


def clss(
    curves: Mapping[int, np.ndarray],
    *,
    alpha: float,
    window: int,
    stationarity: float,
    sigma: float = 1.0,
    noise: str = "paper",
    reward_deviation: Mapping[int, float] | None = None,
    distances: Mapping[int, np.ndarray] | None = None,
    locality: float = np.inf,
    least_runs: int = 2,
    largest: int | None = None,
) -> Plateaus:
    r"""d_eff from the plateaus of runs with several populations.

    Rejects a run that strays too far, or whose last two windows differ; then a
    population with too few valid runs. The gap to the plateau of the largest
    population is regressed, with an intercept, on the effective noise, and
    :math:`d_{eff} = (4/\alpha)` slope.

    Args:
      curves: objective of the centre by population N, [runs, T].
      alpha: learning rate.
      window: w, generations of a tail.
      stationarity: largest difference between means of the last two windows.
      sigma: scale of the perturbation.
      noise: 'paper', effective noise σ²/N, or 'zscore', 1/N times the ratio below.
      reward_deviation: standard deviation S of members' rewards on the plateau, by
        population. With z-scored fitness the gap is (α/4) d_eff S/(σN), as steps are
        σ/S times the gradient; without S the ratio S/σ is taken as 1, and what comes
        out is d_eff times it.
      distances: from the reference point, as `curves`; not looked at by default.
      locality: largest distance of a valid run.
      least_runs: R_min, valid runs that a population needs, at least 2.
      largest: how many populations to fit, from the largest; by default all.

    Raises:
      InputError: for curves that are too short, or fewer than two populations left.
    """
    if noise not in ("paper", "zscore") or least_runs < 2:
        raise InputError(f"no plateaus of noise {noise!r} from {least_runs} runs")
    valid = {}
    for population, curve in curves.items():
        away = None if distances is None else distances[population]
        valid[population] = _valid(curve, window, stationarity, away, locality)
    kept = sorted(n for n, runs in valid.items() if runs.sum() >= least_runs)
    kept = kept[-largest:] if largest else kept
    if len(kept) < 2:
        counts = {n: int(runs.sum()) for n, runs in valid.items()}
        raise InputError(
            f"a slope needs two populations with {least_runs} valid runs; valid are "
            f"{counts}: train longer, or allow more than {stationarity} between windows"
        )
    tails = [np.asarray(curves[n])[valid[n], -window:].mean(-1) for n in kept]
    plateau = np.array([tail.mean() for tail in tails])
    error = np.array([tail.std(ddof=1) / len(tail) ** 0.5 for tail in tails])
    populations = np.array(kept)
    kappa = sigma**2 / populations
    if noise == "zscore":
        ratio = [1.0 if reward_deviation is None else reward_deviation[n] for n in kept]
        scale = 1.0 if reward_deviation is None else sigma
        kappa = np.array(ratio) / scale / populations
    # Least squares is linear in the plateaus: their errors go through it as they are.
    weights = (kappa - kappa.mean()) / ((kappa - kappa.mean()) ** 2).sum()
    gap = plateau[-1] - plateau
    slope = float(weights @ gap)
    return Plateaus(
        effective_dimension=4 / alpha * slope,
        standard_error=float(4 / alpha * np.sqrt((weights**2) @ error**2)),
        intercept=float(gap.mean() - slope * kappa.mean()),
        populations=populations,
        noise=kappa,
        plateau=plateau,
        plateau_error=error,
        valid=valid,
    )


def _valid(
    curves: np.ndarray,
    window: int,
    stationarity: float,
    distances: np.ndarray | None,
    locality: float,
) -> np.ndarray:
    """Which runs are local, and stationary at their end: bool [runs]."""
    curves = np.asarray(curves, float)
    if curves.ndim != 2 or curves.shape[1] < 2 * window:
        raise InputError(
            f"curves must be [runs, at least {2 * window} generations], not of shape "
            f"{curves.shape}"
        )
    last = curves[:, -window:].mean(-1)
    before = curves[:, -2 * window : -window].mean(-1)
    fine = np.abs(last - before) <= stationarity
    if distances is not None:
        fine &= np.asarray(distances).max(-1) <= locality
    return fine
