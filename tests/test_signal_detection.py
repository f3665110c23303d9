"""Type-2 signal detection: known values, invariances, and laws of the intervals.

The values are recomputed with SciPy from the definitions; four decimals where the
source rounds to four.
"""

import functools
import math
import operator

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from jes.metacognition import (
    CORRECTIONS,
    Counts,
    accuracy,
    alignment,
    auroc2,
    best_threshold,
    bootstrap,
    counts,
    criterion,
    d_prime,
    d_prime_error,
    no_failure_rate,
    relative_meta_information,
    report,
    yes_failure_rate,
    yes_rate,
)

NAN, INF = math.nan, math.inf
approx = functools.partial(pytest.approx, rel=0, abs=1e-6, nan_ok=True)

# Counts (hits, misses, false alarms, correct rejections); d' for each of CORRECTIONS.
D_PRIMES = [
    ((80, 20, 30, 70), (1.366022, 1.366022, 1.349772, 1.366022)),
    ((69, 31, 31, 69), (0.991701, 0.991701, 0.981050, 0.991701)),
    ((9, 1, 2, 8), (2.123173, 2.123173, 1.844662, 2.123173)),
    ((30, 20, 10, 140), (1.754433, 1.754433, 1.727528, 1.754433)),
    ((50, 50, 50, 50), (0, 0, 0, 0)),
    ((3, 0, 0, 3), (INF, 7.438033, 2.300699, 1.934843)),
    ((0, 2, 2, 0), (-INF, -7.438033, -1.934843, -1.348980)),
    ((100, 0, 50, 50), (INF, 3.719016, 2.579268, 2.575829)),
    ((100, 0, 100, 0), (NAN, 0, 0, 0)),
    # Those who always answer the same: only the clip gives 0 for classes that differ.
    ((0, 50, 0, 150), (NAN, 0, 0.381484, 0.386704)),
    ((50, 0, 150, 0), (NAN, 0, -0.381484, -0.386704)),
    ((0, 0, 3, 4), (NAN, NAN, NAN, NAN)),
    ((3, 4, 0, 0), (NAN, NAN, NAN, NAN)),
    ((0, 0, 0, 0), (NAN, NAN, NAN, NAN)),
]


def questions(cells: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Correct and Yes, one entry a question, that have these counts."""
    cell = np.repeat(np.arange(4), cells)
    return cell < 2, cell % 2 == 0


def simulate(
    rng: np.random.Generator, shape: tuple[int, ...], hit: float, false_alarm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Questions that are correct half of the time."""
    correct = rng.random(shape) < 0.5
    return correct, rng.random(shape) < np.where(correct, hit, false_alarm)


@pytest.mark.parametrize(("cells", "expected"), D_PRIMES)
def test_d_prime(cells: tuple[int, int, int, int], expected: tuple[float]) -> None:
    table = counts(*questions(cells))
    assert table == cells
    for correction, value in zip(CORRECTIONS, expected, strict=True):
        assert float(d_prime(table, correction)) == approx(value), correction


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_leading_axes(correction: str) -> None:
    """A table of all counts at once is the counts one by one, in float64."""
    table = Counts(*np.array([cells for cells, _ in D_PRIMES]).T.reshape(4, 2, 7))
    column = list(CORRECTIONS).index(correction)
    found = d_prime(table, correction)
    assert found.shape == (2, 7)
    assert found.dtype == np.float64
    assert found.ravel() == approx([values[column] for _, values in D_PRIMES])
    for measure in (criterion, d_prime_error):
        each = [measure(Counts(*cells), correction) for cells, _ in D_PRIMES]
        np.testing.assert_array_equal(measure(table, correction).ravel(), each)
    for measure in (alignment, no_failure_rate, relative_meta_information):
        each = [measure(Counts(*cells)) for cells, _ in D_PRIMES]
        np.testing.assert_array_equal(measure(table).ravel(), each)


@pytest.mark.parametrize(
    ("correct", "yes", "expected"),
    [
        ([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], 7.438033),
        ([1, 1, 0, 0], [0, 0, 1, 1], -7.438033),
    ],
)
def test_d_prime_of_the_paper(
    correct: list[int], yes: list[int], expected: float
) -> None:
    assert float(d_prime(counts(correct, yes), "clip")) == approx(expected)


def test_loglinear_is_that_of_hautus() -> None:
    """And not (h + .5)/((h + .5) + m + 1), which a known package has."""
    hits, misses, false_alarms, rejections = 9, 1, 2, 8
    not_hautus = ndtri((hits + 0.5) / (hits + 0.5 + misses + 1)) - ndtri(
        (false_alarms + 0.5) / (false_alarms + 0.5 + rejections + 1)
    )
    assert not_hautus == approx(1.719848)
    found = d_prime(Counts(hits, misses, false_alarms, rejections))
    assert found - not_hautus == approx(1.844662 - 1.719848)


@pytest.mark.parametrize(
    ("cells", "clip", "loglinear", "rest"),
    [
        # alignment, rate of Yes, accuracy, P(wrong | Yes), P(correct | No), RMI, area
        (
            (80, 20, 30, 70),
            -0.158610,
            -0.156172,
            (0.75, 0.55, 0.5, 0.272727, 0.222222, 0.191165, 0.75),
        ),
        ((69, 31, 31, 69), 0, 0, (0.69, 0.5, 0.5, 0.31, 0.31, 0.106827, 0.69)),
        (
            (9, 1, 2, 8),
            -0.219965,
            -0.174472,
            (0.85, 0.55, 0.5, 0.181818, 0.111111, 0.397313, 0.85),
        ),
        (
            (30, 20, 10, 140),
            0.623869,
            0.615489,
            (0.85, 0.2, 0.25, 0.25, 0.125, 0.263992, 0.766667),
        ),
        (
            (100, 0, 50, 50),
            -1.859508,
            -1.289634,
            (0.75, 0.75, 0.5, 0.333333, 0, 0.311278, 0.75),
        ),
        (
            (100, 0, 100, 0),
            -3.719016,
            -2.579268,
            (0.5, 1, 0.5, 0.5, NAN, 0, 0.5),
        ),
        ((0, 2, 2, 0), 0, 0, (0, 0.5, 0.5, 1, 1, 1, 0)),
        ((50, 50, 50, 50), 0, 0, (0.5, 0.5, 0.5, 0.5, 0.5, 0, 0.5)),
        ((3, 0, 0, 3), 0, 0, (1, 0.5, 0.5, 0, 0, 1, 1)),
        # An accuracy of 0 leaves nothing to tell, and no area.
        ((0, 0, 3, 1), NAN, NAN, (0.25, 0.75, 0, 1, 0, 0, NAN)),
        ((3, 1, 0, 0), NAN, NAN, (0.75, 0.75, 1, 0, 1, 0, NAN)),
        ((0, 0, 0, 0), NAN, NAN, (NAN, NAN, NAN, NAN, NAN, NAN, NAN)),
    ],
)
def test_criterion_and_companions(
    cells: tuple[int, int, int, int],
    clip: float,
    loglinear: float,
    rest: tuple[float, ...],
) -> None:
    table = Counts(*cells)
    assert float(criterion(table, "clip")) == approx(clip)
    assert float(criterion(table)) == approx(loglinear)
    correct, yes = questions(cells)
    found = (
        alignment(table),
        yes_rate(table),
        accuracy(table),
        yes_failure_rate(table),
        no_failure_rate(table),
        relative_meta_information(table),
        auroc2(yes, correct),
    )
    assert np.array(found) == approx(np.array(rest))


def test_information_of_independent_and_of_equal_answers() -> None:
    """0 and 1 within rounding, and never outside."""
    correct, said = np.mgrid[1:40, 1:40]
    table = Counts(correct * said, correct * 7, 3 * said, np.full_like(said, 21))
    assert relative_meta_information(table) == approx(0)
    assert relative_meta_information(table).min() >= 0
    none = np.zeros_like(said)
    same = relative_meta_information(Counts(correct, none, none, said))
    assert same == approx(1)
    assert same.max() <= 1


def test_failure_rates_of_four_questions() -> None:
    table = counts([1, 0, 1, 0], [1, 1, 0, 0])
    assert yes_failure_rate(table) == no_failure_rate(table) == 0.5


@pytest.mark.parametrize(("answer", "aligned"), [(1, 0.3), (0, 0.7)])
def test_constant_answers(answer: int, aligned: float) -> None:
    """Raw alignment pays for a bias; d' does not."""
    correct = np.arange(100) < 30
    table = counts(correct, answer)
    assert float(d_prime(table, "clip")) == 0
    assert float(accuracy(table)) == 0.3
    assert float(alignment(table)) == aligned


@pytest.mark.parametrize(
    ("bias", "hit", "false_alarm", "at_half", "at_third"),
    [
        (-1.0, 0.9332, 0.6915, 0.6209, 0.4959),
        (-0.5, 0.8413, 0.5000, 0.6707, 0.6024),
        (0.0, 0.6915, 0.3085, 0.6915, 0.6915),
        (0.5, 0.5000, 0.1587, 0.6707, 0.7389),
        (1.0, 0.3085, 0.0668, 0.6209, 0.7458),
        (1.5, 0.1587, 0.0228, 0.5680, 0.7317),
    ],
)
def test_alignment_moves_with_bias_and_d_prime_does_not(
    bias: float, hit: float, false_alarm: float, at_half: float, at_third: float
) -> None:
    high, low = ndtr(0.5 - bias), ndtr(-0.5 - bias)
    # Half a unit of the fourth decimal.
    assert (high, low) == pytest.approx((hit, false_alarm), rel=0, abs=5e-5)
    for right, expected in ((0.5, at_half), (0.3, at_third)):
        wrong = 1 - right
        table = Counts(high * right, (1 - high) * right, low * wrong, (1 - low) * wrong)
        assert float(d_prime(table, "none")) == approx(1)
        assert float(criterion(table, "none")) == approx(bias)
        assert float(alignment(table)) == pytest.approx(expected, rel=0, abs=5e-5)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_exchanged_labels(correction: str) -> None:
    rng = np.random.default_rng(0)
    h, m, f, c = rng.integers(0, 6, (4, 200)) * rng.integers(0, 2, (4, 200))
    table, answers, labels = Counts(h, m, f, c), Counts(m, h, c, f), Counts(f, c, h, m)
    sensitivity, bias = d_prime(table, correction), criterion(table, correction)
    assert d_prime(labels, correction) == approx(-sensitivity)
    assert criterion(labels, correction) == approx(bias)
    assert d_prime(answers, correction) == approx(-sensitivity)
    assert criterion(answers, correction) == approx(-bias)
    information = relative_meta_information(table)
    for other in (labels, answers):
        assert relative_meta_information(other) == approx(information)


@pytest.mark.parametrize("correction", [name for name in CORRECTIONS if name != "none"])
def test_finite_and_monotone(correction: str) -> None:
    """More hits raise d', more false alarms lower it, at all counts of a size."""
    for correct, wrong in ((12, 7), (2, 30)):
        hits, false_alarms = np.mgrid[: correct + 1, : wrong + 1]
        table = Counts(hits, correct - hits, false_alarms, wrong - false_alarms)
        found = d_prime(table, correction)
        assert np.isfinite(found).all()
        assert np.isfinite(criterion(table, correction)).all()
        assert (np.diff(found, axis=0) > 0).all()
        assert (np.diff(found, axis=1) < 0).all()


def test_loglinear_tends_to_raw() -> None:
    """By less than 0.002 at 10,000 a class, for rates from 0.05 to 0.95."""
    hits, false_alarms = np.mgrid[500:9501:500, 500:9501:500]
    table = Counts(hits, 10_000 - hits, false_alarms, 10_000 - false_alarms)
    assert np.abs(d_prime(table) - d_prime(table, "none")).max() < 0.002


def test_shards_pool_by_addition() -> None:
    rng = np.random.default_rng(0)
    correct, yes = simulate(rng, (4, 25), 0.9, 0.2)
    shards = [counts(*shard) for shard in zip(correct, yes, strict=True)]
    pooled = functools.reduce(operator.add, shards)
    assert isinstance(pooled, Counts)
    assert pooled == counts(correct.ravel(), yes.ravel())
    # The mean of the shards' values is another number.
    apart = np.mean([d_prime(shard) for shard in shards])
    assert abs(apart - d_prime(pooled)) > 0.05


def test_counts_along_another_axis_and_broadcast() -> None:
    correct, yes = simulate(np.random.default_rng(0), (7, 3), 0.8, 0.3)
    by_column = counts(correct, yes, axis=0)
    for cell, transposed in zip(by_column, counts(correct.T, yes.T), strict=True):
        np.testing.assert_array_equal(cell, transposed)
    first = counts(correct[:, 0], yes.T)
    assert [cell[1] for cell in first] == list(counts(correct[:, 0], yes[:, 1]))


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        ((80, 20, 30, 70), 0.1944),
        ((800, 200, 600, 1400), 0.0539),
        ((2400, 1600, 1680, 5320), 0.0259),
    ],
)
def test_delta_method(cells: tuple[int, int, int, int], error: float) -> None:
    # Half a unit of the fourth decimal.
    found = float(d_prime_error(Counts(*cells), "none"))
    assert found == pytest.approx(error, rel=0, abs=5e-5)


def test_delta_method_against_the_law_of_the_estimate() -> None:
    """Summed over all outcomes of 100 correct and 100 wrong answers."""
    count = np.arange(101)
    hits, false_alarms = np.meshgrid(count, count, indexing="ij")
    estimate = d_prime(Counts(hits, 100 - hits, false_alarms, 100 - false_alarms))
    weight = np.outer(binom.pmf(count, 100, 0.8), binom.pmf(count, 100, 0.3))
    mean = (weight * estimate).sum()
    spread = math.sqrt((weight * (estimate - mean) ** 2).sum())
    assert mean == pytest.approx(1.3628, rel=0, abs=5e-5)
    delta = float(d_prime_error(Counts(80, 20, 30, 70), "none"))
    assert spread == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize(
    ("cells", "correction", "finite"),
    [
        ((3, 0, 1, 2), "none", False),
        ((3, 0, 1, 2), "loglinear", True),
        ((0, 0, 1, 2), "loglinear", False),
        ((1, 2, 0, 0), "clip", False),
    ],
)
def test_delta_method_where_d_prime_is_not_finite(
    cells: tuple[int, int, int, int], correction: str, finite: bool
) -> None:
    error = d_prime_error(Counts(*cells), correction)
    assert np.isfinite(error) == finite
    assert finite or np.isnan(error)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        (
            [0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3, 0.2],
            [1, 1, 0, 1, 1, 0, 0, 1],
            0.666667,
        ),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 0.5),
        ([1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0], 0.666667),
        ([-INF, 0.0, INF], [0, 1, 1], 1),
        ([0.1, 0.2], [1, 1], NAN),
        ([0.1, 0.2], [0, 0], NAN),
        ([0.1, NAN, 0.2], [0, 0, 1], NAN),
        ([], [], NAN),
    ],
)
def test_auroc2(confidence: list[float], correct: list[int], expected: float) -> None:
    assert float(auroc2(confidence, correct)) == approx(expected)


@pytest.mark.parametrize(
    ("sensitivity", "area"), [(1.0, 0.760250), (0.9302, 0.744651), (0.1985, 0.555812)]
)
def test_link_of_auroc2_and_d_prime(sensitivity: float, area: float) -> None:
    """Normal confidences d' apart have an area of Φ(d'/√2)."""
    normal = ndtri((np.arange(100_000) + 0.5) / 100_000)  # error 1e-7 at this size
    correct = np.repeat([True, False], normal.size)
    confidence = np.concatenate([normal + sensitivity, normal])
    assert float(auroc2(confidence, correct)) == approx(area)
    assert ndtr(sensitivity / math.sqrt(2)) == approx(area)


def test_auroc2_against_all_pairs() -> None:
    """With many ties; vectorised, and unmoved by an increasing map or by order."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-4, 5, (30, 17))
    correct = rng.random((30, 17)) < 0.4
    found = auroc2(logits, correct)
    for row, right, area in zip(logits, correct, found, strict=True):
        pairs = np.subtract.outer(row[right], row[~right])
        assert area == approx(((pairs > 0) + (pairs == 0) / 2).mean())
    np.testing.assert_array_equal(auroc2(1 / (1 + np.exp(-logits)), correct), found)
    np.testing.assert_array_equal(auroc2(logits.astype(np.float32), correct), found)
    order = rng.permutation(17)
    np.testing.assert_array_equal(auroc2(logits[:, order], correct[:, order]), found)


def test_report() -> None:
    """Ten questions; the last two got neither Yes nor No, so they count as No."""
    correct = [1, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    yes = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    other = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    confidence = [4, 4, 3, 1, 3, 1, 0, -1, 0, -2]
    found = report(correct, yes, other, confidence)
    # Counts 3, 2, 1, 4; without other 3, 1, 1, 3.
    high, low = ndtri(3.5 / 6), ndtri(1.5 / 6)
    information = 1 - (0.4 * entropy(3 / 4) + 0.6 * entropy(2 / 6))  # of 1 bit
    assert found == approx(
        {
            "accuracy": 0.5,
            "yes_rate": 0.4,
            "other_rate": 0.2,
            "alignment": 0.7,
            "d_prime": high - low,
            "d_prime_clip": ndtri(0.6) - ndtri(0.2),
            "criterion": -(high + low) / 2,
            "auroc2": (5 + 5 + 4.5 + 3.5 + 2.5) / 25,
            "yes_failure_rate": 1 / 4,
            "no_failure_rate": 2 / 6,
            "rmi": information,
            "d_prime_without_other": 2 * ndtri(0.7),
            "correct": 5,
            "wrong": 5,
        }
    )
    assert all(type(value) is float for value in found.values())
    without = report(correct, yes)
    unknown = {"other_rate", "auroc2", "d_prime_without_other"}
    assert {name for name, value in without.items() if math.isnan(value)} == unknown
    order = np.random.default_rng(0).permutation(10)
    columns = (np.array(column)[order] for column in (correct, yes, other, confidence))
    assert report(*columns) == found


def entropy(rate: float) -> float:
    """Bits of one of two outcomes."""
    return -rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate)


def test_report_of_nothing() -> None:
    found = report([], [], [], [])
    assert (found.pop("correct"), found.pop("wrong")) == (0, 0)
    assert all(math.isnan(value) for value in found.values())


def sensitivity(correct: np.ndarray, yes: np.ndarray) -> np.ndarray:
    return d_prime(counts(correct, yes))


def test_bootstrap_of_a_mean_is_binomial() -> None:
    """Its ends are quantiles of 20,000 draws, 4 standard errors from the next value."""
    yes = np.arange(100) < 30
    found = bootstrap(lambda x: x.mean(-1), yes, resamples=20_000, level=0.88)
    # P(X <= 22) = .0479, P(X <= 23) = .0755; P(X <= 36) = .9201, P(X <= 37) = .9470.
    expected = binom.ppf((0.06, 0.94), 100, 0.3) / 100
    assert found == tuple(expected) == (0.23, 0.37)


@pytest.mark.slow
def test_bootstrap_covers_the_truth() -> None:
    """In 95 % of 400 sets of 200 questions: within 3 standard errors, 3.3 %."""
    correct, yes = simulate(np.random.default_rng(0), (400, 200), 0.8, 0.3)
    truth = ndtri(0.8) - ndtri(0.3)
    covered = 0
    for seed, columns in enumerate(zip(correct, yes, strict=True)):
        low, high = bootstrap(sensitivity, *columns, resamples=300, seed=seed)
        covered += low <= truth <= high
    assert covered / 400 == pytest.approx(0.95, rel=0, abs=0.033)


def test_bootstrap_has_the_width_of_the_delta_method() -> None:
    """At more questions than are resampled at once.

    An end of 1,000 resamples is known to 0.085 standard errors, so the width of 3.92 to
    3 %: 9 % is three times that.
    """
    columns = questions((1200, 300, 450, 1050))
    low, high = bootstrap(sensitivity, *columns)
    width = 2 * ndtri(0.975) * float(d_prime_error(Counts(1200, 300, 450, 1050)))
    assert high - low == pytest.approx(width, rel=0.09)
    assert low < float(sensitivity(*columns)) < high


def test_bootstrap_pairs_models() -> None:
    """On the same questions: what two models share takes no part in the difference."""
    rng = np.random.default_rng(0)
    correct, yes = simulate(rng, (300,), 0.8, 0.3)

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return sensitivity(a, b) - sensitivity(a, c)

    assert bootstrap(difference, correct, yes, yes) == (0, 0)
    changed = np.where(rng.random(300) < 0.1, ~yes, yes)
    low, high = bootstrap(difference, correct, yes, changed)
    alone = [bootstrap(sensitivity, correct, answers) for answers in (yes, changed)]
    unpaired = math.hypot(*(top - bottom for bottom, top in alone))
    assert high - low < 0.7 * unpaired


def test_bootstrap_repeats_and_takes_any_statistic_of_questions() -> None:
    correct, yes = simulate(np.random.default_rng(0), (50,), 0.8, 0.3)
    first = bootstrap(sensitivity, correct, yes, seed=1)
    assert bootstrap(sensitivity, correct, yes, seed=1) == first
    assert bootstrap(sensitivity, correct, yes, seed=2) != first
    both = np.stack([correct, yes], axis=1)
    rows = bootstrap(lambda x: sensitivity(x[..., 0], x[..., 1]), both, seed=1)
    assert rows == first
    confidence = np.where(yes, 0.9, 0.1)
    low, high = bootstrap(auroc2, confidence, correct)
    assert 0.5 < low < float(auroc2(confidence, correct)) < high < 1


def test_bootstrap_leaves_out_resamples_without_a_class() -> None:
    """One question of 20 is correct: 36 % of the resamples miss it, and 64 % count."""
    correct = np.arange(20) == 0
    yes = np.arange(20) < 2
    low, high = bootstrap(sensitivity, correct, yes)
    assert math.isfinite(low)
    assert math.isfinite(high)
    for alike in (np.zeros(20, bool), np.ones(20, bool), np.zeros(0, bool)):
        nothing = bootstrap(sensitivity, alike, yes[: alike.size])
        assert np.isnan(nothing).all()

    def share_missing(share: float) -> tuple[float, float]:
        def statistic(x: np.ndarray) -> np.ndarray:
            return np.where(np.arange(len(x)) < share * len(x), NAN, 1.0)

        return bootstrap(statistic, yes)

    assert share_missing(0.5) == (1, 1)
    assert np.isnan(share_missing(0.501)).all()


def test_bootstrap_of_infinite_values() -> None:
    """Raw d' of a perfect model, mixed with resamples that have one error."""
    correct = np.arange(40) < 20
    yes = correct ^ (np.arange(40) == 0)

    def raw(correct: np.ndarray, yes: np.ndarray) -> np.ndarray:
        return d_prime(counts(correct, yes), "none")

    assert bootstrap(raw, correct, yes) == (INF, INF)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.1, 0.4, 0.6, 0.8], [0, 0, 1, 1], 0.4),
        ([0.8, 0.1, 0.4, 0.6], [1, 0, 1, 0], 0.1),  # as good as 0.6, and lower
        ([0.2, 0.7], [1, 1], -INF),
        ([0.2, 0.7], [0, 0], 0.7),
        ([0.5, 0.5, 0.5], [1, 1, 0], -INF),
        ([0.5, 0.5, 0.5], [1, 0, 0], 0.5),
        ([0.5, 0.5], [1, 0], -INF),
        ([-INF, 0.0, INF], [0, 1, 1], -INF),
        ([3], [1], -INF),
    ],
)
def test_best_threshold(
    confidence: list[float], correct: list[int], expected: float
) -> None:
    assert best_threshold(confidence, correct) == expected


def test_best_threshold_against_all_thresholds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        confidence = rng.integers(0, 8, 15) / 8
        correct = rng.random(15) < 0.2 + 0.6 * confidence

        def aligned(
            threshold: float,
            confidence: np.ndarray = confidence,
            correct: np.ndarray = correct,
        ) -> float:
            return float(alignment(counts(correct, confidence > threshold)))

        thresholds = [-INF, *np.unique(confidence)]
        best = max(aligned(threshold) for threshold in thresholds)
        lowest = next(t for t in thresholds if aligned(t) == best)
        assert best_threshold(confidence, correct) == lowest


def test_mistakes_are_named() -> None:
    table = Counts(1, 1, 1, 1)
    for measure in (d_prime, criterion, d_prime_error):
        with pytest.raises(ValueError, match="none, clip, loglinear, half"):
            measure(table, "hautus")
    with pytest.raises(ValueError, match="other than 0 and 1"):
        counts([1, 2], [0, 1])
    with pytest.raises(ValueError, match="other than 0 and 1"):
        auroc2([0.1, 0.2], [0.0, NAN])
    with pytest.raises(ValueError, match=r"not shapes \[\(2,\), \(3,\)\]"):
        report([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"one length are needed, not \[2, 3\]"):
        bootstrap(sensitivity, [1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"shape \(\), not \(1000,\)"):
        bootstrap(np.mean, [1, 0])
    with pytest.raises(ValueError, match="a confidence is NaN"):
        best_threshold([0.1, NAN], [0, 1])
    with pytest.raises(ValueError, match=r"are not \[questions\]"):
        best_threshold([], [])
