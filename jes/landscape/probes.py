r"""What random perturbations of a model do to its reward (2602.00170, section 5).

A candidate is :math:`\theta + \sigma u` with :math:`u \sim N(0, I)` (Eq. 51), and
:math:`\Delta R` its reward minus that of the model, on one pool of prompts (Eq. 52).
These are the statistics of M candidates on P prompts, on numpy arrays.

A best of N is positive even without a direction that improves the model, for three
reasons: candidates differ by chance, the pool is finite, and the best was picked on the
same pool. The controls are `best_of` of a null (`deal_out`), the reward of the same
winners on other prompts (`best_of` of another measure), and `halves`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import norm

SIZES = (5, 10, 20, 30, 50)
"""N of the paper's grid."""


def order_weights(candidates: int, n: int) -> np.ndarray:
    r"""Probabilities that the best of N drawn from M is the j-th smallest of all.

    Without replacement: :math:`\binom{j-1}{N-1} / \binom{M}{N}`, float64 [M].

    Raises:
      ValueError: if N is not from 1 to M.
    """
    if not 1 <= n <= candidates:
        raise ValueError(f"the best of {n} cannot be taken of {candidates} candidates")
    ranks = np.arange(n, candidates + 1, dtype=float)
    logs = gammaln(ranks) - gammaln(n) - gammaln(ranks - n + 1)
    logs -= gammaln(candidates + 1) - gammaln(n + 1) - gammaln(candidates - n + 1)
    return np.concatenate([np.zeros(n - 1), np.exp(logs)])


def best_of(gains: np.ndarray, measured: np.ndarray, n: int) -> tuple[float, float]:
    r"""Mean and variance of a measure of the best of N random candidates (Eq. 10, 53).

    Exact, where the paper draws 2000 subsets.

    Args:
      gains: float [M], by which the best is picked; ties are broken evenly.
      measured: float [M], the gains themselves, or another measure of the candidates
        such as their gains on other prompts.
      n: N.
    """
    gains, picked = np.asarray(gains), np.asarray(measured, float)
    order = np.argsort(gains, kind="stable")
    _, ties = np.unique(gains[order], return_inverse=True)
    chance = np.bincount(ties, order_weights(len(gains), n)) / np.bincount(ties)
    mean = float(chance[ties] @ picked[order])
    square = float(chance[ties] @ picked[order] ** 2)
    return mean, max(0.0, square - mean**2)


def enough(best: Sequence[float], sizes: Sequence[int]) -> int:
    """N_90: the smallest N with at least 0.9 of the best of the largest N.

    0 where the largest does not improve. Sizes are ascending.
    """
    if best[-1] <= 0:
        return 0
    pairs = zip(sizes, best, strict=True)
    return next(n for n, mean in pairs if mean >= 0.9 * best[-1])


def gaussian_best(n: int) -> float:
    """E[best of N] of independent standard normals: chance alone."""
    value, _ = quad(lambda x: n * x * norm.pdf(x) * norm.cdf(x) ** (n - 1), -12, 12)
    return value


def gains_of(bits: np.ndarray, base: np.ndarray) -> np.ndarray:
    """ΔR of each candidate, float64 [M].

    Args:
      bits: bool [M, P], correct answers.
      base: bool [P], the same of the unperturbed model.
    """
    return bits.mean(-1) - base.mean()


def deal_out(bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The null: each prompt's correct answers, permuted over the candidates.

    Every prompt is answered correctly as often as before, but no candidate is better
    than another: what remains of a best of N is luck.
    """
    return rng.permuted(bits, axis=0)


def halves(
    bits: np.ndarray, base: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Variance of ΔR due to the candidates, and due to the finite pool.

    The first is the covariance of the gains on two random halves of the pool and may
    be negative; the second is the rest of the variance of `gains_of`.
    """
    order = rng.permutation(bits.shape[1])
    first, second = np.array_split(order, 2)
    a, b = (gains_of(bits[:, part], base[part]) for part in (first, second))
    own = float(np.cov(a, b)[0, 1])
    return own, float(gains_of(bits, base).var(ddof=1)) - own


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    gains: np.ndarray,
    rng: np.random.Generator,
    draws: int = 1000,
) -> tuple[float, float]:
    """95 % interval of a statistic of the gains over resampled candidates.

    Not for `best_of`: resampling does not see the bias of picking; batches do.
    """
    values = [statistic(rng.choice(gains, len(gains))) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def improving(gains: np.ndarray) -> float:
    """Share of candidates with ΔR > 0."""
    return float(np.mean(np.asarray(gains) > 0))


def headroom(gain: float, base: float) -> float:
    """A gain as a share of the possible gain (Eq. 54); NaN where that is 0."""
    return gain / (1 - base) if base < 1 else math.nan
