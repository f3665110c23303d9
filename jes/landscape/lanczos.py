r"""Lanczos with full reorthogonalisation, and spectra from it (2602.00170, Alg. 3).

Operators are symmetric products on flat float32 vectors [D]
(`jax.flatten_util.ravel_pytree` flattens a model's weights), so that the m vectors of
the basis are one array [m, D] and each step reorthogonalises by two matrix products.
Memory is m + 3 vectors. The small tridiagonal eigenproblem is solved on the host in
float64.

Shapes of spectra, with one definition each: 2602.00170 names participation ratio,
effective rank and negative mass (Fig. 17) and defines none of them. Here, with
p = |λ| / Σ|λ| over all eigenvalues:

    participation ratio   (Σ|λ|)² / Σλ² = 1 / Σp²
    effective rank        exp(-Σ p log p)
    negative mass         Σ p over λ < 0, a share of |λ|
    negative count        the share of the eigenvalues that are below 0
    effective dimension   (Σλ)² / Σλ², with signs: what second differences can show

The first and the last agree where no eigenvalue is negative. d_eff(α) of Eq. 27 is
another quantity: it counts all positive directions, stiff or flat, almost alike.

A quadrature of m nodes cannot resolve the many eigenvalues near 0: their weight sits
on one or two nodes, on either side. The negative count of a `measure_quadrature` is
then the sign of such a node, and its participation ratio too small: a spectrum that is
half negative can give a count of 98 % and half the true ratio.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import eigh_tridiagonal

Product = Callable[..., jax.Array]
"""From a vector [D], and arrays that the operator depends on, to their product."""

ROUNDING = 8 * np.finfo(np.float32).eps
"""A new vector of this length, relative to the operator, is nothing but rounding."""

ZERO = 1e-6
"""Eigenvalues below this share of the largest count as 0, not negative."""


class Krylov(NamedTuple):
    """m steps of Lanczos: the operator A on a subspace is a tridiagonal matrix T."""

    diagonal: jax.Array  # float32 [m], of T
    beside: (
        jax.Array
    )  # float32 [m]; the last: the length of what A adds to the subspace
    basis: jax.Array  # float32 [m, D], orthonormal rows; 0 once the subspace is closed


class Quadrature(NamedTuple):
    r"""Gauss quadratures of s probes: :math:`z^T f(A) z = \sum_k w_k f(\theta_k)`."""

    nodes: np.ndarray  # float64 [s, m], θ, Ritz values
    weights: np.ndarray  # w = |z|² Y_1k² (Eq. 28), |z|² in all; 0 beyond the subspace


class Ritz(NamedTuple):
    """Approximate eigenpairs, by descending magnitude."""

    values: np.ndarray  # float64 [k]
    vectors: jax.Array  # float32 [k, D], orthonormal rows
    residuals: np.ndarray  # |A v - λ v|, with rounding: λ is at most so far off


@partial(jax.jit, static_argnums=(0, 2))
def lanczos(product: Product, start: jax.Array, steps: int, *arguments: Any) -> Krylov:
    """Steps of Lanczos; each vector is made orthogonal to all before, twice.

    Args:
      product: of the operator with a vector; static, so that the same function
        compiles once.
      start: float32 [D], not 0.
      steps: m, from 1 to D.
      *arguments: of `product` after the vector: arrays or trees of them.

    Raises:
      ValueError: for a number of steps out of range.
    """
    if not 1 <= steps <= start.shape[0]:
        raise ValueError(f"{steps} steps in {start.shape[0]} dimensions")

    def step(j: jax.Array, state: Any) -> Any:
        diagonal, beside, basis, vector, largest = state
        basis = basis.at[j].set(vector)
        image = product(vector, *arguments)
        along = _dot(image, vector)
        # Removes the parts along this vector and the one before as well as the rest.
        for _ in range(2):
            image = image - _dot(_dot(basis, image), basis)
        length = jnp.linalg.norm(image)
        largest = jnp.maximum(largest, jnp.abs(along) + length)
        closed = length <= ROUNDING * largest
        vector = jnp.where(closed, 0, image / jnp.where(closed, 1, length))
        diagonal = diagonal.at[j].set(along)
        beside = beside.at[j].set(jnp.where(closed, 0, length))
        return diagonal, beside, basis, vector, largest

    zeros = jnp.zeros(steps, jnp.float32)
    basis = jnp.zeros((steps, start.shape[0]), jnp.float32)
    first = start / jnp.linalg.norm(start)
    state = (zeros, zeros, basis, first, jnp.float32(0))
    return Krylov(*jax.lax.fori_loop(0, steps, step, state)[:3])


_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _eigenpairs(krylov: Krylov) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of T, ascending, float64 [m], and its eigenvectors as columns."""
    diagonal = np.asarray(krylov.diagonal, np.float64)
    beside = np.asarray(krylov.beside, np.float64)[:-1]
    return eigh_tridiagonal(diagonal, beside)


def ritz_pairs(krylov: Krylov, count: int) -> Ritz:
    """The approximate eigenpairs of largest magnitude, at most `count` and m."""
    values, columns = _eigenpairs(krylov)
    found = np.asarray(krylov.basis).any(-1)
    # T splits at rows of 0, and so do its eigenvectors.
    real = np.flatnonzero((columns[found] ** 2).sum(0) > 0.5)
    chosen = real[np.argsort(-np.abs(values[real]))][:count]
    columns = columns[:, chosen]
    vectors = _dot(jnp.asarray(columns.T, jnp.float32), krylov.basis)
    rounded = ROUNDING * np.abs(values).max()
    residuals = np.hypot(float(krylov.beside[-1]) * columns[-1], rounded)
    return Ritz(values[chosen], vectors, residuals)


def probe(key: jax.Array, size: int) -> jax.Array:
    """A Rademacher vector, float32 [D]: its squared length is D exactly."""
    return jax.random.rademacher(key, (size,), jnp.float32)


def quadrature_of(krylov: Krylov) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of one `probe` [D] as the start, a row of a `Quadrature`."""
    values, columns = _eigenpairs(krylov)
    return values, krylov.basis.shape[1] * columns[0] ** 2


def trace(
    quadrature: Quadrature, function: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """tr f(A), the mean over the probes, and its standard error (Eq. 29).

    The error of one probe is NaN; f is not called for nodes of weight 0.
    """
    nodes, weights = quadrature
    used = weights > 0
    values = np.zeros_like(nodes)
    values[used] = function(nodes[used])
    sums = (weights * values).sum(-1)
    error = sums.std(ddof=1) / len(sums) ** 0.5 if len(sums) > 1 else np.nan
    return float(sums.mean()), float(error)


def density(quadrature: Quadrature, grid: np.ndarray, width: float) -> np.ndarray:
    """Spectral density at a grid [G], of integral 1: Gaussian bells at the nodes."""
    nodes, weights = (part.ravel() for part in quadrature)
    apart = (np.asarray(grid)[:, None] - nodes) / width
    bells = np.exp(-(apart**2) / 2) / (width * np.sqrt(2 * np.pi))
    return bells @ (weights / weights.sum())


class Measures(NamedTuple):
    """Of a spectrum, float each; NaN where all eigenvalues are 0. See the module."""

    trace: float  # Σλ
    square: float  # Σλ²
    participation: float
    rank: float
    negative_mass: float  # from 0 to 1
    negative_count: float  # from 0 to 1
    dimension: float
    largest: float
    lowest: float


def measure(eigenvalues: np.ndarray, weights: np.ndarray | None = None) -> Measures:
    """The measures of a spectrum [n]; `weights` [n] count equal eigenvalues."""
    values = np.asarray(eigenvalues, np.float64)
    counts = np.ones_like(values) if weights is None else np.asarray(weights)
    values, counts = values[counts > 0], counts[counts > 0]
    sizes = np.abs(values)
    mass, square = counts @ sizes, counts @ values**2
    if not mass > 0:
        return Measures(*[np.nan] * len(Measures._fields))
    below = values < -ZERO * sizes.max()
    # Σ p log p, in a form that is defined for eigenvalues of 0.
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
    """The measures of a spectrum seen by probes, and their standard errors.

    Each sum over the spectrum is the mean over the probes; errors are by the jackknife
    over probes, NaN of one. The extreme eigenvalues are Ritz values, which lie inside
    the true ones; they have no errors.
    """
    probes = len(quadrature.nodes)

    def of(nodes: np.ndarray, weights: np.ndarray) -> Measures:
        return measure(nodes.ravel(), weights.ravel() / len(nodes))

    whole = of(*quadrature)
    if probes == 1:
        return whole, Measures(*[np.nan] * len(whole))
    left_out = np.array(
        [of(*(np.delete(part, i, 0) for part in quadrature)) for i in range(probes)]
    )
    errors = np.sqrt((probes - 1) * left_out.var(0))
    errors[-2:] = np.nan
    return whole, Measures(*map(float, errors))
