"""The ES estimate: its statistics, invariances, signs, dtypes and memory."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jes
from jes.core.anchor import displacement
from jes.core.drift import predicted_drift
from jes.core.evolution import Evolution
from jes.core.noise import PyTree
from jes.update import first_state, replay

D = 20
CURVATURE = jnp.linspace(0.5, 2.0, D)
OPTIMUM = jnp.linspace(-1.0, 1.0, D)


def fitness(params: PyTree) -> jax.Array:
    return -0.5 * (CURVATURE * (params["w"] - OPTIMUM) ** 2).sum()


def population(params: PyTree, key: jax.Array, n: int, noise: jes.Noise) -> jax.Array:
    draw = jax.vmap(jes.perturb_member, in_axes=(None, None, 0, None))
    return jax.vmap(fitness)(draw(params, key, jnp.arange(n), noise))


def estimate(
    params: PyTree, key: jax.Array, values: jax.Array, noise: jes.Noise, shaping: str
) -> PyTree:
    transform = jes.es_gradient(noise, shaping=shaping)
    zeros = optax.tree.zeros_like(params)
    updates, _ = transform.update(
        zeros, transform.init(params), params, key=key, fitness=values
    )
    return updates


@pytest.mark.parametrize("antithetic", [False, True])
def test_mean_matches_the_gradient_of_a_quadratic(antithetic: bool) -> None:
    """E[g] = -σ∇J exactly for a quadratic; z-test of every coordinate's mean."""
    noise = jes.Noise(sigma=0.3, antithetic=antithetic)
    params = {"w": jnp.zeros(D)}
    seeds, n = 4000, 16

    def one(seed: jax.Array) -> jax.Array:
        key = jes.generation_key(jax.random.key(7), seed)
        values = population(params, key, n, noise)
        return estimate(params, key, values, noise, "none")["w"]

    drawn = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(seeds)))
    expected = -0.3 * np.asarray(jax.grad(fitness)(params)["w"])
    z = (drawn.mean(0) - expected) / (drawn.std(0, ddof=1) / seeds**0.5)
    # 20 coordinates: max |z| of 20 standard normals exceeds 4 once in 800 seeds.
    assert np.abs(z).max() < 4
    assert 0.4 < z.std() < 1.6


def test_estimate_is_the_written_out_sum() -> None:
    noise = jes.Noise(sigma=0.1)
    params = {"a": {"w": jnp.ones((3, 4))}, "b": jnp.zeros(5)}
    key, values = jax.random.key(1), jnp.array([0.3, 0.1, 0.7, 0.4])
    zeros = optax.tree.zeros_like(params)
    weights = np.asarray(jes.shape_fitness(values))
    members = [jes.perturb(zeros, jax.random.fold_in(key, i), 1.0) for i in range(4)]
    expected = jax.tree.map(
        lambda *e: -sum(w * x for w, x in zip(weights, e, strict=True)) / 4, *members
    )
    got = estimate(params, key, values, noise, "zscore")
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


def test_order_inside_antithetic_pairs_only_turns_the_noise() -> None:
    """Swapping the members of every pair negates every direction weight."""
    noise = jes.Noise(sigma=0.1, antithetic=True)
    params = {"w": jnp.zeros(D)}
    key = jax.random.key(0)
    values = jnp.array([0.1, 0.9, 0.4, 0.3, 0.8, 0.8])
    swapped = values.reshape(3, 2)[:, ::-1].ravel()
    first = estimate(params, key, values, noise, "zscore")["w"]
    second = estimate(params, key, swapped, noise, "zscore")["w"]
    np.testing.assert_allclose(first, -second, rtol=1e-6)


def test_antithetic_estimate_is_that_of_all_members_written_out() -> None:
    noise = jes.Noise(sigma=0.1, antithetic=True)
    params = {"w": jnp.zeros(D)}
    key = jes.generation_key(jax.random.key(0), 0)
    values = population(params, key, 8, noise)
    weights = jes.shape_fitness(values)
    draw = jax.vmap(jes.perturb_member, in_axes=(None, None, 0, None))
    epsilon = draw(params, key, jnp.arange(8), noise)["w"] / 0.1
    expected = -(weights[:, None] * epsilon).sum(0) / 8
    got = estimate(params, key, values, noise, "zscore")["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_dropped_members_leave_the_estimate_of_the_others() -> None:
    noise = jes.Noise(sigma=0.1)
    params = {"w": jnp.zeros(D)}
    key = jax.random.key(0)
    values = jnp.array([0.2, jnp.nan, 0.5, 0.9])
    got = estimate(params, key, values, noise, "zscore")["w"]
    z = jes.shape_fitness(jnp.array([0.2, 0.5, 0.9]))
    draws = [
        jes.perturb(params, jax.random.fold_in(key, i), 1.0)["w"] for i in (0, 2, 3)
    ]
    expected = -sum(a * b for a, b in zip(z, draws, strict=True)) / 3
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_ties_change_nothing_at_all() -> None:
    params = {"w": jnp.linspace(0.1, 1, D)}
    optimizer = optax.chain(
        jes.es_gradient(jes.Noise(sigma=0.1)), optax.scale_by_learning_rate(0.5)
    )
    updates, _ = optimizer.update(
        optax.tree.zeros_like(params),
        optimizer.init(params),
        params,
        key=jax.random.key(0),
        fitness=jnp.full(30, 0.1),
    )
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)


def test_updates_are_float32_and_it_ascends() -> None:
    noise = jes.Noise(sigma=0.05)
    params = {"w": jnp.zeros(D)}
    optimizer = optax.chain(jes.es_gradient(noise), optax.scale_by_learning_rate(0.1))
    state = optimizer.init(params)
    before = float(fitness(params))

    @jax.jit
    def step(params: PyTree, state: PyTree, generation: int) -> tuple:
        key = jes.generation_key(jax.random.key(0), generation)
        values = population(params, key, 32, noise)
        updates, state = optimizer.update(
            optax.tree.zeros_like(params), state, params, key=key, fitness=values
        )
        return optax.apply_updates(params, updates), state, values

    for generation in range(100):
        params, state, values = step(params, state, generation)
    assert float(fitness(params)) > 0.1 * before
    half = {"w": jnp.zeros(D, jnp.bfloat16)}
    updates = estimate(half, jax.random.key(0), values, noise, "zscore")
    chex.assert_type(updates["w"], jnp.float32)


@pytest.mark.parametrize("settings", [{}, {"rank": 1}, {"distribution": "table"}])
def test_pure_noise_walks_as_the_theory_of_drift_says(settings: dict[str, Any]) -> None:
    """‖θ_T - θ_0‖ = α√(Td/N) for fitness independent of the noise."""
    evolution = Evolution(population=30, sigma=1e-3, alpha=5e-4, **settings)
    steps = 40
    params = {"w": jnp.zeros((250, 400))}
    base = jax.tree.map(jnp.array, params)
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(steps, 30)).astype(np.float32)
    state = first_state(evolution, params)
    params, _ = replay(evolution, params, state, jax.random.key(0), rewards)
    moved = float(displacement(params, base))
    # The relative spread of the norm of 1e5 normals is 1/sqrt(2e5), 0.2 %; of a product
    # of factors sqrt(2/250 + 2/400) / 2, so of the 1200 here 0.2 % too.
    assert moved == pytest.approx(predicted_drift(evolution, 100_000, steps), rel=0.01)


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_float32_master_keeps_steps_that_bfloat16_loses(scale: float) -> None:
    """Steps of 9e-5 on weights near 1 (norm gains) vanish without a master."""
    evolution = Evolution(population=30, sigma=1e-3, alpha=5e-4)
    rng = np.random.default_rng(1)
    start = scale * np.ones(20_000, np.float32) + (
        0.02 * rng.normal(size=20_000) if scale < 1 else 0
    )
    rewards = rng.normal(size=(100, 30)).astype(np.float32)
    expected = predicted_drift(evolution, 20_000, 100)

    def walk(dtype: str) -> float:
        params = {"w": jnp.asarray(start, dtype)}
        base = jax.tree.map(jnp.array, params)
        state = first_state(evolution, params)
        params, _ = replay(evolution, params, state, jax.random.key(0), rewards)
        return float(displacement(params, base))

    assert walk("float32") == pytest.approx(expected, rel=0.02)
    assert abs(walk("bfloat16") / expected - 1) > 0.05


def test_holds_one_leafs_noise_at_a_time() -> None:
    """Temporary memory of an update does not grow with the population."""
    leaves = {str(i): jnp.zeros((256, 256)) for i in range(8)}

    def temporary(n: int) -> int:
        transform = jes.es_gradient(jes.Noise(sigma=0.1))
        state = transform.init(leaves)

        def update(key: jax.Array, values: jax.Array) -> PyTree:
            return transform.update(leaves, state, key=key, fitness=values)[0]

        compiled = jax.jit(update).lower(jax.random.key(0), jnp.ones(n)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    leaf = 256 * 256 * 4
    assert temporary(64) <= temporary(4) + 64 * 1024
    # The running sum going in and out of the loop, for one leaf of the eight.
    assert temporary(64) <= 2 * leaf + 64 * 1024
