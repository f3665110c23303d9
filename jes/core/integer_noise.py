r"""Stochastically rounded Gaussian noise on a grid of integers, drawn sparsely.

The perturbation of 2602.03120, Eq. (3), is
:math:`\delta = \lfloor\sigma\varepsilon\rfloor + b`, with :math:`b` a Bernoulli number
of probability :math:`\sigma\varepsilon - \lfloor\sigma\varepsilon\rfloor`. Entries are
independent, and :math:`P(\delta = k) = E[\max(0, 1 - |\sigma\varepsilon - k|)]`: for a
small σ all but :math:`0.8\sigma` of them are 0. So `sparse_noise` does not draw every
entry, but the gaps from one that is not 0 to the next, which are geometric, and the
values there, from their exact probabilities: the same distribution, about 1/σ times
cheaper. Where that does not pay, every entry is drawn, but from one number of 32 bits.
`dense_noise` is the definition, with a normal and a uniform number for each.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.random import random_bits

DEVIATIONS = 8
"""Sparse entries are drawn for their expected number and so many standard deviations
more. Where there are more (probability 1e-15) the last are lost."""

RARE = 2.0**-31
"""Values less probable than this, the resolution of the bits that choose, do not
occur. Up to sigma = 0.15 that leaves 1 and -1."""

MANY = 0.1
"""Share of nonzero entries above which all are drawn (a sparse one costs eight times
as much on a CPU)."""

WIDTH = 64
"""Gaps that are summed by a product with a triangle of ones; see `_row_sums`."""


def dense_noise(key: jax.Array, shape: tuple[int, ...], sigma: float) -> jax.Array:
    """Eq. (3) as it stands: δ float32, every entry drawn. The reference."""
    normal_key, rounding_key = jax.random.split(key)
    scaled = sigma * jax.random.normal(normal_key, shape)
    floor = jnp.floor(scaled)
    return floor + jax.random.bernoulli(rounding_key, scaled - floor)


class Outcomes(NamedTuple):
    """What an entry that is not 0 can be, up to its sign.

    Attributes:
      values: int [R, rounds], of every outcome.
      probabilities: float64 [R], given that it is not 0; they sum to 1.
      nonzero: the probability that it is not 0.
    """

    values: np.ndarray
    probabilities: np.ndarray
    nonzero: float


@functools.cache
def outcomes(sigma: float, rounds: int = 1) -> Outcomes:
    """Outcomes of rounding the same σε stochastically once, or twice independently.

    σ is in codes. Two rounds are the perturbation and the update of QuZO (2502.12346);
    an entry is then 0 if both are.
    """
    mass: dict[tuple[int, ...], float] = {}
    for k in range(math.ceil(9 * sigma)):
        here, up, both_up = _moments(sigma, k)
        shares = [here - up, up]
        if rounds == 2:
            shares = [here - 2 * up + both_up, up - both_up, up - both_up, both_up]
        for ups, share in zip(np.ndindex(*(2,) * rounds), shares, strict=True):
            value = tuple(k + one for one in ups)
            if any(value):
                mass[value] = mass.get(value, 0.0) + share
    total = sum(mass.values())
    kept = {value: p for value, p in mass.items() if p > RARE * total}
    values = sorted(kept, key=lambda value: -kept[value])
    probabilities = np.array([kept[value] for value in values])
    return Outcomes(np.array(values), probabilities / probabilities.sum(), total)


def variance(sigma: float) -> float:
    """E[δ²], in squared codes: 0.8 σ while that is small, and never below σ²."""
    possible = outcomes(sigma)
    squares = (possible.values[:, 0] ** 2 * possible.probabilities).sum()
    return float(possible.nonzero * squares)


def _moments(sigma: float, k: int) -> tuple[float, float, float]:
    """Means of 1, u and u², for u = σ|ε| - k, over those ε with 0 <= u < 1."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) * math.sqrt(2 / math.pi)

    low, high = k / sigma, (k + 1) / sigma
    zeroth = math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))
    first = density(low) - density(high)
    second = zeroth + low * density(low) - high * density(high)
    up = sigma * first - k * zeroth
    return zeroth, up, sigma**2 * second - 2 * k * sigma * first + k**2 * zeroth


def entries(size: int, sigma: float, rounds: int = 1) -> int:
    """How many entries `integer_noise` draws for a matrix of this size."""
    p = outcomes(sigma, rounds).nonzero
    return size if p > MANY else _sparse_entries(size, p)


def _sparse_entries(size: int, p: float) -> int:
    most = size * p + DEVIATIONS * math.sqrt(size * p * (1 - p)) + DEVIATIONS
    return math.ceil(most / WIDTH) * WIDTH


def integer_noise(
    key: jax.Array, size: int, sigma: float, rounds: int = 1
) -> tuple[jax.Array | None, jax.Array]:
    """The δ of a matrix: those that are not 0 if they are few, else all of them.

    Of a matrix of `size` entries, below 2^31, rounded as in `outcomes`.

    Returns:
      positions int32 [K], ascending, where the last may lie beyond the matrix, and
      values int32 [rounds, K]; or None and values int32 [rounds, size].
    """
    possible = outcomes(sigma, rounds)
    if possible.nonzero <= MANY:
        return sparse_noise(key, size, sigma, rounds)
    bits = random_bits(key, (size,))
    share = possible.nonzero * possible.probabilities
    values = np.concatenate([np.zeros((1, rounds), int), possible.values])
    drawn = _chosen(bits & ~np.uint32(1), values, np.array([1 - share.sum(), *share]))
    return None, drawn * jnp.where(bits & 1, 1, -1)[None]


def sparse_noise(
    key: jax.Array, size: int, sigma: float, rounds: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The entries that are not 0; arguments and results as of `integer_noise`."""
    possible = outcomes(sigma, rounds)
    count = _sparse_entries(size, possible.nonzero)
    draws = 1 if len(possible.values) == 1 else 2
    bits = random_bits(key, (draws, count))
    # Gaps beyond the matrix need no precision, and their sum must not overflow.
    gaps = jnp.minimum(_geometric(bits[0] >> 1, possible.nonzero), size + 1)
    positions = _running_sum(gaps, possible.nonzero) - 1
    sign = jnp.where(bits[0] & 1, 1, -1)
    if draws == 1:
        return positions, jnp.asarray(possible.values.T) * sign[None]
    values = _chosen(bits[1], possible.values, possible.probabilities)
    return positions, values * sign[None]


def _chosen(
    bits: jax.Array, values: np.ndarray, probabilities: np.ndarray
) -> jax.Array:
    """Values [R, rounds] of these probabilities, by uniform bits: int32 [rounds, K].

    As sums of steps, one for every limit that the bits have passed: a single pass,
    without a table in memory.
    """
    limits = np.round(np.cumsum(probabilities)[:-1] * 2.0**32)
    limits = np.minimum(limits, 2**32 - 1).astype(np.uint32)
    rows = []
    for column in values.T:
        drawn = jnp.full(bits.shape, column[0], jnp.int32)
        for limit, step in zip(limits, np.diff(column), strict=True):
            if step:
                drawn += jnp.where(bits >= limit, jnp.int32(step), 0)
        rows.append(drawn)
    return jnp.stack(rows)


def _geometric(bits: jax.Array, p: float) -> jax.Array:
    """Number of trials up to the first success, int32, from 31 random bits each."""
    small = bits.astype(jnp.float32) * np.float32(2.0**-31)
    rest = (np.uint32(2**31) - bits).astype(jnp.float32) * np.float32(2.0**-31)
    # An exponential number, from the end of the unit interval where it is precise.
    exponential = jnp.where(bits < 2**30, -jnp.log1p(-small), -jnp.log(rest))
    return (exponential * np.float32(-1 / math.log1p(-p))).astype(jnp.int32) + 1


def _running_sum(gaps: jax.Array, p: float) -> jax.Array:
    """`jnp.cumsum(gaps)`; the compiler for CPUs makes a slow program of that."""
    # The expected sum of a row of `WIDTH` gaps is WIDTH / p.
    if 4 * WIDTH / p > 2**24:
        return jnp.cumsum(gaps)
    return jax.lax.platform_dependent(gaps, cpu=_row_sums, default=jnp.cumsum)


def _row_sums(gaps: jax.Array) -> jax.Array:
    """`jnp.cumsum(gaps)`, by products of rows with a triangle of ones in float32.

    Exact where the sums of rows are below 2^24. (Whole rows: filling one up makes it
    five times slower.)
    """
    rows = gaps.reshape(-1, WIDTH)
    triangle = jnp.triu(jnp.ones((WIDTH, WIDTH), jnp.float32))
    sums = (rows.astype(jnp.float32) @ triangle).astype(jnp.int32)
    before = jnp.cumsum(sums[:, -1]) - sums[:, -1]
    return (sums + before[:, None]).reshape(-1)
