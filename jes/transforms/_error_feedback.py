"""Updates on a grid: carries the rounding error into the next update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.codes import Codes, allowed, difference, matrix_numbers
from jes.core.noise import PyTree, leaf_key
from jes.core.tree import (
    is_codes,
    map_leaves,
    rounded,
    total,
    transpose,
    values_of,
)

INITIAL = ("zero", "uniform")
DTYPES = ("float32", "bfloat16", "float16")


class ErrorFeedbackState(NamedTuple):
    """The rounding error, and counts of the last update.

    Attributes:
      residual: e, a tree like the parameters of arrays in their shapes (of codes, in
        codes); None with decay 0, which needs none.
      changed, blocked: float32 scalars, how many weights the last update changed, and
        how many moves the range of the codes stopped.
    """

    residual: PyTree
    changed: jax.Array
    blocked: jax.Array


def error_feedback(
    *,
    decay: float = 0.9,
    dtype: str = "float32",
    initial: str = "zero",
    clip: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates to the grid of the weights, and carries the rest on.

    2602.03120 Eq. (6) to (8) and Algorithm 1, the "full residual":

    .. math::
      u_t = \alpha\hat g_t + \gamma e_{t-1}, \quad
      \Delta_t = \mathrm{Gate}(\mathrm{Round}(u_t)), \quad e_t = u_t - \Delta_t.

    Round is to the nearest, halves to even. A move that would leave the range of the
    codes is skipped and stays in the residual. With :math:`\gamma = 1`,
    :math:`W_t + e_t` is what float32 weights would be (Eq. 9 to 13); below 1 steps that
    do not come to 1/2 in sum fade. With :math:`\gamma = 0` it is naive rounding.

    The last link of a chain. Codes move on their integers; weights of bfloat16 or
    float16 on the numbers of their dtype, so that they need no float32 master.

    Args:
      decay: γ, in [0, 1].
      dtype: of the residual: 'float32', 'bfloat16' or 'float16'.
      initial: the residual before the first update: 'zero', or 'uniform' in
        [-1/2, 1/2) of a code, as in the published code.
      clip: the residual is cut to [-clip, clip]; 0 for not, 1.5 in the published code.

    Returns:
      A transformation whose `update` needs `params`. For codes it gives the `Codes`
      that `optax.apply_updates` has to add to them.

    Raises:
      ValueError: for a decay outside [0, 1], an unknown dtype or initial residual, or a
        negative clip.

    Example:
      >>> import jax.numpy as jnp, optax, jes
      >>> params = {'w': jes.pack_codes(jnp.array([[3], [7]]), bits=4)}
      >>> feedback = jes.error_feedback(decay=1.0)
      >>> state = feedback.init(params)
      >>> for step in range(3):
      ...     updates = {'w': jnp.array([[0.25], [-0.25]])}
      ...     updates, state = feedback.update(updates, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jes.unpack_codes(params['w']).ravel()
      Array([4, 6], dtype=uint8)
    """
    check_feedback(decay, initial, clip)
    if dtype not in DTYPES:
        raise ValueError(f"a residual is one of {DTYPES}, not {dtype!r}")

    def init_fn(params: PyTree) -> ErrorFeedbackState:
        def start(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            return initial_residual(path, leaf, initial).astype(dtype)

        residual = map_leaves(start, params) if decay else None
        return ErrorFeedbackState(residual, jnp.zeros([]), jnp.zeros([]))

    def update_fn(
        updates: PyTree,
        state: ErrorFeedbackState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ErrorFeedbackState]:
        del extra_args
        if params is None:
            raise ValueError("error_feedback needs params: update(..., params)")
        residual = state.residual
        if residual is None:
            residual = jax.tree.map(jnp.zeros_like, updates)

        def one(leaf: Any, update: jax.Array, left: jax.Array) -> tuple[Any, ...]:
            moves, left = round_step(
                leaf, values_of(leaf), update, left, decay=decay, clip=clip
            )
            return *as_update(leaf, moves, left), left.astype(dtype)

        out = jax.tree.map(one, params, updates, residual, is_leaf=is_codes)
        updates, changed, blocked, residual = transpose(params, out, 4)
        residual = residual if decay else None
        return updates, ErrorFeedbackState(residual, total(changed), total(blocked))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_feedback(decay: float, initial: str, clip: float) -> None:
    """Raises ValueError for settings that neither transformation can have."""
    if not 0 <= decay <= 1:
        raise ValueError(f"the residual's decay must be in [0, 1], not {decay}")
    if initial not in INITIAL:
        raise ValueError(f"a residual starts as one of {INITIAL}, not {initial!r}")
    if not clip >= 0:
        raise ValueError(f"the residual cannot be cut at {clip}")


def round_step(
    leaf: Codes | jax.Array,
    values: jax.Array,
    update: jax.Array,
    residual: jax.Array,
    *,
    decay: float,
    clip: float,
) -> tuple[jax.Array, jax.Array]:
    """The moves of one leaf and its residual after them, float32.

    The leaf gives the range of the codes or the dtype of the weights; `values` are its
    codes, or its weights in float32.
    """
    wanted = update + decay * residual.astype(jnp.float32)
    if isinstance(leaf, Codes):
        moves = allowed(leaf, values, jnp.round(wanted))
    else:
        moves = rounded(values + wanted, leaf.dtype) - values
    left = wanted - moves
    return moves, jnp.clip(left, -clip, clip) if clip else left


def initial_residual(
    path: tuple[Any, ...], leaf: Any, initial: str, part: Any = None
) -> jax.Array:
    """The residual of a leaf, or of a part of a stack, before the first update.

    Float32; uniform only for codes. Of a part, its number is given: see `PartKey`.
    """
    if initial == "zero" or not is_codes(leaf):
        return jnp.zeros(leaf.shape, jnp.float32)
    key = leaf_key(jax.random.key(0), path)

    def one(number: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, number)
        return jax.random.uniform(own, leaf.shape[-2:], minval=-0.5, maxval=0.5)

    return jax.vmap(one)(matrix_numbers(leaf.shape, part)).reshape(leaf.shape)


def as_update(
    leaf: Any, moves: jax.Array, left: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Moves as what `optax.apply_updates` adds; how many there are, and were blocked.

    What is `left` is the residual after them. The numbers are float32 scalars.
    """
    changed = (moves != 0).sum(dtype=jnp.float32)
    if not is_codes(leaf):
        return moves, changed, jnp.zeros([])
    blocked = (jnp.abs(left) > 0.5).sum(dtype=jnp.float32)
    return difference(leaf, moves), changed, blocked
