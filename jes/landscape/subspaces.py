r"""Whether directions that matter share a subspace: overlaps, and what chance gives.

2602.00170 says that improvement is degenerate: useful components lie in few directions
of high curvature, which random perturbations share. The overlap of a vector v with a
subspace of orthonormal rows U [k, D] is the share of its squared norm there,

.. math:: |U v|^2 / |v|^2.

Of an isotropic v, or of a random subspace, it has the Beta distribution with k/2 and
(D - k)/2: mean k/D, and for m Gaussian vectors pooled m times both parameters. That is
exact, and is the control here: random directions, and random subspaces of equal size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import beta


class Overlap(NamedTuple):
    """The share of squared norms in a subspace, and what chance gives.

    Attributes:
      share: from 0 to 1.
      expected: k/D.
      low, high: 95 % of what chance gives lies between.
      p_value: chance of a share as large or larger.
    """

    share: float
    expected: float
    low: float
    high: float
    p_value: float


def overlap(coordinates: np.ndarray, squares: np.ndarray, size: int) -> Overlap:
    """The overlap of vectors with a subspace, pooled over the vectors.

    Args:
      coordinates: along the orthonormal vectors of the subspace, float [k] of one
        vector or [m, k] of m that are independent by chance alone.
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
    return np.asarray(
        jnp.matmul(vectors, basis.T, precision=jax.lax.Precision.HIGHEST), np.float64
    )


def random_subspace(key: jax.Array, dimensions: int, size: int) -> jax.Array:
    """Orthonormal rows of a random subspace, float32 [k, D]."""
    drawn = jax.random.normal(key, (size, dimensions), jnp.float32)
    return jnp.linalg.qr(drawn)[0].T
