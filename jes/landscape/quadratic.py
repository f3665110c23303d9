r"""Stochastic ascent on a quadratic: rise, peak and decay in closed form (2602.00170).

For :math:`J(\theta) = 1 - \frac12 \theta^\top C \theta` the modes of the curvature C
are independent. In its eigenbasis, with :math:`a_i = 1 - \alpha\lambda_i`,

.. math:: x_{i,t+1} = a_i x_{i,t} + b \xi_{i,t}, \qquad \xi \sim N(0, 1)

(Eq. 15). Multiplicities are repeated eigenvalues. Everything is float64 and exact for
this linear model. ES differs from it: see `jes.landscape.zscored`. `simulate` draws
runs of both.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from jes.core.fitness import shape_fitness
from jes.errors import InputError

NOISES = ("paper", "zscore")
METHODS = ("linear", "es", "zscore")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ascent:
    r"""A quadratic, a start on it, and the settings of the ascent.

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
      InputError: for settings out of range or unstable.
    """

    eigenvalues: np.ndarray
    start: np.ndarray
    alpha: float
    sigma: float
    population: int
    noise: str = "paper"
    start_variance: float | np.ndarray = 0.0

    def __post_init__(self) -> None:
        shapes = np.shape(self.eigenvalues), np.shape(self.start)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
            raise InputError(
                f"eigenvalues and start must be vectors of one length, not {shapes}"
            )
        check_steps(self.eigenvalues, self.alpha)
        if not (self.sigma > 0 and self.population >= 1):
            raise InputError(
                f"sigma must be positive and the population at least 1, not "
                f"{self.sigma} and {self.population}"
            )
        if self.noise not in NOISES:
            raise InputError(f"noise must be one of {NOISES}, not {self.noise!r}")


class Moments(NamedTuple):
    """Mean and variance of every mode over runs, [..., d] each."""

    mean: np.ndarray
    variance: np.ndarray


def check_steps(eigenvalues: ArrayLike, alpha: float) -> None:
    """Raises InputError for negative curvature or an unstable learning rate."""
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
    """Moments [*time, d] of the modes after whole generations (Eq. 16).

    A mode without curvature has variance b² t, without bound.
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
    # strength (2 - strength) is 1 - a² without its rounding error.
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

    For small steps this is their number: it counts stiff and flat modes alike.
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
        # + 0 turns -0 into 0 where there is no curvature.
        return -2 * np.log(np.abs(contraction(ascent))) + 0.0


def amplitudes(ascent: Ascent) -> np.ndarray:
    """A_i of E J_t - J_inf = Σ A_i exp(-γ_i t), [d]; 0 without curvature (Eq. 20)."""
    values = ascent.eigenvalues
    variance = np.where(values > 0, stationary_variance(ascent), 0)
    return -values * (ascent.start**2 + ascent.start_variance - variance) / 2


def blocks(ascent: Ascent) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rates, descending, and the sum of the amplitudes of each."""
    distinct, which = np.unique(rates(ascent), return_inverse=True)
    summed = np.bincount(which, weights=amplitudes(ascent))
    return distinct[::-1], summed[::-1]


def peak_time(ascent: Ascent) -> float | None:
    """The time of the highest interior maximum of E J_t: a root of Eq. (23).

    All roots lie before the time from which the slowest mode outweighs all others
    together. A mode with α λ = 1 is gone after one generation and is left out.

    Returns:
      Generations, not rounded; None where E J_t has no interior maximum.
    """
    rate, amplitude = blocks(ascent)
    moving = (rate > 0) & np.isfinite(rate) & (amplitude != 0)
    rate, amplitude = rate[moving], amplitude[moving]
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
    r"""The peak for two distinct eigenvalues, or blocks of these (Eq. 25).

    :math:`\log(\gamma_{hi} |A_{hi}| / (\gamma_{lo} A_{lo})) / (\gamma_{hi} -
    \gamma_{lo})`; None unless the first mode rises by more than the second falls.

    Raises:
      InputError: unless there are two distinct positive eigenvalues below 1 / α.
    """
    values = ascent.eigenvalues[ascent.eigenvalues > 0]
    if len(np.unique(values)) != 2 or ascent.alpha * values.max() >= 1:
        raise InputError("not two distinct eigenvalues with 0 < alpha x eigenvalue < 1")
    rate, amplitude = (array[:2] for array in blocks(ascent))
    slope = rate * np.abs(amplitude)
    if not (amplitude[0] < 0 < amplitude[1] and slope[0] > slope[1]):
        return None
    return float(np.log(slope[0] / slope[1]) / (rate[0] - rate[1]))


def path(ascent: Ascent, generations: int, **changes: ArrayLike) -> Moments:
    r"""The modes under schedules and anchored weight decay, generation by generation.

    Exact. With coefficient c, L2 decay to the start (2605.30148, Algorithm 1) acts
    after the step: with :math:`r = 1 - \alpha_t c`,

    .. math:: x_{t+1} = r\,(a_t x_t + b_t \xi) + (1 - r)\,\bar x_0.

    Args:
      ascent: the start, and the settings without a schedule.
      generations: T.
      **changes: `alpha`, `sigma`, `population` or `decay`, [T] or a number.

    Returns:
      Moments [T + 1, d], the start first.

    Raises:
      InputError: for a schedule of another length, or with numbers out of range.
    """

    def step(state: Moments, rate: float, scale: float, members: float) -> Moments:
        a = 1 - rate * ascent.eigenvalues
        b = rate * (scale if ascent.noise == "paper" else 1) / members**0.5
        return Moments(a * state.mean, a**2 * state.variance + b**2)

    return march(ascent, schedules(ascent, generations, **changes), step)


def march(ascent: Ascent, plan: np.ndarray, step: Callable[..., Moments]) -> Moments:
    """Moments [T + 1, d] of a step, each followed by the decay to the start.

    Args:
      ascent: the start.
      plan: [4, T], from `schedules`.
      step: from `Moments` [d], α, σ and N to the `Moments` after the step.
    """
    start = np.asarray(ascent.start, float)
    states = [Moments(start, np.broadcast_to(ascent.start_variance, start.shape))]
    for rate, scale, members, pull in plan.T:
        mean, variance = step(states[-1], rate, scale, members)
        kept = 1 - rate * pull
        states.append(Moments(kept * mean + (1 - kept) * start, kept**2 * variance))
    return Moments(*map(np.array, zip(*states, strict=True)))


def schedules(ascent: Ascent, generations: int, **changes: ArrayLike) -> np.ndarray:
    """α, σ, N and the decay coefficient of each generation, [4, T]: see `path`."""
    own = {"alpha": ascent.alpha, "sigma": ascent.sigma}
    own |= {"population": ascent.population, "decay": 0.0}
    if unknown := changes.keys() - own.keys():
        raise TypeError(f"no schedule of {unknown}; there are {list(own)}")
    plan = np.empty((4, generations))
    for row, (name, value) in zip(plan, (own | changes).items(), strict=True):
        array = np.asarray(value, float)
        if array.shape not in ((), (generations,)) or not (array >= 0).all():
            raise InputError(
                f"{name} must be a number or {generations} numbers, none negative"
            )
        row[:] = array
    if (plan[2] < 1).any() or (plan[0] * plan[3] >= 1).any():
        raise InputError("populations must be at least 1, and alpha x decay below 1")
    return plan


def stationary_covariance(
    curvature: np.ndarray, noise: np.ndarray, alpha: float
) -> np.ndarray:
    r"""Covariance of x under noise that differs by direction (App. C), exact for any α.

    :math:`x_{t+1} = (I - \alpha H) x_t + \alpha \eta_t` with :math:`Cov\,\eta =
    \Sigma` (Eq. 30) leaves it unchanged (Eq. 31); J* - E J = tr(H V) / 2 (Eq. 33).

    Args:
      curvature: H, [d, d], of the loss: the paper's C.
      noise: Σ, [d, d].
      alpha: learning rate.

    Raises:
      InputError: for a flat, concave or overshooting direction (App. D).
    """
    kept = np.eye(len(curvature)) - alpha * curvature
    radius = np.abs(np.linalg.eigvals(kept)).max()
    if radius >= 1:
        raise InputError(
            f"no stationary state: a direction grows by {radius:.6g} a generation"
        )
    return solve_discrete_lyapunov(kept, alpha**2 * noise)


class Runs(NamedTuple):
    """Independent runs."""

    objective: jax.Array  # [runs, T + 1], J of the centre, the start first
    final: jax.Array  # [runs, d], the modes at the end


def simulate(
    ascent: Ascent,
    generations: int,
    *,
    key: jax.Array,
    runs: int,
    method: str = "linear",
    **changes: ArrayLike,
) -> Runs:
    """Draws runs of an ascent, in float32.

    Args:
      ascent: the start, and the settings without a schedule.
      generations: T.
      key: of all noise.
      runs: how many.
      method: 'linear' (2602.00170, Eq. 14, with the ascent's noise), 'es' (its Eq. 1:
        a population's rewards as they are, over σ) or 'zscore' (2509.24372, as
        `jes.es_gradient`; no 1/σ).
      **changes: see `path`; only 'linear' can change its population.

    Raises:
      InputError: for an unknown method, or a schedule out of range.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {METHODS}, not {method!r}")
    if method != "linear" and "population" in changes:
        raise InputError(f"{method!r} has one population, that of the ascent")
    plan = schedules(ascent, generations, **changes)
    starts, noises = jax.random.split(key)
    shape = (runs, len(ascent.start))
    spread = jnp.sqrt(jnp.broadcast_to(jnp.asarray(ascent.start_variance), shape[1:]))
    first = jax.random.normal(starts, shape) * spread[None] + ascent.start[None]
    return _runs(
        jax.random.split(noises, runs),
        first.astype(jnp.float32),
        jnp.asarray(np.stack([ascent.start, ascent.eigenvalues]), jnp.float32),
        jnp.asarray(plan.T, jnp.float32),
        method=(method, ascent.noise == "paper"),
        # The linear model has no members: one program for all populations.
        members=0 if method == "linear" else ascent.population,
    )


@partial(jax.jit, static_argnames=("method", "members"))
def _runs(
    keys: jax.Array,
    first: jax.Array,
    quadratic: jax.Array,
    plan: jax.Array,
    *,
    method: tuple[str, bool],
    members: int,
) -> Runs:
    anchor, values = quadratic
    name, paper = method

    def loss(x: jax.Array) -> jax.Array:
        return (values * x**2).sum() / 2

    def step(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> Any:
        key, (alpha, sigma, population, decay) = at
        if name == "linear":
            scale = (sigma if paper else 1.0) / jnp.sqrt(population)
            move = scale * jax.random.normal(key, x.shape) - values * x
        else:
            move = _estimate(key, x, values, sigma, name, members)
        x = anchor + (1 - alpha * decay) * (x + alpha * move - anchor)
        return x, loss(x)

    def run(key: jax.Array, x: jax.Array) -> Runs:
        final, losses = jax.lax.scan(step, x, (jax.random.split(key, len(plan)), plan))
        return Runs(1 - jnp.concatenate([loss(x)[None], losses]), final)

    return jax.vmap(run)(keys, first)


def estimates(
    ascent: Ascent, *, key: jax.Array, runs: int, method: str = "zscore"
) -> jax.Array:
    """Independent estimates of the update over α at the start, [runs, d].

    `method` is 'es' or 'zscore': see `simulate`.
    """
    if method not in METHODS[1:]:
        raise InputError(f"method must be one of {METHODS[1:]}, not {method!r}")
    x = jnp.asarray(ascent.start, jnp.float32)
    values = jnp.asarray(ascent.eigenvalues, jnp.float32)

    def one(key: jax.Array) -> jax.Array:
        return _estimate(key, x, values, ascent.sigma, method, ascent.population)

    return jax.jit(jax.vmap(one))(jax.random.split(key, runs))


def _estimate(
    key: jax.Array,
    x: jax.Array,
    values: jax.Array,
    sigma: jax.typing.ArrayLike,
    method: str,
    members: int,
) -> jax.Array:
    """The estimate of one generation at x, [d]."""
    noise = jax.random.normal(key, (members, *x.shape))
    losses = (values[None] * (x[None] + sigma * noise) ** 2).sum(-1) / 2
    # Z-scores do not need the 1 of J; without it differences keep all their digits.
    weights = (1 - losses) / sigma if method == "es" else shape_fitness(-losses)
    return weights @ noise / members
