r"""The spectrum of the smoothed reward's Hessian as pairs of perturbations show it.

With n pairs in D dimensions the operator of `jes.landscape.curvature` is

.. math:: \hat H = \frac{1}{n} \sum_i w_i \varepsilon_i \varepsilon_i^T - \bar w I,
   \qquad w_i = -s_i/\sigma^2:

n eigenvalues of its own, and D - n of :math:`-\bar w`. The former are those of a
matrix [n, n] made of the products :math:`\varepsilon_i \cdot \varepsilon_j`, so that no
Lanczos is needed and the noise is drawn a few times, not once a product.

What it is worth: in many dimensions perturbations are nearly orthogonal, the products
nearly D times the unit matrix, and so the n eigenvalues nearly D w_i / n, whatever the
landscape. Their spread, their signs and their participation ratio are those of the n
second differences. Two things tell curvature from that:

- the control, rewards dealt out at random, which has second differences of the same
  kind and no curvature;
- curvature along directions that were not chosen by these pairs (`along`), of which
  the estimate is unbiased: along the eigenvectors of another objective, or along those
  of one half of the pairs by the other half (`held_out`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jes.core.noise import PyTree, leaf_noise
from jes.landscape.measures import Measures, measure

HELD = 2**27
"""Entries of noise that may be held at once: half a gigabyte."""


SPANNED = 1e-5
"""Of the products of directions, eigenvalues below this share of the largest are those
of more directions than dimensions, and float32's rounding."""


class Directions(NamedTuple):
    """What is kept of n directions of noise in D dimensions.

    Attributes:
      products: float64 [n, n], of any two.
      coordinates: float64 [n, k], along the vectors that were asked for.
      size: D.
    """

    products: np.ndarray
    coordinates: np.ndarray
    size: int


class Spectrum(NamedTuple):
    """Of the sample operator.

    Attributes:
      eigenvalues: float64 [r], ascending, with r the lesser of n and D.
      bulk: the value of all others.
      others: D - r, how many these are.
    """

    eigenvalues: np.ndarray
    bulk: float
    others: int

    def measures(self) -> Measures:
        """See `jes.landscape.measures`."""
        counts = np.append(np.ones(len(self.eigenvalues)), self.others)
        return measure(np.append(self.eigenvalues, self.bulk), counts)


class Along(NamedTuple):
    """Mean curvature along some directions, with its standard error over pairs."""

    curvature: float
    error: float


class HeldOut(NamedTuple):
    """The top eigenvectors of one half of the pairs, seen by the other; see there.

    Attributes:
      within: the mean of their eigenvalues, where they were found.
      beyond: the mean curvature along them by the other half.
      error: standard error of `beyond`.
    """

    within: float
    beyond: float
    error: float


def look_at(
    params: PyTree, basis: jax.Array, key: jax.Array, directions: int, block: int = 0
) -> Directions:
    """Products of directions of noise with each other, and with given vectors.

    Args:
      params: of which the noise has the leaves.
      basis: float32 [k, D], vectors in the order of `ravel_pytree`.
      key: the generation key.
      directions: n.
      block: directions whose noise of one leaf is held at once, twice; 0 for what
        `HELD` allows. In several blocks noise is drawn again for every pair of these.
    """
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    block = block or min(directions, max(1, HELD // largest))
    vectors = jax.vmap(ravel_pytree(params)[1])(basis)
    blocks = [
        jnp.arange(start, min(start + block, directions))
        for start in range(0, directions, block)
    ]
    products = np.zeros((directions, directions))
    coordinates = []
    for number, rows in enumerate(blocks):
        found, projected = _own_products(vectors, key, rows)
        coordinates.append(np.asarray(projected, np.float64))
        products[np.ix_(rows, rows)] = found
        for columns in blocks[number + 1 :]:
            found = np.asarray(_products(params, key, rows, columns))
            products[np.ix_(rows, columns)] = found
            products[np.ix_(columns, rows)] = found.T
    return Directions(products, np.concatenate(coordinates), basis.shape[1])


def _draw(key: jax.Array, path: Any, shape: tuple[int, ...], rows: jax.Array) -> Any:
    """Noise of a leaf in several directions, [rows, size of the leaf]."""

    def one(row: jax.Array) -> jax.Array:
        return leaf_noise(jax.random.fold_in(key, row), path, shape).ravel()

    return jax.vmap(one)(rows)


_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _own_products(
    vectors: PyTree, key: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a block with itself, and with the vectors (leaves [k, ...])."""
    own: Any = 0
    projected: Any = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(vectors):
        drawn = _draw(key, path, leaf.shape[1:], rows)
        own += _dot(drawn, drawn.T)
        projected += _dot(drawn, leaf.reshape(len(leaf), -1).T)
    return own, projected


@jax.jit
def _products(
    params: PyTree, key: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """Of one block with another."""
    total: Any = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        drawn = [_draw(key, path, leaf.shape, some) for some in (rows, columns)]
        total += _dot(drawn[0], drawn[1].T)
    return total


def spectrum(directions: Directions, weights: np.ndarray) -> Spectrum:
    """All eigenvalues of the sample operator.

    Args:
      directions: from `look_at`.
      weights: w, float [n], from `jes.landscape.curvature.stein_weights`.
    """
    weights = np.asarray(weights, np.float64)
    values, _ = _eigenpairs(directions.products, weights)
    others = directions.size - len(values)
    return Spectrum(values - weights.mean(), -float(weights.mean()), others)


def _eigenpairs(
    products: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean of w ε ε^T: eigenvalues [r], and C [r, n] with vectors C E."""
    squares, axes = np.linalg.eigh(products)
    spanned = squares > SPANNED * squares[-1]
    lengths, axes = np.sqrt(squares[spanned]), axes[:, spanned]
    # In the orthonormal rows (axes / lengths)^T E the operator is this matrix.
    root = axes * lengths
    values, columns = np.linalg.eigh(root.T @ (weights[:, None] * root))
    return values / len(weights), ((axes / lengths) @ columns).T


def along(coordinates: np.ndarray, weights: np.ndarray) -> Along:
    """Curvature of J_σ in directions that these pairs had no part in choosing.

    Args:
      coordinates: of the noise along k unit vectors, float [n, k].
      weights: w, float [n].

    Returns:
      The mean of w ((ε · u)² - 1) over pairs and vectors; without bias.
    """
    squares = (np.asarray(coordinates) ** 2).mean(-1)
    terms = np.asarray(weights, np.float64) * (squares - 1)
    error = terms.std(ddof=1) / len(terms) ** 0.5
    return Along(float(terms.mean()), float(error))


def held_out(directions: Directions, weights: np.ndarray, count: int) -> HeldOut:
    """The highest eigenvalues of a half of the pairs, and what the other half says.

    Both halves in turn, and the mean of both. What is curvature is the same within and
    beyond; what is chance is 0 beyond, up to its error.

    Args:
      directions: from `look_at`.
      weights: w, float [n].
      count: eigenvectors of a half, those of the highest eigenvalues.
    """
    weights = np.asarray(weights, np.float64)
    within, beyond, errors = [], [], []
    for start in (0, 1):
        here, there = slice(start, None, 2), slice(1 - start, None, 2)
        own, other = weights[here], weights[there]
        values, rows = _eigenpairs(directions.products[here, here], own)
        within.append(values[-count:].mean() - own.mean())
        coordinates = directions.products[there, here] @ rows[-count:].T
        found = along(coordinates, other)
        beyond.append(found.curvature)
        errors.append(found.error)
    error = np.linalg.norm(errors) / 2
    return HeldOut(float(np.mean(within)), float(np.mean(beyond)), float(error))
