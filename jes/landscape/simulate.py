"""Runs on a quadratic: the linear model of 2602.00170, and ES itself."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from jes.core.fitness import shape_fitness
from jes.errors import InputError
from jes.landscape.quadratic import Ascent, schedules

METHODS = ("linear", "es", "zscore")


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
    alpha: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    population: ArrayLike | None = None,
    decay: ArrayLike = 0.0,
) -> Runs:
    """Draws runs of an ascent, in float32.

    Args:
      ascent: the start, and what has no schedule.
      generations: T.
      key: of all noise.
      runs: how many.
      method: 'linear' (2602.00170, Eq. 14, with the ascent's noise), 'es' (its Eq. 1:
        a population's rewards as they are, over σ) or 'zscore' (2509.24372, as
        `jes.es_gradient`; no 1/σ).
      alpha, sigma, population, decay: see `quadratic.path`. Only 'linear' can change
        its population.

    Raises:
      InputError: for an unknown method; see `quadratic.schedules`.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {METHODS}, not {method!r}")
    if method != "linear" and population is not None:
        raise InputError(f"{method!r} has one population, that of the ascent")
    plan = schedules(ascent, generations, alpha, sigma, population, decay)
    starts, noises = jax.random.split(key)
    shape = (runs, len(ascent.start))
    spread = jnp.sqrt(jnp.broadcast_to(jnp.asarray(ascent.start_variance), shape[1:]))
    first = jax.random.normal(starts, shape) * spread[None] + ascent.start[None]
    return _runs(
        jax.random.split(noises, runs),
        first.astype(jnp.float32),
        jnp.asarray(ascent.start, jnp.float32),
        jnp.asarray(ascent.eigenvalues, jnp.float32),
        tuple(jnp.asarray(part, jnp.float32) for part in plan),
        method=method,
        # The linear model has no members: one program for all populations.
        members=0 if method == "linear" else ascent.population,
        paper=ascent.noise == "paper",
    )


@partial(jax.jit, static_argnames=("method", "members", "paper"))
def _runs(
    keys: jax.Array,
    first: jax.Array,
    anchor: jax.Array,
    values: jax.Array,
    plan: tuple[jax.Array, ...],
    *,
    method: str,
    members: int,
    paper: bool,
) -> Runs:
    def loss(x: jax.Array) -> jax.Array:
        return (values * x**2).sum() / 2

    def step(x: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        key, alpha, sigma, population, decay = at
        if method == "linear":
            scale = (sigma if paper else 1.0) / jnp.sqrt(population)
            move = scale * jax.random.normal(key, x.shape) - values * x
        else:
            move = _estimate(key, x, values, sigma, method, members)
        x = anchor + (1 - alpha * decay) * (x + alpha * move - anchor)
        return x, loss(x)

    def run(key: jax.Array, x: jax.Array) -> Runs:
        at = (jax.random.split(key, plan[0].shape[0]), *plan)
        final, losses = jax.lax.scan(step, x, at)
        return Runs(1 - jnp.concatenate([loss(x)[None], losses]), final)

    return jax.vmap(run)(keys, first)


def estimates(
    ascent: Ascent, *, key: jax.Array, runs: int, method: str = "zscore"
) -> jax.Array:
    """Independent single estimates at the start, the updates over α: [runs, d].

    Args:
      ascent: where, and with which σ and N.
      key: of all noise.
      runs: how many.
      method: 'es' or 'zscore', see `simulate`.

    Raises:
      InputError: for another method.
    """
    if method not in METHODS[1:]:
        raise InputError(f"method must be one of {METHODS[1:]}, not {method!r}")
    return _estimates(
        jax.random.split(key, runs),
        jnp.asarray(ascent.start, jnp.float32),
        jnp.asarray(ascent.eigenvalues, jnp.float32),
        ascent.sigma,
        method=method,
        members=ascent.population,
    )


@partial(jax.jit, static_argnames=("method", "members"))
def _estimates(
    keys: jax.Array,
    x: jax.Array,
    values: jax.Array,
    sigma: jax.Array,
    *,
    method: str,
    members: int,
) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        return _estimate(key, x, values, sigma, method, members)

    return jax.vmap(one)(keys)


def _estimate(
    key: jax.Array,
    x: jax.Array,
    values: jax.Array,
    sigma: jax.Array,
    method: str,
    members: int,
) -> jax.Array:
    """The estimate of one generation at x, [d]."""
    noise = jax.random.normal(key, (members, *x.shape))
    losses = (values[None] * (x[None] + sigma * noise) ** 2).sum(-1) / 2
    # Without the 1, which z-scores take off, differences keep all their digits.
    weights = (1 - losses) / sigma if method == "es" else shape_fitness(-losses)
    return weights @ noise / members
