"""Ascent on a quadratic: closed forms, against recursion and simulation."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import jes
from jes.errors import InputError
from jes.landscape import quadratic
from jes.landscape.quadratic import Ascent

TOY = Ascent(
    eigenvalues=np.repeat([1.0, 0.05], [16, 112]),
    start=np.repeat([0.3, 0.0], [16, 112]),
    alpha=0.05,
    sigma=1.0,
    population=30,
)
"""16 stiff modes that start far out, 112 flat ones that start at their optimum."""

POPULATIONS = (5, 10, 30, 100)


def with_population(population: int, ascent: Ascent = TOY) -> Ascent:
    return dataclasses.replace(ascent, population=population)


def random_ascent(seed: int, noise: str = "paper") -> Ascent:
    """40 modes of widely different curvature, some of none, and random starts."""
    random = np.random.default_rng(seed)
    values = np.exp(random.normal(-2, 1.5, 40))
    values[:4] = 0
    return Ascent(
        eigenvalues=values,
        start=random.normal(0, 0.3, 40),
        start_variance=random.uniform(0, 0.02, 40),
        alpha=1.2 / values.max(),
        sigma=0.3,
        population=12,
        noise=noise,
    )


def standard_errors(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many standard errors the means over runs are away."""
    samples = np.asarray(samples, float)
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    return np.abs(samples.mean(0) - expected) / error


@pytest.mark.parametrize(
    ("population", "peak", "best", "time", "plateau"),
    [
        (5, 0.8969, 40, 40.014, 0.6786),
        (10, 0.9445, 47, 47.422, 0.8393),
        (30, 0.9795, 59, 58.879, 0.9464),
        (100, 0.9933, 71, 71.286, 0.9839),
    ],
)
def test_rise_and_decay_of_the_toy(
    population: int, peak: float, best: int, time: float, plateau: float
) -> None:
    ascent = with_population(population)
    curve = quadratic.expected_objective(ascent, np.arange(2001))
    assert curve[0] == pytest.approx(0.28, abs=1e-12)
    assert curve.max() == pytest.approx(peak, abs=1e-4)
    assert curve.argmax() == best
    assert 1 - quadratic.plateau_gap(ascent) == pytest.approx(plateau, abs=1e-4)
    assert curve[-1] == pytest.approx(1 - quadratic.plateau_gap(ascent), abs=1e-4)
    closed = quadratic.two_mode_peak_time(ascent)
    assert closed == pytest.approx(time, abs=1e-3)
    assert quadratic.peak_time(ascent) == pytest.approx(closed, rel=1e-9)


def test_details_of_the_toy() -> None:
    variance = quadratic.stationary_variance(TOY)
    assert variance[0] == pytest.approx(8.5470e-4, rel=1e-4)
    assert variance[-1] == pytest.approx(1.668753e-2, rel=1e-6)
    rates, amplitudes = quadratic.blocks(TOY)
    np.testing.assert_allclose(rates, [0.1025866, 5.006260e-3], rtol=1e-6)
    np.testing.assert_allclose(amplitudes, [-0.7131624, 0.0467251], rtol=1e-6)
    pair = dataclasses.replace(
        TOY, eigenvalues=np.array([1.0, 0.05]), start=np.array([0.3, 0.0])
    )
    expected = [-0.0445726, 4.171882e-4]
    np.testing.assert_allclose(quadratic.amplitudes(pair), expected, atol=1e-7)
    assert quadratic.two_mode_peak_time(pair) == pytest.approx(78.8208, abs=1e-4)
    curve = quadratic.expected_objective(pair, [0, 79])
    np.testing.assert_allclose(curve, [0.955, 0.9994229], atol=1e-6)
    assert quadratic.plateau_gap(pair) == pytest.approx(1 - 0.9991555, abs=1e-7)


@pytest.mark.parametrize(
    ("alpha", "all_modes", "stiff_only"),
    [
        (0.001, 128.0108, 16.0080),
        (0.05, 128.5504, 16.4103),
        (0.5, 134.7511, 21.3333),
    ],
)
def test_effective_dimension(alpha: float, all_modes: float, stiff_only: float) -> None:
    """It counts flat modes as well as stiff ones, and not those without curvature."""
    values = TOY.eigenvalues
    assert quadratic.effective_dimension(values, alpha) == pytest.approx(
        all_modes, abs=1e-4
    )
    strict = np.where(values == 1, 1.0, 0.0)
    assert quadratic.effective_dimension(strict, alpha) == pytest.approx(
        stiff_only, abs=1e-4
    )


def test_slope_of_plateaus() -> None:
    noise = [quadratic.effective_noise(with_population(n)) for n in POPULATIONS]
    assert noise == pytest.approx([1 / n for n in POPULATIONS])
    gaps = [quadratic.plateau_gap(with_population(n)) for n in POPULATIONS]
    slope, intercept = np.polyfit(noise, gaps, 1)
    assert slope == pytest.approx(1.60688, abs=1e-5)
    assert abs(intercept) < 1e-12
    small = dataclasses.replace(TOY, sigma=0.01, noise="zscore")
    assert quadratic.plateau_gap(small) == quadratic.plateau_gap(TOY)


@pytest.mark.parametrize("noise", quadratic.NOISES)
@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_agree_on_random_spectra(seed: int, noise: str) -> None:
    """Eq. (16), (17), (18), (21) and (26) with each other and with the recursion."""
    ascent = random_ascent(seed, noise)
    curved = ascent.eigenvalues > 0
    time = np.arange(301)
    closed, exact = quadratic.moments(ascent, time), quadratic.path(ascent, 300)
    np.testing.assert_allclose(closed.mean, exact.mean, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(closed.variance, exact.variance, rtol=1e-11)
    b, a = quadratic.step_noise(ascent), quadratic.contraction(ascent)
    stationary = quadratic.stationary_variance(ascent)
    np.testing.assert_allclose(
        stationary[curved], b**2 / (1 - a[curved] ** 2), rtol=1e-11
    )
    assert np.isinf(stationary[~curved]).all()
    np.testing.assert_allclose(
        closed.variance[-1, ~curved],
        (ascent.start_variance + 300 * b**2)[~curved],
        rtol=1e-12,
    )
    gap = (ascent.eigenvalues[curved] * stationary[curved]).sum() / 2
    assert quadratic.plateau_gap(ascent) == pytest.approx(gap, rel=1e-13)
    decays = np.exp(-quadratic.rates(ascent) * time[:, None])
    np.testing.assert_allclose(
        quadratic.expected_objective(ascent, time),
        1 - gap + (quadratic.amplitudes(ascent) * decays).sum(-1),
        atol=1e-13,
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_root_is_the_peak_on_random_spectra(seed: int) -> None:
    ascent = dataclasses.replace(
        random_ascent(seed), start_variance=0.0, population=5, sigma=1.0
    )
    stiff = ascent.eigenvalues > np.median(ascent.eigenvalues)
    ascent = dataclasses.replace(ascent, start=np.where(stiff, 3.0, 0.0))
    time = quadratic.peak_time(ascent)
    curve = quadratic.expected_objective(ascent, np.arange(3000))
    assert time is not None
    assert abs(curve.argmax() - time) < 1
    assert curve.argmax() > 0


def test_no_peak_where_the_curve_is_monotone() -> None:
    """Only rising, only falling, at rest, one mode, no curvature."""
    far = dataclasses.replace(TOY, start=np.full(128, 3.0))
    assert (quadratic.amplitudes(far) < 0).all()
    inside = dataclasses.replace(TOY, start=np.zeros(128))
    # Mixed signs, but what falls is more than what rises from the first generation on.
    weak = dataclasses.replace(TOY, start=np.repeat([0.03, 0.0], [16, 112]))
    assert quadratic.amplitudes(weak)[0] < 0 < quadratic.amplitudes(weak)[-1]
    for ascent in (far, inside, weak):
        assert quadratic.peak_time(ascent) is None
        assert quadratic.two_mode_peak_time(ascent) is None
        steps = np.diff(quadratic.expected_objective(ascent, np.arange(1, 1000)))
        assert (steps > 0).all() or (steps < 0).all()
    for values in ([1.0], [0.0, 0.0]):
        start = np.ones(len(values))
        single = dataclasses.replace(TOY, eigenvalues=np.array(values), start=start)
        assert quadratic.peak_time(single) is None


def test_the_highest_of_two_peaks() -> None:
    """Three rates make four turns possible; the finder takes the higher top."""
    ascent = Ascent(
        eigenvalues=np.array([1.0, 0.1, 0.01, 0.001]),
        start=np.array([1.0, 0.0, 5.0, 0.0]),
        alpha=0.2,
        sigma=1.0,
        population=2,
    )
    curve = quadratic.expected_objective(ascent, np.arange(20_000))
    slopes = np.sign(np.diff(curve))
    tops = 1 + np.flatnonzero((slopes[:-1] > 0) & (slopes[1:] < 0))
    assert len(tops) == 2
    assert curve[tops[0]] < curve[tops[1]]
    assert quadratic.peak_time(ascent) == pytest.approx(tops[1], abs=1)
    # A nearer start of the slow mode makes the first the higher one.
    ascent = dataclasses.replace(ascent, start=np.array([1.0, 0.0, 3.0, 0.0]))
    curve = quadratic.expected_objective(ascent, np.arange(20_000))
    assert quadratic.peak_time(ascent) == pytest.approx(curve.argmax(), abs=1)
    assert curve.argmax() < 50


@pytest.mark.parametrize("population", POPULATIONS)
def test_simulation_of_the_toy(population: int) -> None:
    """400 runs: every tenth generation within 3 standard errors, the start exactly."""
    ascent = with_population(population)
    runs = quadratic.simulate(ascent, 160, key=jax.random.key(6), runs=400)
    time = np.arange(10, 161, 30)
    expected = quadratic.expected_objective(ascent, time)
    away = standard_errors(runs.objective[:, time], expected)
    assert (away < 3).all()
    assert np.abs(runs.objective[:, time].mean(0) - expected).max() < 0.004


@pytest.mark.slow
@pytest.mark.parametrize("population", POPULATIONS[:3])
def test_simulated_peak(population: int) -> None:
    """Of 4000 runs, by a quartic through the top: within 5 % of Eq. (25)."""
    ascent = with_population(population)
    time = quadratic.two_mode_peak_time(ascent)
    assert time is not None
    runs = quadratic.simulate(ascent, 80, key=jax.random.key(1), runs=4000)
    window = np.arange(round(time) - 16, round(time) + 17)
    curve = np.asarray(runs.objective, float).mean(0)
    fitted = np.polynomial.Polynomial.fit(window, curve[window], 4)
    grid = np.linspace(window[0], window[-1], 1000)
    assert grid[fitted(grid).argmax()] == pytest.approx(time, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("noise", quadratic.NOISES)
def test_simulation_of_random_spectra(noise: str) -> None:
    """Mean and variance of every mode, and the objective."""
    ascent = random_ascent(7, noise)
    runs = quadratic.simulate(ascent, 60, key=jax.random.key(2), runs=4000)
    time = np.array([0, 3, 20, 60])
    expected = quadratic.expected_objective(ascent, time)
    assert (standard_errors(runs.objective[:, time], expected) < 3).all()
    mean, variance = quadratic.moments(ascent, 60)
    final = np.asarray(runs.final, float)
    z = (final.mean(0) - mean) / np.sqrt(variance / 4000)
    ratio = (final.var(0) / variance - 1) / np.sqrt(2 / 4000)
    # Chi-square with 40 degrees: mean 40, three standard deviations above is 67.
    assert (z**2).sum() < 67
    assert (ratio**2).sum() < 67


def test_schedules_and_decay_against_simulation() -> None:
    """α, σ and N that change, with a pull to the start, all at once."""
    ascent = random_ascent(3)
    time = np.arange(60)
    changes = {
        "alpha": ascent.alpha / (1 + time / 30),
        "sigma": np.where(time < 30, 0.5, 0.1),
        "population": np.where(time < 40, 4, 40),
        "decay": 0.02 * (time > 10),
    }
    exact = quadratic.path(ascent, 60, **changes)
    runs = quadratic.simulate(ascent, 60, key=jax.random.key(0), runs=4000, **changes)
    at = np.array([10, 30, 45, 60])
    expected = quadratic.objective(ascent.eigenvalues, exact)[at]
    assert (standard_errors(runs.objective[:, at], expected) < 3).all()
    final = np.asarray(runs.final, float)
    z = (final.mean(0) - exact.mean[-1]) / np.sqrt(exact.variance[-1] / 4000)
    assert (z**2).sum() < 67


def test_where_anchored_weight_decay_settles() -> None:
    ascent = random_ascent(5, "zscore")
    state = quadratic.path(ascent, 3000, decay=0.1)
    kept = 1 - ascent.alpha * 0.1
    product = kept * quadratic.contraction(ascent)
    mean = (1 - kept) * ascent.start / (1 - product)
    variance = (kept * quadratic.step_noise(ascent)) ** 2 / (1 - product**2)
    np.testing.assert_allclose(state.mean[-1], mean, rtol=1e-12)
    np.testing.assert_allclose(state.variance[-1], variance, rtol=1e-12)
    # Without curvature it is the law of drift.
    free = ascent.eigenvalues == 0
    law = jes.drift_norm(
        alpha=ascent.alpha,
        population=ascent.population,
        parameters=int(free.sum()),
        generations=math.inf,
        kind="l2",
        coefficient=0.1,
    )
    assert state.variance[-1, free].sum() ** 0.5 == pytest.approx(law, rel=1e-12)
    np.testing.assert_allclose(state.mean[-1, free], ascent.start[free], rtol=1e-12)


def test_stationary_covariance() -> None:
    """Diagonal and rotated noise; with isotropic noise it is Eq. (17)."""
    curvature = np.diag([1.0, 0.05])
    same = quadratic.stationary_covariance(curvature, np.eye(2) / 30, 0.05)
    np.testing.assert_allclose(np.diag(same), [8.5470e-4, 1.668753e-2], rtol=1e-4)
    gap = np.trace(curvature @ same) / 2
    assert gap == pytest.approx(8.445386e-4, rel=1e-6)
    c, s = math.cos(0.5), math.sin(0.5)
    turn = np.array([[c, -s], [s, c]])
    noise = turn @ np.diag([1.0, 0.1]) @ turn.T / 30
    exact = quadratic.stationary_covariance(curvature, noise, 0.05)
    expected = [[6.7789e-4, 6.0249e-4], [6.0249e-4, 5.1208e-3]]
    np.testing.assert_allclose(exact, expected, rtol=1e-4)
    gap = np.trace(curvature @ exact) / 2
    assert gap == pytest.approx(4.66967e-4, rel=1e-6)
    kept = np.eye(2) - 0.05 * curvature  # Eq. (31) leaves it as it is
    after = kept @ exact @ kept.T + 0.05**2 * noise
    np.testing.assert_allclose(after, exact, rtol=1e-12)
    balance = curvature @ exact + exact @ curvature.T
    assert np.abs(balance / (0.05 * noise) - 1).max() == pytest.approx(0.026, abs=5e-4)
    # A basis is as good as another, and curvature may be of any kind that has a state.
    turned = turn @ curvature @ turn.T
    np.testing.assert_allclose(
        quadratic.stationary_covariance(turned, turn @ noise @ turn.T, 0.05),
        turn @ exact @ turn.T,
        rtol=1e-10,
    )
    for bad in (0.0, -0.1, 41.0):
        with pytest.raises(InputError, match="no stationary state"):
            quadratic.stationary_covariance(np.diag([1.0, bad]), noise, 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 2.0}, "between 0 and 2"),
        ({"alpha": 0.0}, "between 0 and 2"),
        ({"eigenvalues": np.linspace(-1, 1, 128)}, "cannot be negative"),
        ({"start": np.zeros(3)}, "one length"),
        ({"population": 0}, "population"),
        ({"sigma": 0.0}, "sigma"),
        ({"noise": "white"}, "noise must be"),
    ],
)
def test_ascents_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TOY, **change)


def test_what_else_is_refused() -> None:
    with pytest.raises(InputError, match="two distinct"):
        quadratic.two_mode_peak_time(random_ascent(0))
    with pytest.raises(InputError, match="alpha must be a number or 10"):
        quadratic.path(TOY, 10, alpha=np.ones(9))
    with pytest.raises(InputError, match="below 1"):
        quadratic.path(TOY, 10, decay=20.0)
    with pytest.raises(TypeError, match="no schedule of"):
        quadratic.path(TOY, 10, rate=1.0)
    key = jax.random.key(0)
    with pytest.raises(InputError, match="method"):
        quadratic.simulate(TOY, 10, key=key, runs=2, method="sgd")
    with pytest.raises(InputError, match="one population"):
        quadratic.simulate(TOY, 10, key=key, runs=2, method="es", population=5)
    with pytest.raises(InputError, match="method"):
        quadratic.estimates(TOY, key=key, runs=2, method="linear")
