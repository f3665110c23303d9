"""Keys and perturbations: everything random in a run comes from here.

The key contract. One root key a run; then

    generation_key = fold_in(root, generation)
    direction_key  = fold_in(generation_key, direction)
    leaf_key       = fold_in(direction_key, crc32(path of the leaf))

A member's direction is the member itself, or with antithetic pairs members 2i and
2i+1 share direction i with signs +1 and -1. The path of a leaf is its keys joined by
'/', such as 'layers/mlp/up/kernel'. Every leaf has noise of its own: the published
code of 2509.24372 reseeds for each tensor, which gives equal shapes equal noise.
Noise is never stored; whoever needs it draws it again from the key.

Codes, the integers of quantised weights, have integer noise, matrix by matrix:
matrix l of a stack has the key fold_in(leaf_key, l), a matrix alone l = 0. So have
matrices with noise of low rank; see `jes.core.low_rank` for the keys of its factors.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jes.core import random, signs
from jes.core.integer_noise import integer_noise
from jes.core.low_rank import draw_low_rank
from jes.core.stack import has_matrices

PyTree = Any

DISTRIBUTIONS: dict[str, Callable[..., jax.Array]] = {
    "normal": random.normal,
    "table": random.table,
    "sign": signs.sign,
}
"""Distributions of ε, all of mean 0 and variance 1: functions of (key, shape), or of
(key, shape, place) for some entries of a larger array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """How members differ from the centre.

    Attributes:
      sigma: standard deviation of the perturbation, in units of the weights; of
        quantised weights, in codes, before it is rounded to whole ones.
      antithetic: whether members come in pairs θ + σε and θ - σε.
      rounds: of codes, how many times σε is rounded: once, or twice independently, to
        measure with the one and to move by the other (QuZO).
      scale_sigma: the same as sigma for the scales of quantised weights; 0 leaves them.
      distribution: of ε, see `DISTRIBUTIONS`: 'normal', or 'table', which is about
        normal and faster on CPUs, or 'sign', ±1. Codes have integer noise whatever it
        is.
      rank: of the noise of matrices, see `jes.core.low_rank`; 0 for full rank.
      partitioned: whether the arrays are spread over devices. The numbers are the same,
        but computed from one counter per axis, of which a device can compute its part.
    """

    sigma: float
    antithetic: bool = False
    rounds: int = 1
    scale_sigma: float = 0.0
    distribution: str = "normal"
    rank: int = 0
    partitioned: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma must be positive and finite, not {self.sigma}")
        if not (math.isfinite(self.scale_sigma) and self.scale_sigma >= 0):
            raise ValueError(f"scale_sigma cannot be {self.scale_sigma}")
        if self.distribution not in DISTRIBUTIONS:
            names = tuple(DISTRIBUTIONS)
            raise ValueError(f"noise must be one of {names}, not {self.distribution!r}")
        if self.rank < 0:
            raise ValueError(f"rank cannot be negative: {self.rank}")

    def check_population(self, population: int) -> None:
        """Raises ValueError where `population` members cannot be drawn."""
        if population < 1:
            raise ValueError(f"population must be at least 1, not {population}")
        if self.antithetic and population % 2:
            raise ValueError(
                f"antithetic pairs need an even population, not {population}"
            )

    def direction(
        self, generation_key: jax.Array, member: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The direction key of a member, and the sign (float32) it is taken with."""
        if not self.antithetic:
            return jax.random.fold_in(generation_key, member), jnp.float32(1)
        sign = (1 - 2 * (member % 2)).astype(jnp.float32)
        return jax.random.fold_in(generation_key, member // 2), sign

    def direction_weights(self, member_weights: jax.Array) -> jax.Array:
        """Sums members' weights [N] over those that share a direction: [directions]."""
        if not self.antithetic:
            return member_weights
        return member_weights[0::2] - member_weights[1::2]


def generation_key(root: jax.Array, generation: jax.typing.ArrayLike) -> jax.Array:
    """The key that all noise of a generation comes from."""
    return jax.random.fold_in(root, generation)


def leaf_path(path: tuple[Any, ...]) -> str:
    """'layers/mlp/up/kernel' for a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_key(direction_key: jax.Array, path: tuple[Any, ...]) -> jax.Array:
    """The key of one leaf's noise."""
    return jax.random.fold_in(direction_key, zlib.crc32(leaf_path(path).encode()))


STANDARD = Noise(sigma=1.0)
"""Normal noise of full rank."""


class PartKey(NamedTuple):
    """What `jes.update_in_place` passes as `key` where it updates a part of a leaf.

    Attributes:
      key: the generation key.
      part: int32 scalar, the number of the part among equal parts of the first axis of
        the leaf; or int32 [R], the numbers of its rows on that axis; None for the whole
        leaf.
    """

    key: jax.Array
    part: jax.Array | None

    @classmethod
    def of(cls, key: "jax.Array | PartKey") -> "PartKey":
        """The same for a plain key, which stands for whole leaves."""
        return key if isinstance(key, cls) else cls(key, None)  # type: ignore[arg-type]


def leaf_noise(
    direction_key: jax.Array,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    noise: Noise = STANDARD,
    part: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The noise ε of one leaf: float32, of mean 0 and variance 1.

    Args:
      direction_key: see the key contract.
      path: of the leaf in the parameters.
      shape: of the leaf, or of a part of it.
      noise: the distribution and rank; σ is not read.
      part: see `PartKey`; of noise of full rank only.
    """
    key = leaf_key(direction_key, path)
    draw = DISTRIBUTIONS[noise.distribution]
    if noise.rank and has_matrices(path, shape):
        return draw_low_rank(key, shape, noise.rank, draw).full()
    if part is None and not (noise.partitioned and math.prod(shape) < 2**32):
        return draw(key, shape)
    return draw(key, shape, random.places(shape, part, partitioned=noise.partitioned))


def codes_noise(
    direction_key: jax.Array,
    path: tuple[Any, ...],
    matrix: jax.typing.ArrayLike,
    size: int,
    noise: Noise,
) -> tuple[jax.Array | None, jax.Array]:
    """The entries that move of a matrix of `size` codes, as of `integer_noise`.

    `matrix` is its number in the stack. Sign and gate come later.
    """
    if noise.rank:
        raise ValueError("noise of low rank is for weights of floats, not for codes")
    key = jax.random.fold_in(leaf_key(direction_key, path), matrix)
    return integer_noise(key, size, noise.sigma, noise.rounds)


def perturb(
    params: PyTree,
    key: jax.Array,
    sigma: jax.typing.ArrayLike,
    noise: Noise = STANDARD,
) -> PyTree:
    """θ + σε, with ε drawn from `key` (2509.24372, Algorithm 1).

    Args:
      params: pytree of floating-point arrays.
      key: typed PRNG key, a direction key; the same key gives the same ε.
      sigma: scalar, in units of the weights; negative for the antithetic member.
      noise: the distribution of ε, by default normal of full rank; its σ is not read.

    Returns:
      A new pytree with the dtypes of `params`; the sum is taken in float32.

    Raises:
      TypeError: for weights that are not floats.
    """

    def add(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{leaf_path(path)} holds {leaf.dtype}: members of a quantised model "
                "differ from it by `jes.draw_overlays`"
            )
        epsilon = leaf_noise(key, path, leaf.shape, noise)
        return (leaf.astype(jnp.float32) + sigma * epsilon).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, params)


def perturb_member(
    params: PyTree, key: jax.Array, member: jax.Array, noise: Noise
) -> PyTree:
    """The weights of one member of the generation with this generation key."""
    direction_key, sign = noise.direction(key, member)
    return perturb(params, direction_key, noise.sigma * sign, noise)
