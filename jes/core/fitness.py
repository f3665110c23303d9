"""Fitness shaping: from rewards to the weights of the members."""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

LARGE = 40
"""Exponent of two beyond which rewards are scaled before they are squared."""


def shape_fitness(rewards: jax.Array, method: str = "zscore") -> jax.Array:
    """Weights of the members, from their rewards.

    A member whose reward is not finite gets weight 0 and takes no part in the
    statistics. If all other members tie, every weight is exactly 0: rounding noise is
    not divided by a vanishing standard deviation.

    Args:
      rewards: [N]; higher is better.
      method: a name in `METHODS`: 'zscore' (ddof 0, eps 1e-8; 2509.24372, Algorithm
        1), 'centered_rank' (ranks scaled to [-1/2, 1/2], ties share their mean rank;
        1703.03864), 'pair_zscore' (of antithetic pairs, the z-score of r(+) - r(-) over
        pairs, cut at ±3, with both signs; as in the code of 2602.03120, though the mean
        that it takes off is signal) or 'none' (the rewards as they are).

    Returns:
      float32 [N].

    Raises:
      ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown shaping {method!r}; known are {', '.join(METHODS)}")
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 1)
    finite = jnp.isfinite(rewards)
    highest = jnp.max(jnp.where(finite, rewards, -jnp.inf))
    lowest = jnp.min(jnp.where(finite, rewards, jnp.inf))
    shaped = METHODS[method](jnp.where(finite, rewards, 0), finite)
    return jnp.where(finite & (highest > lowest), shaped, 0)


def typical_spread(method: str, population: int) -> float:
    """Length of the step of noise alone, over that of independent z-scores.

    The root mean square of shaped fitness without ties; of pairs, whose members have
    opposite values, the square root of 2. NaN where rewards decide it.
    """
    ranks = (population + 1) / (12 * max(population - 1, 1))
    spreads = {"zscore": 1.0, "pair_zscore": 2**0.5, "centered_rank": ranks**0.5}
    return spreads.get(method, math.nan)


def finite_members(rewards: jax.Array) -> jax.Array:
    """How many members count (float32 scalar, at least 1 so that it can divide)."""
    return jnp.maximum(jnp.isfinite(rewards).sum(), 1).astype(jnp.float32)


def _zscore(rewards: jax.Array, finite: jax.Array) -> jax.Array:
    # Squares of numbers beyond 1e19 are infinite: they are scaled, by a power of two,
    # which is exact; others stay as they are.
    _, exponent = jnp.frexp(jnp.abs(rewards).max())
    rewards = jnp.ldexp(rewards, -jnp.where(exponent > LARGE, exponent, 0))
    count = finite_members(jnp.where(finite, rewards, jnp.nan))
    centred = jnp.where(finite, rewards - rewards.sum() / count, 0)
    return centred / (jnp.sqrt((centred**2).sum() / count) + 1e-8)


def _pair_zscore(rewards: jax.Array, finite: jax.Array) -> jax.Array:
    if rewards.shape[0] % 2:
        raise ValueError(f"{rewards.shape[0]} members are not pairs")
    both = finite[0::2] & finite[1::2]
    gains = jnp.where(both, rewards[0::2] - rewards[1::2], 0)
    spread = jnp.max(gains, where=both, initial=-jnp.inf)
    spread -= jnp.min(gains, where=both, initial=jnp.inf)
    # A difference of two rewards is no better known than their last digits.
    tied = spread <= 1e-6 * jnp.abs(rewards).max()
    gains = jnp.where(both & ~tied, jnp.clip(_zscore(gains, both), -3, 3), 0)
    return jnp.stack([gains, -gains], axis=1).reshape(-1)


def _centered_rank(rewards: jax.Array, finite: jax.Array) -> jax.Array:
    other = finite[None, :]
    below = (other & (rewards[None, :] < rewards[:, None])).sum(-1)
    equal = (other & (rewards[None, :] == rewards[:, None])).sum(-1)
    rank = below + (equal - 1) / 2
    return (rank / jnp.maximum(finite.sum() - 1, 1) - 0.5).astype(jnp.float32)


METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "zscore": _zscore,
    "centered_rank": _centered_rank,
    "pair_zscore": _pair_zscore,
    "none": lambda rewards, finite: rewards,
}
