r"""Curvature of an objective, by derivatives and by perturbations (2602.00170, App. G).

Signs: rewards R and J are maximised, losses minimised, and all curvature here is that
of a loss: the Hessian of -R, of -J, or of the loss. It is positive at a maximum of the
reward.

The smoothed reward is :math:`J_\sigma(\theta) = E\,J(\theta + \sigma\varepsilon)`
(Eq. 2). Its curvature needs no derivatives. With n antithetic pairs, second differences
:math:`s_i = (J(\theta + \sigma\varepsilon_i) + J(\theta - \sigma\varepsilon_i))/2 -
J(\theta)` and weights :math:`w_i = -s_i/\sigma^2` it is, by Stein's identity,

.. math:: \hat H = \frac{1}{n} \sum_i w_i \varepsilon_i \varepsilon_i^T - \bar w I,

one symmetric operator: n eigenvalues of its own, and D - n of :math:`-\bar w`. The n
are those of a matrix [n, n] of the products :math:`\varepsilon_i \cdot \varepsilon_j`,
so no Lanczos is needed and the noise is drawn a few times instead of once a product.

In many dimensions (D much larger than n) perturbations are nearly orthogonal, their
products nearly D times the unit matrix, and so the n eigenvalues nearly D w_i / n for
any landscape: their spread, signs and participation ratio are those of the n second
differences. Two things tell curvature from that: the control with rewards dealt out at
random, and curvature along directions that these pairs did not choose (`along`), of
which the estimate is unbiased: the eigenvectors of another objective, or those of one
half of the pairs measured by the other half (`held_out`).

Noise is drawn again from its keys, pair by pair, by the contract of `jes.core.noise`,
and never stored. A flat vector is a tree with one leaf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.stats import beta

from jes.core.noise import PyTree, leaf_noise
from jes.landscape.lanczos import Measures, measure

HELD = 2**27
"""Entries of noise in memory at once: half a gigabyte."""

SPANNED = 1e-5
"""Eigenvalues of the products below this share of the largest are float32 rounding of
0, as where there are more directions than dimensions."""


def hvp(loss: Callable[[PyTree], jax.Array], params: PyTree, vector: PyTree) -> PyTree:
    """The Hessian of a scalar loss times a vector, forward over reverse."""
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


class Index(NamedTuple):
    """The cheap index of curvature, with 95 % bootstrap intervals over directions."""

    trace: float  # tr H = -2 mean(s) / σ²
    trace_low: float
    trace_high: float
    dimension: float  # (tr H)² / tr H²; infinite where all variance of s is noise
    dimension_low: float
    dimension_high: float
    square: float  # tr H² = 2 var(s) / σ⁴
    variance: float  # of s, without the noise; the estimate may be negative
    noise: float  # variance of s due to the finite number of prompts


def second_differences(values: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """s of antithetic pairs, float64 [n, ...].

    Args:
      values: float [2n, ...], members 2i and 2i+1 are the pair i.
      centre: float [...], of the centre.
    """
    values = np.asarray(values, np.float64)
    return (values[0::2] + values[1::2]) / 2 - np.asarray(centre, np.float64)


def cheap_index(
    differences: np.ndarray, sigma: float, *, draws: int = 2000, seed: int = 0
) -> Index:
    r"""Trace and effective dimension of the curvature from second differences.

    For Gaussian perturbations of a quadratic, s has mean -σ² tr H / 2 and variance
    σ⁴ tr H² / 2. Prompts are a sample, which adds variance to the mean over them: that
    of the interaction of directions and prompts over their number P,

    .. math:: \frac{1}{P} \sum_{ip}
       \frac{(s_{ip} - \bar s_i - \bar s_p + \bar s)^2}{(n-1)(P-1)},

    the mean difference, over all halvings of the prompts, between var(s) and the
    covariance of the means of the two halves. It is subtracted.

    An index only where rewards are steps (J has no curvature then, only J_σ has). Where
    the trace is near 0, because signs cancel or because all is noise, the dimension is
    meaningless.

    Args:
      differences: s, float [n, P] by prompts, or [n] without noise.
      sigma: σ.
      draws: resamples of the bootstrap; prompts are not resampled.
      seed: of these.

    Raises:
      ValueError: for fewer than two pairs or prompts.
    """
    s = np.asarray(differences, np.float64)
    if len(s) < 2:
        raise ValueError(f"{len(s)} pairs have no variance")
    means, noises = (s, np.zeros(len(s))) if s.ndim == 1 else _by_direction(s)
    chosen = np.random.default_rng(seed).integers(len(s), size=(draws, len(s)))
    trace, dimension, square, variance, noise = _index(means, noises, sigma)
    traces, dimensions, *_ = _index(means[chosen], noises[chosen], sigma)
    ends = np.percentile(traces, [2.5, 97.5])
    # Interpolating between infinite values would give NaN.
    bounds = np.percentile(dimensions, [2.5, 97.5], method="nearest")
    found = (trace, *ends, dimension, *bounds, square, variance, noise)
    return Index(*map(float, found))


def _by_direction(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the prompts, and each direction's part of the noise: [n] each."""
    count, prompts = s.shape
    if prompts < 2:
        raise ValueError("the noise of one prompt cannot be estimated")
    means = s.mean(1)
    rest = s - means[:, None] - s.mean(0) + s.mean()
    freedom = (count - 1) / count * (prompts - 1)
    return means, (rest**2).sum(1) / (freedom * prompts)


def _index(means: np.ndarray, noises: np.ndarray, sigma: float) -> Any:
    """Of [..., n]: trace, dimension, square, variance and noise, [...]."""
    mean, noise = means.mean(-1), noises.mean(-1)
    variance = means.var(-1, ddof=1) - noise
    positive = variance > 0
    dimension = np.where(
        positive, 2 * mean**2 / np.where(positive, variance, 1), np.inf
    )
    return -2 * mean / sigma**2, dimension, 2 * variance / sigma**4, variance, noise


def smoothed_hvp(vector: PyTree, key: jax.Array, weights: jax.Array) -> PyTree:
    """The Hessian of -J_σ times a vector, by frozen antithetic pairs; see the module.

    The same pairs give the same symmetric operator.

    Args:
      vector: v, float32 leaves; flat, or like the parameters.
      key: the generation key that the pairs were drawn from.
      weights: w, float32 [n]; pair i has direction i of that key.
    """
    named = jax.tree_util.tree_leaves_with_path(vector)
    leaves = [leaf for _, leaf in named]

    def add(direction: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        direction_key = jax.random.fold_in(key, direction)
        drawn = [leaf_noise(direction_key, path, leaf.shape) for path, leaf in named]
        along = sum(map(jnp.vdot, drawn, leaves), jnp.float32(0))
        scale = weights[direction]
        return [
            total + scale * (along * noise - leaf)
            for total, noise, leaf in zip(sums, drawn, leaves, strict=True)
        ]

    zeros = [jnp.zeros_like(leaf) for leaf in leaves]
    sums = jax.lax.fori_loop(0, len(weights), add, zeros)
    means = [total / len(weights) for total in sums]
    return jax.tree.unflatten(jax.tree.structure(vector), means)


class Directions(NamedTuple):
    """What is kept of n directions of noise in D dimensions."""

    products: np.ndarray  # float64 [n, n], of any two
    coordinates: np.ndarray  # float64 [n, k], along given vectors
    size: int  # D


class Spectrum(NamedTuple):
    """Of the sample operator."""

    eigenvalues: np.ndarray  # float64 [r], ascending, with r the lesser of n and D
    bulk: float  # the value of all others
    others: int  # D - r, how many these are

    def measures(self) -> Measures:
        """See `jes.landscape.lanczos`."""
        counts = np.append(np.ones(len(self.eigenvalues)), self.others)
        return measure(np.append(self.eigenvalues, self.bulk), counts)


def directions_of(
    params: PyTree, basis: jax.Array, key: jax.Array, count: int, block: int = 0
) -> Directions:
    """Products of directions of noise with each other, and with given vectors.

    Args:
      params: of which the noise has the leaves.
      basis: float32 [k, D], vectors in the order of `ravel_pytree`.
      key: the generation key.
      count: n.
      block: directions whose noise of one leaf is in memory at once, twice; 0 for what
        `HELD` allows. With several blocks noise is drawn again for every pair of these.
    """
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    block = block or min(count, max(1, HELD // largest))
    vectors = jax.vmap(ravel_pytree(params)[1])(basis)
    blocks = np.split(np.arange(count), range(block, count, block))
    products = np.zeros((count, count))
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
    """All eigenvalues of the sample operator with weights w, float [n]."""
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


class Along(NamedTuple):
    """Mean curvature along some directions, with its standard error over pairs."""

    curvature: float
    error: float


def along(coordinates: np.ndarray, weights: np.ndarray) -> Along:
    """Curvature of J_σ in directions that these pairs did not choose, without bias.

    The mean of w ((ε · u)² - 1) over pairs, with weights w [n], and vectors u, along
    which the noise has coordinates [n, k].
    """
    squares = (np.asarray(coordinates) ** 2).mean(-1)
    terms = np.asarray(weights, np.float64) * (squares - 1)
    error = terms.std(ddof=1) / len(terms) ** 0.5
    return Along(float(terms.mean()), float(error))


class HeldOut(NamedTuple):
    """The top eigenvectors of one half of the pairs, measured by the other."""

    within: float  # the mean of their eigenvalues, by the half that found them
    beyond: float  # the mean curvature along them by the other half
    error: float  # standard error of `beyond`


def held_out(directions: Directions, weights: np.ndarray, count: int) -> HeldOut:
    """The `count` highest eigenvalues of a half of the pairs, checked by the other.

    Both halves in turn, and the mean of both. Curvature is the same within and beyond;
    chance is 0 beyond, up to its error.
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


class Overlap(NamedTuple):
    """The share of squared norms in a subspace, and its distribution under chance."""

    share: float  # from 0 to 1
    expected: float  # k/D
    low: float  # 95 % interval under chance
    high: float
    p_value: float  # probability of a share as large or larger


def overlap(coordinates: np.ndarray, squares: np.ndarray, size: int) -> Overlap:
    """The overlap of vectors v with a subspace of orthonormal rows U [k, D], pooled.

    The share |U v|² / |v|². Of an isotropic v, or of a random subspace, it has the Beta
    distribution with k/2 and (D - k)/2, exactly; for m Gaussian vectors pooled, m times
    both parameters.

    Args:
      coordinates: U v, float [k] of one vector or [m, k] of m that are independent
        under chance.
      squares: squared norms of the vectors, float [] or [m].
      size: D.

    Raises:
      ValueError: for a subspace that is not smaller than the space.
    """
    coordinates = np.atleast_2d(np.asarray(coordinates, np.float64))
    count, dimensions = coordinates.shape
    if not 0 < dimensions < size:
        raise ValueError(f"a subspace of {dimensions} in {size} dimensions")
    share = float((coordinates**2).sum() / np.sum(squares))
    chance = beta(count * dimensions / 2, count * (size - dimensions) / 2)
    low, high = map(float, chance.ppf([0.025, 0.975]))
    return Overlap(share, dimensions / size, low, high, float(chance.sf(share)))


def coordinates_of(vectors: jax.Array, basis: jax.Array) -> np.ndarray:
    """Along the rows of a basis [k, D], of a vector [D] or several [m, D]: [..., k]."""
    return np.asarray(_dot(vectors, basis.T), np.float64)


def random_subspace(key: jax.Array, dimensions: int, size: int) -> jax.Array:
    """Orthonormal rows of a random subspace, float32 [k, D]."""
    drawn = jax.random.normal(key, (size, dimensions), jnp.float32)
    return jnp.linalg.qr(drawn)[0].T
