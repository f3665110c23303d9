"""The step of ES in whole numbers, by replaying seeds."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jes.core import random, signs
from jes.core.drift import KINDS
from jes.core.noise import Noise, PartKey, PyTree, leaf_key
from jes.core.placement import kept
from jes.core.tree import map_leaves
from jes.core.whole_numbers import add, pulled


def whole_number_es(
    noise: Noise, decay: str = "none"
) -> optax.GradientTransformationExtraArgs:
    r"""Moves a displacement in whole numbers by a generation's keys and fitness.

    The parameters are the displacement D of `jes.core.whole_numbers`, int32, from the
    weights that a run has begun with, and so are the updates. Every operation is exact:
    the bits depend on the arguments alone, not on the order of members, on parts of a
    leaf, on a mesh or on the device. It ascends, and is a chain by itself: α is in the
    fitness, and the decay of 2605.30148, Algorithm 1, is of D.

    Args:
      noise: as the members were perturbed; of distribution 'sign' and full rank.
      decay: 'none', or 'l2' or 'l1' towards D = 0.

    Returns:
      A transformation whose `update` needs `params`, and takes `key`, the generation
      key (or a `PartKey`), `fitness`, int32 [N] from `whole_fitness`, and, for a decay,
      `strength`, uint32 from `strength_of`. It has no state.

    Raises:
      ValueError: for noise of another kind, or an unknown decay.
    """
    if noise.distribution != "sign" or noise.rank:
        raise ValueError("whole numbers are for noise 'sign' of full rank")
    if decay not in KINDS:
        raise ValueError(f"decay must be one of {KINDS}, not {decay!r}")

    def update_fn(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        key: jax.Array,
        fitness: jax.Array,
        strength: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del updates, extra_args
        if params is None:
            raise ValueError("whole_number_es needs params: update(..., params)")
        if decay != "none" and strength is None:
            raise ValueError(f"decay {decay!r} needs update(..., strength=...)")
        key, part = PartKey.of(key)
        noise.check_population(fitness.shape[0])
        weights = noise.direction_weights(fitness)

        def moved(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            if leaf.dtype != jnp.int32:
                raise TypeError(f"a displacement is int32, not {leaf.dtype}: {path}")
            place = random.places(leaf.shape, part, partitioned=noise.partitioned)
            words, bits_of = signs.layout(leaf.shape, place)

            def step(direction: jax.Array, total: jax.Array) -> jax.Array:
                own = leaf_key(jax.random.fold_in(key, direction), path)
                drawn = kept(lambda: random.bits_at(own, words), direction)
                plus = (bits_of(drawn) & 1).astype(bool)
                weight = weights[direction]
                return total + jnp.where(plus, weight, -weight)

            start = jnp.zeros(leaf.shape, jnp.int32)
            new = jax.lax.fori_loop(0, len(weights), step, start)
            new = add(leaf, new)
            if strength is not None and decay != "none":
                new = pulled(new, strength, decay)
            return new - leaf  # modulo 2^32, as is the sum of both

        return map_leaves(moved, params), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
