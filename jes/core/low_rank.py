r"""Noise of low rank: a matrix of noise as the product of two thin factors.

:math:`E = A B^T / \sqrt{r}` for a matrix [I, O], with A [I, r] and B [O, r] of
independent standard normal entries (EGGROLL, 2511.16652). Mean 0, variance 1 and
uncorrelated entries, as noise of full rank; of fourth moments,

    E[E_ij^4] = 3 + 6/r,   E[E_ij^2 E_il^2] = E[E_ij^2 E_kj^2] = 1 + 2/r,
    E[E_ij^2 E_kl^2] = 1,  E[E_ij E_il E_kj E_kl] = 1/r.

A member is r (I + O) numbers a matrix. Its products with the matrix are those of the
centre, which all members share in one large batch, and two thin ones of its own.

Keys, after the contract of `jes.core.noise`: matrix l of a stack has the key
fold_in(leaf_key, l), a matrix alone l = 0, and from it one draw [r, I + O]: in row k
the I entries of column k of A, then the O of column k of B.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""A distribution of mean 0 and variance 1: a function of (key, shape)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix, or a stack [..., I, O], by its factors: the sum over k of a_k b_k^T.

    `a` is [..., r, I] and `b`, which all scale factors are in, [..., r, O]: each column
    of a factor is contiguous, and products with it run along that.
    """

    a: jax.Array
    b: jax.Array

    def full(self) -> jax.Array:
        """The matrices themselves, float32 [..., I, O]."""
        return jnp.einsum(
            "...ki,...ko->...io",
            self.a,
            self.b,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


def draw_matrix(
    leaf_key: jax.Array,
    matrix: jax.typing.ArrayLike,
    shape: tuple[int, int],
    rank: int,
    draw: Draw,
) -> LowRank:
    """The noise of one matrix [I, O]: float32, of variance 1.

    `matrix` is its number in the stack, 0 for a matrix alone; `draw` gives the entries
    of the factors.
    """
    rows, columns = shape
    drawn = draw(jax.random.fold_in(leaf_key, matrix), (rank, rows + columns))
    return LowRank(drawn[:, :rows], drawn[:, rows:] / math.sqrt(rank))


def draw_low_rank(
    leaf_key: jax.Array, shape: tuple[int, ...], rank: int, draw: Draw
) -> LowRank:
    """The noise of a leaf [..., I, O]: all of its matrices, see `draw_matrix`."""
    *stack, rows, columns = shape
    numbers = jnp.arange(math.prod(stack)).reshape(stack)

    def one(matrix: jax.Array) -> LowRank:
        return draw_matrix(leaf_key, matrix, (rows, columns), rank, draw)

    for _ in stack:
        one = jax.vmap(one)
    return one(numbers)
