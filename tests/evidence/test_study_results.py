from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from misstep.errors import DataError
from misstep.evidence.stats import wilson
from misstep.evidence.study_results import (
    Case,
    Study,
    StudyModel,
    Verdict,
    measure,
    read_study,
    tell,
    write_study,
)


def model(*cases: tuple[Verdict, Verdict, Verdict]) -> StudyModel:
    """Of (mistake, unguided analysis says so, guided analysis says so)."""
    return measure("m", "0", [own(*case) for case in cases])


def own(mistake: Verdict, unguided: Verdict, guided: Verdict) -> Case:
    """A model that answers alike with the guide and analyses its own answer."""
    return Case(mistake, mistake, mistake, unguided, guided)


def analysing(found: StudyModel, name: str, guided: bool = False) -> tuple[object, int, int]:
    metric = found.metric("analysing", guided, name)
    return metric.value, metric.n, metric.unscored


def test_who_always_finds_fault_gets_the_mistakes_and_no_right_answer() -> None:
    found = model(*[(True, True, True)] * 3, *[(False, True, True)] * 5)
    assert analysing(found, "sensitivity") == (1.0, 3, 0)
    assert analysing(found, "specificity") == (0.0, 5, 0)
    assert analysing(found, "balanced_accuracy") == (0.5, 8, 0)
    assert analysing(found, "accuracy") == (3 / 8, 8, 0)


def test_who_always_praises_is_as_right_as_its_answers() -> None:
    found = model(*[(True, False, False)] * 3, *[(False, False, False)] * 5)
    assert found.metric("answering", False, "accuracy").value == 5 / 8
    assert analysing(found, "accuracy") == (5 / 8, 8, 0)
    assert analysing(found, "balanced_accuracy") == (0.5, 8, 0)
    assert {paired.difference for paired in found.comparisons} == {0.0}


def test_an_undecided_analysis_is_neither_right_nor_wrong() -> None:
    found = model((True, True, None), (True, None, None), (False, False, None))
    assert analysing(found, "accuracy") == (1.0, 2, 1)
    assert analysing(found, "sensitivity") == (1.0, 1, 1)
    assert analysing(found, "decided") == (2 / 3, 3, 0)
    assert analysing(found, "accuracy", guided=True) == (None, 0, 3)
    assert analysing(found, "balanced_accuracy", guided=True) == (None, 0, 3)
    assert analysing(found, "decided", guided=True) == (0.0, 3, 0)


def test_an_answer_without_a_verdict_moves_no_number() -> None:
    cases: list[tuple[Verdict, Verdict, Verdict]] = [(True, True, False), (False, True, False)]
    without, found = model(*cases), model(*cases, (None, True, False))
    for row, same in zip(found.rows, without.rows, strict=True):
        for name in set(row.metrics) - {"decided"}:
            expected = same.metrics[name]
            unscored = expected.unscored + (name == "accuracy")
            assert row.metrics[name] == expected.model_copy(update={"unscored": unscored})
    assert found.comparisons == without.comparisons
    assert (found.wins.win.n, found.wins.win.unscored) == (2, 1)
    counts = found.rows[-1].counts
    assert counts is not None and counts.unjudged == 1


def test_balance_needs_both_kinds_of_answers() -> None:
    assert analysing(model((True, True, True)), "balanced_accuracy")[0] is None
    assert analysing(model((True, True, True)), "specificity") == (None, 0, 0)


# What the guided analysis does to the unguided one: right beats wrong and undecided.
OUTCOMES = {
    (True, False): "win",
    (True, None): "win",
    (False, True): "lose",
    (None, True): "lose",
}


@pytest.mark.parametrize("mistake", [True, False])
@pytest.mark.parametrize(("guided", "unguided"), list(product([True, False, None], repeat=2)))
def test_right_wins_and_all_else_is_a_tie(
    mistake: bool, guided: Verdict, unguided: Verdict
) -> None:
    def says(right: Verdict) -> Verdict:
        return None if right is None else right == mistake

    wins = model((mistake, says(unguided), says(guided))).wins
    expected = OUTCOMES.get((guided, unguided), "tie")
    found = {"win": wins.win.value, "tie": wins.tie.value, "lose": wins.lose.value}
    assert found == {name: float(name == expected) for name in found}


def test_wins_are_counted_and_tested_in_pairs() -> None:
    won, lost, tied = (True, None, True), (True, True, False), (False, False, False)
    wins = model(*[won] * 6, *[lost], *[tied] * 3).wins
    assert (wins.win.value, wins.lose.value, wins.tie.value) == (0.6, 0.1, 0.3)
    assert (wins.win.low, wins.win.high) == wilson(6, 10)[1:3]
    assert wins.tested is not None
    assert wins.tested.difference == pytest.approx(0.5)
    # Seven discordant pairs, one of them against: 2 * (1 + 7) / 2^7.
    assert wins.tested.p == pytest.approx(0.125)
    assert (wins.tested.a, wins.tested.b) == ("analysing/guided", "analysing/unguided")


def test_telling_is_set_against_doing_over_the_same_prompts() -> None:
    # All mistakes are found but one, of which the analysis says nothing; one answer is right.
    found = model(*[(True, True, True)] * 4, (True, None, True), (False, False, True))
    unguided, guided, answering = found.comparisons
    assert (unguided.a, unguided.b, unguided.n) == (
        "analysing/unguided",
        "answering/unguided",
        5,
    )
    assert unguided.difference == pytest.approx(4 / 5)
    assert guided.n == 6
    assert guided.difference == pytest.approx(4 / 6)
    assert (answering.a, answering.difference) == ("answering/guided", 0.0)


def test_what_analyses_said_is_counted_by_what_they_are_about() -> None:
    found = model(
        (True, True, None), (True, False, None), (True, True, None), (False, None, True)
    )
    counts = found.rows[2].counts
    assert counts is not None
    assert counts.mistakes.model_dump() == {"mistake": 2, "right": 1, "undecided": 0}
    assert counts.right_answers.model_dump() == {"mistake": 0, "right": 0, "undecided": 1}


def telling(
    says: Callable[[Verdict], Verdict], mistakes: int = 3, right: int = 9
) -> list[Case]:
    """Of one set of answers, what a model says of each whose verdict is known."""
    return [own(m, says(m), says(m)) for m in [True] * mistakes + [False] * right]


WAYS_TO_SAY_NOTHING: list[Callable[[Verdict], Verdict]] = [
    lambda mistake: True,
    lambda mistake: False,
    lambda mistake: None,
]


@pytest.mark.parametrize("says", WAYS_TO_SAY_NOTHING)
def test_who_does_not_look_tells_no_better_than_who_does_not_either(
    says: Callable[[Verdict], Verdict],
) -> None:
    for first in WAYS_TO_SAY_NOTHING:
        found = tell({"first": telling(first), "m": telling(says)}, seed=0)
        assert [(told.model, told.guided) for told in found] == [("m", False), ("m", True)]
        for told in found:
            assert told.value == pytest.approx(0.5) and told.first == pytest.approx(0.5)
            assert told.difference == pytest.approx(0) and told.p > 0.05


def test_who_tells_them_apart_is_ahead_however_few_the_mistakes() -> None:
    blind, sharp = telling(lambda mistake: True, 5, 45), telling(lambda mistake: mistake, 5, 45)
    told, _ = tell({"first": blind, "m": sharp}, seed=0)
    assert told.value == pytest.approx(1.0) and told.first == pytest.approx(0.5)
    assert told.difference == pytest.approx(0.5)
    assert 0 < told.low <= 0.5 <= told.high and told.p < 0.001
    back, _ = tell({"first": sharp, "m": blind}, seed=0)
    assert back.difference == -told.difference and back.p == told.p


def test_what_the_judge_cannot_score_is_told_by_nobody() -> None:
    blind, sharp = telling(lambda mistake: True), telling(lambda mistake: mistake)
    more = [own(None, True, True)] * 4
    assert tell({"a": blind + more, "b": sharp + more}, 0) == tell({"a": blind, "b": sharp}, 0)


@pytest.mark.parametrize("kinds", [{"mistakes": 0}, {"right": 0}])
def test_nothing_is_told_apart_where_all_answers_are_alike(kinds: dict[str, int]) -> None:
    cases = telling(lambda mistake: mistake, **kinds)
    assert tell({"first": cases, "m": cases}, seed=0) == ()


def test_telling_of_others_answers_is_not_set_against_doing() -> None:
    cases = [Case(True, False, False, None, True), Case(False, False, True, True, True)]
    found = measure("m", "0", cases, own=False)
    assert [(paired.a, paired.b) for paired in found.comparisons] == [
        ("answering/guided", "answering/unguided")
    ]
    assert found.metric("answering", False, "accuracy").value == 0.5
    assert analysing(found, "sensitivity") == (1.0, 1, 0), "of what it analysed"
    assert analysing(found, "specificity") == (None, 0, 1)


def study() -> Study:
    models = (model((True, True, True), (False, False, None)),)
    return Study(policy="p", judge="rule", seed=3, prompts=2, models=models)


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    write_study(path, study())
    assert read_study(path) == study()
    assert '"schema": 1' in path.read_text()


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"schema": 2}'])
def test_a_broken_study_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"study\.json"):
        read_study(path)


def test_an_absent_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_study(tmp_path / "study.json")
