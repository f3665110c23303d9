r"""Lanczos with full reorthogonalisation, and spectra from it (2602.00170, Alg. 3).

Operators are symmetric products on flat float32 vectors, not on trees: what Lanczos
costs beside the products is the m vectors of its basis, and as one array [m, D] they
are made orthogonal to each other by two matrix products; subspaces of vectors, which
come of it, are arrays [k, D] too. `jax.flatten_util.ravel_pytree` gives a model's
weights that form. Memory is that of m + 3 vectors.

The eigenvalues of the small tridiagonal matrix are found on the host, in float64.
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


class Krylov(NamedTuple):
    """m steps of Lanczos: the operator A on a subspace is a tridiagonal matrix T.

    Attributes:
      diagonal: float32 [m], of T.
      beside: float32 [m], the elements beside it; the last one is the length of what
        A adds to the subspace.
      basis: float32 [m, D], orthonormal rows; rows of 0 after the subspace has closed
        in itself, which it does where the start has parts of few eigenvectors.
    """

    diagonal: jax.Array
    beside: jax.Array
    basis: jax.Array


class Quadrature(NamedTuple):
    r"""Gauss quadratures of s probes: :math:`z^T f(A) z = \sum_k w_k f(\theta_k)`.

    Attributes:
      nodes: float64 [s, m], θ, Ritz values.
      weights: float64 [s, m], w = |z|² Y_1k² (Eq. 28); a row sums to |z|², which is D
        in the mean. 0 beside nodes that stand for nothing.
    """

    nodes: np.ndarray
    weights: np.ndarray


class Ritz(NamedTuple):
    """Approximate eigenpairs, by descending magnitude.

    Attributes:
      values: float64 [k].
      vectors: float32 [k, D], orthonormal rows.
      residuals: float64 [k], |A v - λ v|, with what float32 has rounded: an eigenvalue
        is within it of λ.
    """

    values: np.ndarray
    vectors: jax.Array
    residuals: np.ndarray


@partial(jax.jit, static_argnums=(0, 2))
def lanczos(product: Product, start: jax.Array, steps: int, *arguments: Any) -> Krylov:
    """Steps of Lanczos from a start, each vector made orthogonal to all before, twice.

    Args:
      product: of the operator with a vector, to be traced; static, so that the same
        function compiles once.
      start: float32 [D], not 0.
      steps: m, from 1 to D.
      *arguments: of `product` after the vector: arrays or trees of them.

    Raises:
      ValueError: for a number of steps that cannot be.
    """
    if not 1 <= steps <= start.shape[0]:
        raise ValueError(f"{steps} steps in {start.shape[0]} dimensions")

    def step(j: jax.Array, state: Any) -> Any:
        diagonal, beside, basis, vector, largest = state
        basis = basis.at[j].set(vector)
        image = product(vector, *arguments)
        along = _dot(image, vector)
        # Takes the parts along this vector and the one before as well as the rest.
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


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def eigenpairs(krylov: Krylov) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of T, ascending, float64 [m], and its eigenvectors as columns."""
    diagonal = np.asarray(krylov.diagonal, np.float64)
    beside = np.asarray(krylov.beside, np.float64)[:-1]
    return eigh_tridiagonal(diagonal, beside)


def ritz_pairs(krylov: Krylov, count: int) -> Ritz:
    """The approximate eigenpairs of largest magnitude, at most `count`.

    Args:
      krylov: from `lanczos`.
      count: k; there are no more than steps that found something.
    """
    values, columns = eigenpairs(krylov)
    found = np.asarray(krylov.basis).any(-1)
    # T of rows of 0 is apart from the rest of it: so are its eigenvectors.
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


def quadrature_of(krylov: Krylov, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of one probe, a row of a `Quadrature`.

    Args:
      krylov: from the probe as its start.
      square: the squared length of the probe.
    """
    values, columns = eigenpairs(krylov)
    return values, square * columns[0] ** 2


def stochastic_quadrature(
    product: Product,
    size: int,
    *arguments: Any,
    key: jax.Array,
    probes: int,
    steps: int,
) -> Quadrature:
    """Stochastic Lanczos quadrature with Rademacher probes (2602.00170, Alg. 3).

    Args:
      product: as for `lanczos`.
      size: D.
      *arguments: of the product.
      key: typed PRNG key; probe i is drawn from fold_in(key, i).
      probes: s.
      steps: m, of each; the products are s m.
    """
    rows = []
    for number in range(probes):
        start = probe(jax.random.fold_in(key, number), size)
        rows.append(quadrature_of(lanczos(product, start, steps, *arguments), size))
    nodes, weights = map(np.array, zip(*rows, strict=True))
    return Quadrature(nodes, weights)


def trace(
    quadrature: Quadrature, function: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """tr f(A), the mean over the probes, and its standard error (Eq. 29).

    Args:
      quadrature: of s probes; with one the error is NaN.
      function: f, of arrays; it is not asked for nodes of weight 0.
    """
    nodes, weights = quadrature
    used = weights > 0
    values = np.zeros_like(nodes)
    values[used] = function(nodes[used])
    sums = (weights * values).sum(-1)
    error = sums.std(ddof=1) / len(sums) ** 0.5 if len(sums) > 1 else np.nan
    return float(sums.mean()), float(error)


def density(quadrature: Quadrature, grid: np.ndarray, width: float) -> np.ndarray:
    """Spectral density: the share of the eigenvalues by unit of λ, smoothed.

    Args:
      quadrature: of s probes.
      grid: float [G], where to.
      width: standard deviation of the Gaussian that stands for each node.

    Returns:
      float64 [G], of integral 1.
    """
    nodes, weights = (part.ravel() for part in quadrature)
    apart = (np.asarray(grid)[:, None] - nodes) / width
    bells = np.exp(-(apart**2) / 2) / (width * np.sqrt(2 * np.pi))
    return bells @ (weights / weights.sum())
