r"""What the shape of a spectrum is said in, with one definition of each.

2602.00170 names participation ratio, effective rank and negative mass (Fig. 17) and
defines none of them. Here, with p = |λ| / Σ|λ| over all eigenvalues:

    participation ratio   (Σ|λ|)² / Σλ² = 1 / Σp²
    effective rank        exp(-Σ p log p)
    negative mass         Σ p over λ < 0, a share of |λ|
    negative count        the share of the eigenvalues that are below 0
    effective dimension   (Σλ)² / Σλ², with signs: what second differences can tell

The first and the last are the same where no eigenvalue is negative. d_eff(α) of Eq. 27
is another thing: it counts all positive directions, stiff or flat, almost alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jes.landscape.lanczos import Quadrature

ZERO = 1e-6
"""Relative to the largest, eigenvalues that are rounding count as 0, not negative."""


class Measures(NamedTuple):
    """Of a spectrum, float each; NaN where all eigenvalues are 0.

    Attributes:
      trace: Σλ.
      square: Σλ².
      participation: the participation ratio, of |λ|.
      rank: the effective rank.
      negative_mass, negative_count: shares, from 0 to 1.
      dimension: the effective dimension, with signs.
      largest, lowest: the extreme eigenvalues.
    """

    trace: float
    square: float
    participation: float
    rank: float
    negative_mass: float
    negative_count: float
    dimension: float
    largest: float
    lowest: float


def measure(eigenvalues: np.ndarray, weights: np.ndarray | None = None) -> Measures:
    """The measures of a spectrum.

    Args:
      eigenvalues: float [n].
      weights: float [n], how many eigenvalues each stands for; by default 1.
    """
    values = np.asarray(eigenvalues, np.float64)
    counts = np.ones_like(values) if weights is None else np.asarray(weights)
    values, counts = values[counts > 0], counts[counts > 0]
    sizes = np.abs(values)
    mass, square = counts @ sizes, counts @ values**2
    if not mass > 0:
        return Measures(*[np.nan] * len(Measures._fields))
    below = values < -ZERO * sizes.max()
    # Σ p log p, in a form that knows eigenvalues of 0.
    entropy = np.log(mass) - counts @ (sizes * np.log(np.where(sizes, sizes, 1))) / mass
    found = (
        counts @ values,
        square,
        mass**2 / square,
        np.exp(entropy),
        (counts * sizes)[below].sum() / mass,
        counts[below].sum() / counts.sum(),
        (counts @ values) ** 2 / square,
        values.max(),
        values.min(),
    )
    return Measures(*map(float, found))


def measure_quadrature(quadrature: Quadrature) -> tuple[Measures, Measures]:
    """The measures of a spectrum that probes have seen, and their standard errors.

    Each sum over the spectrum is the mean over the probes; what is made of the sums has
    the error of the jackknife over probes. The extreme eigenvalues are Ritz values:
    the true ones are outside of them. Their errors are NaN, as all are of one probe.
    """
    probes = len(quadrature.nodes)

    def of(rows: Sequence[int]) -> Measures:
        nodes, weights = (part[list(rows)].ravel() for part in quadrature)
        return measure(nodes, weights / len(rows))

    rows = range(probes)
    whole = of(rows)
    if probes == 1:
        return whole, Measures(*[np.nan] * len(whole))
    left_out = np.array([of([r for r in rows if r != i]) for i in rows])
    errors = np.sqrt((probes - 1) * left_out.var(0))
    errors[-2:] = np.nan
    return whole, Measures(*map(float, errors))
