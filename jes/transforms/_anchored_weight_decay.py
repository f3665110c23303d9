"""Anchored weight decay: a pull back to where the weights started."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jes.core.drift import KINDS
from jes.core.noise import PyTree
from jes.core.placement import on_device
from jes.core.tree import structure, values_of


class AnchoredWeightDecayState(NamedTuple):
    """Updates so far, an int32 scalar: where the schedules are."""

    count: jax.Array  # type: ignore[assignment]  # the name that optax has for it


def anchored_weight_decay(
    learning_rate: optax.ScalarOrSchedule,
    coefficient: optax.ScalarOrSchedule,
    anchor: PyTree,
    kind: str = "l2",
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls the updated weights towards an anchor; the last link of a chain.

    The exact form of 2605.30148, Algorithm 1: the decay acts after the step u, on
    :math:`\delta = \theta + u - \theta_0`, with :math:`\alpha\lambda` divided neither
    by N nor by σ:

    .. math::
      \text{L2:}\; \theta \leftarrow \theta_0 + (1 - \alpha\lambda)\,\delta, \qquad
      \text{L1:}\; \theta \leftarrow
        \theta_0 + \mathrm{sign}(\delta) \max(|\delta| - \alpha\lambda, 0).

    Before `jes.error_feedback` it pulls codes to the codes of the anchor, and what of
    the pull is less than a code waits in the residual.

    It acts in a generation without a step (all members tied) too. The arithmetic is in
    float32: in half precision most of a pull this small is rounded away, as in the
    published code.

    Args:
      learning_rate: α, as in the link before.
      coefficient: λ; `jes.coefficient_for_norm` gives the one for a budget of drift.
        With a number for each, α λ < 1 is checked for L2.
      anchor: θ_0, in any floating dtype, on the device or in the host's memory; see
        `jes.keep_anchor`. `update(..., anchor=...)` sets another one from task to
        task.
      kind: 'l2', or 'l1', the proximal soft threshold.
      mask: as in `optax.masked`: a tree of bools, or a function from the parameters
        to one, that says which weights are pulled; by default all.

    Returns:
      A transformation whose `update` needs `params`. Its state is a count: the anchor
      is no part of it, so a checkpoint of the state does not repeat the base model.

    Raises:
      ValueError: for an unknown kind, a negative λ, or α λ >= 1 with L2.

    Example:
      >>> import jax.numpy as jnp, optax, jes
      >>> params = {'w': jnp.array([1.0, 2.0])}
      >>> decay = jes.anchored_weight_decay(5e-4, 10.0, anchor={'w': jnp.zeros(2)})
      >>> state = decay.init(params)
      >>> updates, state = decay.update({'w': jnp.zeros(2)}, state, params)
      >>> optax.apply_updates(params, updates)['w']
      Array([0.995, 1.99 ], dtype=float32)
    """
    if kind not in KINDS[1:]:
        raise ValueError(f"kind must be 'l1' or 'l2', not {kind!r}")
    if not callable(coefficient):
        if not coefficient >= 0:
            raise ValueError(f"the coefficient cannot be negative: {coefficient}")
        product = 0 if callable(learning_rate) else learning_rate * coefficient
        if kind == "l2" and not product < 1:
            raise ValueError(f"learning_rate x coefficient must be below 1: {product}")

    def at(value: optax.ScalarOrSchedule, count: jax.Array) -> Any:
        return value(count) if callable(value) else value

    def init_fn(params: PyTree) -> AnchoredWeightDecayState:
        del params
        return AnchoredWeightDecayState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: PyTree,
        state: AnchoredWeightDecayState,
        params: PyTree | None = None,
        *,
        anchor: PyTree = anchor,
        **extra_args: Any,
    ) -> tuple[PyTree, AnchoredWeightDecayState]:
        del extra_args
        if params is None:
            raise ValueError("anchored_weight_decay needs params: update(..., params)")
        if anchor is None:
            raise ValueError("anchored_weight_decay has no anchor to pull to")
        if structure(anchor) != structure(params):
            raise ValueError(
                "the anchor is not a tree like the parameters; jes.update_in_place "
                "takes it as an argument, anchor=..."
            )
        strength = at(learning_rate, state.count) * at(coefficient, state.count)
        chosen = mask(params) if callable(mask) else True if mask is None else mask

        def pulled(chosen: bool, update: Any, param: Any, home: Any) -> jax.Array:
            if not chosen:
                return update
            # One leaf at a time comes over from the host, if that is where it is kept.
            home = values_of(jax.tree.map(on_device, home))
            step = update.astype(jnp.float32)
            away = values_of(param) + step - home
            if kind == "l2":
                return step - strength * away
            # What the soft threshold takes off is the displacement, clipped.
            return step - jnp.clip(away, -strength, strength)

        # A mask may be a prefix of the tree: a bool for a whole branch.
        chosen = jax.tree.map(
            lambda pull, branch: jax.tree.map(lambda _: pull, branch), chosen, updates
        )
        updates = jax.tree.map(pulled, chosen, updates, params, anchor)
        return updates, AnchoredWeightDecayState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
