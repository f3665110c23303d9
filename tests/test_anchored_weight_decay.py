"""Anchored weight decay: vectors of 2605.30148, order, fixed points, the walk's law."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jes

ALPHA = 5e-4


def decayed(
    delta: list[float], coefficient: float, kind: str, step: float = 0.0
) -> np.ndarray:
    """θ - θ_0 after one update from θ_0 + delta (with θ_0 = 0)."""
    params = jnp.array(delta, jnp.float32)
    decay = jes.anchored_weight_decay(
        ALPHA, coefficient, jnp.zeros_like(params), kind=kind
    )
    updates, _ = decay.update(jnp.full_like(params, step), decay.init(params), params)
    return np.asarray(optax.apply_updates(params, updates))


def test_published_vectors() -> None:
    np.testing.assert_allclose(decayed([1e-3], 10, "l2"), [9.95e-4], rtol=1e-6)
    delta = [1e-3, 4e-6, -4e-6, -1e-3]
    expected = [9.95e-4, 0, 0, -9.95e-4]
    np.testing.assert_allclose(decayed(delta, 0.01, "l1"), expected, atol=1e-10)


def test_the_decay_acts_after_the_step() -> None:
    np.testing.assert_allclose(
        decayed([0.0], 10, "l2", step=0.2), [0.2 * 0.995], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_fixed_points_and_no_op(kind: str) -> None:
    assert decayed([0.0], 3.0, kind) == 0
    step = np.float32(1.7e-5)
    np.testing.assert_array_equal(
        decayed([0.3], 0.0, kind, step=step), np.float32(0.3) + step
    )


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="below 1"):
        jes.anchored_weight_decay(ALPHA, 2000, jnp.zeros(1))
    with pytest.raises(ValueError, match="negative"):
        jes.anchored_weight_decay(ALPHA, -1, jnp.zeros(1))
    with pytest.raises(ValueError, match="'l1' or 'l2', not 'l3'"):
        jes.anchored_weight_decay(ALPHA, 1, jnp.zeros(1), kind="l3")
    decay = jes.anchored_weight_decay(ALPHA, 1, jnp.zeros(1))
    with pytest.raises(ValueError, match="needs params"):
        decay.update(jnp.zeros(1), decay.init(jnp.zeros(1)))


def test_schedules_follow_the_count_and_the_anchor_can_be_set_anew() -> None:
    params = jnp.ones(1)
    decay = jes.anchored_weight_decay(
        lambda count: 0.1 * (count + 1), lambda count: 2.0, jnp.zeros(1)
    )
    state = decay.init(params)
    zero = jnp.zeros(1)
    first, state = decay.update(zero, state, params)
    second, state = decay.update(zero, state, params)
    np.testing.assert_allclose([first[0], second[0]], [-0.2, -0.4], rtol=1e-6)
    moved, _ = decay.update(zero, state._replace(anchor=params), params)
    assert float(moved[0]) == 0


def test_float32_updates_whatever_the_dtypes_and_no_recompilation() -> None:
    params = jnp.ones(3, jnp.bfloat16)
    decay = jes.anchored_weight_decay(ALPHA, 1.0, jnp.zeros(3, jnp.bfloat16))

    @jax.jit
    @chex.assert_max_traces(1)
    def update(step: jax.Array, state: optax.OptState) -> tuple:
        return decay.update(step, state, params, something=1)

    updates, state = update(jnp.zeros(3), decay.init(params))
    updates, state = update(jnp.ones(3), state)
    chex.assert_type(updates, jnp.float32)
    assert int(state.count) == 2


@pytest.mark.parametrize(
    ("kind", "coefficient", "expected"),
    [("l2", 10.0, 9.11e-4), ("l1", 0.01, 1.04e-3), ("l1", 0.02, 5.8e-4)],
)
def test_pure_noise_norms(kind: str, coefficient: float, expected: float) -> None:
    """Rms of θ - θ_0 after T = 500 with N = 30: steps of N(0, α²/N) each."""
    size = 100_000
    decay = jes.anchored_weight_decay(ALPHA, coefficient, jnp.zeros(size), kind=kind)

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        noise = ALPHA / 30**0.5 * jax.random.normal(key, (size,))
        updates, state = decay.update(noise, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (jnp.zeros(size), decay.init(jnp.zeros(size)))
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 500))
    rms = float(jnp.sqrt((params**2).mean()))
    # 1 %, the bound of the published values; sampling is 0.2 to 0.4 % of it.
    assert rms == pytest.approx(expected, rel=0.01)
