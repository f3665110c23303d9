"""The rows of `jes.bench` about quantised evolution strategies (2602.03120).

All on the feed-forward matrices of one layer of Qwen2.5-0.5B, 13 million codes.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.bench.timing import Row, compare
from jes.core.codes import Codes, pack
from jes.core.evolution import Evolution
from jes.core.integer_noise import dense_noise
from jes.core.noise import generation_key, leaf_key
from jes.core.tree import map_leaves
from jes.transforms import error_feedback, es_gradient
from jes.update import first_state, tell

SHAPE = (896, 4864)
MEMBERS = 50
WINDOW = 50
SIGMAS = {0.001: ">= 200", 0.005: "", 0.01: ">= 50"}
"""Sigma in codes, and how much cheaper a sparse draw is to be than a dense one."""


def feed_forward() -> dict[str, Codes]:
    """Parameters of one layer's feed-forward, of codes of 4 bits."""
    rng = np.random.default_rng(0)
    shapes = {"gate": SHAPE, "up": SHAPE, "down": SHAPE[::-1]}
    return {
        name: pack(jnp.asarray(rng.integers(0, 16, shape)), bits=4)
        for name, shape in shapes.items()
    }


def settings(sigma: float, rounding: str) -> Evolution:
    """As in the published runs, but for pairs: every member has noise of its own."""
    return Evolution(
        population=MEMBERS,
        sigma=sigma,
        alpha=2 * sigma,
        rounding=rounding,
        window=WINDOW,
    )


def sparse_estimate(sigma: float, members: int) -> Callable[[], Any]:
    """A function that draws so many members again, and sums them with weights."""
    transform = es_gradient(settings(sigma, "residual").noise)
    params = feed_forward()

    @jax.jit
    def run(fitness: jax.Array) -> Any:
        key = jax.random.key(0)
        return transform.update(params, (), key=key, fitness=fitness)[0]

    return partial(run, rewards(members))


def dense_estimate(sigma: float, members: int) -> Callable[[], Any]:
    """The same by Eq. (3) as it stands, every entry of every member drawn."""
    params = feed_forward()

    @jax.jit
    def run(weights: jax.Array) -> Any:
        return dense_sums(params, sigma, weights, jax.random.key(0))

    return partial(run, rewards(members))


def dense_sums(params: Any, sigma: float, weights: jax.Array, key: jax.Array) -> Any:
    """Sums of members' noise for each leaf."""

    def one(path: Any, leaf: Codes) -> jax.Array:
        def add(member: jax.Array, total: jax.Array) -> jax.Array:
            own = leaf_key(jax.random.fold_in(key, member), path)
            return total + weights[member] * dense_noise(own, leaf.shape, sigma)

        return jax.lax.fori_loop(0, weights.shape[0], add, jnp.zeros(leaf.shape))

    return map_leaves(one, params)


def replayed_update(sigma: float) -> Callable[[], Any]:
    """A function that updates by seed replay, with a window that is full."""
    evolution = settings(sigma, "replay")
    params = feed_forward()
    state = first_state(evolution, params)
    keys = [generation_key(jax.random.key(1), g) for g in range(WINDOW)]
    data = jnp.stack([jax.random.key_data(key) for key in keys])
    fitness = jnp.stack([rewards(MEMBERS)] * WINDOW)
    state = state._replace(
        count=jnp.int32(WINDOW), keys=data.astype(state.keys.dtype), fitness=fitness
    )
    generations = itertools.count(WINDOW)

    def run() -> Any:
        nonlocal params, state
        key = generation_key(jax.random.key(1), next(generations))
        params, state = tell(evolution, params, state, key, rewards(MEMBERS))
        return params

    return run


def dense_update(sigma: float) -> Callable[[], Any]:
    """A function that updates with dense noise and a kept residual."""
    feedback = error_feedback(decay=0.9)
    rate = settings(sigma, "residual").rate

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, key: jax.Array, fitness: jax.Array) -> Any:
        sums = dense_sums(params, sigma, fitness, key)
        steps = jax.tree.map(lambda total: rate / MEMBERS * total, sums)
        updates, state = feedback.update(steps, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = feed_forward()
    state = feedback.init(params)
    generations = itertools.count()

    def run() -> Any:
        nonlocal params, state
        key = generation_key(jax.random.key(1), next(generations))
        params, state = update(params, state, key, rewards(MEMBERS))
        return params

    return run


def rewards(members: int) -> jax.Array:
    """Of all members."""
    return jax.random.normal(jax.random.key(3), (members,))


def rows(repeats: int) -> list[Row]:
    """What sparse noise saves, of 50 members."""
    dense, sparse, out = 2, 100, []
    for sigma, goal in SIGMAS.items():
        name = f"dense / sparse noise of codes, sigma = {sigma}"
        first = dense_estimate(sigma, dense)
        second = sparse_estimate(sigma, sparse)
        out.append(compare(name, goal, first, second, repeats, dense / sparse))
    for sigma in (0.001, 0.01):
        name = f"seed-replay update / dense-noise update, sigma = {sigma}"
        first, second = replayed_update(sigma), dense_update(sigma)
        out.append(compare(name, "<= 0.5", first, second, repeats))
    return out
