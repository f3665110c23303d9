"""What the gradient baselines share: an optimizer step from microbatches."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jes.core.noise import PyTree
from jes.errors import InputError


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, which is at least 1."""
    return max(n for n in range(1, min(number, most) + 1) if not number % n)


def mean_gradient(
    slopes: Callable[[jax.Array], tuple[Any, PyTree]], rows: jax.Array, microbatch: int
) -> tuple[Any, PyTree]:
    """The gradient over all rows, from the memory of a microbatch; to be traced.

    Args:
      slopes: gives metrics and gradient of some rows, as means over these.
      rows: int [R], the numbers of the rows.
      microbatch: rows at once, a divisor of R; 0 for all.
    """
    # Each microbatch is a mean over as many rows, so the mean of these is the whole.
    pieces = rows.reshape(-1, microbatch or len(rows))
    first = slopes(pieces[0])
    if len(pieces) == 1:
        return first

    def add(sums: Any, rows: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, slopes(rows)), None

    sums, _ = jax.lax.scan(add, first, pieces[1:])
    return jax.tree.map(lambda leaf: leaf / len(pieces), sums)


def descend(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    microbatch: int,
    before: tuple[PyTree, Any],
    data: PyTree,
    rows: jax.Array,
) -> tuple[PyTree, Any, dict[str, jax.Array]]:
    """One optimizer step on the given rows of the data; to be traced.

    Args:
      loss: of the parameters and some rows of the data, with metrics.
      optimizer: of the step.
      microbatch: see `mean_gradient`.
      before: parameters and optimizer state.
      data: arrays [R, ...].
      rows: int, numbers of the rows.

    Returns:
      Parameters and optimizer state after it, and of the weights before it the metrics,
      `loss` and `gradient_norm`.
    """
    params, state = before

    def slopes(rows: jax.Array) -> tuple[dict[str, jax.Array], PyTree]:
        chosen = jax.tree.map(lambda array: array[rows], data)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, chosen
        )
        return metrics | {"loss": value}, gradient

    metrics, gradient = mean_gradient(slopes, rows, microbatch)
    norm = optax.tree.norm(gradient)
    updates, state = optimizer.update(gradient, state, params)
    metrics = metrics | {"gradient_norm": norm}
    return optax.apply_updates(params, updates), state, metrics


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raises InputError if `loss` or `gradient_norm` is not finite."""
    if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
        raise InputError(
            "the gradient is not finite; the weights have diverged (a smaller "
            "learning_rate helps)"
        )
