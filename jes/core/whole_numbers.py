r"""Evolution strategies in whole numbers: the same bits on any machine.

With noise of ±1 (`noise='sign'`) and fitness rounded to whole numbers w, the sum of an
update, :math:`\sum_n w_n \varepsilon_n`, is a whole number: exact, in any order. So the
centre is kept as the base θ_0 and a displacement D in whole numbers,

.. math:: \theta = \theta_0 + u D, \quad D \leftarrow D + \sum_n w_n \varepsilon_n,
   \quad w_n = \mathrm{round}\left(\frac{\alpha_t}{N u} Z_n\right),

with a unit u that is a power of two, which makes u D exact in float32 too (beyond 2^24
units it is rounded, everywhere alike). A generation loses nothing to rounding but that
of its N numbers w. D, and with it θ, follows from the base and the ledger alone,
whatever the device, the layout, the chunk or the order.

D is int32 and saturates. A step of noise alone has about 2^15 units a weight or less, a
step that all members agree on 2^15 √N: far from full after thousands of generations.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.fitness import METHODS, finite_members, shaped
from jes.core.noise import PyTree
from jes.core.placement import on_device
from jes.core.programs import program
from jes.core.tree import values_of

BITS = 15
"""Of the size of a member's whole fitness: a z-score is at most √N."""


def unit_for(alpha: float, population: int) -> float:
    """The unit of displacements: the least power of two that BITS have room for.

    In it, α / N times the largest z-score of N members is at most 2^15.
    """
    least = alpha / (math.sqrt(population) * 2**BITS)
    mantissa, exponent = math.frexp(least)
    return math.ldexp(1.0, exponent - (mantissa == 0.5)) if least else 1.0


def whole_fitness(rewards: np.ndarray, shaping: str, rate: float) -> np.ndarray:
    """Shaped fitness times `rate` / N in whole numbers: int32 [N], of 16 bits.

    Sums are exact before they are rounded, so that the order of members and the machine
    do not matter. Members whose reward is not finite get 0 and are not among N; what is
    beyond 16 bits, as only rewards that are not shaped can be, becomes the largest.

    Args:
      rewards: float32 [N]; higher is better.
      shaping: see `jes.shape_fitness`.
      rate: α over the unit.
    """
    rewards = np.asarray(rewards, np.float32).astype(np.float64)
    share = rate / float(finite_members(rewards, np))
    scaled = shaped(rewards, METHODS[shaping], np) * share
    most = 2**BITS - 1
    return np.clip(np.rint(scaled), -most, most).astype(np.int32)


def add(displacement: jax.Array, moves: jax.Array) -> jax.Array:
    """The sum of int32 arrays; beyond the range, its end."""
    total = displacement + moves
    wrapped = ((displacement ^ total) & (moves ^ total)) < 0
    limits = jnp.iinfo(jnp.int32)
    return jnp.where(wrapped, jnp.where(moves < 0, limits.min, limits.max), total)


def pulled(displacement: jax.Array, strength: jax.Array, kind: str) -> jax.Array:
    """A displacement after a decay; see `jes.anchored_weight_decay`.

    Args:
      displacement: int32 D.
      strength: uint32: of 'l2' the share of D to take off, in 2^-32; of 'l1' the units.
      kind: 'l2' or 'l1'.
    """
    size = jnp.abs(displacement).astype(jnp.uint32)  # of -2^31 too
    if kind == "l1":
        left = size - jnp.minimum(size, strength)
    else:
        left = size - share_of(size, strength)
    return jnp.where(displacement < 0, 0 - left, left).astype(jnp.int32)


def share_of(size: jax.Array, share: jax.Array) -> jax.Array:
    """round(size x share / 2^32) of uint32 numbers, from products of 16 bits each."""
    bits, low = np.uint32(16), np.uint32(0xFFFF)
    (a, b), (c, d) = ((x >> bits, x & low) for x in (size, share))
    carry = (b * d >> bits) + (a * d & low) + (b * c & low) + np.uint32(0x8000)
    return a * c + (a * d >> bits) + (b * c >> bits) + (carry >> bits)


def strength_of(kind: str, pull: float, unit: float) -> np.ndarray:
    """The strength that `pulled` takes, for a pull α λ: uint32 scalar."""
    strength = round(pull / unit) if kind == "l1" else round(pull * 2**32)
    return np.asarray(min(strength, 2**32 - 1), np.uint32)


def none_of(params: PyTree) -> PyTree:
    """The displacement of a model that has not moved: D = 0."""
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, jnp.int32, device=leaf.sharding), params
    )


def displaced(
    base: PyTree, displacement: PyTree, unit: float, dtype: Any = jnp.float32
) -> PyTree:
    """θ = θ_0 + u D in float32, then in the dtype.

    Args:
      base: θ_0, in any floating dtype, on the device or in the host's memory.
      displacement: D, int32.
      unit: u, a power of two.
      dtype: of the result.
    """
    settings = np.float32(unit), jnp.dtype(dtype)
    return jax.tree.map(
        lambda home, away: _displaced(home, away, *settings), base, displacement
    )


@program(static_argnums=3)
def _displaced(home, away, unit, dtype):
    home = values_of(on_device(home))
    # The smallest floats are 0 to some devices: they keep what has not moved.
    moved = jnp.where(away == 0, home, home + unit * away.astype(jnp.float32))
    return moved.astype(dtype)


def norm(displacement: PyTree, unit: float) -> jax.Array:
    """‖θ - θ_0‖, Euclidean, in units of the weights: float32 scalar."""
    return np.float32(unit) * _norm(displacement)


@jax.jit
def _norm(displacement: PyTree) -> jax.Array:
    squares = [(values_of(leaf) ** 2).sum() for leaf in jax.tree.leaves(displacement)]
    return jnp.sqrt(sum(squares))
