"""What the gradient baselines share: AdamW, and its step from microbatches."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jes import memory
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.experiment import Experiment

CLIP_NORM = 1.0
"""Largest global norm of a step's gradient."""


def make_optimizer(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW without decay, behind a bound on the global norm of the gradient."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(learning_rate, weight_decay=0.0),
    )


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, which is at least 1."""
    return max(n for n in range(1, min(number, most) + 1) if not number % n)


def choose_microbatch(
    experiment: Experiment, rows: int, prompt: int, new: int
) -> dict[str, int]:
    """The largest divisor of `rows` whose gradient fits the memory.

    Args:
      experiment: of the run.
      rows: of an optimizer step.
      prompt, new: tokens of a row without logits and with them.
    """
    most = memory.rows_of_gradient(
        experiment.pretrained.config,
        experiment.parameters,
        prompt,
        new,
        budget=int(experiment.settings.memory_gb * 1e9) or memory.free_bytes(),
    )
    return {"microbatch": largest_divisor(rows, most)}


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


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def descend(
    baseline: Any, model: Any, before: tuple[PyTree, Any], data: Any, rows: jax.Array
) -> tuple[tuple[PyTree, Any], dict[str, jax.Array]]:
    """One optimizer step on some rows of the data.

    Args:
      baseline: hashable settings with an `optimizer`, a `microbatch` (see
        `mean_gradient`), and `loss(model, params, *data)`, which gives a mean over the
        rows and a dict of metrics.
      model: a decoder.
      before: parameters, float32, and optimizer state; donated.
      data: a tuple of pytrees of arrays [R, ...].
      rows: int, numbers of the rows.

    Returns:
      Parameters and optimizer state after it, and of the weights before it the metrics,
      `loss` and `gradient_norm` (before it is bounded).
    """
    params, state = before

    def slopes(rows: jax.Array) -> tuple[dict[str, jax.Array], PyTree]:
        chosen = jax.tree.map(lambda array: array[rows], data)
        loss = partial(baseline.loss, model)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, *chosen
        )
        return metrics | {"loss": value}, gradient

    metrics, gradient = mean_gradient(slopes, rows, baseline.microbatch)
    metrics = metrics | {"gradient_norm": optax.tree.norm(gradient)}
    updates, state = baseline.optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), metrics


def mean_metrics(history: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """The means over some steps.

    Raises:
      InputError: if `loss` or `gradient_norm` is not finite.
    """
    rows = jax.device_get(history)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if not math.isfinite(means["loss"] + means["gradient_norm"]):
        raise InputError(
            "the gradient is not finite; the weights have diverged (a smaller "
            "learning_rate helps)"
        )
    return means
