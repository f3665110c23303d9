"""Error feedback without a residual in memory: it is computed again when needed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.codes import unpack
from jes.core.noise import PartKey, PyTree
from jes.core.tree import is_codes, leaves_with_path, structure, total, values_of
from jes.transforms._error_feedback import (
    as_update,
    check_feedback,
    initial_residual,
    round_step,
)


class SeedReplayState(NamedTuple):
    """The last generations, from which a residual follows: some kilobytes.

    Attributes:
      count: int32 scalar, updates so far.
      keys: uint32 [K, ...], data of the last K generation keys, in a ring.
      fitness: float32 [K, N], of the same generations, in the same ring.
      inner: state of the wrapped transformation.
      changed, blocked: as in `ErrorFeedbackState`.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that optax has for it
    keys: jax.Array
    fitness: jax.Array
    inner: Any
    changed: jax.Array
    blocked: jax.Array


def seed_replay(
    inner: optax.GradientTransformation,
    *,
    population: int,
    decay: float = 0.9,
    window: int = 50,
    initial: str = "zero",
    clip: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""`jes.error_feedback` whose residual is replayed from seeds (2602.03120, Alg. 2).

    Before an update the residual is computed from zero through the last K generations,
    oldest first, from their keys and fitness. Three things are approximate: what is
    older than K generations is left out, a share of :math:`\gamma^K` of it; the gate,
    a decay to an anchor, and the grid of weights of half precision are in the replay
    those of today's weights; and schedules of `inner` are taken at today's step. Where
    none of the three matters, the updates are those of the kept residual, bit for bit.

    `update` holds the steps and the residual of all weights it is given in float32;
    `jes.update_in_place` gives it one matrix at a time. The noise of all K generations
    is drawn again for every update, sparsely.

    Args:
      inner: from keys and fitness to steps in codes, such as
        `optax.chain(jes.es_gradient(noise), optax.scale_by_learning_rate(alpha))`. It
        must not keep anything of the size of the weights.
      population: N.
      decay: γ, in [0, 1].
      window: K, how many generations are replayed.
      initial, clip: as in `jes.error_feedback`. As in the published code a uniform
        residual is there before the first update only; after it replays start at zero.

    Returns:
      A transformation whose `update` needs `params`, `key` and `fitness`, and passes
      further arguments (an anchor) on to `inner`.

    Raises:
      ValueError: for a decay outside [0, 1], a window below 1, or an `inner` that keeps
        more than scalars.
    """
    check_feedback(decay, initial, clip)
    if window < 1:
        raise ValueError(f"the window must be at least 1 generation, not {window}")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> SeedReplayState:
        state = inner.init(params)
        if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(state)):
            raise ValueError("seed_replay wraps what keeps nothing but scalars")
        data = jax.random.key_data(jax.random.key(0))
        return SeedReplayState(
            count=jnp.zeros([], jnp.int32),
            keys=jnp.zeros((window, *data.shape), data.dtype),
            fitness=jnp.zeros((window, population), jnp.float32),
            inner=state,
            changed=jnp.zeros([]),
            blocked=jnp.zeros([]),
        )

    def update_fn(
        updates: PyTree,
        state: SeedReplayState,
        params: PyTree | None = None,
        *,
        key: jax.Array,
        fitness: jax.Array,
        **extra_args: Any,
    ) -> tuple[PyTree, SeedReplayState]:
        if params is None:
            raise ValueError("seed_replay needs params: update(..., params)")
        fitness = jnp.asarray(fitness, jnp.float32)
        key, part = PartKey.of(key)
        data, impl = jax.random.key_data(key), jax.random.key_impl(key)
        if data.shape != state.keys.shape[1:]:
            raise ValueError("seed_replay takes keys of the default kind alone")
        leaves = leaves_with_path(params)
        # As bytes, not floats: every step of the replay reads codes and residual.
        values = [unpack(x) if is_codes(x) else values_of(x) for _, x in leaves]

        def step(key: jax.Array, fitness: jax.Array, residuals: Any) -> Any:
            """The moves of a generation, the residuals after it, and inner's state."""
            steps, inner_state = inner.update(
                updates,
                state.inner,
                params,
                key=key if part is None else PartKey(key, part),
                fitness=fitness,
                **extra_args,
            )
            given = zip(leaves, values, jax.tree.leaves(steps), residuals, strict=True)
            rows = [
                round_step(leaf, *row, decay=decay, clip=clip)
                for (_, leaf), *row in given
            ]
            return [row[0] for row in rows], [row[1] for row in rows], inner_state

        def replay(generation: jax.Array, residuals: Any) -> Any:
            slot = generation % window
            then = jax.random.wrap_key_data(state.keys[slot], impl=impl)
            return step(then, state.fitness[slot], residuals)[1]

        start = [initial_residual(path, leaf, initial, part) for path, leaf in leaves]
        start = [jnp.where(state.count == 0, residual, 0) for residual in start]
        first = jnp.maximum(state.count - window, 0)
        residuals = jax.lax.fori_loop(first, state.count, replay, start)
        moves, residuals, inner_state = step(key, fitness, residuals)
        rows = [
            as_update(leaf, *row)
            for (_, leaf), *row in zip(leaves, moves, residuals, strict=True)
        ]
        slot = state.count % window
        new = SeedReplayState(
            count=optax.safe_increment(state.count),
            keys=state.keys.at[slot].set(data),
            fitness=state.fitness.at[slot].set(fitness),
            inner=inner_state,
            changed=total([changed for _, changed, _ in rows]),
            blocked=total([blocked for _, _, blocked in rows]),
        )
        return structure(params).unflatten([row[0] for row in rows]), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
