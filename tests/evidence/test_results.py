import json
import random
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from misstep.errors import DataError
from misstep.evidence.results import (
    Comparison,
    Metric,
    Results,
    Row,
    Setting,
    Values,
    adjusted,
    compare_pooled,
    is_rate,
    metric_from_scores,
    pool,
    read_results,
    write_results,
)
from misstep.evidence.stats import wilson
from misstep.records import Prompt, Response, Score


def scored(value: float | None, response_id: str = "r", metric: str = "mistake_rate") -> Score:
    return Score(response_id=response_id, metric=metric, value=value, judge="rule")


def compared(
    ours: dict[str, float | None], base: dict[str, float | None], metric: str = "mistake_rate"
) -> Comparison | None:
    """Two settings of which each answers each prompt once."""
    values: Values = {
        (setting, "t", metric): {0: {p: scored(v, p, metric) for p, v in of.items()}}
        for setting, of in ((OURS, ours), (BASE, base))
    }
    return compare_pooled(OURS, BASE, "t", metric, values, 17)


def some_results() -> Results:
    metric = Metric(value=0.25, low=0.1, high=0.5, n=8, unscored=1)
    row = Row(method="vanilla", guided=False, seed=17, test_set="攻撃", metrics={"m": metric})
    comparison = Comparison(
        a="sft/guided",
        b="vanilla/unguided",
        metric="m",
        difference=-0.1,
        low=-0.2,
        high=0.0,
        p=0.04,
        test="McNemar exact",
        test_set="攻撃",
        seed=17,
        n=8,
    )
    return Results(policy="goal-hijacking", model="m", rows=(row,), comparisons=(comparison,))


def test_a_rate_has_wilsons_interval() -> None:
    found = metric_from_scores([scored(1.0)] * 15 + [scored(0.0)] * 133)
    assert (found.n, found.unscored) == (148, 0)
    assert found.low == pytest.approx(0.0624, abs=5e-5)
    assert found.high == pytest.approx(0.1605, abs=5e-5)


@pytest.mark.parametrize("values", [[1.0, 0.0, 0.0], [7.0, 3.5, 4.0]])
def test_the_unscored_move_nothing(values: list[float]) -> None:
    without = metric_from_scores([scored(value) for value in values])
    added = metric_from_scores([scored(value) for value in values] + [scored(None)] * 40)
    assert added == without.model_copy(update={"unscored": 40})


def test_nothing_scored_is_no_value() -> None:
    assert metric_from_scores([scored(None)]) == Metric(
        value=None, low=None, high=None, n=0, unscored=1
    )
    assert metric_from_scores([]).n == 0


def test_other_numbers_have_a_seeded_bootstrap_interval() -> None:
    scores = [scored(float(value), metric="harmless_score") for value in range(1, 11)]
    found = metric_from_scores(scores, seed=3)
    assert found == metric_from_scores(scores[::-1], seed=3)
    assert found.value == 5.5
    assert found.low is not None and found.high is not None
    assert 3.4 < found.low < 4.2 and 6.8 < found.high < 7.6


def test_scores_of_two_metrics_do_not_mix() -> None:
    with pytest.raises(ValueError, match="found helpfulness, mistake_rate"):
        metric_from_scores([scored(1.0), scored(1.0, metric="helpfulness")])


def test_comparison_pairs_by_prompt_where_both_are_scored() -> None:
    found = compared(
        {"p1": 0.0, "p2": 0.0, "p3": None, "p4": 1.0, "only a": 1.0},
        {"p4": 1.0, "p3": 1.0, "p2": 1.0, "p1": 1.0, "only b": 1.0},
    )
    assert found is not None
    assert (found.a, found.b, found.n) == ("ours/guided", "vanilla/unguided", 3)
    assert found.difference == pytest.approx(-2 / 3)
    assert (found.p, found.test) == (0.5, "McNemar exact")


def test_other_numbers_are_compared_by_their_mean() -> None:
    found = compared({"p": 8.0, "q": 6.0}, {"q": 5.0, "p": 4.0}, "harmless_score")
    assert found is not None
    assert (found.difference, found.test) == (2.5, "sign-flip")


def test_without_a_common_prompt_there_is_no_comparison() -> None:
    assert compared({"p": 1.0}, {"q": 1.0}) is None
    assert compare_pooled(OURS, BASE, "t", "other", {}, 1) is None


def test_settings_are_named() -> None:
    assert Setting("mistake_analysis", True).name == "mistake_analysis/guided"
    assert Setting("vanilla", False).name == "vanilla/unguided"
    assert Setting("sft", False, "n=20").name == "sft[n=20]/unguided"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, some_results())
    first = path.read_bytes()
    assert read_results(path) == some_results()
    write_results(path, read_results(path))
    assert path.read_bytes() == first
    assert "攻撃" in first.decode()


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, some_results().model_copy(update={"cost": None}))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(data) == ["comparisons", "model", "policy", "rows", "schema"]
    assert data["schema"] == 1
    assert set(data["rows"][0]) == {
        "method",
        "guided",
        "mistake_source",
        "analysis_source",
        "seed",
        "test_set",
        "metrics",
    }
    assert set(data["rows"][0]["metrics"]["m"]) == {"value", "low", "high", "n", "unscored"}
    assert {"a", "b", "metric", "difference", "low", "high", "p", "test"} <= set(
        data["comparisons"][0]
    )


BASE, OURS = Setting("vanilla", False), Setting("ours", True)


def test_what_a_comparison_adds_is_absent_from_a_run(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", some_results())
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert not {"variant", "pooled", "p_adjusted"} & set(re.findall(r"\w+", text))


def test_seeds_are_pooled_over_the_prompts_that_all_of_them_scored() -> None:
    by_seed = {
        0: {"a": scored(1.0), "b": scored(0.0), "c": scored(None)},
        1: {"a": scored(1.0), "b": scored(1.0), "c": scored(1.0)},
    }
    found = pool(OURS, "attacks", "mistake_rate", by_seed, 0)
    assert (found.value, found.n, found.unscored) == (0.75, 2, 1)
    assert found.by_seed == {0: 0.5, 1: 1.0}
    assert pool(OURS, "t", "m", {0: {"a": scored(None)}}, 0).value is None


def test_one_seed_is_pooled_as_a_rate() -> None:
    scores = {str(i): scored(float(i < 3)) for i in range(9)}
    found = pool(OURS, "attacks", "mistake_rate", {4: scores}, 0)
    assert (found.value, found.low, found.high, found.n) == wilson(3, 9)


def test_pooled_settings_are_compared_prompt_by_prompt_and_seed_by_seed() -> None:
    prompts = [str(i) for i in range(60)]
    base = {p: scored(float(int(p) < 30)) for p in prompts}
    values: Values = {
        (BASE, "t", "m"): {0: base, 1: base, 2: base},
        (OURS, "t", "m"): {
            seed: {p: scored(float(int(p) < 6 + seed)) for p in prompts} for seed in (0, 1, 2)
        },
    }
    found = compare_pooled(OURS, BASE, "t", "m", values, 0)
    assert found is not None
    assert found.difference == pytest.approx(-23 / 60)
    assert found.low < found.difference < found.high < 0
    assert (found.a, found.b, found.n) == ("ours/guided", "vanilla/unguided", 60)
    reverse = compare_pooled(BASE, OURS, "t", "m", values, 0)
    assert reverse is not None and reverse.difference == pytest.approx(23 / 60)
    (alone,) = adjusted([found])
    assert alone.p_adjusted == found.p
    assert all(c.p_adjusted == min(1, 2 * found.p) for c in adjusted([found, found]))


def of_cases(prompts: list[str], shares: list[tuple[float, int]]) -> dict[str, Score]:
    """Scores of which each is the share of so many cases."""
    return {
        prompt: scored(share, Response(prompt=Prompt.of(prompt), text="").id, "m").model_copy(
            update={"cases": cases}
        )
        for prompt, (share, cases) in zip(prompts, shares, strict=True)
    }


def test_pooled_prompts_of_several_cases_weigh_as_they_do_in_a_run() -> None:
    prompts = ["p", "q", "r"]
    ours = of_cases(prompts, [(1.0, 1), (0.0, 3), (0.5, 2)])
    base = of_cases(prompts, [(0.0, 1), (1 / 3, 3), (1.0, 2)])
    row = metric_from_scores(list(ours.values()))
    one, three = (
        pool(OURS, "t", "m", dict.fromkeys(range(seeds), ours), 0) for seeds in (1, 3)
    )
    assert (one.value, one.low, one.high, one.n) == (2 / 6, row.low, row.high, 3)
    assert three.value == pytest.approx(2 / 6) == three.by_seed[2]
    for seeds in (1, 3):
        values: Values = {
            (OURS, "t", "m"): dict.fromkeys(range(seeds), ours),
            (BASE, "t", "m"): dict.fromkeys(range(seeds), base),
        }
        pooled = compare_pooled(OURS, BASE, "t", "m", values, 0)
        assert pooled is not None and pooled.difference == pytest.approx(-1 / 6)


def test_a_rate_of_several_cases_a_prompt_spreads_as_that_rate_does() -> None:
    prompts = [str(place) for place in range(10)]
    counts = [1, 1, 2, 3, 1, 2, 3, 1, 1, 2]
    followed, not_one = (of_cases(prompts, [(v, n) for n in counts]) for v in (1.0, 0.0))
    found = pool(OURS, "t", "m", dict.fromkeys(range(3), followed), 0)
    # All followed: no number of instructions makes it less or more.
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.722, abs=1e-3)
    for seeds in (1, 3):
        values: Values = {
            (OURS, "t", "m"): dict.fromkeys(range(seeds), followed),
            (BASE, "t", "m"): dict.fromkeys(range(seeds), not_one),
        }
        apart = compare_pooled(OURS, BASE, "t", "m", values, 0)
        assert apart is not None
        assert (apart.difference, apart.high) == (1.0, 1.0) and 0.6 < apart.low < 1


def test_an_interval_over_cases_holds_the_true_rate() -> None:
    draw, held, widths = random.Random(0), 0, []
    for _ in range(200):
        counts = [draw.choice((1, 1, 2, 3)) for _ in range(100)]
        shares = [(sum(draw.random() < 0.8 for _ in range(n)) / n, n) for n in counts]
        scores = of_cases([str(place) for place in range(100)], shares)
        found = pool(OURS, "t", "m", dict.fromkeys(range(2), scores), 0)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    # Of about 170 cases: 2 * 1.96 * sqrt(0.8 * 0.2 / 170) is 0.12.
    assert 184 <= held <= 198 and 0.1 < sum(widths) / 200 < 0.14


def test_grades_and_balances_are_no_rates() -> None:
    assert [is_rate(m) for m in ("mistake_rate", "refusal_rate@x", "win_rate")] == [True] * 3
    other = ("harmless_score@x", "reference_loss", "mistake_probability", "length_bias@y")
    assert not any(map(is_rate, other))
    lowest = [scored(1.0, str(place), "harmless_score") for place in range(20)]
    found = metric_from_scores(lowest)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0), "a scale from 1 to 10"


def test_a_balance_of_several_seeds_stays_within_its_ends() -> None:
    signs = {str(place): 1.0 if place < 18 else -1.0 for place in range(20)}
    both = []
    for sign in (1, -1):
        scores = {p: scored(sign * v, p, "length_bias@x") for p, v in signs.items()}
        both.append(pool(OURS, "t", "length_bias@x", dict.fromkeys(range(3), scores), 0))
    one, other = both
    assert one.value == 0.8 and one.low is not None and one.high is not None
    assert 0.3 < one.low < 0.8 < one.high < 1
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low)), "mirrored"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "invalid JSON"),
        ('{"schema": 2, "policy": "p", "model": "m"}', "schema"),
        ('{"schema": 1, "policy": "p", "model": "m", "row": []}', "row"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=expected) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "results.json")


def test_no_number_is_a_nan() -> None:
    with pytest.raises(ValidationError):
        Metric(value=float("nan"), low=0, high=1, n=1)
