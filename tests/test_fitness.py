"""Fitness shaping: vectors, invariances, ties and non-finite rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jes

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # 2509.24372, test vectors with ddof 0.
        ([0.1, 0.2, 0.3, 0.4], [-1.341641, -0.447214, 0.447214, 1.341641]),
        ([1, 1, 1, 0], [0.577350, 0.577350, 0.577350, -1.732051]),
    ],
)
def test_zscore_vectors(rewards: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(jes.shape_fitness(rewards), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["zscore", "centered_rank", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e6])
@pytest.mark.parametrize("count", [1, 2, 30, 200])
def test_ties_change_nothing(method: str, value: float, count: int) -> None:
    shaped = jes.shape_fitness(jnp.full(count, value), method)
    assert not np.asarray(shaped).any()


def test_zscore_is_invariant_to_shift_and_scale() -> None:
    rewards = np.random.default_rng(0).normal(size=30)
    base = jes.shape_fitness(rewards)
    np.testing.assert_allclose(jes.shape_fitness(rewards * 7 + 3), base, atol=3e-6)
    assert abs(float(base.sum())) < 1e-5
    np.testing.assert_allclose(float((base**2).sum()), 30, rtol=1e-5)


def test_centered_rank() -> None:
    shaped = jes.shape_fitness([3.0, 100.0, 3.0, -5.0, 7.0], "centered_rank")
    np.testing.assert_allclose(shaped, [-0.125, 0.5, -0.125, -0.5, 0.25])


@pytest.mark.parametrize("method", ["zscore", "centered_rank", "none"])
def test_members_that_are_not_finite_are_dropped(method: str) -> None:
    rewards = [1.0, NAN, 2.0, INF, 4.0, -INF]
    shaped = np.asarray(jes.shape_fitness(rewards, method))
    rest = np.asarray(jes.shape_fitness([1.0, 2.0, 4.0], method))
    np.testing.assert_array_equal(shaped[[1, 3, 5]], 0)
    np.testing.assert_allclose(shaped[[0, 2, 4]], rest, rtol=1e-6)


@pytest.mark.parametrize("method", ["zscore", "centered_rank", "none"])
def test_all_members_not_finite(method: str) -> None:
    assert not np.asarray(jes.shape_fitness([NAN, INF, NAN], method)).any()


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'rank'; known are zscore, centered_rank"):
        jes.shape_fitness([1.0, 2.0], "rank")


def test_same_under_jit() -> None:
    rewards = jnp.array([0.3, NAN, 0.1, 0.9])
    traced = jax.jit(jes.shape_fitness, static_argnums=1)(rewards, "zscore")
    np.testing.assert_allclose(traced, jes.shape_fitness(rewards), rtol=1e-6)
