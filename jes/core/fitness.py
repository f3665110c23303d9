"""Fitness shaping: from rewards to the weights of the members."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

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
    return shaped(rewards, METHODS[method], jnp)


def shaped(rewards: Any, function: Callable[..., Any], xp: Any) -> Any:
    """Weights by a function of `METHODS`, for arrays of `jax.numpy` or `numpy`.

    Of `numpy`, sums are exact before they are rounded: their order does not matter.
    """
    finite = xp.isfinite(rewards)
    highest = xp.max(xp.where(finite, rewards, -xp.inf))
    lowest = xp.min(xp.where(finite, rewards, xp.inf))
    found = function(xp.where(finite, rewards, 0), finite, xp)
    return xp.where(finite & (highest > lowest), found, 0)


def _total(values: Any, xp: Any) -> Any:
    return math.fsum(values) if xp is np else values.sum()


def typical_spread(method: str, population: int) -> float:
    """Length of the step of noise alone, over that of independent z-scores.

    The root mean square of shaped fitness without ties; of pairs, whose members have
    opposite values, the square root of 2. NaN where rewards decide it.
    """
    ranks = (population + 1) / (12 * max(population - 1, 1))
    spreads = {"zscore": 1.0, "pair_zscore": 2**0.5, "centered_rank": ranks**0.5}
    return spreads.get(method, math.nan)


def finite_members(rewards: Any, xp: Any = jnp) -> Any:
    """How many members count (float32 scalar, at least 1 so that it can divide)."""
    return xp.maximum(xp.isfinite(rewards).sum(), 1).astype(np.float32)


def _zscore(rewards: Any, finite: Any, xp: Any) -> Any:
    # Squares of numbers beyond 1e19 are infinite: they are scaled, by a power of two,
    # which is exact; others stay as they are.
    _, exponent = xp.frexp(xp.abs(rewards).max())
    rewards = xp.ldexp(rewards, -xp.where(exponent > LARGE, exponent, 0))
    # Counted anew, as by the caller: in other words XLA rounds otherwise.
    count = finite_members(xp.where(finite, rewards, xp.nan), xp)
    centred = xp.where(finite, rewards - _total(rewards, xp) / count, 0)
    return centred / (xp.sqrt(_total(centred**2, xp) / count) + 1e-8)


def _pair_zscore(rewards: Any, finite: Any, xp: Any) -> Any:
    if rewards.shape[0] % 2:
        raise ValueError(f"{rewards.shape[0]} members are not pairs")
    both = finite[0::2] & finite[1::2]
    gains = xp.where(both, rewards[0::2] - rewards[1::2], 0)
    spread = xp.max(gains, where=both, initial=-xp.inf)
    spread -= xp.min(gains, where=both, initial=xp.inf)
    # A difference of two rewards is no better known than their last digits.
    tied = spread <= 1e-6 * xp.abs(rewards).max()
    gains = xp.where(both & ~tied, xp.clip(_zscore(gains, both, xp), -3, 3), 0)
    return xp.stack([gains, -gains], axis=1).reshape(-1)


def _centered_rank(rewards: Any, finite: Any, xp: Any) -> Any:
    other = finite[None, :]
    below = (other & (rewards[None, :] < rewards[:, None])).sum(-1)
    equal = (other & (rewards[None, :] == rewards[:, None])).sum(-1)
    rank = below + (equal - 1) / 2
    return (rank / xp.maximum(finite.sum() - 1, 1) - 0.5).astype(rewards.dtype)


METHODS: dict[str, Callable[..., Any]] = {
    "zscore": _zscore,
    "centered_rank": _centered_rank,
    "pair_zscore": _pair_zscore,
    "none": lambda rewards, finite, xp: rewards,
}
