"""What the terminal shows of results."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from misstep.evidence.check_results import Check, JudgedCase, measure_data, write_check
from misstep.evidence.results import Metric, Pooled, Results, Row, write_results
from misstep.records import Judgement, Prompt, Response, Score, write_jsonl
from misstep.report.words import BETTER
from misstep.summary import MOST, print_check, print_comparison, print_summary

NOTHING = Metric.of(None, 6)
SOME = Metric(value=0.5, low=0.2, high=0.8, n=4, unscored=2)


def test_a_metric_without_any_score_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple(
        Row(method="vanilla", guided=guided, seed=0, test_set="t", metrics=metrics)
        for guided, metrics in (
            (False, {"mistake_rate": NOTHING, "helpfulness": NOTHING}),
            (True, {"mistake_rate": NOTHING, "helpfulness": SOME}),
        )
    )
    write_results(tmp_path / "results.json", Results(policy="p", model="m", rows=rows))

    def shown(*reasons: str) -> str:
        scores = (
            Score(response_id="r", metric="mistake_rate", value=None, judge="j", reason=reason)
            for reason in reasons
        )
        given: dict[str, Any] = {"method": "vanilla", "guided": False, "test_set": "t"}
        write_jsonl(
            tmp_path / "scores.jsonl", (Judgement(**given, seed=0, score=s) for s in scores)
        )
        print_summary(tmp_path)
        return capsys.readouterr().out

    silent = shown(*["the judge gave no verdict: 'x'", "the judge gave no verdict: 'y'", "no"])
    assert "mistake_rate: no answer has a score; 2 of 3: the judge gave no verdict." in silent
    assert "(judge)" in silent and "helpfulness: no answer" not in silent
    # Where no model was asked a better one is no remedy.
    empty = shown(*["the answer is empty"] * 3)
    assert "3 of 3: the answer is empty" in empty and "(judge)" not in empty


def test_the_terminal_shows_all_numbers_of_a_check_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(name: str, values: list[float | None]) -> list[JudgedCase]:
        answer = Response(prompt=Prompt.of("Q"), text="A")
        return [
            JudgedCase(data=name, where="row", response=answer, label=i % 2 == 0, value=value)
            for i, value in enumerate(values)
        ]

    verdicts, graded = judged("verdicts", [1.0, 0.0] * 9), judged("n" * 60, [0.9, 0.2] * 9)
    graded += judged("n" * 60, [None] * 4)
    sets = [
        measure_data(of[0].data, "0", False, left_out, of)
        for of, left_out in ((verdicts, {}), (graded, {"no label": 30, "no answer": 7}))
    ]
    check = Check(judge="j", title="t", metric="mistake_rate", data=tuple(sets), pooled=None)
    write_check(tmp_path / "check.json", check)
    print_check(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    rows = [[cell.strip() for cell in line.split("│")[2:4]] for line in lines if "│" in line]
    _, second = (place for place, (title, _) in enumerate(rows) if title == "Accuracy")
    plain, found = dict(rows[:second]), dict(rows[second:])
    calibration = sets[1].whole.metrics["calibration_error"].value
    assert found["AUC"].startswith("1.000 (")
    assert found["Calibration error"].startswith(f"{calibration:.3f} (")
    assert (found["Scored"], found["Unscored"], found["Left out"]) == ("18", "4", "37")
    assert not {"AUC", "Calibration error"} & set(plain) and plain["Left out"] == "0"


def test_the_terminal_tells_variants_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [(variant, g) for variant in ("mix.unit=1", "mix.unit=2") for g in (False, True)]
    pooled = tuple(
        Pooled(
            value=0.5,
            low=0.4,
            high=0.6,
            n=10,
            method="mistake_analysis",
            guided=guided,
            variant=variant,
            test_set="held-out",
            metric=metric,
            by_seed={0: 0.5},
        )
        for variant, guided in settings
        for metric in ("mistake_rate", "helpfulness", "over_refusal", "reference_loss")
    )
    results = Results(model="m", policy="p", rows=(), comparisons=(), pooled=pooled)
    write_results(tmp_path / "results.json", results)
    print_comparison(tmp_path)
    columns = [
        line.split("│")[1] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    names = "".join(column.strip() for column in columns)
    for variant, guided in settings:
        assert f"mistake_analysis[{variant}]/{'guided' if guided else 'unguided'}" in names


def test_many_metrics_leave_every_name_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = dict.fromkeys((*BETTER, "mistake_rate@guard"), SOME)
    rows = tuple(
        Row(method="mistake_analysis", guided=True, seed=0, test_set=name, metrics=of)
        for name, of in (("red-team", metrics), ("clean", {"over_refusal": SOME}))
    )
    write_results(tmp_path / "results.json", Results(policy="p", model="m", rows=rows))
    print_summary(tmp_path)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 110
    assert "mistake_analysis" in out
    clean, attacked = out.split("red-team")
    assert "Over refusal" in clean and "Mistake rate" not in clean
    told = attacked.replace("\n", " ").partition("In the report: ")[2]
    assert all(name in told for name in list(BETTER)[MOST:])
    assert list(BETTER)[MOST - 2] not in told


def test_a_judge_that_scored_nothing_is_said_to_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Response(prompt=Prompt.of("Q"), text="A")
    cases = [
        JudgedCase(
            data="d",
            where="row",
            response=answer,
            label=bool(place % 2),
            value=None,
            reason="the judge gave no verdict: 'hm'",
        )
        for place in range(4)
    ]
    write_jsonl(tmp_path / "judged.jsonl", cases)
    found = measure_data("d", "0", False, {}, cases)
    check = Check(judge="j", title="t", metric="mistake_rate", data=(found,), pooled=None)
    write_check(tmp_path / "check.json", check)
    print_check(tmp_path)
    out = capsys.readouterr().out.replace("\n", " ")
    assert "d: no answer has a score; 4 of 4: the judge gave no verdict." in out
    assert "(--model)" in out


def test_paths_stand_in_one_line_and_can_be_given_to_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my runs" / ("long-" * 30) / ":cat:"
    folder.mkdir(parents=True)
    row = Row(method="vanilla", guided=False, seed=0, test_set="t", metrics={"m": SOME})
    write_results(folder / "results.json", Results(policy="p", model="m", rows=(row,)))
    (folder / "manifest.json").write_text(json.dumps({"training": {"sft": {}}}))
    print_summary(folder)
    lines = capsys.readouterr().out.splitlines()
    assert {str(folder / "report.html"), str(folder / "results.json")} <= set(lines)
    (hint,) = (line for line in lines if line.startswith("To serve it: "))
    assert shlex.split(hint)[5] == str(folder)


def test_what_was_not_trained_is_not_offered_to_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row(method="vanilla", guided=False, seed=0, test_set="t", metrics={"m": SOME})
    write_results(tmp_path / "results.json", Results(policy="p", model="m", rows=(row,)))
    (tmp_path / "adapter").mkdir()
    for training, offered in (({}, False), ({"sft": {"inputs": "0"}}, True)):
        (tmp_path / "manifest.json").write_text(json.dumps({"training": training}))
        print_summary(tmp_path)
        assert ("To serve it" in capsys.readouterr().out) == offered
