r"""Type-2 signal detection: whether Yes ("I know") follows the model's correctness.

The signal is that the model's own direct answer is correct. With
:math:`H = P(\text{yes} | \text{correct})` and :math:`F = P(\text{yes} | \text{wrong})`,
sensitivity is :math:`d' = z(H) - z(F)`, reluctance :math:`c = -(z(H) + z(F)) / 2`.

Type-2 d' is not free of bias (Barrett, Dienes and Seth 2013) and depends on which
questions are answered wrongly: read it next to accuracy, the rate of Yes and AUROC2.
Meta-d' needs a two-choice task of type 1, which open questions are not.

Everything is float64, and NaN without a warning where it is undefined.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, ndtri
from scipy.stats import rankdata

PAPER_CLIP = 1e-4
"""How close to 0 and 1 rates come in the code of 2602.02605."""

CHUNK = 2**20
"""Entries of an array that `bootstrap` resamples at once, to bound its memory."""


class Counts(NamedTuple):
    """Questions by correctness and answer; `+` pools them, as d' must not be averaged.

    Fields have any shape, the same for all.
    """

    hits: np.ndarray  # correct, Yes
    misses: np.ndarray  # correct, No
    false_alarms: np.ndarray  # wrong, Yes
    correct_rejections: np.ndarray  # wrong, No

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*(np.add(a, b) for a, b in zip(self, other, strict=True)))


CORRECTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda part, whole: part / whole,
    "clip": lambda part, whole: np.clip(part / whole, PAPER_CLIP, 1 - PAPER_CLIP),
    "loglinear": lambda part, whole: (part + 0.5) / (whole + 1),
    "half": lambda part, whole: np.clip(part, 0.5, whole - 0.5) / whole,
}
"""Rates from counts: raw; of 2602.02605, to 1e-4 and 1 - 1e-4; of Hautus 1995 (always
applied); of Macmillan & Kaplan 1985 (only rates of 0 and 1 move, by 1/(2N))."""


def counts(correct: ArrayLike, yes: ArrayLike, axis: int = -1) -> Counts:
    """Counts of the four outcomes over the questions, the given axis.

    Args:
      correct: [..., questions], 0 or 1: whether the direct answer is correct.
      yes: 0 or 1, broadcast with `correct`: whether the model says that it knows.

    Raises:
      ValueError: for values other than 0 and 1.
    """
    right, said = _binary(correct), _binary(yes)
    cells = (right & said, right & ~said, ~right & said, ~right & ~said)
    return Counts(*(cell.sum(axis) for cell in cells))


def d_prime(counts: Counts, correction: str = "loglinear") -> np.ndarray:
    """Type-2 sensitivity d' = z(H) - z(F) (2602.02605).

    Args:
      counts: of any shape.
      correction: a name in `CORRECTIONS`; all but 'none' keep it finite.

    Returns:
      float64 of the shape of the counts; NaN if nothing is correct, or nothing wrong.
    """
    hit, false_alarm = _rates(counts, correction)
    with np.errstate(invalid="ignore"):  # inf - inf
        return ndtri(hit) - ndtri(false_alarm)


def criterion(counts: Counts, correction: str = "loglinear") -> np.ndarray:
    """Reluctance to say Yes, c = -(z(H) + z(F))/2; arguments as for `d_prime`."""
    hit, false_alarm = _rates(counts, correction)
    with np.errstate(invalid="ignore"):
        return -(ndtri(hit) + ndtri(false_alarm)) / 2


def d_prime_error(counts: Counts, correction: str = "loglinear") -> np.ndarray:
    r"""Standard error of d' by the delta method (Gourevitch & Galanter 1967).

    The root of :math:`H(1-H)/(n_1 \phi(z(H))^2) + F(1-F)/(n_0 \phi(z(F))^2)`; that of
    the criterion is half of it. Arguments and shape as for `d_prime`; NaN where d' is
    not finite.
    """
    variance: Any = 0.0
    sizes = (counts[0] + counts[1], counts[2] + counts[3])
    for rate, size in zip(_rates(counts, correction), sizes, strict=True):
        density = np.exp(-(ndtri(rate) ** 2) / 2) / math.sqrt(2 * math.pi)
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = variance + rate * (1 - rate) / (size * density**2)
    return np.sqrt(variance)


def auroc2(confidence: ArrayLike, correct: ArrayLike) -> np.ndarray:
    """Area under the type-2 ROC: P(correct has more confidence than wrong), ties half.

    By mid-ranks: invariant under a strictly increasing map of the confidence. With Yes
    and No as the confidence it is only (1 + H - F)/2.

    Args:
      confidence: [..., questions], graded, in any unit.
      correct: 0 or 1, broadcast with `confidence`.

    Returns:
      float64 [...]; NaN if nothing is correct, nothing wrong, or a confidence is NaN.
    """
    level, right = np.broadcast_arrays(np.asarray(confidence), _binary(correct))
    ranks = rankdata(level, axis=-1)
    ones = right.sum(-1)
    zeros = right.shape[-1] - ones
    above = (ranks * right).sum(-1) - ones * (ones + 1) / 2
    return _share(above, ones * zeros)


def accuracy(counts: Counts) -> np.ndarray:
    """Share of direct answers that are correct; NaN without questions."""
    return _share(counts[0] + counts[1], _total(counts))


def yes_rate(counts: Counts) -> np.ndarray:
    """Share of Yes; NaN without questions."""
    return _share(counts[0] + counts[2], _total(counts))


def alignment(counts: Counts) -> np.ndarray:
    """Share where Yes and correct agree (2602.02605); NaN without questions.

    It moves with bias and accuracy: a model that always says No has 1 - accuracy.
    """
    return _share(counts[0] + counts[3], _total(counts))


def yes_failure_rate(counts: Counts) -> np.ndarray:
    """Share of Yes that is followed by a wrong answer (2602.02605); NaN without Yes."""
    return _share(counts[2], counts[0] + counts[2])


def no_failure_rate(counts: Counts) -> np.ndarray:
    """Share of No that is followed by a correct answer (2602.02605); NaN without No."""
    return _share(counts[1], counts[1] + counts[3])


def relative_meta_information(counts: Counts) -> np.ndarray:
    """Share of the entropy of correctness explained by Yes, I/H (2602.02605).

    In [0, 1], the same with Yes and No exchanged; 0 at an accuracy of 0 or 1; NaN
    without questions.
    """
    hit, miss, false_alarm, rejection = _share(np.stack(counts), _total(counts))
    entropy = entr(hit + miss) + entr(false_alarm + rejection)
    said = entr(hit + false_alarm) + entr(miss + rejection)
    joint = entr(hit) + entr(miss) + entr(false_alarm) + entr(rejection)
    certain = entropy == 0
    share = (entropy + said - joint) / np.where(certain, 1, entropy)
    # Clipped for rounding; a certain outcome has no entropy to explain.
    return np.where(certain, 0, np.clip(share, 0, 1))[()]


def report(
    correct: ArrayLike,
    yes: ArrayLike,
    other: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
) -> dict[str, float]:
    """All measures of one model on one set of questions.

    Args:
      correct: [questions], 0 or 1.
      yes: [questions], 0 or 1; 0 also for what is neither Yes nor No, as in 2602.02605.
      other: [questions], 0 or 1: neither Yes nor No.
      confidence: [questions], graded.

    Returns:
      Measures by name, NaN where undefined or not given what they need. d' is
      log-linear but for 'd_prime_clip'; 'd_prime_without_other' leaves out questions
      with another answer; 'correct' and 'wrong' are numbers of questions.

    Raises:
      ValueError: for shapes that differ, or values other than 0 and 1.
    """
    given = [x for x in (correct, yes, other, confidence) if x is not None]
    shapes = [np.shape(x) for x in given]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"one value a question is needed, not shapes {shapes}")
    right, said = _binary(correct), _binary(yes)
    table = counts(right, said)
    area = math.nan if confidence is None else auroc2(confidence, right)
    other_rate = without = np.asarray(math.nan)
    if other is not None:
        kept = ~_binary(other)
        other_rate = _share((~kept).sum(), kept.size)
        without = d_prime(counts(right[kept], said[kept]))
    measures = {
        "accuracy": accuracy(table),
        "yes_rate": yes_rate(table),
        "other_rate": other_rate,
        "alignment": alignment(table),
        "d_prime": d_prime(table),
        "d_prime_clip": d_prime(table, "clip"),
        "criterion": criterion(table),
        "auroc2": area,
        "yes_failure_rate": yes_failure_rate(table),
        "no_failure_rate": no_failure_rate(table),
        "rmi": relative_meta_information(table),
        "d_prime_without_other": without,
        "correct": right.sum(),
        "wrong": (~right).sum(),
    }
    return {name: float(value) for name, value in measures.items()}


def bootstrap(
    statistic: Callable[..., ArrayLike],
    *arrays: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over questions drawn with replacement.

    Arrays are resampled jointly, so that models compared on the same questions are
    paired. Resamples whose statistic is NaN (no question of a class) are left out.

    Args:
      statistic: takes the arrays with many resamples at once, [resamples, questions,
        ...], and returns [resamples].
      *arrays: [questions, ...].
      resamples, seed: of the draws.
      level: share of the resamples within the interval.

    Returns:
      The lower and the upper end, values of the statistic without interpolation; NaN if
      it is NaN in more than half of the resamples.

    Raises:
      ValueError: for arrays of different lengths, or a statistic of another shape.
    """
    columns = [np.asarray(array) for array in arrays]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"arrays of one length are needed, not {sorted(lengths)}")
    (questions,) = lengths
    rng = np.random.default_rng(seed)
    chunk = max(CHUNK // max(questions, 1), 1)
    values = np.empty(resamples)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(questions, size=(size, questions))
        value = np.asarray(statistic(*(column[drawn] for column in columns)))
        if value.shape != (size,):
            raise ValueError(f"statistic of shape {value.shape}, not {(size,)}")
        values[start : start + size] = value
    missing = np.isnan(values)
    if 2 * missing.sum() > resamples:
        return math.nan, math.nan
    ends = (1 - level) / 2, (1 + level) / 2
    # Interpolation would make NaN of infinite values.
    low, high = np.quantile(values[~missing], ends, method="inverted_cdf")
    return float(low), float(high)


def best_threshold(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Threshold on the confidence with the largest alignment; Yes is above it.

    Fitted on training questions, the baseline of learning only when to say Yes.

    Args:
      confidence: [questions].
      correct: [questions], 0 or 1.

    Returns:
      One of the confidences, or -inf (always Yes); the lowest of those that tie.
    """
    levels, right = np.asarray(confidence), _binary(correct)
    if levels.shape != right.shape or levels.ndim != 1 or not levels.size:
        raise ValueError(f"shapes {levels.shape}, {right.shape} are not [questions]")
    if np.isnan(levels).any():
        raise ValueError("a confidence is NaN")
    # As the threshold passes a question it turns to No: right if its answer is wrong.
    candidates, index = np.unique(np.append(-np.inf, levels), return_inverse=True)
    gains = np.bincount(index, np.append(0, np.where(right, -1, 1)))
    return float(candidates[np.argmax(np.cumsum(gains))])


def _binary(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError("values other than 0 and 1, or False and True")
    return array.astype(bool)


def _rates(counts: Counts, correction: str) -> tuple[np.ndarray, np.ndarray]:
    """H and F."""
    if correction not in CORRECTIONS:
        known = ", ".join(CORRECTIONS)
        raise ValueError(f"unknown correction {correction!r}; known are {known}")
    rule = CORRECTIONS[correction]
    hit, miss, false_alarm, rejection = (np.asarray(x, np.float64) for x in counts)
    ones, zeros = _or_nan(hit + miss), _or_nan(false_alarm + rejection)
    return rule(hit, ones), rule(false_alarm, zeros)


def _total(counts: Counts) -> np.ndarray:
    hit, miss, false_alarm, rejection = counts
    return hit + miss + false_alarm + rejection


def _share(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    return np.asarray(part, np.float64) / _or_nan(whole)


def _or_nan(size: ArrayLike) -> np.ndarray:
    """NaN for an empty class: explicit, and division by it does not warn."""
    return np.where(np.equal(size, 0), np.nan, size)
