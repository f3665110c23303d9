"""Statistics of random perturbations, against values worked out by hand or by draws."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from jes.landscape.probes import (
    SIZES,
    best_of,
    bootstrap,
    deal_out,
    enough,
    gains_of,
    gaussian_best,
    halves,
    headroom,
    improving,
    order_weights,
)


def best(gains, n):
    """Mean and variance of the best gain itself."""
    return best_of(np.array(gains, float), gains, n)


QUANTILES = norm.ppf((np.arange(240) + 0.5) / 240)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([-2, -1, 0, 1, 2], {1: 0, 2: 1.0, 3: 1.5, 4: 1.8, 5: 2.0}),
        (
            [-0.02, -0.01, -0.01, 0, 0, 0, 0.01, 0.03],
            {1: 0, 2: 0.00857142857, 4: 0.01785714286, 8: 0.03},
        ),
        (QUANTILES, {5: 1.1665, 10: 1.5447, 20: 1.8774, 30: 2.0562, 50: 2.2685}),
    ],
)
def test_best_of_has_the_known_values(gains, expected):
    for n, value in expected.items():
        assert best(gains, n)[0] == pytest.approx(value, abs=5e-5)


def test_best_of_is_the_mean_and_variance_over_all_subsets():
    gains = np.array([0.3, -0.1, 0.3, 0.2, -0.4, 0.0, 0.1])
    for n in range(1, 8):
        bests = [max(chosen) for chosen in itertools.combinations(gains, n)]
        mean, variance = best(gains, n)
        assert mean == pytest.approx(np.mean(bests))
        assert variance == pytest.approx(np.var(bests), abs=1e-12)


def test_the_picked_one_is_measured_otherwise_with_even_picks_among_ties():
    gains = np.array([0.0, 1.0, 1.0, 0.5])
    other = np.array([5.0, 1.0, 3.0, 7.0])
    picks = []
    for chosen in itertools.combinations(range(4), 2):
        best = max(gains[list(chosen)])
        picks.append(np.mean([other[i] for i in chosen if gains[i] == best]))
    assert best_of(gains, other, 2)[0] == pytest.approx(np.mean(picks))


def test_best_of_agrees_with_random_subsets():
    rng = np.random.default_rng(0)
    gains = rng.normal(size=240)
    draws = np.array([rng.choice(gains, 30, replace=False).max() for _ in range(2000)])
    mean, variance = best(gains, 30)
    assert abs(draws.mean() - mean) < 4 * np.sqrt(variance / 2000)


@pytest.mark.parametrize("n", [0, 6])
def test_more_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match="5 candidates"):
        order_weights(5, n)


def test_gaussian_gains_saturate_at_30_of_the_grid_whatever_they_mean():
    assert enough([best(QUANTILES, n)[0] for n in SIZES], SIZES) == 30
    values = {5: 1.163, 10: 1.539, 20: 1.867, 30: 2.043, 40: 2.161, 50: 2.249}
    for n, value in values.items():
        assert gaussian_best(n) == pytest.approx(value, abs=6e-4)


def test_nothing_is_enough_where_nothing_improves():
    assert enough([-0.2, -0.1], (5, 10)) == 0
    assert enough([0.95, 1.0], (5, 10)) == 5


def test_the_null_keeps_each_prompts_answers_and_takes_the_candidates_difference():
    rng = np.random.default_rng(1)
    skill = rng.uniform(0.2, 0.8, size=(200, 1))
    bits = rng.random((200, 320)) < skill
    base = np.zeros(320, bool)
    dealt = deal_out(bits, rng)
    np.testing.assert_array_equal(dealt.sum(0), bits.sum(0))
    assert gains_of(bits, base).std() > 0.15
    # Each prompt's answers are then 200 coins of that prompt's share.
    coins = np.sqrt((bits.mean(0) * (1 - bits.mean(0))).sum()) / 320
    assert gains_of(dealt, base).std() == pytest.approx(coins, rel=0.15)


def test_halves_tell_skill_from_the_finite_pool():
    rng = np.random.default_rng(2)
    skill = rng.normal(0.5, 0.05, size=(4000, 1))
    bits = rng.random((4000, 320)) < skill
    own, noise = halves(bits, np.zeros(320, bool), rng)
    assert own == pytest.approx(0.05**2, rel=0.1)
    assert noise == pytest.approx((0.25 - 0.05**2) / 320, rel=0.3)
    own, noise = halves(rng.random((4000, 320)) < 0.5, np.zeros(320, bool), rng)
    assert abs(own) < 4 * 0.25 / 160 / np.sqrt(4000)
    assert noise == pytest.approx(0.25 / 320, rel=0.1)


def test_halves_add_up_to_the_variance():
    rng = np.random.default_rng(3)
    bits = rng.random((50, 20)) < 0.4
    base = rng.random(20) < 0.4
    assert sum(halves(bits, base, rng)) == pytest.approx(
        gains_of(bits, base).var(ddof=1)
    )


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(100):
        low, high = bootstrap(np.mean, rng.normal(size=60), rng, draws=300)
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_improving_and_headroom():
    assert improving(np.array([0.1, 0.0, -0.2, 0.3])) == 0.5
    assert headroom(0.1, 0.75) == pytest.approx(0.4)
    assert np.isnan(headroom(0.0, 1.0))
