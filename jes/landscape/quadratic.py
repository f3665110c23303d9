r"""Stochastic ascent on a quadratic: rise, peak and decay in closed form (2602.00170).

For :math:`J(\theta) = 1 - \frac12 \theta^\top C \theta` the modes of the curvature C
are independent. In its eigenbasis, with :math:`a_i = 1 - \alpha\lambda_i`,

.. math:: x_{i,t+1} = a_i x_{i,t} + b \xi_{i,t}, \qquad \xi \sim N(0, 1)

(Eq. 15). Multiplicities are repeated eigenvalues. Everything is float64 and exact for
this linear model, which is not ES: `jes.landscape.zscored` says what ES does.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from jes.errors import InputError

NOISES = ("paper", "zscore")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ascent:
    r"""A quadratic, a start on it, and the steps taken.

    Attributes:
      eigenvalues: [d], of C; none negative.
      start: [d], mean of x_0 in the eigenbasis; the optimum is 0.
      alpha: learning rate, below 2 / largest eigenvalue.
      sigma: scale of the perturbation.
      population: N.
      noise: of a step, 'paper' for :math:`b = \alpha\sigma/\sqrt N` (Eq. 15) or
        'zscore' for :math:`b = \alpha/\sqrt N`, that of z-scored fitness.
      start_variance: of x_0, a number or [d].

    Raises:
      InputError: where no such ascent exists, or where it has no stationary state.
    """

    eigenvalues: np.ndarray
    start: np.ndarray
    alpha: float
    sigma: float
    population: int
    noise: str = "paper"
    start_variance: float | np.ndarray = 0.0

    def __post_init__(self) -> None:
        values, start = np.asarray(self.eigenvalues), np.asarray(self.start)
        if values.ndim != 1 or start.shape != values.shape or not values.size:
            raise InputError(
                "eigenvalues and start must be vectors of one length, not of shapes "
                f"{values.shape} and {start.shape}"
            )
        check_steps(values, self.alpha)
        if not (self.sigma > 0 and self.population >= 1):
            raise InputError(
                f"sigma must be positive and the population at least 1, not "
                f"{self.sigma} and {self.population}"
            )
        if self.noise not in NOISES:
            raise InputError(f"noise must be one of {NOISES}, not {self.noise!r}")


class Moments(NamedTuple):
    """Of every mode, over runs."""

    mean: np.ndarray  # [..., d]
    variance: np.ndarray  # [..., d]


def check_steps(eigenvalues: ArrayLike, alpha: float) -> None:
    """Raises InputError for negative curvature, or steps too long to be stable."""
    values = np.asarray(eigenvalues, float)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError("eigenvalues of the curvature cannot be negative")
    if not 0 < alpha * values.max() < 2 and not (alpha > 0 and values.max() == 0):
        raise InputError(
            f"alpha must be between 0 and 2 / largest eigenvalue "
            f"{2 / max(values.max(), 1e-300):.4g}, not {alpha}"
        )


def contraction(ascent: Ascent) -> np.ndarray:
    """a_i = 1 - α λ_i, [d] (Eq. 15)."""
    return 1 - ascent.alpha * ascent.eigenvalues


def step_noise(ascent: Ascent) -> float:
    """b, the standard deviation that a step adds to each mode (Eq. 15)."""
    scale = ascent.sigma if ascent.noise == "paper" else 1.0
    return ascent.alpha * scale / ascent.population**0.5


def moments(ascent: Ascent, time: ArrayLike) -> Moments:
    """Mean and variance of the modes after whole generations (Eq. 16).

    A mode without curvature has variance b² t, without bound.

    Args:
      ascent: with d modes.
      time: generations, of any shape.

    Returns:
      Moments [*time, d].
    """
    time = np.asarray(time)[..., None]
    a = contraction(ascent)
    left = (a * a) ** time
    lost = 1 - a * a
    curved = lost > 0
    grown = np.where(curved, (1 - left) / np.where(curved, lost, 1), time)
    variance = left * ascent.start_variance + step_noise(ascent) ** 2 * grown
    return Moments(a**time * ascent.start, variance)


def stationary_variance(ascent: Ascent) -> np.ndarray:
    """v_inf = b² / (1 - a²), [d]; infinite without curvature (Eq. 17)."""
    # The same as 1 - a², without its rounding.
    strength = ascent.alpha * ascent.eigenvalues
    with np.errstate(divide="ignore"):
        return step_noise(ascent) ** 2 / (strength * (2 - strength))


def objective(eigenvalues: np.ndarray, state: Moments) -> np.ndarray:
    """E J = 1 - Σ λ (mean² + variance) / 2, of the shape before d (Eq. 18)."""
    return 1 - (eigenvalues * (state.mean**2 + state.variance)).sum(-1) / 2


def expected_objective(ascent: Ascent, time: ArrayLike) -> np.ndarray:
    """E J_t, of the shape of `time`, in whole generations (Eq. 18)."""
    return objective(ascent.eigenvalues, moments(ascent, time))


def effective_dimension(eigenvalues: ArrayLike, alpha: float) -> float:
    """d_eff = 2 Σ 1 / (2 - α λ) over positive eigenvalues (Eq. 27).

    For small steps it is their number: it counts stiff and flat modes alike.

    Raises:
      InputError: see `check_steps`.
    """
    check_steps(eigenvalues, alpha)
    values = np.asarray(eigenvalues, float)
    return float(2 * (1 / (2 - alpha * values[values > 0])).sum())


def effective_noise(ascent: Ascent) -> float:
    """κ = σ²/N, or 1/N for noise 'zscore'."""
    return (step_noise(ascent) / ascent.alpha) ** 2


def plateau_gap(ascent: Ascent) -> float:
    """1 - J_inf = (α/4) d_eff κ (Eq. 19, 26 and 27)."""
    dimension = effective_dimension(ascent.eigenvalues, ascent.alpha)
    return ascent.alpha / 4 * dimension * effective_noise(ascent)


def rates(ascent: Ascent) -> np.ndarray:
    """γ_i = -2 log |1 - α λ_i| a generation, [d] (Eq. 21)."""
    with np.errstate(divide="ignore"):
        # + 0: no curvature is rate 0, not -0
        return -2 * np.log(np.abs(contraction(ascent))) + 0.0


def amplitudes(ascent: Ascent) -> np.ndarray:
    """A_i of E J_t - J_inf = Σ A_i exp(-γ_i t), [d]; 0 without curvature (Eq. 20)."""
    values = ascent.eigenvalues
    variance = np.where(values > 0, stationary_variance(ascent), 0)
    return -values * (ascent.start**2 + ascent.start_variance - variance) / 2


def blocks(ascent: Ascent) -> tuple[np.ndarray, np.ndarray]:
    """Rates that differ, falling, and the sums of the amplitudes that have them."""
    distinct, which = np.unique(rates(ascent), return_inverse=True)
    summed = np.bincount(which, weights=amplitudes(ascent))
    return distinct[::-1], summed[::-1]


def rises_then_decays(ascent: Ascent) -> bool:
    r"""Whether E J_t rises at first and comes down to its plateau at last.

    The first is :math:`\sum \gamma_i A_i < 0`, the second that the slowest mode starts
    inside its noise floor, A > 0: together they are enough for a peak, and for two
    distinct rates they are the conditions of Eq. (25).
    """
    rate, amplitude = _moving_blocks(ascent)
    if not rate.size:
        return False
    return bool((rate * amplitude).sum() < 0 < amplitude[-1])


def peak_time(ascent: Ascent) -> float | None:
    """The time of the highest interior maximum of E J_t: a root of Eq. (23).

    All roots lie before the time from which the slowest mode outweighs all others
    together. Up to there a sign change of the slope is looked for on a fine grid.
    A mode with α λ = 1 is gone after one generation and is left out.

    Returns:
      Generations, not rounded; None where E J_t has no interior maximum.
    """
    rate, amplitude = _moving_blocks(ascent)
    if rate.size < 2:
        return None
    weight = rate * amplitude
    excess = rate - rate[-1]  # against underflow: the slope times exp(slowest rate t)

    def fall(time: float) -> float:
        return float((weight * np.exp(-excess * time)).sum())

    ratio = np.abs(weight[:-1]).sum() / np.abs(weight[-1])
    last = np.log(max(ratio, 1.0)) / excess[-2] + 1 / rate[0]
    grid = np.concatenate([[0], np.geomspace(1e-4 / rate[0], last, 4000)])
    falls = np.array([fall(time) for time in grid])
    tops = np.flatnonzero((falls[:-1] < 0) & (falls[1:] >= 0))
    peaks = [float(brentq(fall, grid[top], grid[top + 1])) for top in tops]
    if not peaks:
        return None
    return max(peaks, key=lambda time: (amplitude * np.exp(-rate * time)).sum())


def two_mode_peak_time(ascent: Ascent) -> float | None:
    r"""The peak in closed form for two distinct eigenvalues (Eq. 25).

    :math:`\log(\gamma_{hi} |A_{hi}| / (\gamma_{lo} A_{lo})) / (\gamma_{hi} -
    \gamma_{lo})`, with amplitudes summed over equal eigenvalues; the best whole
    generation is beside it.

    Returns:
      Generations; None unless :math:`A_{hi} < 0 < A_{lo}` and :math:`\gamma_{hi}
      |A_{hi}| > \gamma_{lo} A_{lo}`.

    Raises:
      InputError: for other than two distinct positive eigenvalues, or α λ >= 1.
    """
    values = ascent.eigenvalues[ascent.eigenvalues > 0]
    if len(np.unique(values)) != 2 or ascent.alpha * values.max() >= 1:
        raise InputError(
            "the closed form needs two distinct positive eigenvalues, and alpha x "
            "eigenvalue below 1; peak_time has no such limits"
        )
    rate, amplitude = (array[:2] for array in blocks(ascent))
    if not (amplitude[0] < 0 < amplitude[1] and rises_then_decays(ascent)):
        return None
    slope = rate * np.abs(amplitude)
    return float(np.log(slope[0] / slope[1]) / (rate[0] - rate[1]))


def path(
    ascent: Ascent,
    generations: int,
    *,
    alpha: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    population: ArrayLike | None = None,
    decay: ArrayLike = 0.0,
) -> Moments:
    r"""The modes under schedules and anchored weight decay, generation by generation.

    Exact. With coefficient c, L2 decay to the start (2605.30148, Algorithm 1) acts
    after the step: with :math:`r = 1 - \alpha_t c`,

    .. math:: x_{t+1} = r\,(a_t x_t + b_t \xi) + (1 - r)\,\bar x_0.

    Args:
      ascent: the start, and what has no schedule.
      generations: T.
      alpha, sigma, population: those of each generation, [T] or a number; by default
        the ascent's.
      decay: c of each generation, [T] or a number.

    Returns:
      Moments [T + 1, d], the start first.

    Raises:
      InputError: see `schedules`.
    """
    plan = schedules(ascent, generations, alpha, sigma, population, decay)
    start = np.asarray(ascent.start, float)
    mean = np.empty((generations + 1, start.size))
    variance = np.empty_like(mean)
    mean[0], variance[0] = start, ascent.start_variance
    for t, (rate, scale, members, pull) in enumerate(zip(*plan, strict=True)):
        a, kept = 1 - rate * ascent.eigenvalues, 1 - rate * pull
        b = rate * (scale if ascent.noise == "paper" else 1) / members**0.5
        mean[t + 1] = kept * a * mean[t] + (1 - kept) * start
        variance[t + 1] = kept**2 * (a**2 * variance[t] + b**2)
    return Moments(mean, variance)


def schedules(
    ascent: Ascent,
    generations: int,
    alpha: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    population: ArrayLike | None = None,
    decay: ArrayLike = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """α, σ, N and decay of each generation, [T] each; None is the ascent's own.

    Raises:
      InputError: for a schedule of another length, or with numbers that cannot be.
    """
    given = (alpha, sigma, population, decay)
    own = (ascent.alpha, ascent.sigma, ascent.population, 0.0)
    plan = []
    for name, value, default in zip(
        ("alpha", "sigma", "population", "decay"), given, own, strict=True
    ):
        array = np.asarray(default if value is None else value, float)
        if array.shape not in ((), (generations,)) or not (array >= 0).all():
            raise InputError(
                f"{name} must be a number or {generations} numbers, none negative"
            )
        plan.append(np.broadcast_to(array, generations))
    rate, scale, members, pull = plan
    if (members < 1).any() or (rate * pull >= 1).any():
        raise InputError("populations must be at least 1, and alpha x decay below 1")
    return rate, scale, members, pull


def anchored_plateau(ascent: Ascent, decay: float) -> Moments:
    r"""Where anchored weight decay settles: the fixed point of `path`, [d] each.

    With :math:`r = 1 - \alpha c`: mean :math:`(1 - r) x_0 / (1 - r a)`, variance
    :math:`r^2 b^2 / (1 - r^2 a^2)`, finite also without curvature.

    Raises:
      InputError: unless 0 < α decay < 1.
    """
    if not 0 < ascent.alpha * decay < 1:
        raise InputError(f"alpha x decay must be between 0 and 1; decay is {decay}")
    kept = 1 - ascent.alpha * decay
    product = kept * contraction(ascent)
    mean = (1 - kept) * ascent.start / (1 - product)
    return Moments(mean, (kept * step_noise(ascent)) ** 2 / (1 - product**2))


def _moving_blocks(ascent: Ascent) -> tuple[np.ndarray, np.ndarray]:
    """Of `blocks`, those that make E J_t change after the first generation."""
    rate, amplitude = blocks(ascent)
    moving = (rate > 0) & np.isfinite(rate) & (amplitude != 0)
    return rate[moving], amplitude[moving]
