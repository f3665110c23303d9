r"""Hops between two optima: noise against a barrier (2602.00170, App. E).

:math:`L(x) = \frac\lambda4 (x^2 - a^2)^2` (Eq. 44) has its minima at ±a and a barrier
at 0. Descent with noise, :math:`x \leftarrow x - \alpha L'(x) + \alpha\xi` and
:math:`\xi \sim N(0, \kappa)` (Eq. 38), is a diffusion at the temperature
:math:`\epsilon = \alpha\kappa/2` (Eq. 40). The ratio of barrier and temperature
decides: far above log T no run hops within T generations, near log T a few do (Eq. 49),
and at 1 the wells hold nothing.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jes.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleWell:
    """The wells, and the noise; all numbers are positive.

    Attributes:
      stiffness: λ of Eq. (44).
      minimum: a.
      alpha: learning rate.
      kappa: σ²/N of Eq. (38), or 1/N for z-scored fitness: variance of the noise.
    """

    stiffness: float
    minimum: float
    alpha: float
    kappa: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise InputError(f"{name} must be positive, not {value}")


def loss(well: DoubleWell, x: ArrayLike) -> np.ndarray:
    """L(x), of the shape of x (Eq. 44)."""
    return well.stiffness / 4 * (np.asarray(x) ** 2 - well.minimum**2) ** 2


def temperature(well: DoubleWell) -> float:
    """ε = α κ / 2 (Eq. 40)."""
    return well.alpha * well.kappa / 2


def barrier_ratio(well: DoubleWell) -> float:
    """Barrier λ a⁴ / 4 over temperature: λ a⁴ / (2 α κ) (Eq. 45, 48)."""
    return well.stiffness * well.minimum**4 / 4 / temperature(well)


def well_variance(well: DoubleWell) -> float:
    """Variance inside a well, ε / (2 λ a²), for a high barrier (Eq. 50)."""
    return temperature(well) / (2 * well.stiffness * well.minimum**2)


def escape_generations(well: DoubleWell) -> float:
    r"""Mean number of generations until a hop, for a high barrier (Kramers; Eq. 47).

    :math:`2\pi / \sqrt{L''(a) |L''(0)|} \; e^{\Delta L/\epsilon} / \alpha`, where L''
    is 2 and -1 times λ a² (Eq. 41, 42, 46).
    """
    bend = math.sqrt(2) * well.stiffness * well.minimum**2
    return 2 * math.pi / bend * math.exp(barrier_ratio(well)) / well.alpha


def passage_generations(well: DoubleWell, points: int = 4001) -> float:
    r"""Mean number of generations from -a to a, at any barrier, for short steps.

    The first-passage integral of the diffusion, with a trapezoidal rule of so many
    points between -a and a: :math:`\frac1{\alpha\epsilon} \int_{-a}^{a}
    e^{L(y)/\epsilon} \int_{-\infty}^{y} e^{-L(z)/\epsilon}\,dz\,dy`.
    """
    a, epsilon = well.minimum, temperature(well)
    # Beyond the left end the density is below exp(-40) of that in the well.
    reach = math.sqrt(a**2 + math.sqrt(160 * epsilon / well.stiffness)) - a
    spacing = 2 * a / (points - 1)
    y = np.arange(-math.ceil(reach / spacing), points) * spacing - a
    density = np.exp(-loss(well, y) / epsilon)
    below = np.cumsum(density) - density / 2  # trapezoidal, as density is 0 at its end
    inside = y >= -a - spacing / 2
    outer = below[inside] * spacing / density[inside]
    return float(np.trapezoid(outer, dx=spacing) / (epsilon * well.alpha))


def hop_probability(generations: ArrayLike, escape: float) -> np.ndarray:
    """Share of runs that hop within so many generations (Eq. 43)."""
    return -np.expm1(-np.asarray(generations, float) / escape)


def simulate(
    well: DoubleWell, generations: int, *, key: jax.Array, runs: int
) -> jax.Array:
    """Runs from -a (Eq. 38): x after each generation, [runs, T + 1], float32."""
    first = jnp.full(runs, -well.minimum, jnp.float32)

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (_step(well, x, key),) * 2

    _, states = jax.lax.scan(step, first, jax.random.split(key, generations))
    return jnp.concatenate([first[None], states]).T


def first_passages(
    well: DoubleWell, generations: int, *, key: jax.Array, runs: int
) -> jax.Array:
    """Generations until each run from -a first reaches a, [runs]; infinite if never."""
    first = jnp.full(runs, -well.minimum, jnp.float32)

    def watch(state: tuple[jax.Array, jax.Array], at: Any) -> Any:
        x, when = state
        key, generation = at
        x = _step(well, x, key)
        arrived = jnp.where(x >= well.minimum, generation, jnp.inf)
        return (x, jnp.minimum(when, arrived)), None

    at = (jax.random.split(key, generations), jnp.arange(1.0, generations + 1))
    (_, when), _ = jax.lax.scan(watch, (first, jnp.full(runs, jnp.inf)), at)
    return when


def mean_passage(times: ArrayLike, generations: int) -> tuple[float, float]:
    """Mean of exponential times and its standard error, by maximum likelihood.

    Times [runs] are infinite where nothing happened within `generations`.

    Raises:
      InputError: if no run passed.
    """
    times = np.asarray(times, float)
    passed = np.isfinite(times).sum()
    if not passed:
        raise InputError(f"no run of {times.size} passed within {generations}")
    mean = np.minimum(times, generations).sum() / passed
    return float(mean), float(mean / math.sqrt(passed))


def _step(well: DoubleWell, x: jax.Array, key: jax.Array) -> jax.Array:
    slope = well.stiffness * x * (x**2 - well.minimum**2)
    noise = math.sqrt(well.kappa) * jax.random.normal(key, x.shape)
    return x + well.alpha * (noise - slope)
