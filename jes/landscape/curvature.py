r"""Curvature of an objective, by derivatives and by perturbations (2602.00170, App. G).

Signs: rewards R and J are to be maximised, losses minimised, and all curvature here is
that of a loss: the Hessian of -R, of -J, or of the loss. At a maximum of the reward it
is positive.

The smoothed reward is :math:`J_\sigma(\theta) = E\,J(\theta + \sigma\varepsilon)`
(Eq. 2). Its curvature needs no derivatives; with :math:`n` antithetic pairs and second
differences :math:`s_i = (J(\theta + \sigma\varepsilon_i) + J(\theta -
\sigma\varepsilon_i))/2 - J(\theta)` it is, by Stein's identity,

.. math:: H v = -\frac{1}{n\sigma^2} \sum_i s_i\,
   ((\varepsilon_i \cdot v)\,\varepsilon_i - v),

the same pairs for every v, so that it is one symmetric operator. Of a model with D
weights, D much more than n, nearly everything about this operator is sampling noise:
see `jes.landscape.smoothed`.

Noise is drawn again from its keys, pair by pair, by the contract of `jes.core.noise`,
and never stored. A flat vector is a tree with one leaf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.noise import Noise, PyTree, leaf_noise
from jes.transforms import es_gradient


def hvp(loss: Callable[[PyTree], jax.Array], params: PyTree, vector: PyTree) -> PyTree:
    """The Hessian of a loss times a vector, forward over reverse.

    Args:
      loss: of the parameters, a scalar.
      params: where.
      vector: like the parameters.
    """
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


class Index(NamedTuple):
    """The cheap index of curvature, with 95 % bootstrap intervals over directions.

    Attributes:
      trace, trace_low, trace_high: tr H = -2 mean(s) / σ².
      dimension, dimension_low, dimension_high: 2 mean(s)² / var(s), which is
        (tr H)² / tr H²; infinite where all variance of s is noise.
      square: tr H² = 2 var(s) / σ⁴.
      variance: of s, noise taken off; it may come out negative.
      noise: variance that s has from its finite number of prompts.
    """

    trace: float
    trace_low: float
    trace_high: float
    dimension: float
    dimension_low: float
    dimension_high: float
    square: float
    variance: float
    noise: float


def second_differences(values: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """s of antithetic pairs.

    Args:
      values: float [2n, ...], members 2i and 2i+1 are the pair i.
      centre: float [...], of the centre.

    Returns:
      float64 [n, ...].
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

    which is what var(s) and the covariance of the means of two halves of the prompts
    differ by, in the mean over all halvings. It is taken off.

    An index only where rewards are steps (J has no curvature then, only J_σ has). Where
    the trace is near 0, because signs cancel or because there is nothing but noise, the
    dimension says nothing.

    Args:
      differences: s, float [n, P] by prompts, or [n] without noise.
      sigma: σ.
      draws: resamples of the bootstrap; prompts are not resampled.
      seed: of these.

    Raises:
      ValueError: for fewer than two pairs.
    """
    s = np.asarray(differences, np.float64)
    if len(s) < 2:
        raise ValueError(f"{len(s)} pairs have no variance")
    means, noises = (s, np.zeros(len(s))) if s.ndim == 1 else _by_direction(s)
    chosen = np.random.default_rng(seed).integers(len(s), size=(draws, len(s)))
    trace, dimension, square, variance, noise = _index(means, noises, sigma)
    traces, dimensions, *_ = _index(means[chosen], noises[chosen], sigma)
    low, high = np.percentile(traces, [2.5, 97.5])
    # Some may be infinite, between which nothing is interpolated.
    lowest, highest = np.percentile(dimensions, [2.5, 97.5], method="nearest")
    return Index(
        float(trace),
        float(low),
        float(high),
        float(dimension),
        float(lowest),
        float(highest),
        float(square),
        float(variance),
        float(noise),
    )


def _by_direction(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the prompts, and each direction's part of the noise: [n] each."""
    count, prompts = s.shape
    if prompts < 2:
        raise ValueError("the noise of one prompt cannot be told")
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


def stein_weights(differences: jax.typing.ArrayLike, sigma: float) -> jax.Array:
    """-s / σ²: what pairs count in the smoothed reward's Hessian, float32 [n]."""
    return -jnp.asarray(differences, jnp.float32) / sigma**2


def smoothed_hvp(vector: PyTree, key: jax.Array, weights: jax.Array) -> PyTree:
    """The Hessian of -J_σ times a vector, by frozen antithetic pairs; see above.

    Args:
      vector: v, float32 leaves; flat, or like the parameters.
      key: the generation key that the pairs were drawn from.
      weights: from `stein_weights`, float32 [n]; pair i has direction i of that key.

    Returns:
      A tree like the vector. The same pairs give the same symmetric operator.
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


def gradient_difference(
    rewards: Callable[[PyTree, jax.Array], jax.typing.ArrayLike],
    params: PyTree,
    vector: PyTree,
    key: jax.Array,
    *,
    noise: Noise,
    step: float,
) -> PyTree:
    """The Hessian of -J_σ times a vector, from two ES estimates of the gradient.

    (g(θ + hv) - g(θ - hv)) / 2h, with g from Eq. 1 and the same noise on both sides.
    Its products cost evaluations, 2N each, and it is only near to a symmetric operator:
    rewards are asked at other points for every v.

    Args:
      rewards: of all members around given parameters, [N]: takes these and the key.
      params: θ.
      vector: v, like the parameters.
      key: the generation key of both sides.
      noise: how members differ from the parameters; antithetic pairs have less noise.
      step: h, in units of the weights for a v of length 1.
    """
    estimate = partial(es_gradient(noise, shaping="none").update, vector, None)

    def descent(sign: int) -> PyTree:
        there = jax.tree.map(lambda at, v: at + sign * step * v, params, vector)
        return estimate(key=key, fitness=rewards(there, key))[0]

    scale = 1 / (2 * step * noise.sigma)
    return jax.tree.map(lambda a, b: scale * (a - b), descent(1), descent(-1))
