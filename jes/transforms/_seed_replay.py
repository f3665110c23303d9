"""Error feedback without a residual in memory: it is computed again when needed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.codes import Codes, unpack
from jes.core.noise import PyTree
from jes.core.placement import on_device
from jes.core.tree import is_codes, leaves_with_path, structure, total, values_of
from jes.transforms._error_feedback import (
    as_update,
    check_feedback,
    count_moves,
    initial_residual,
    round_step,
)


class SeedReplayState(NamedTuple):
    """The last generations, from which a residual follows: some kilobytes.

    Attributes:
      count: int32 scalar, updates so far.
      keys: uint32 [K, ...], data of the last K generation keys, in a ring.
      fitness: float32 [K, N], what they came to, in the same ring.
      inner: state of the wrapped transformation.
      changed, blocked: as in `ErrorFeedbackState`.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that optax has for it
    keys: jax.Array
    fitness: jax.Array
    inner: Any
    changed: jax.Array
    blocked: jax.Array


class _Settings(NamedTuple):
    decay: float
    initial: str
    clip: float


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

    One matrix at a time is in memory in floats. The noise of all K generations is drawn
    again for every update, sparsely.

    Args:
      inner: from keys and fitness to steps in codes, such as
        `optax.chain(jes.es_gradient(noise), optax.scale_by_learning_rate(alpha))`; with
        `jes.anchored_weight_decay`, the anchor has to be given to `update`. It must not
        keep anything of the size of the weights.
      population: N.
      decay: γ, in [0, 1].
      window: K, how many generations are replayed.
      initial, clip: as in `jes.error_feedback`. As in the published code a uniform
        residual is there before the first update only; after it replays start at zero.

    Returns:
      A transformation whose `update` needs `params`, `key` and `fitness`, and takes
      trees like the parameters (an anchor) as further arguments.

    Raises:
      ValueError: for a decay outside [0, 1], a window below 1, or an `inner` that keeps
        more than scalars.
    """
    check_feedback(decay, initial, clip)
    if window < 1:
        raise ValueError(f"the window must be at least 1 generation, not {window}")
    inner = optax.with_extra_args_support(inner)
    settings = _Settings(decay, initial, clip)

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
        del updates
        if params is None:
            raise ValueError("seed_replay needs params: update(..., params)")
        fitness = jnp.asarray(fitness, jnp.float32)
        data = jax.random.key_data(key)
        if data.shape != state.keys.shape[1:]:
            raise ValueError("seed_replay takes keys of the default kind alone")
        rows = []
        for number, leaf in enumerate(jax.tree.leaves(params, is_leaf=is_codes)):

            def one(leaf: Any, matrix: Any = None, number: int = number) -> Leaf:
                cut = partial(_cut, params, number, matrix)
                trees = {
                    name: cut(tree) if _alike(tree, params) else tree
                    for name, tree in extra_args.items()
                }
                alone = _alone(params, number, leaf)
                step = partial(
                    inner.update,
                    optax.tree.zeros_like(alone),
                    state.inner,
                    alone,
                    matrix=matrix,
                    **trees,
                )
                return _replay(step, state, alone, matrix, key, fitness, settings)

            stacked = is_codes(leaf) and leaf.ndim == 3
            rows.append(_in_turn(one, leaf) if stacked else one(leaf))
        slot = state.count % window
        new = SeedReplayState(
            count=optax.safe_increment(state.count),
            keys=state.keys.at[slot].set(data),
            fitness=state.fitness.at[slot].set(fitness),
            inner=rows[0].inner,
            changed=total([row.changed.sum() for row in rows]),
            blocked=total([row.blocked.sum() for row in rows]),
        )
        outer = structure(params)
        return outer.unflatten([row.update for row in rows]), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Leaf(NamedTuple):
    """What becomes of one leaf, or of one matrix of a stack."""

    update: Any
    inner: Any
    changed: jax.Array
    blocked: jax.Array


def _in_turn(one: Callable[..., Leaf], stack: Codes) -> Leaf:
    """`one` for every matrix of a stack, of which each is moved before the next.

    The update is the difference of two stacks. Where `optax.apply_updates` follows in
    the same program a compiler cancels the difference with the sum, and moves a donated
    stack where it is: there are moves of no more than one matrix at a time.
    """

    def move(stack: Codes, matrix: jax.Array) -> tuple[Codes, Leaf]:
        before = jax.tree.map(lambda codes: codes[matrix], stack)
        row = one(before, matrix)
        after = jax.tree.map(jnp.add, before, row.update)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=matrix, axis=0)
        return jax.tree.map(put, stack, after), row._replace(update=None)

    after, row = jax.lax.scan(move, stack, jnp.arange(stack.shape[0]))
    update = jax.tree.map(jnp.subtract, after, stack)
    # The same for every matrix: what it was of scalars.
    return row._replace(update=update, inner=jax.tree.map(lambda x: x[0], row.inner))


def _replay(
    step: Any,
    state: SeedReplayState,
    alone: PyTree,
    matrix: Any,
    key: jax.Array,
    fitness: jax.Array,
    settings: _Settings,
) -> Leaf:
    """Replays the window for one leaf, then takes the step of this generation.

    Args:
      step: `inner.update`, but for key and fitness.
      state: with the window.
      alone: the parameters with all other leaves None.
      matrix: number of the matrix that the leaf is of its stack, or None.
      key, fitness: of this generation.
    """
    ((path, leaf),) = leaves_with_path(alone)
    # Bytes as they are: half of what a step reads.
    values = unpack(leaf) if is_codes(leaf) else values_of(leaf)
    impl = jax.random.key_impl(key)
    window = state.keys.shape[0]

    def moved(
        key: jax.Array, fitness: jax.Array, residual: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        updates, inner = step(key=key, fitness=fitness)
        (update,) = jax.tree.leaves(updates)
        moves, left = round_step(
            leaf, values, update, residual, decay=settings.decay, clip=settings.clip
        )
        return moves, left, inner

    def again(generation: jax.Array, residual: jax.Array) -> jax.Array:
        slot = generation % window
        then = jax.random.wrap_key_data(state.keys[slot], impl=impl)
        return moved(then, state.fitness[slot], residual)[1]

    start = initial_residual(
        path, leaf, settings.initial, 0 if matrix is None else matrix
    )
    start = jnp.where(state.count == 0, start, 0)
    first = jnp.maximum(state.count - window, 0)
    residual = jax.lax.fori_loop(first, state.count, again, start)
    moves, left, inner = moved(key, fitness, residual)
    return Leaf(as_update(leaf, moves), inner, *count_moves(leaf, moves, left))


def _cut(params: PyTree, number: int, matrix: Any, tree: PyTree) -> PyTree:
    """A tree like the parameters with one leaf, or one matrix of it, and else None."""
    leaf = structure(params).flatten_up_to(tree)[number]
    leaf = jax.tree.map(on_device, leaf)
    if matrix is not None:
        leaf = jax.tree.map(lambda stack: stack[matrix], leaf)
    return _alone(params, number, leaf)


def _alone(params: PyTree, number: int, leaf: Any) -> PyTree:
    """A tree like the parameters with one leaf, and else None."""
    outer = structure(params)
    return outer.unflatten(
        leaf if place == number else None for place in range(outer.num_leaves)
    )


def _alike(tree: PyTree, params: PyTree) -> bool:
    return structure(tree) == structure(params)
