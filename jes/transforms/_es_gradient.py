"""The ES estimate of the gradient, by replaying seeds."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.codes import matrix_numbers
from jes.core.fitness import METHODS, finite_members, shape_fitness
from jes.core.integer_noise import entries
from jes.core.low_rank import draw_matrix
from jes.core.noise import (
    DISTRIBUTIONS,
    Noise,
    PartKey,
    PyTree,
    codes_noise,
    leaf_key,
    leaf_noise,
)
from jes.core.stack import has_matrices
from jes.core.tree import is_codes, map_leaves

AT_ONCE = 2**19
"""Entries of sparse noise that are drawn at once: some megabytes."""


class EsGradientState(NamedTuple):
    """Nothing is kept: a generation's estimate follows from its key and fitness."""


def es_gradient(
    noise: Noise, *, shaping: str = "zscore"
) -> optax.GradientTransformationExtraArgs:
    r"""Turns keys and fitness into a descent direction.

    The estimate of 2509.24372, Algorithm 1, with the usual factor 1/σ left to the
    learning rate:

    .. math:: g = -\frac{1}{N} \sum_{n=1}^N Z_n \varepsilon_n, \quad Z = shape(F).

    Fitness is maximised and optax descends; the sign is turned here and nowhere else.
    Noise is drawn again from the key, one member's noise for one leaf at a time, and
    summed in float32 whatever the dtype of the parameters.

    For matrices with noise of low rank the sum over members is one product of their
    factors, side by side: A [I, N r] times B [N r, O]. Its order follows from shapes
    alone.

    For `Codes` ε is the integer perturbation δ of 2602.03120 Eq. (3) and (5), of which
    only the nonzero entries are drawn: an update of the shape of the codes, in codes.

    Args:
      noise: as the members were perturbed.
      shaping: see `jes.shape_fitness`.

    Returns:
      A transformation whose `update` takes, beside the incoming updates (only their
      shapes matter; zeros will do), `key`, the generation key, and `fitness`, float
      [N], and returns float32 updates. Members with non-finite fitness count neither
      in the sum nor in N. Noise of a part of a leaf is drawn where `key` is a
      `PartKey`, see `jes.update_in_place`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jes
      >>> noise = jes.Noise(sigma=0.1)
      >>> optimizer = optax.chain(
      ...     jes.es_gradient(noise), optax.scale_by_learning_rate(0.5))
      >>> params = {'w': jnp.zeros(3)}
      >>> state = optimizer.init(params)
      >>> key = jes.generation_key(jax.random.key(0), 0)
      >>> members = [jes.perturb_member(params, key, i, noise) for i in range(8)]
      >>> fitness = jnp.array([-((m['w'] - 1) ** 2).sum() for m in members])
      >>> zeros = optax.tree.zeros_like(params)
      >>> updates, state = optimizer.update(
      ...     zeros, state, params, key=key, fitness=fitness)
      >>> params = optax.apply_updates(params, updates)
    """
    if shaping not in METHODS:
        raise ValueError(f"unknown shaping {shaping!r}; known are {', '.join(METHODS)}")

    def init_fn(params: PyTree) -> EsGradientState:
        del params
        return EsGradientState()

    def update_fn(
        updates: PyTree,
        state: EsGradientState,
        params: PyTree | None = None,
        *,
        key: jax.Array,
        fitness: jax.Array,
        **extra_args: Any,
    ) -> tuple[PyTree, EsGradientState]:
        del params, extra_args
        fitness = jnp.asarray(fitness, jnp.float32)
        key, part = PartKey.of(key)
        noise.check_population(fitness.shape[0])
        weights = shape_fitness(fitness, shaping) / finite_members(fitness)
        weights = noise.direction_weights(weights)

        def estimate(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            shape, sums = leaf.shape, _Sums(path, leaf.shape[-2:], key, weights, noise)
            low_rank = noise.rank and has_matrices(path, shape)
            if not (is_codes(leaf) or low_rank):
                return sums.of_floats(shape, part)
            if len(shape) == 2 and part is not None:
                raise ValueError(f"noise of rows of {path} cannot be drawn alone")
            one = sums.of_codes if is_codes(leaf) else sums.of_factors
            numbers = matrix_numbers(shape, part)
            if len(shape) == 2:
                return one(numbers[0])
            return jax.lax.map(one, numbers).reshape(shape)

        return map_leaves(estimate, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Sums(NamedTuple):
    """Sums over directions of their weights [directions] times the noise of a leaf.

    `shape` is that of one of its matrices, `key` the generation key.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    key: jax.Array
    weights: jax.Array
    noise: Noise

    def of_floats(self, shape: tuple[int, ...], part: Any) -> jax.Array:
        """For noise of full rank: of the leaf, or of a part of it."""

        def add(direction: jax.Array, total: jax.Array) -> jax.Array:
            direction_key = jax.random.fold_in(self.key, direction)
            drawn = leaf_noise(direction_key, self.path, shape, self.noise, part)
            return total - self.weights[direction] * drawn

        start = jnp.zeros(shape, jnp.float32)
        return jax.lax.fori_loop(0, self.weights.shape[0], add, start)

    def of_factors(self, matrix: jax.Array) -> jax.Array:
        """For the noise of low rank of the matrix of this number."""
        (rows, columns), count, rank = self.shape, len(self.weights), self.noise.rank
        distribution = DISTRIBUTIONS[self.noise.distribution]
        # Factors of so many members at a time that they take no more than the matrix.
        room = max(AT_ONCE, rows * columns)
        at_once = min(count, max(1, room // (rank * (rows + columns))))

        def draw(direction: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = leaf_key(jax.random.fold_in(self.key, direction), self.path)
            drawn = draw_matrix(own, matrix, (rows, columns), rank, distribution)
            # The last block is filled up with directions of weight 0.
            weight = jnp.where(direction < count, self.weights[direction], 0)
            return drawn.a, -weight * drawn.b

        def add(block: jax.Array, total: jax.Array) -> jax.Array:
            a, b = jax.vmap(draw)(block * at_once + jnp.arange(at_once))
            a, b = a.reshape(-1, rows), b.reshape(-1, columns)
            return total + jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)

        start = jnp.zeros(self.shape, jnp.float32)
        return jax.lax.fori_loop(0, -(-count // at_once), add, start)

    def of_codes(self, matrix: jax.Array) -> jax.Array:
        """For the integer noise of a matrix; of two roundings, by the second."""
        size, count, noise = math.prod(self.shape), len(self.weights), self.noise

        def draw(direction: jax.Array) -> tuple[jax.Array | None, jax.Array]:
            own = jax.random.fold_in(self.key, direction)
            positions, values = codes_noise(own, self.path, matrix, size, noise)
            return positions, -self.weights[direction] * values[-1]

        # Starting a short draw costs more than the draw, so many are made at a time: a
        # divisor of their number, for whole batches.
        most = min(count, max(1, AT_ONCE // entries(size, noise.sigma, noise.rounds)))
        at_once = max(n for n in range(1, most + 1) if count % n == 0)

        def add(batch: jax.Array, total: jax.Array) -> jax.Array:
            positions, steps = jax.vmap(draw)(batch * at_once + jnp.arange(at_once))
            if positions is None:
                return total + steps.sum(0)

            # One after the other: the order of sums does not depend on the batch.
            def add_one(i: jax.Array, total: jax.Array) -> jax.Array:
                return total.at[positions[i]].add(
                    steps[i], mode="drop", unique_indices=True, indices_are_sorted=True
                )

            return jax.lax.fori_loop(0, at_once, add_one, total)

        start = jnp.zeros(size, jnp.float32)
        total = jax.lax.fori_loop(0, count // at_once, add, start)
        return total.reshape(self.shape)
