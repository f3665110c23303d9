"""The rows of `jes.bench` about quantised evolution strategies (2602.03120).

All on one matrix of 896 x 4864 codes, the largest of Qwen2.5-0.5B, where a draw is long
enough to be timed and everything else about an update is there too.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.codes import Codes, pack
from jes.core.integer_noise import dense_noise
from jes.core.noise import generation_key
from jes.tell import Evolution, first_state, tell
from jes.transforms import error_feedback, es_gradient

SHAPE = (896, 4864)
MEMBERS = 50
WINDOW = 50
SIGMAS = {0.001: ">= 200", 0.005: "", 0.01: ">= 50"}
"""Sigma in codes, and how much cheaper a sparse draw is to be than a dense one."""


def matrix() -> dict[str, Codes]:
    """Parameters of one matrix, of codes of 4 bits."""
    codes = np.random.default_rng(0).integers(0, 16, SHAPE)
    return {"codes": pack(jnp.asarray(codes), bits=4)}


def settings(sigma: float, rounding: str) -> Evolution:
    """As in the published runs, but for pairs: every member has noise of its own."""
    return Evolution(
        population=MEMBERS,
        sigma=sigma,
        alpha=2 * sigma,
        rounding=rounding,
        window=WINDOW,
    )


def sparse_estimate(sigma: float, generations: int) -> Callable[[], Any]:
    """A function that draws so many generations again and sums each with weights."""
    transform = es_gradient(settings(sigma, "residual").noise)
    params = matrix()

    @jax.jit
    def run(fitness: jax.Array) -> Any:
        def one(generation: jax.Array, total: jax.Array) -> jax.Array:
            key = generation_key(jax.random.key(0), generation)
            updates, _ = transform.update(params, (), key=key, fitness=fitness)
            return total + updates["codes"]

        return jax.lax.fori_loop(0, generations, one, jnp.zeros(SHAPE))

    return partial(run, rewards())


def dense_estimate(sigma: float, members: int) -> Callable[[], Any]:
    """A function that draws so many members by Eq. (3), and sums them with weights."""

    @jax.jit
    def run(weights: jax.Array) -> Any:
        return dense_sum(sigma, weights, jax.random.key(0))

    return partial(run, rewards()[:members])


def dense_sum(sigma: float, weights: jax.Array, key: jax.Array) -> jax.Array:
    """Sum of members' noise, drawn entry by entry."""

    def add(member: jax.Array, total: jax.Array) -> jax.Array:
        drawn = dense_noise(jax.random.fold_in(key, member), SHAPE, sigma)
        return total + weights[member] * drawn

    return jax.lax.fori_loop(0, weights.shape[0], add, jnp.zeros(SHAPE))


def replayed_update(sigma: float) -> Callable[[], Any]:
    """A function that updates by seed replay, with a window that is full."""
    evolution = settings(sigma, "replay")
    params = matrix()
    state = first_state(evolution, params)
    keys = [generation_key(jax.random.key(1), g) for g in range(WINDOW)]
    data = jnp.stack([jax.random.key_data(key) for key in keys])
    fitness = jax.random.normal(jax.random.key(2), (WINDOW, MEMBERS))
    state = state._replace(
        count=jnp.int32(WINDOW), keys=data.astype(state.keys.dtype), fitness=fitness
    )
    generations = itertools.count(WINDOW)

    def run() -> Any:
        nonlocal params, state
        key = generation_key(jax.random.key(1), next(generations))
        params, state = tell(evolution, params, state, key, rewards())
        return params

    return run


def dense_update(sigma: float) -> Callable[[], Any]:
    """A function that updates with dense noise and a kept residual."""
    feedback = error_feedback(decay=0.9)
    rate = settings(sigma, "residual").rate

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, key: jax.Array, fitness: jax.Array) -> Any:
        step = rate / MEMBERS * dense_sum(sigma, fitness, key)
        updates, state = feedback.update({"codes": step}, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = matrix()
    state = feedback.init(params)
    generations = itertools.count()

    def run() -> Any:
        nonlocal params, state
        key = generation_key(jax.random.key(1), next(generations))
        params, state = update(params, state, key, rewards())
        return params

    return run


def rewards() -> jax.Array:
    """Of all members."""
    return jax.random.normal(jax.random.key(3), (MEMBERS,))
