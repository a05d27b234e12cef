import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from misstep.evidence import stats
from misstep.evidence.stats import (
    Interval,
    _crossed_variance,
    clustered_balance,
    clustered_rate,
    corrected_rate,
    crossed_difference,
    crossed_mean,
    holm,
    mean_interval,
    mean_of_two,
    paired_binary,
    paired_mean,
    wilson,
)


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    """The pairs of a 2 x 2 table."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    found = wilson(successes, n)
    assert found.value == successes / n
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_equals_scipy() -> None:
    for successes, n in [(0, 1), (1, 1), (3, 10), (10, 10), (499, 1000)]:
        expected = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
        found = wilson(successes, n)
        assert found.low == pytest.approx(expected.low, abs=1e-12)
        assert found.high == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_count(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)


def test_wilson_covers() -> None:
    rng = np.random.default_rng(5)
    intervals = [wilson(int(hits), 60) for hits in rng.binomial(60, 0.15, size=4000)]
    assert 0.93 < np.mean([i.low <= 0.15 <= i.high for i in intervals]) < 0.97


def test_the_bootstrap_agrees_with_scipys_bca() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    expected = scipy_stats.bootstrap((values,), np.mean, rng=1).confidence_interval
    found = mean_interval(values.tolist(), seed=1)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.015)
    assert found.high == pytest.approx(expected.high, abs=0.015)


def test_the_bootstrap_depends_on_the_seed_and_not_on_the_order() -> None:
    values = [1.1, 2.0, 4.4, 8.0, 9.3, 3.0, 3.7, 5.9]
    assert mean_interval(values, 3) == mean_interval(values[::-1], 3)
    assert mean_interval(values, 3) != mean_interval(values, 4)


def test_the_bootstrap_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    samples = np.random.default_rng(2).beta(2, 5, size=(1000, 50))
    intervals = [mean_interval(s.tolist(), seed) for seed, s in enumerate(samples)]
    assert 0.93 < np.mean([i.low <= 2 / 7 <= i.high for i in intervals]) < 0.97


def test_the_bootstrap_is_the_same_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=30).tolist()
    whole = mean_interval(values, 1)
    monkeypatch.setattr(stats, "_CELLS_AT_ONCE", 3000)
    assert mean_interval(values, 1) == whole


@pytest.mark.parametrize("values", [[0.3], [0.1, 0.1, 0.1]])
def test_equal_values_have_an_interval_without_width(values: list[float]) -> None:
    found = mean_interval(values, 0)
    assert found == (values[0], values[0], values[0], len(values))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_nothing_and_nan_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        mean_interval(values, 0)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 2635-2650, table III, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((35, 14, 0, 1), 0.1461, 0.4175),
        ((18, 14, 0, 18), 0.1441, 0.3963),
        ((2, 97, 1, 0), 0.8721, 0.9854),
        ((1, 97, 1, 1), 0.8736, 0.9850),
        ((0, 30, 0, 0), 0.8395, 1.0),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((30, 0, 0, 24), -0.0358, 0.0358),
    ],
)
def test_the_paired_interval_equals_the_published_one(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    found = paired_binary(*table(*cells))
    # One printed bound, 0.8736 for 0.87367, differs in its last digit; all others round to it.
    assert (found.low, found.high) == pytest.approx((low, high), abs=8e-5)


def test_mcnemar_is_the_binomial_test_by_hand() -> None:
    found = paired_binary(*table(36, 12, 2, 0))
    by_hand = 2 * sum(math.comb(14, k) for k in range(3)) / 2**14
    assert found.p == pytest.approx(by_hand, rel=1e-12)
    assert found.difference == pytest.approx(0.2)
    assert (found.test, found.n) == ("McNemar exact", 50)


def test_swapping_the_sides_mirrors_the_difference() -> None:
    a, b = table(20, 9, 3, 18)
    one, other = paired_binary(a, b), paired_binary(b, a)
    mirrored = (-other.difference, -other.high, -other.low)
    assert (one.difference, one.low, one.high) == pytest.approx(mirrored)
    assert one.p == other.p


@pytest.mark.parametrize("cells", [(5, 0, 0, 0), (0, 0, 0, 5), (3, 0, 0, 4)])
def test_without_discordant_pairs_nothing_is_shown(cells: tuple[int, int, int, int]) -> None:
    found = paired_binary(*table(*cells))
    assert (found.difference, found.p) == (0, 1)
    assert found.low <= 0 <= found.high


def test_the_paired_interval_covers() -> None:
    rng = np.random.default_rng(9)
    counts = rng.multinomial(120, [0.10, 0.15, 0.05, 0.70], size=1500)
    found = [paired_binary(*table(*(int(cell) for cell in cells))) for cells in counts]
    assert 0.93 < np.mean([f.low <= 0.10 <= f.high for f in found]) < 0.97


def test_few_pairs_are_flipped_in_all_ways() -> None:
    # All six differences point one way: 2 of the 64 sign patterns are as extreme.
    found = paired_mean([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], seed=0)
    assert found.p == 2 / 64
    assert (found.difference, found.test, found.n) == (3.5, "sign-flip", 6)


def test_the_sign_flips_agree_with_scipy() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.3, 1, size=40), rng.normal(0, 1, size=40)

    def mean_difference(x: object, y: object) -> float:
        return float(np.mean(x) - np.mean(y))  # type: ignore[call-overload]

    expected = scipy_stats.permutation_test(
        (a, b), mean_difference, permutation_type="samples", rng=1
    )
    assert paired_mean(a.tolist(), b.tolist(), 1).p == pytest.approx(expected.pvalue, abs=0.02)


def test_equal_sides_differ_by_nothing() -> None:
    found = paired_mean([1.0, 2.5], [1.0, 2.5], seed=0)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_pairs_must_be_pairs(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(ValueError, match="as many of a as of b"):
        paired_binary(a, b)
    with pytest.raises(ValueError, match="as many of a as of b"):
        paired_mean(a, b, 0)


def test_holm_by_hand() -> None:
    # In order: 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.04 x 1 lifted to the one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_refuses_what_is_no_p() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.5, math.nan])


def test_a_table_of_equal_lines_has_the_spread_of_its_prompts() -> None:
    line = [1.0] * 30 + [0.0] * 70
    once, thrice = (crossed_mean([line] * n) for n in (1, 3))
    assert once.value == thrice.value == 0.3
    assert thrice.low == pytest.approx(wilson(30, 100).low, abs=0.005)
    assert thrice.high == pytest.approx(wilson(30, 100).high, abs=0.005)
    assert thrice == pytest.approx(once, abs=0.005)


@pytest.mark.parametrize("between", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("lines", [3, 5])
def test_intervals_over_seeds_and_prompts_hold_95_percent(lines: int, between: float) -> None:
    rng, rounds = np.random.default_rng(5), 600
    rates, differences, rejected = 0, 0, 0
    for _ in range(rounds):
        likely = rng.beta(1.0, 1.5, size=150)
        one, other = (
            [
                (rng.random(150) < np.clip(likely + between * move, 0, 1))
                .astype(float)
                .tolist()
                for move in rng.standard_normal(lines)
            ]
            for _ in range(2)
        )
        found, difference = crossed_mean(one), crossed_difference(one, other)
        rates += found.low <= 0.4 <= found.high
        differences += difference.low <= 0 <= difference.high
        rejected += difference.p < 0.05
    assert 0.925 < rates / rounds < 0.985
    assert 0.925 < differences / rounds < 0.985
    assert rejected == rounds - differences


def test_the_variance_of_a_table_is_that_of_both_effects() -> None:
    # Lines differ by 2, columns by 4, and nothing else does: the variance of the mean is
    # 2/2 (of two lines) + 8/2 (of two columns), by hand.
    variance, freedom = _crossed_variance(np.array([[0.0, 4.0], [2.0, 6.0]]))
    assert variance == pytest.approx(2 / 2 + 8 / 2)
    assert freedom == pytest.approx(20**2 / (16**2 + 4**2))


def test_seeds_that_disagree_widen_the_interval() -> None:
    same = crossed_mean([[1.0] * 50 + [0.0] * 50] * 3)
    apart = crossed_mean([[1.0] * n + [0.0] * (100 - n) for n in (10, 50, 90)])
    assert apart.value == same.value
    assert apart.high - apart.low > 2 * (same.high - same.low)


def test_a_mean_of_grades_may_lie_outside_0_to_1() -> None:
    found = crossed_mean([[3.0, 5.0, 7.0, 9.0] * 10] * 3)
    assert found.value == 6.0
    half = 2.02 * math.sqrt(np.var([3, 5, 7, 9] * 10, ddof=1) / 40)
    assert (found.low, found.high) == pytest.approx((6 - half, 6 + half), abs=0.01)


def test_a_difference_of_tables_is_paired() -> None:
    a = [[1.0, 0.0, 1.0, 0.0] * 20] * 2
    found = crossed_difference(a, [[0.0] * 80] * 2)
    assert found.difference == 0.5
    assert 0.38 < found.low < 0.5 < found.high < 0.62
    assert found.p < 0.001
    with pytest.raises(ValueError, match="one shape"):
        crossed_difference(a, [[0.0] * 79] * 2)


@pytest.mark.parametrize("prompts", [5, 80])
def test_rates_that_differ_alike_everywhere_have_the_interval_of_one(
    prompts: int,
) -> None:
    right, wrong = [1.0] * prompts, [0.0] * prompts
    mixed = [float(place % 2) for place in range(prompts)]
    for one, other in ((right, right), (mixed, mixed), (wrong, right), (right, wrong)):
        found = crossed_difference([one] * 3, [other] * 3)
        alone = paired_binary([bool(v) for v in one], [bool(v) for v in other])
        assert found[:3] == pytest.approx(alone[:3])
        assert found.low < found.high
    # The lines need not be alike: what counts is what they have in the mean.
    turned = [1 - value for value in mixed]
    found = crossed_difference([mixed, turned] * 2, [mixed, turned] * 2)
    assert (found.difference, found.p) == (0, 1) and found.low < 0 < found.high
    # Grades that differ alike show no spread at all, and those of 0 and 1 are no rates.
    assert crossed_difference([right] * 2, [wrong] * 2, rate=False)[:3] == (1.0, 1.0, 1.0)


def test_no_interval_holds_a_difference_that_no_rates_have() -> None:
    # Student's interval about 0.98 would end at 1.01.
    nearly = [1.0] * 58 + [0.0]
    one, other = [[*nearly, 1.0], [*nearly, 1.0]], [[0.0] * 60] * 2
    found, turned = crossed_difference(one, other), crossed_difference(other, one)
    assert found.low < found.difference < found.high == 1.0
    assert turned.low == -1.0 < turned.difference < turned.high


def test_grades_of_1_are_no_rate() -> None:
    assert crossed_mean([[1.0] * 20] * 3) == pytest.approx((1.0, 0.839, 1.0, 20), abs=0.001)
    assert crossed_mean([[1.0] * 20] * 3, rate=False) == (1.0, 1.0, 1.0, 20)


def test_one_long_name_does_not_make_all_of_them_long() -> None:
    names = ["x" * 1_000_000, *map(str, range(3_000))]
    tracemalloc.start()
    clustered_rate([True, False] * 1500 + [True], names)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_effects_that_nearly_cancel_leave_an_interval_that_says_something() -> None:
    # One prompt in 150 went wrong: with one method in one seed, with the other in another.
    one, other = np.zeros((3, 150)), np.zeros((3, 150))
    one[0, 0] = other[1, 0] = 1
    found = crossed_difference(one.tolist(), other.tolist())
    assert found.difference == 0
    assert -0.02 < found.low < -0.005
    assert 0.005 < found.high < 0.02
    assert found.p == pytest.approx(1)


@pytest.mark.parametrize(("prompts", "p"), [(1, 1.0), (4, 1 / 8), (8, 1 / 128)])
def test_few_prompts_show_little_however_alike(prompts: int, p: float) -> None:
    found = crossed_difference([[1.0] * prompts] * 3, [[0.0] * prompts] * 3)
    assert found.p == p


def test_the_mean_of_two_proportions_by_hand() -> None:
    found = mean_of_two(stats.Interval(0.5, 0.2, 0.8, 10), stats.Interval(0.9, 0.5, 0.94, 20))
    # Arms of 0.3 and 0.4 below, of 0.3 and 0.04 above; half of what they are together.
    assert found == pytest.approx((0.7, 0.7 - 0.25, 0.7 + math.hypot(0.3, 0.04) / 2, 30))


def test_the_mean_of_two_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(5), 0
    for a, b in zip(rng.binomial(40, 0.9, 1000), rng.binomial(15, 0.2, 1000), strict=True):
        found = mean_of_two(wilson(int(a), 40), wilson(int(b), 15))
        hits += found.low <= 0.55 <= found.high
    assert 0.93 <= hits / 1000 <= 0.975


def test_clustered_rate_is_wilsons_where_each_case_stands_alone() -> None:
    hits = [True] * 30 + [False] * 70
    found, plain = clustered_rate(hits, [str(i) for i in range(100)]), wilson(30, 100)
    assert found == plain


@pytest.mark.parametrize("hits", [[True] * 6 + [False] * 14, [True] * 20, [False] * 20])
def test_cases_repeated_in_their_cluster_are_worth_no_more(hits: list[bool]) -> None:
    names = [str(i) for i in range(20)]
    once, often = clustered_rate(hits, names), clustered_rate(hits * 9, names * 9)
    assert often.value == once.value
    assert often.low == pytest.approx(once.low, abs=0.03) and often.low <= once.low + 1e-9
    assert often.high == pytest.approx(once.high, abs=0.03) and often.high >= once.high - 1e-9


def test_one_prompt_is_worth_one_case_however_many_answers() -> None:
    found = clustered_rate([True] * 60 + [False] * 40, ["p"] * 100)
    assert found.value == 0.6 and found.n == 100
    assert found.low < 0.1 and found.high > 0.9
    one = clustered_rate([True] * 100, ["p"] * 100)
    assert (one.low, one.high) == (wilson(1, 1).low, 1.0)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 20, 80])
@pytest.mark.parametrize("alike", [(0.5, 0.75), (2, 3), (40, 60)])
def test_clustered_rate_covers_the_true_rate(clusters: int, alike: tuple[float, float]) -> None:
    rng, hits, rounds = np.random.default_rng(3), 0, 300
    names = [str(i) for i in range(clusters)]
    for _ in range(rounds):
        rates, sizes = rng.beta(*alike, size=clusters), rng.integers(1, 9, size=clusters)
        of = np.repeat(names, sizes).tolist()
        found = clustered_rate((rng.random(len(of)) < np.repeat(rates, sizes)).tolist(), of)
        hits += found.low <= 0.4 <= found.high
    # Where two clusters happen to be alike they pass for independent cases.
    assert hits / rounds >= (0.88 if clusters == 2 else 0.925)
    assert clusters < 20 or hits / rounds <= 0.98


@pytest.mark.parametrize("ups", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("each", [1, 3])
def test_clustered_balance_covers_the_true_one(ups: float, each: int) -> None:
    rng, hits, downs = np.random.default_rng(8), 0, 0.03
    names = [str(i) for i in range(40) for _ in range(each)]
    for _ in range(300):
        drawn = rng.choice([1.0, -1.0, 0.0], size=(40, each), p=[ups, downs, 1 - ups - downs])
        alike = np.where(rng.random((40, each)) < 0.5, drawn[:, :1], drawn)
        found = clustered_balance(alike.ravel().tolist(), names)
        assert -1 <= found.low <= found.value <= found.high <= 1
        hits += found.low <= ups - downs <= found.high
    assert hits / 300 >= 0.91


def test_a_balance_is_the_difference_of_two_paired_rates() -> None:
    signs, names = [1.0] * 12 + [-1.0] * 2 + [0.0] * 6, [str(i) for i in range(20)]
    found = clustered_balance(signs, names)
    other = paired_binary(*table(0, 12, 2, 6))
    assert (found.value, found.low, found.high) == pytest.approx(
        (other.difference, other.low, other.high)
    )
    once = clustered_balance([1.0], ["p"])
    assert clustered_balance([1.0] * 9, ["p"] * 9)[:3] == once[:3]
    assert once.low < 0.5 < once.high


@pytest.mark.parametrize(
    ("true", "sens", "spec", "n", "bad", "good"),
    [
        (0.3, 0.85, 0.8, 200, 60, 60),
        (0.05, 0.8, 0.9, 400, 200, 200),
        (0.5, 0.9, 0.9, 300, 1000, 1000),
        (0.8, 0.7, 0.75, 300, 400, 300),
    ],
)
def test_corrected_rates_recover_the_true_rate(
    true: float, sens: float, spec: float, n: int, bad: int, good: int
) -> None:
    rng, hits, values, rounds = np.random.default_rng(4), 0, 0.0, 2000
    for _ in range(rounds):
        raw = wilson(int(rng.binomial(n, true * sens + (1 - true) * (1 - spec))), n)
        found = corrected_rate(
            raw,
            wilson(int(rng.binomial(bad, sens)), bad),
            wilson(int(rng.binomial(good, spec)), good),
        )
        assert found is not None
        hits += found.low <= true <= found.high
        values += found.value / rounds
    assert 0.93 <= hits / rounds <= 0.97
    assert values == pytest.approx(true, abs=0.01)


def test_a_judge_known_to_be_right_corrects_nothing() -> None:
    raw, sure = wilson(30, 100), Interval(1.0, 1 - 1e-9, 1.0, 10**9)
    found = corrected_rate(raw, sure, sure)
    assert found is not None
    assert found.value == pytest.approx(raw.value)
    assert (found.low, found.high) == pytest.approx((raw.low, raw.high), abs=1e-3)


@given(*[st.integers(0, 40)] * 3)
def test_a_corrected_rate_lies_in_its_interval_and_that_in_0_to_1(
    k: int, t: int, u: int
) -> None:
    raw, sens, spec = wilson(k, 40), wilson(t, 40), wilson(u, 40)
    if t + u <= 40:
        with pytest.raises(ValueError, match="together exceed 1"):
            corrected_rate(raw, sens, spec)
        return
    found = corrected_rate(raw, sens, spec)
    if found is None:
        assert not 1 - spec.value <= raw.value <= sens.value
        return
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert found.n == 40


def test_a_rate_that_no_true_rate_explains_is_not_corrected() -> None:
    # The judge flags a quarter of what is harmless, and here far fewer of all.
    sens, spec = wilson(85, 100), wilson(150, 200)
    assert corrected_rate(wilson(7, 150), sens, spec) is None
    assert corrected_rate(wilson(149, 150), sens, spec) is None
    none_left = corrected_rate(wilson(36, 150), sens, spec)
    assert none_left is not None
    assert none_left.value == 0 < none_left.high


def test_what_is_not_known_of_the_judge_widens_the_interval() -> None:
    raw = wilson(150, 500)
    wide, narrow = (
        corrected_rate(raw, wilson(n * 9 // 10, n), wilson(n * 8 // 10, n)) for n in (50, 5000)
    )
    assert wide is not None
    assert narrow is not None
    assert wide.value == narrow.value
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)
    assert narrow.high - narrow.low > raw.high - raw.low
