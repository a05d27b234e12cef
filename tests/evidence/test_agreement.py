import math
import random
from collections.abc import Callable, Iterable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from misstep.evidence import agreement
from misstep.evidence.agreement import (
    _lowest_auc,
    auc,
    calibration_curve,
    calibration_error,
    kappa,
    krippendorff_alpha,
)
from misstep.evidence.stats import Interval


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Enough for what is asked here, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "RESAMPLES", 300)
        patch.setattr(agreement, "DRAWS", 3000)
        yield


def apart(n: int) -> list[str]:
    """A prompt for each case."""
    return [f"p{i}" for i in range(n)]


CASES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60).filter(
    lambda cases: len({label for _, label in cases}) == 2
)


@given(CASES)
def test_auc_is_the_u_statistic_over_all_pairs(cases: list[tuple[int, bool]]) -> None:
    scores, labels = [s / 5 for s, _ in cases], [label for _, label in cases]
    of_bad = [s for s, label in zip(scores, labels, strict=True) if label]
    of_good = [s for s, label in zip(scores, labels, strict=True) if not label]
    expected = mannwhitneyu(of_bad, of_good).statistic / (len(of_bad) * len(of_good))
    found = auc(scores, labels, apart(len(cases)))
    assert found.value == pytest.approx(expected)
    assert 0 <= found.low <= found.value <= found.high <= 1
    turned = auc([-s for s in scores], labels, apart(len(cases)))
    assert turned.value == pytest.approx(1 - found.value)


def coverage(found: Iterable[Interval], true: float) -> float:
    """How many of the intervals hold the true value."""
    hits = []
    for interval in found:
        assert interval.low < interval.high
        assert -1 <= interval.low <= interval.value <= interval.high <= 1
        hits.append(interval.low <= true <= interval.high)
    return sum(hits) / len(hits)


AUCS = [0.76, 0.95, 0.98, 0.99, 0.998]


@pytest.mark.parametrize("true", AUCS)
@pytest.mark.parametrize("of_each", [(50, 50), (20, 100)])
def test_auc_interval_covers_the_true_value(true: float, of_each: tuple[int, int]) -> None:
    rng, n = np.random.default_rng(1), sum(of_each)
    labels = np.repeat([True, False], of_each)
    # Two normals whose distance gives this AUC: Phi(distance / root 2).
    scores = rng.normal(size=(200, n)) + labels * math.sqrt(2) * NormalDist().inv_cdf(true)
    found = (auc(of.tolist(), labels.tolist(), apart(n)) for of in scores)
    assert coverage(found, true) >= 0.92


@pytest.mark.parametrize("true", AUCS)
def test_auc_interval_covers_where_prompts_have_several_answers(true: float) -> None:
    rng, intervals = np.random.default_rng(2), []
    away = math.sqrt(2) * NormalDist().inv_cdf(true)
    for _ in range(200):
        sizes = rng.integers(1, 6, size=40)
        prompts = np.repeat(np.arange(40), sizes)
        labels = np.repeat(rng.random(40) < 0.5, sizes)
        alike = np.repeat(rng.normal(scale=math.sqrt(0.6), size=40), sizes)
        scores = labels * away + alike + rng.normal(scale=math.sqrt(0.4), size=len(labels))
        intervals.append(auc(scores.tolist(), labels.tolist(), prompts.astype(str).tolist()))
    assert coverage(intervals, true) >= 0.92


def test_auc_interval_covers_where_a_few_labels_are_wrong() -> None:
    # Where one case in fifty is at the wrong end, faults are rarer and greater than the method
    # expects; far apart as the ends are, this is the AUC.
    rng, labels, wrong = np.random.default_rng(3), np.repeat([True, False], 100), 0.02
    true = (1 - wrong) ** 2 + wrong * (1 - wrong)
    scores = rng.normal(size=(200, 200)) + 20 * (labels ^ (rng.random((200, 200)) < wrong))
    found = [auc(of.tolist(), labels.tolist(), apart(200)) for of in scores]
    assert 0.92 <= coverage(found, true) <= 0.99
    # Six cases at the wrong end are not the many small faults that the same AUC could be.
    far = [-1.0] * 3 + [2.0] * 97 + [1.0] * 97 + [3.0] * 3
    few = auc(far, labels.tolist(), apart(200))
    assert few.low < _lowest_auc(few.value, 100, 100) - 0.01


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_auc_bounds_lie_so_many_of_their_own_errors_from_the_value(
    m: int, n: int, part: float
) -> None:
    """Newcombe's method 5, by its equation."""
    at = round(part * m * n)
    bounds = (_lowest_auc(at / m / n, m, n), 1 - _lowest_auc(1 - at / m / n, m, n))
    for bound in bounds:
        each = (m + n) / 2 - 1
        of_pairs = each * ((1 - bound) / (2 - bound) + bound / (1 + bound))
        error = math.sqrt(max(0.0, bound * (1 - bound) * (1 + of_pairs)) / (m * n))
        assert abs(at / m / n - bound) == pytest.approx(1.959964 * error, abs=1e-6)
    assert bounds[1] - bounds[0] > 0.01


def test_a_judge_without_a_fault_may_still_have_one() -> None:
    for measure in (auc, kappa):
        few, many = (
            measure([True] * n + [False] * n, [True] * n + [False] * n, apart(2 * n))
            for n in (2, 200)
        )
        assert few.value == many.value == few.high == many.high == 1
        assert few.low < 0.6 and 0.96 < many.low < 0.999
        together = measure([True, False] * 200, [True, False] * 200, ["p", "q"] * 200)
        assert together.low == pytest.approx(
            measure([True, False], [True, False], ["p", "q"]).low, abs=0.02
        )


@pytest.mark.parametrize(
    ("share", "right", "n"),
    [(0.5, 0.97, 60), (0.5, 0.99, 60), (0.5, 0.998, 200), (0.1, 0.99, 100), (0.3, 0.8, 60)],
)
@pytest.mark.parametrize("answers", [1, 4])
def test_kappa_interval_covers_the_true_value(
    share: float, right: float, n: int, answers: int
) -> None:
    rng, intervals = np.random.default_rng(4), []
    prompts = [f"p{i}" for i in range(n) for _ in range(answers)]
    for _ in range(120):
        # Of a prompt six answers in ten are the same one over again.
        same = rng.random((n, answers)) < 0.6
        yes, hit = rng.random((n, answers)) < share, rng.random((n, answers)) < right
        labels = np.where(same, yes[:, :1], yes).ravel()
        said = labels == np.where(same, hit[:, :1], hit).ravel()
        if len({*labels, *said}) > 1:
            intervals.append(kappa(said.tolist(), labels.tolist(), prompts))
    called = share * right + (1 - share) * (1 - right)
    chance = share * called + (1 - share) * (1 - called)
    # Least where faults are few and come by prompts: the design effect is then found too small.
    least = 0.91 if answers == 1 else 0.84
    assert coverage(intervals, (right - chance) / (1 - chance)) >= least


def test_repeating_each_case_under_its_prompt_makes_no_interval_narrower() -> None:
    rng = random.Random(2)
    labels = [rng.random() < 0.5 for _ in range(100)]
    said = [label if rng.random() < 0.8 else not label for label in labels]
    scores = [float(s) for s in said]
    measures: list[Callable[[int, list[str]], Any]] = [
        lambda times, prompts: auc(scores * times, labels * times, prompts),
        lambda times, prompts: kappa(said * times, labels * times, prompts),
        lambda times, prompts: calibration_error(scores * times, labels * times, prompts),
    ]
    for measure in measures:
        alone, repeated = measure(1, apart(100)), measure(5, apart(100) * 5)
        assert repeated.value == pytest.approx(alone.value)
        assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), abs=0.01)
        naive = measure(5, apart(500))
        assert naive.high - naive.low < 0.7 * (alone.high - alone.low)


def test_kappa_of_the_textbook_table() -> None:
    # Cohen's example as it is often printed: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no.
    said = [True] * 25 + [False] * 25
    labels = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = kappa(said, labels, apart(50))
    assert found.value == pytest.approx(0.4)
    # The large-sample standard error is 0.129.
    assert found.low == pytest.approx(0.4 - 1.96 * 0.129, abs=0.05)
    assert found.high == pytest.approx(0.4 + 1.96 * 0.129, abs=0.05)


def test_a_judge_that_decides_by_chance_has_no_kappa_and_half_an_auc() -> None:
    labels = [True, False] * 40
    said = [True, True, False, False] * 20
    assert kappa(said, labels, apart(80)).value == pytest.approx(0)
    assert auc([float(s) for s in said], labels, apart(80)).value == pytest.approx(0.5)


def test_calibration_by_hand() -> None:
    scores = [0.15] * 10 + [0.85] * 10
    labels = [True] * 2 + [False] * 8 + [True] * 6 + [False] * 4
    # The bins are off by 0.05 and 0.25, with half of the cases each.
    assert calibration_error(scores, labels, apart(20)).value == pytest.approx(0.15)
    low, high = calibration_curve(scores, labels)
    assert (low.score, low.share, low.n) == pytest.approx((0.15, 0.2, 10))
    assert (high.low, high.high, high.share) == pytest.approx((0.8, 0.9, 0.6))


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.8), (0.25, 0.9)])
def test_calibration_interval_covers_the_true_error(shift: float, least: float) -> None:
    rng, hits, rounds = random.Random(6), 0, 100
    for _ in range(rounds):
        scores = [rng.random() for _ in range(300)]
        # Scores that are too low by a parabola, whose mean over all scores is 4/6 of the shift.
        labels = [rng.random() < min(1, s + 4 * shift * s * (1 - s)) for s in scores]
        found = calibration_error(scores, labels, apart(300))
        assert found.low <= found.value <= found.high
        hits += found.low <= shift * 4 / 6 <= found.high
    assert hits / rounds >= least


def test_a_score_of_one_belongs_to_the_last_bin() -> None:
    (only,) = calibration_curve([1.0], [True])
    assert (only.low, only.high) == (0.9, 1.0)


@pytest.mark.parametrize("measure", [auc, kappa])
def test_one_label_alone_has_no_such_number(measure: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        measure([True, True], [True, True], apart(2))  # type: ignore[operator]


def test_scores_that_are_no_probabilities_have_no_calibration() -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        calibration_error([7.0], [True], apart(1))


def test_alpha_of_the_published_example() -> None:
    """Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four
    observers, twelve units, nominal data with missing values; alpha is 0.743."""
    table = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = zip(*(line.split() for line in table), strict=True)
    found = krippendorff_alpha([[v for v in unit if v != "."] for unit in units])
    assert found == pytest.approx(0.743, abs=0.0005)


def test_alpha_of_two_observers_and_of_ratings_without_variety() -> None:
    """The same paper, section A: two observers, ten units, binary data; alpha is 0.095."""
    ratings = zip("0100000010", "1110010000", strict=True)
    assert krippendorff_alpha(ratings) == pytest.approx(0.095, abs=0.0005)
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0
