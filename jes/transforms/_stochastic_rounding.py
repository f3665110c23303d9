r"""QuZO (2502.12346), as 2602.03120 compares with it: unbiased rounding, no residual.

One Gaussian u is rounded stochastically twice: members are perturbed by the one
rounding and the weights are moved by the other, so that their product has no bias
(`Noise(rounds=2)`). The summed step is rounded stochastically once more and added;
moves out of range are skipped. Rounding is right on average, but adds a random walk.

As in the published code of 2602.03120, shaped fitness takes the place of the measured
slopes :math:`\mu_i`, and the sum is rounded once, not every query. (With pairs that
code halves α, which is left to the setting here.)
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.codes import Codes, allowed, difference
from jes.core.noise import PartKey, PyTree, leaf_key
from jes.core.random import places, uniform
from jes.core.tree import is_codes, map_leaves, total, transpose, values_of


class StochasticRoundingState(NamedTuple):
    """Counts of the last update, as in `ErrorFeedbackState`."""

    changed: jax.Array
    blocked: jax.Array


def stochastic_rounding() -> optax.GradientTransformationExtraArgs:
    """Rounds steps of codes up or down at random, so that they are right on average.

    `update` needs `params`, all of them codes, and `key`, the generation key.
    """

    def init_fn(params: PyTree) -> StochasticRoundingState:
        if not all(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes))):
            raise ValueError("stochastic rounding is for codes alone")
        return StochasticRoundingState(jnp.zeros([]), jnp.zeros([]))

    def update_fn(
        updates: PyTree,
        state: StochasticRoundingState,
        params: PyTree | None = None,
        *,
        key: jax.Array,
        **extra_args: Any,
    ) -> tuple[PyTree, StochasticRoundingState]:
        del state, extra_args
        if params is None:
            raise ValueError("stochastic_rounding needs params: update(..., params)")
        key, part = PartKey.of(key)
        key = jax.random.fold_in(key, zlib.crc32(b"rounding"))

        def one(path: tuple[Any, ...], leaf: Codes, update: jax.Array) -> Any:
            floor = jnp.floor(update)
            place = None if part is None else places(update.shape, part)
            drawn = uniform(leaf_key(key, path), update.shape, place)
            wanted = floor + (drawn < update - floor)
            moves = allowed(leaf, values_of(leaf), wanted)
            counts = ((moves != 0).sum(), (moves != wanted).sum())
            return difference(leaf, moves), *(c.astype(jnp.float32) for c in counts)

        rows = map_leaves(one, params, updates)
        updates, changed, blocked = transpose(params, rows, 3)
        return updates, StochasticRoundingState(total(changed), total(blocked))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
