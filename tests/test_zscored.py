"""What ES does on a quadratic: noise of its estimates, mean field against runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quadratic import TOY, random_ascent, standard_errors

import jes
from jes.errors import InputError
from jes.landscape import quadratic, zscored
from jes.landscape.quadratic import Ascent, Moments

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.mark.parametrize(
    ("sigma", "uncentred", "model"),
    [(0.01, 5.10, 0.0018), (0.1, 0.386, 0.018), (1.0, 2.01, 0.183)],
)
def test_noise_of_estimates_in_flat_modes(
    sigma: float, uncentred: float, model: float
) -> None:
    """4000 estimates × 112 modes: 0.1 % of sampling error, within 1 and 3 %."""
    ascent = dataclasses.replace(TOY, sigma=sigma)
    key = jax.random.key(0)
    plain = quadratic.estimates(ascent, key=key, runs=4000, method="es")
    measured = float(plain[:, 16:].std())
    assert measured == pytest.approx(uncentred, rel=0.01)
    assert zscored.uncentred_noise(ascent) == pytest.approx(measured, rel=0.01)
    zscores = quadratic.estimates(ascent, key=key, runs=4000)
    assert float(zscores[:, 16:].std()) == pytest.approx(30**-0.5, rel=0.03)
    # The linear model has neither: it is right only at σ = 1, for z-scores.
    assert quadratic.effective_noise(ascent) ** 0.5 == pytest.approx(model, rel=0.03)


def test_the_estimates_are_those_of_the_transformation() -> None:
    """Same mean as `jes.es_gradient` on the same quadratic, its sign turned."""
    ascent = dataclasses.replace(TOY, sigma=0.1)
    noise = jes.Noise(sigma=0.1)
    transformation = jes.es_gradient(noise)
    start = jnp.asarray(TOY.start, jnp.float32)
    values = jnp.asarray(TOY.eigenvalues, jnp.float32)

    @jax.jit
    @jax.vmap
    def update(generation: jax.Array) -> jax.Array:
        key = jes.generation_key(jax.random.key(0), generation)
        members = jax.vmap(lambda i: jes.perturb_member(start, key, i, noise))(
            jnp.arange(30)
        )
        fitness = 1 - (values[None] * members**2).sum(-1) / 2
        step, _ = transformation.update(
            start, transformation.init(start), key=key, fitness=fitness
        )
        return -step

    real = np.asarray(update(jnp.arange(1000)), float)[:, :16].mean(-1)
    here = quadratic.estimates(ascent, key=jax.random.key(1), runs=4000)
    here = np.asarray(here, float)[:, :16].mean(-1)
    error = (real.var() / 1000 + here.var() / 4000) ** 0.5
    assert abs(real.mean() - here.mean()) < 3 * error
    # α σ ∇J / S with the 3 % that 30 members lack; not the α ∇J of the linear model.
    spread = zscored.reward_deviation(
        TOY.eigenvalues, Moments(TOY.start, np.zeros(128)), 0.1
    )
    expected = -float(zscored.sample_deviation(30)) * 0.1 * 0.3 / spread
    assert abs(here.mean() - expected) < 3 * error
    assert abs(expected) < 0.9 * 0.3


def test_deviation_of_rewards_and_of_samples() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(size=(20_000, 128))
    for sigma in (0.1, 1.0):
        losses = (TOY.eigenvalues * (TOY.start + sigma * draws) ** 2).sum(-1) / 2
        spread = zscored.reward_deviation(
            TOY.eigenvalues, Moments(TOY.start, np.zeros(128)), sigma
        )
        assert losses.std() == pytest.approx(spread, rel=0.02)  # four standard errors
    groups = random.normal(size=(100_000, 5)).std(-1)
    error = groups.std() / len(groups) ** 0.5
    assert abs(groups.mean() - zscored.sample_deviation(5)) < 3 * error
    assert zscored.sample_deviation(1000) == pytest.approx(1 - 0.75 / 1000, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("ascent", [TOY, random_ascent(4)], ids=["toy", "random"])
def test_mean_field_against_z_scored_es(ascent: Ascent, sigma: float) -> None:
    """1 - E J_t of 200 runs within 15 % and 2 standard errors, generations 10 to 150.

    The linear model with the same α and N is wrong by more than that.
    """
    ascent = dataclasses.replace(ascent, sigma=sigma, population=30, alpha=0.05)
    runs = quadratic.simulate(
        ascent, 150, key=jax.random.key(0), runs=200, method="zscore"
    )
    time = np.arange(10, 151, 10)
    gaps = 1 - np.asarray(runs.objective[:, time], float)
    mean, error = gaps.mean(0), gaps.std(0, ddof=1) / 200**0.5
    field = quadratic.objective(ascent.eigenvalues, zscored.path(ascent, 150))
    assert (np.abs(mean - (1 - field[time])) < 0.15 * mean + 2 * error).all()
    linear = dataclasses.replace(ascent, noise="zscore")
    linear_gaps = 1 - quadratic.expected_objective(linear, time)
    assert np.abs(linear_gaps / mean - 1).max() > 0.3


def test_mean_field_with_schedules_and_decay() -> None:
    """As above; α and σ halve on the way, and the anchor pulls."""
    time = np.arange(150)
    changes = {
        "alpha": np.where(time < 75, 0.05, 0.025),
        "sigma": np.where(time < 75, 0.1, 0.05),
        "decay": 0.3,
    }
    ascent = dataclasses.replace(TOY, sigma=0.1)
    runs = quadratic.simulate(
        ascent, 150, key=jax.random.key(0), runs=200, method="zscore", **changes
    )
    at = np.array([10, 50, 75, 100, 150])
    gaps = 1 - np.asarray(runs.objective[:, at], float)
    mean, error = gaps.mean(0), gaps.std(0, ddof=1) / 200**0.5
    field = zscored.path(ascent, 150, **changes)
    expected = 1 - quadratic.objective(ascent.eigenvalues, field)[at]
    assert (np.abs(mean - expected) < 0.15 * mean + 2 * error).all()


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("population", [4, 30])
def test_where_z_scored_es_settles(sigma: float, population: int) -> None:
    """From there the recursion does not move, and to there it comes."""
    ascent = dataclasses.replace(TOY, sigma=sigma, population=population)
    settled = zscored.stationary(ascent)
    there = dataclasses.replace(
        ascent, start=np.zeros(128), start_variance=settled.variance
    )
    state = zscored.path(there, 50)
    np.testing.assert_allclose(state.variance[-1], settled.variance, rtol=1e-8)
    last = Moments(state.mean[-1], state.variance[-1])
    spread = zscored.reward_deviation(ascent.eigenvalues, last, sigma)
    assert spread == pytest.approx(settled.reward_deviation, rel=1e-8)
    objective = quadratic.objective(ascent.eigenvalues, last)
    assert 1 - objective == pytest.approx(settled.gap, rel=1e-8)
    if sigma < 1:  # at 1 it takes some ten thousand generations
        far = zscored.path(ascent, 3000).variance[-1]
        np.testing.assert_allclose(far, settled.variance, rtol=1e-4)


def test_limits_of_the_plateau() -> None:
    """Short steps: the linear model with S/σ for σ²; σ → 0: α² d tr(Λ) / 8(N c_N)²."""
    short = dataclasses.replace(TOY, alpha=1e-4, sigma=1.0, population=1000)
    settled = zscored.stationary(short)
    scale = short.alpha * 128 * settled.reward_deviation / (4 * 1000)
    assert settled.gap == pytest.approx(scale, rel=0.01)
    values = np.full(2000, 0.3)  # many equal modes: h is small whatever α is
    tiny = Ascent(
        eigenvalues=values, start=0 * values, alpha=0.01, sigma=1e-9, population=20
    )
    scale = 20 * float(zscored.sample_deviation(20))
    expected = 0.01**2 * 2000 * values.sum() / (8 * scale**2)
    assert zscored.stationary(tiny).gap == pytest.approx(expected, rel=0.02)


def test_uncentred_es_is_another_algorithm() -> None:
    """Eq. (1): the mean is the gradient of the linear model, the noise is not."""
    ascent = dataclasses.replace(TOY, sigma=1.0)
    runs = quadratic.simulate(ascent, 20, key=jax.random.key(0), runs=400, method="es")
    stiff = quadratic.moments(ascent, 20).mean[0]
    means = np.asarray(runs.final, float)[:, :16].mean(-1)
    assert standard_errors(means, stiff) < 3
    flat = float(np.asarray(runs.final)[:, 16:].std())
    model = quadratic.moments(ascent, 20).variance[-1] ** 0.5
    assert flat > 5 * model


def test_what_is_refused() -> None:
    alone = dataclasses.replace(TOY, population=1)
    with pytest.raises(InputError, match="at least 2"):
        zscored.path(alone, 3)
    with pytest.raises(InputError, match="at least 2"):
        zscored.stationary(alone)
    flat = dataclasses.replace(TOY, eigenvalues=np.zeros(128))
    with pytest.raises(InputError, match="without curvature"):
        zscored.stationary(flat)
