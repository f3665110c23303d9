r"""How far noise alone carries the weights, and how strong a pull keeps them nearer.

With z-scored fitness that is independent of the noise, each generation adds a step of
covariance :math:`(\alpha^2/N) I`. Without decay that is a random walk; with anchored
weight decay (2605.30148) L2 makes it an Ornstein-Uhlenbeck process, and L1 a Brownian
motion with a constant pull to zero. Nearly all of what ES moves is this: systematic
motion is at most α a generation in total, and L2 ends it at 1/λ.

Norms are root mean squares, which are sharp in a model of many weights.
"""

import math
from functools import partial

from scipy.optimize import brentq

from jes.core.evolution import Evolution
from jes.core.fitness import typical_spread
from jes.core.integer_noise import variance

KINDS = ("none", "l2", "l1")


def drift_norm(
    *,
    alpha: float,
    population: int,
    parameters: int,
    generations: float,
    kind: str = "none",
    coefficient: float = 0.0,
    spread: float = 1.0,
) -> float:
    r""":math:`\|\theta_T - \theta_0\|` that noise alone would reach.

    With N members, d parameters, T generations, and :math:`r = 1 - \alpha\lambda`:

    - no decay: :math:`\alpha \sqrt{T d / N}`;
    - L2: the same with :math:`(1 - r^{2T}) r^2 / (1 - r^2)` for T, exact (the decay
      acts on the newest step too, hence :math:`r^2`);
    - L1: the second moment of Brownian motion reflected at 0 with drift
      :math:`-\alpha\lambda`, started at 0; the limit of many small steps.

    Args:
      alpha, population, parameters, kind, coefficient: α, N, d, the decay and its λ.
      generations: T; `math.inf` for the stationary norm.
      spread: root mean square of the shaped fitness; 1 for z-scores.

    Raises:
      ValueError: for an unknown kind, or a λ that L2 cannot have.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    if kind == "l2" and not 0 <= alpha * coefficient < 1:
        raise ValueError(f"alpha x coefficient must be in [0, 1): {coefficient}")
    step = alpha * spread / math.sqrt(population)  # rms of one weight
    if kind == "none" or coefficient == 0 or step == 0:
        squares = step**2 * generations
    elif kind == "l2":
        square = (1 - alpha * coefficient) ** 2
        squares = step**2 * (square * (1 - square**generations) / (1 - square))
    else:
        pull = alpha * coefficient
        # Twice the scale of the Laplace distribution that it tends to.
        length = step**2 / pull
        squares = length**2 * _reflected_second_moment(generations * pull / length)
    return math.sqrt(parameters * squares)


def _reflected_second_moment(time: float) -> float:
    r"""E[X²] of Brownian motion with drift -1, reflected at 0, started there.

    From Itô, :math:`d E[X^2]/dt = 1 - 2 E[X]`; with the known mean of that process
    (Abate and Whitt 1987) the integral is elementary. It tends to 1/2.
    """
    if time > 1000:  # within rounding of the limit
        return 0.5
    if time <= 1e-6:  # where the terms cancel, it is the free walk to first order
        return time
    root = math.sqrt(time)
    density = math.exp(-time / 2) / math.sqrt(2 * math.pi)
    above = math.erfc(root / math.sqrt(2)) / 2
    return (2 * time + time**2) * above - (root**3 + root) * density + 0.5 - above


def coefficient_for_norm(
    norm: float,
    *,
    alpha: float,
    population: int,
    parameters: int,
    generations: float = math.inf,
    kind: str = "l2",
) -> float:
    r"""The λ that keeps the drift of noise within a budget; 0 if plain ES stays in it.

    For the stationary norm in closed form, with :math:`s^2` the budget of squares a
    weight: L2 :math:`\lambda = (1 - \sqrt{s^2/(s^2 + \alpha^2/N)})/\alpha`, L1
    :math:`\lambda = \alpha/(\sqrt{2} N s)`. For a finite number of generations
    `drift_norm`, which falls with λ, is inverted numerically.

    Args:
      norm: ‖θ - θ_0‖ not to be exceeded by drift, in units of the weights.
      alpha, population, parameters, generations, kind: see `drift_norm`.

    Raises:
      ValueError: for a budget that is not positive, or kind 'none'.
    """
    if not (norm > 0 and math.isfinite(norm)):
        raise ValueError(f"a budget must be positive and finite, not {norm}")
    if kind not in KINDS[1:]:
        raise ValueError(f"kind must be 'l1' or 'l2', not {kind!r}")
    settings = {"alpha": alpha, "population": population, "parameters": parameters}
    drift = partial(drift_norm, generations=generations, **settings)  # type: ignore
    if drift() <= norm:
        return 0.0
    square = norm**2 / parameters
    if kind == "l2":
        high = (1 - math.sqrt(square / (square + alpha**2 / population))) / alpha
    else:
        high = alpha / (math.sqrt(2) * population * math.sqrt(square))
    if generations == math.inf:
        return high

    def excess(coefficient: float) -> float:
        return drift(kind=kind, coefficient=coefficient) - norm

    # In finite time the walk is shorter than for ever, so a weaker pull is enough.
    return brentq(excess, 0.0, high, xtol=1e-15 * high) if excess(high) < 0 else high


def predicted_drift(evolution: Evolution, parameters: int, generations: int) -> float:
    """‖θ - θ_0‖ that noise alone would reach with these settings; see `drift_norm`.

    Of a quantised model in codes, and of the weights with their residual, W + e: on
    the grid it is less while steps wait in the residual, and later up to 1/12 a weight
    more, squared. NaN where rounding loses steps or adds some, for a decay of codes or
    with a falling α, and for shaping 'none', whose steps scale with the rewards.
    """
    step, steps = evolution.alpha, float(generations)
    if evolution.alpha_half_life or evolution.alpha_cosine:
        if evolution.decay != "none":
            return math.nan
        # As many steps of the first length as have the same sum of squares.
        steps = evolution.squared_steps(generations)
    if evolution.rounding != "none":
        kept = {"residual": math.inf, "replay": evolution.window}
        lossless = evolution.residual_decay == 1 and evolution.decay == "none"
        if not lossless or generations > kept.get(evolution.rounding, 0):
            return math.nan
        step = evolution.rate * math.sqrt(variance(evolution.sigma))
    return drift_norm(
        alpha=step,
        population=evolution.population,
        parameters=parameters,
        generations=steps,
        kind=evolution.decay,
        coefficient=evolution.decay_coefficient,
        spread=typical_spread(evolution.shaping, evolution.population),
    )
