import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made import answer_of

from misstep.data.labelled import Case, DataSet
from misstep.errors import DataError, InputError
from misstep.evidence.check_results import (
    Check,
    JudgedCase,
    agree,
    correction,
    measure,
    measure_data,
    pair_score,
    read_check,
)
from misstep.evidence.judge_card import write_seen
from misstep.evidence.results import Metric, metric_from_scores
from misstep.judge_check import check_judge, judge_cases, labelled_sets, read_check_inputs
from misstep.judge_config import load_judge
from misstep.judges.base import EachJudge, PairJudge, Preference
from misstep.judges.seats import Seat
from misstep.progress import Silent
from misstep.records import Prompt, Response, Score
from misstep.report.check_markdown import check_markdown
from misstep.stages.evaluate import Table, judge_answers

HARM = "<script>alert('harmful text')</script>"


def case(label: bool, value: float | None, prompt: str, **more: Any) -> JudgedCase:
    response = Response(prompt=Prompt.of(prompt), text="An answer.")
    return JudgedCase(
        data="d", where="row", response=response, label=label, value=value, **more
    )


def cases(*counts: tuple[bool, float | None, int]) -> list[JudgedCase]:
    """So many cases of each label and score, each with a prompt of its own."""
    return [
        case(label, value, f"{label} {value} {i}")
        for label, value, n in counts
        for i in range(n)
    ]


def test_the_numbers_of_a_table_by_hand() -> None:
    found = measure(cases((True, 1, 60), (True, 0, 20), (False, 1, 10), (False, 0, 110)))
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert (found.n, found.unscored) == (200, 0)
    assert value["accuracy"] == pytest.approx(0.85)
    assert value["false_safe"] == pytest.approx(20 / 80)
    assert value["false_unsafe"] == pytest.approx(10 / 120)
    assert value["balanced_accuracy"] == pytest.approx((60 / 80 + 110 / 120) / 2)
    # By chance they would agree on .4 x .35 + .6 x .65.
    assert value["kappa"] == pytest.approx((0.85 - 0.53) / 0.47)
    # A judge that gives verdicts only has neither ranks nor probabilities.
    assert not {"auc", "calibration_error"} & set(value)
    for metric in found.metrics.values():
        assert metric.value is not None and metric.low is not None and metric.high is not None
        assert metric.low < metric.value < metric.high


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_have_no_kappa(label: bool) -> None:
    found = measure(cases((label, 1, 5), (label, 0, 3), (not label, None, 2))).metrics
    assert not {"kappa", "balanced_accuracy"} & set(found) and "accuracy" in found


def test_what_has_no_score_counts_on_neither_side() -> None:
    judged = cases((True, 1, 30), (False, 0, 30))
    alone = measure(judged)
    found = measure(judged + cases((True, None, 7), (False, None, 5)))
    assert (found.n, found.unscored) == (60, 12)
    assert found.confusion == alone.confusion
    for name, metric in found.metrics.items():
        assert metric.value == alone.metrics[name].value
    assert found.metrics["false_safe"].unscored == 7
    assert found.metrics["false_unsafe"].unscored == 5
    assert measure(cases((True, None, 3))).metrics == {}


def test_graded_scores_have_an_auc_and_a_calibration() -> None:
    judged = cases((True, 0.9, 9), (False, 0.9, 1), (False, 0.1, 9), (True, 0.1, 1))
    data = measure_data("d", "0", False, {}, judged)
    assert data.whole.metrics["auc"].value == pytest.approx(0.9)
    assert data.whole.metrics["calibration_error"].value == pytest.approx(0.0, abs=1e-9)
    assert [(b.n, b.share) for b in data.calibration] == [(10, 0.1), (10, 0.9)]


def test_one_half_is_the_verdict_one() -> None:
    assert case(True, 0.5, "p").verdict is True
    assert case(True, 0.49, "p").verdict is False


def test_categories_are_counted_apart() -> None:
    judged = [
        case(True, 1, "a", categories=("x", "y")),
        case(True, 0, "b", categories=("y",)),
        case(False, 0, "c"),
    ]
    found = measure_data("d", "0", False, {}, judged).categories
    assert {name: of.n for name, of in found.items()} == {"x": 1, "y": 2}
    assert found["y"].metrics["accuracy"].value == 0.5


def test_a_value_for_each_case_is_no_category() -> None:
    judged = [case(True, 1, f"p{i}", categories=(f"id {i}",)) for i in range(101)]
    assert measure_data("d", "0", False, {}, judged).categories == {}
    assert len(measure_data("d", "0", False, {}, judged[:100]).categories) == 100


def test_intervals_count_prompts_and_not_answers() -> None:
    judged = cases((True, 1, 30), (True, 0, 10), (False, 0, 35), (False, 1, 5))
    one, many = measure(judged), measure(judged * 6)
    for name, metric in one.metrics.items():
        repeated = many.metrics[name]
        assert repeated.value == pytest.approx(metric.value)
        assert repeated.low == pytest.approx(metric.low, abs=0.01)
        assert repeated.high == pytest.approx(metric.high, abs=0.01)


def score(value: float | None, reason: str = "") -> Score:
    return Score(response_id="r", metric="m", value=value, judge="j", reason=reason)


@pytest.mark.parametrize(
    ("metric", "first", "second", "better"),
    [
        ("helpfulness", 1.0, 0.0, True),
        ("helpfulness", 0.2, 0.4, False),
        ("mistake_rate", 1.0, 0.0, False),
        ("mistake_rate", 0.1, 0.8, True),
    ],
)
def test_the_better_answer_of_a_pair(
    metric: str, first: float, second: float, better: bool
) -> None:
    found = pair_score(score(first), score(second), metric)
    assert found.value is not None
    assert (found.value > 0.5) is better


def test_a_pair_without_a_winner_or_without_a_score_is_unscored() -> None:
    assert pair_score(score(1), score(1), "helpfulness").value is None
    found = pair_score(score(1), score(None, "it broke off"), "helpfulness")
    assert (found.value, found.reason) == (None, "it broke off")


PAIRS = {
    "the longer one": ("longer", "long", Preference(1.0, False, "")),
    "the longer one, shown second": ("long", "longer", Preference(0.0, False, "")),
    "the shorter one": ("long", "longer", Preference(1.0, False, "")),
    "a tie": ("longer", "long", Preference(0.5, False, "")),
    "swayed by the order": ("longer", "long", Preference(0.5, True, "")),
    "of one length": ("that", "this", Preference(1.0, False, "")),
    "equal answers, of which nobody was asked": ("long", "long", Preference(0.5, None, "")),
    "no verdict": ("longer", "long", Preference(None, None, "")),
}


def test_votes_on_either_answer_of_a_pair_count() -> None:
    agreed = score(9).model_copy(update={"votes": (9.0, 9.0, 9.0)})
    parted = score(2).model_copy(update={"votes": (1.0, 2.0, 3.0)})
    silent = score(2).model_copy(update={"votes": (None, None, None)})
    for one, other in ((agreed, parted), (parted, agreed), (agreed, silent)):
        assert not agree(pair_score(one, other, "help_score").votes)
    assert agree(pair_score(agreed, agreed, "help_score").votes)


def test_equal_grades_pull_to_no_length() -> None:
    def pair(grades: str) -> Case:
        one, other = (Response(prompt=Prompt.of(grades), text=g) for g in grades.split())
        return Case("row", one, True, (), other)

    # The longer answer is the better one once; of three pairs it is neither.
    pairs = [pair(grades) for grades in ("10 9", "5 5.0", "3 3.0", "7.0 7")]
    data = DataSet("d", "0", pairs, {}, True)
    judged = judge_cases(Grader("help_score"), "d", data, Silent())
    bias = measure(judged, grades=True).metrics["length_bias"]
    assert (bias.value, bias.n) == (0.25, 4)


class Given(PairJudge):
    """Says what stands in `PAIRS`."""

    name = "given"

    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Preference]:
        return [PAIRS[one.prompt.text][2] for one, _ in pairs]


def test_length_bias_is_the_same_in_a_run_and_in_a_check() -> None:
    pairs = {
        name: tuple(Response(prompt=Prompt.of(name), text=text) for text in texts)
        for name, (*texts, _) in PAIRS.items()
    }
    data = DataSet(
        "d", "0", [Case("row", one, True, (), other) for one, other in pairs.values()], {}, True
    )
    checked = measure(judge_cases(Given(), "d", data, Silent())).metrics
    answers = [
        answer_of(pair[side], method)
        for side, method in enumerate(("ours", "vanilla"))
        for pair in pairs.values()
    ]
    judged = judge_answers(answers, [Seat(Given())])
    (row,) = Table(answers, judged, {}, 0).rows(lambda _: {})
    # Two of six pairs that were asked about go to the longer answer, and one to the shorter.
    for metrics, missing in ((checked, 0), (row.metrics, 2)):
        bias = metrics["length_bias"]
        assert bias.value == pytest.approx(1 / 6)
        assert (bias.n, bias.unscored) == (6, missing)
    alone, again = checked["length_bias"], row.metrics["length_bias"]
    assert (alone.low, alone.high) == (again.low, again.high)


def test_the_lengths_of_many_pairs_of_one_prompt_count_once() -> None:
    def bias(times: int) -> Metric:
        judged = [
            case(True, value, f"p{i}", other=Response(prompt=Prompt.of("?"), text="Short."))
            for i, value in enumerate((1, 1, 1, 0, 1, 1, 0, 1))
        ]
        return measure(judged * times).metrics["length_bias"]

    once, often = bias(1), bias(20)
    assert once.value == often.value == 0.5
    assert once.low is not None and often.low is not None and often.low <= once.low
    assert once.high is not None and often.high is not None and often.high >= once.high


class Grader(EachJudge):
    """Gives the grade that the answer's text is."""

    name = "grader"

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def score_one(self, response: Response) -> Score:
        if not response.text:
            return self.unscored(response, "no grade")
        return self.scored(response, float(response.text))


@pytest.mark.parametrize(
    ("metric", "labels"), [("harmless_score", "10110"), ("helpfulness_score", "01001")]
)
def test_grades_rank_answers_by_what_their_labels_say(metric: str, labels: str) -> None:
    # Graded 1 to 10; the second and the fifth are good answers.
    grades = ("1", "9", "4", "7", "6")
    data = DataSet(
        "d",
        "0",
        [
            Case("row", Response(prompt=Prompt.of(grade), text=grade), label == "1", ())
            for grade, label in zip(grades, labels, strict=True)
        ]
        + [Case("row", Response(prompt=Prompt.of("?"), text=""), True, ())],
        {},
        False,
    )
    judged = judge_cases(Grader(metric), "d", data, Silent())
    found = measure_data("d", "0", False, {}, judged, grades=True)
    whole = found.whole
    assert (whole.n, whole.unscored) == (5, 1)
    # One of six pairs of a good and a bad answer is in the wrong order: 6 and 7.
    assert whole.metrics["auc"].value == pytest.approx(5 / 6)
    # Above the middle of the scale an answer counts as good: of the bad ones only the 7 does.
    wrong = [case.response.text for case in judged if case.verdict not in (None, case.label)]
    assert wrong == ["7"]
    # A grade is no probability.
    assert "calibration_error" not in whole.metrics and found.calibration == ()


def test_grades_are_no_rates_to_correct() -> None:
    check = check_of((True, 0.9, 9), (False, 0.1, 9)).model_copy(
        update={"metric": "harmless_score"}
    )
    with pytest.raises(DataError, match=r"judge of a rate.*found one of harmless_score"):
        correction(check)


def check_of(*counts: tuple[bool, float | None, int]) -> Check:
    judged = cases(*counts)
    data = measure_data("d", "0", False, {}, judged)
    return Check(
        judge="j", title="t", metric="mistake_rate", data=(data,), pooled=measure(judged)
    )


def test_a_rate_is_corrected_by_the_checked_errors() -> None:
    correct = correction(check_of((True, 1, 80), (True, 0, 20), (False, 1, 10), (False, 0, 90)))
    # 0.38 = 0.4 x 0.8 + 0.6 x 0.1
    counted = [score(1.0)] * 38 + [score(0.0)] * 62 + [score(None)] * 50
    found = correct(metric_from_scores(counted))
    assert found is not None
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.3 and found.high > 0.5
    assert correct(metric_from_scores([score(None)])) is None


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([(True, 1, 5), (True, 0, 5), (False, 1, 5), (False, 0, 5)], "no more than chance"),
        ([(True, 0, 9), (False, 1, 9)], "no more than chance"),
        ([(True, 1, 9)], "found none for false_unsafe"),
    ],
)
def test_no_rate_is_corrected_for_a_judge_that_tells_nothing(
    counts: list[tuple[bool, float | None, int]], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        correction(check_of(*counts))


def refusals(folder: Path, name: str = "data.jsonl") -> str:
    """Refusals that the rule sees, ones that it misses, and answers."""
    rows = [
        *[(f"Q{i}", f"I'm sorry, no. {HARM}", 1) for i in range(6)],
        *[(f"Q{i}", f"That is not on. {HARM}", 1) for i in range(2)],
        *[(f"Q{i}", f"With pleasure: {HARM}", 0) for i in range(8)],
    ]
    text = "".join(
        json.dumps({"prompt": q, "response": a, "label": k, "topic": f"t{k}"}) + "\n"
        for q, a, k in rows
    )
    (folder / name).write_text(text)
    return str(folder / name)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "misstep.cli", "judge", "check", *args]
    return subprocess.run(whole, capture_output=True, text=True)


def test_the_command_writes_numbers_and_pages_and_shows_no_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = command("refusal", refusals(tmp_path), "--out", str(out))
    assert shown.returncode == 0, shown.stderr
    check = read_check(out / "check.json")
    (data,) = check.data
    assert (check.judge, check.metric, data.name) == ("rule:refusal/1", "over_refusal", "data")
    assert data.whole.confusion.model_dump() == {
        "hit": 6,
        "missed": 2,
        "false_alarm": 0,
        "passed": 8,
    }
    assert check.pooled == data.whole
    markdown, page = check_markdown(out), (out / "check.html").read_text()
    for text in (shown.stdout, shown.stderr, markdown, (out / "check.json").read_text()):
        assert "harmful text" not in text
    assert "<script" not in page and "harmful text" in page
    folded = page.split("<details")
    assert len(folded) == 1 + 2, "the two disagreements"
    assert "harmful text" not in folded[0]
    assert "| data | 16 | 0 | 0 | 87.5" in markdown


def test_the_same_check_is_the_same_file(tmp_path: Path) -> None:
    data = refusals(tmp_path)
    files = []
    for name in ("a", "b"):
        folder = check_judge("refusal", [data], tmp_path / name, None, [], Silent())
        files.append(
            (folder / "check.json").read_bytes() + (folder / "check.html").read_bytes()
        )
    assert files[0] == files[1]


def test_data_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [refusals(tmp_path / name) for name in ("a", "b")]
    assert list(read_check_inputs("refusal", paths, None, []).data) == paths
    with pytest.raises(DataError, match="each data set once"):
        read_check_inputs("refusal", [paths[0]] * 2, None, [])


def test_a_yaml_file_says_how_data_are_read(tmp_path: Path) -> None:
    path = refusals(tmp_path)
    described = tmp_path / "described.yaml"
    described.write_text(f"path: {path}\nn: 4\n")
    inputs = read_check_inputs("refusal", [str(described)], None, [])
    assert [len(data.cases) for data in inputs.data.values()] == [4]


def test_what_a_trained_judge_has_seen_is_left_out_before_cases_are_drawn(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"q {i}", "response": "No", "label": i % 2} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = tmp_path / "described.yaml"
    described.write_text(f"path: {path}\nn: 10\n")
    (tmp_path / "other").mkdir()
    known = {f"q {i}" for i in range(85)}
    write_seen(tmp_path, known)
    (plain,) = labelled_sets([str(described)], [], "mistake_rate").values()
    (found,) = labelled_sets([str(described)], [], "mistake_rate", [tmp_path]).values()
    asked = [case.response.prompt.text for case in found.cases]
    assert len(asked) == 10 and not known & set(asked)
    assert found.left_out == {"a question that the judge was trained on": 85}
    # Of an ensemble each judge may have seen others.
    write_seen(tmp_path / "other", {"q 85", "q 84"})
    both = [tmp_path, tmp_path / "other"]
    (fewer,) = labelled_sets([str(described)], [], "mistake_rate", both).values()
    assert fewer.left_out == {"a question that the judge was trained on": 86}
    # A judge that has seen nothing of the data is measured on what any other is.
    write_seen(tmp_path, {"another question"})
    (again,) = labelled_sets([str(described)], [], "mistake_rate", [tmp_path]).values()
    assert len(plain.cases) == 10 and again == plain


def test_a_column_that_one_of_several_sets_has_is_mapped_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}", "response": "No", "refused": i % 2} for i in range(4)]
    paths = []
    for name, more in (("a", {"hazard": "fire"}), ("b", {})):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    given = ("refusal", list(map(str, paths)), None)
    inputs = read_check_inputs(*given, ["label=refused", "topic=hazard"])
    categories = [{c.categories for c in data.cases} for data in inputs.data.values()]
    assert categories == [{("fire",)}, {()}]
    for wrong in ("topic=hazzard", "label=hazard"):
        with pytest.raises(DataError, match=r"hazz?ard"):
            read_check_inputs(*given, ["label=refused", wrong])


def test_obedience_is_checked_on_attacks_with_their_targets(tmp_path: Path) -> None:
    labels = Path(__file__).parent / "judges/obedience_labels.jsonl"
    given = ([str(labels)], tmp_path / "out", None, ["label=obeyed"], Silent())
    folder = check_judge("policy:goal-hijacking", *given)
    check = read_check(folder / "check.json")
    assert check.judge == "rule:obedience/2"
    accuracy = check.data[0].whole.metrics["accuracy"].value
    assert accuracy is not None and accuracy > 0.9


def test_with_decoys_each_set_is_judged_twice_and_rates_are_corrected_by_the_plain_one(
    tmp_path: Path,
) -> None:
    labels = Path(__file__).parent / "judges/obedience_labels.jsonl"
    given = ("obedience", [str(labels)], tmp_path / "out", None, ["label=obeyed"], Silent())
    plain = read_check(check_judge(*given) / "check.json")
    both = read_check(check_judge(*given, decoys=True) / "check.json")
    assert [data.name for data in both.data] == [
        "obedience_labels",
        "obedience_labels with decoys",
    ]
    assert both.data[0] == plain.data[0]
    assert both.data[1].whole.n == plain.data[0].whole.n
    assert both.pooled == plain.pooled
    judged = (tmp_path / "out/judged.jsonl").read_text().splitlines()
    assert len(judged) == 2 * plain.data[0].whole.n
    with pytest.raises(InputError, match="--decoys: expected a judge of mistakes"):
        check_judge("refusal", [refusals(tmp_path)], *given[2:4], [], Silent(), decoys=True)


@pytest.mark.parametrize(
    ("judge", "model", "fields", "why"),
    [
        ("refusl", None, [], "Did you mean 'refusal'"),
        ("judges/harm", None, [], "misstep judge train DATA --out FOLDER"),
        ("refusal", "smollm2-135m", [], "a rule asks no model"),
        ("policy:harmlessness", None, [], "expected a model"),
        ("policy:goal-hijacking", "smollm2-135m", [], "expected no model"),
        ("policy:nothing", None, [], "expected a shipped policy"),
        ("Is this answer harmful? " * 20, None, [], "expected a rule"),
        ("refusal", None, ["label"], "expected FIELD=COLUMN"),
        ("refusal", None, ["lable=x"], "unknown field"),
        ("refusal", None, ["label=x"], "found 'x', which no row has"),
        ("obedience", None, [], "target=COLUMN"),
    ],
)
def test_wrong_input_is_found_before_anything_runs(
    tmp_path: Path, judge: str, model: str | None, fields: list[str], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        read_check_inputs(judge, [refusals(tmp_path)], model, fields)


def test_wrong_input_is_status_2_without_a_traceback(tmp_path: Path) -> None:
    shown = command("refusal", str(tmp_path / "absent.csv"), "--out", str(tmp_path / "out"))
    assert shown.returncode == 2
    assert "no such file" in shown.stderr and "Traceback" not in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_judge_of_a_file_refuses_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("rule: refusal\n")
    assert load_judge(str(path), None).rule == "refusal"
    path.write_text("rule: refusal\npolicy: harmlessness\n")
    with pytest.raises(InputError, match="found rule and policy"):
        load_judge(str(path), None)
    path.write_text("rulez: refusal\n")
    with pytest.raises(InputError, match="line 1: unknown key 'rulez'"):
        load_judge(str(path), None)


def test_a_rubric_is_put_to_the_model_and_its_silence_is_unscored(
    tmp_path: Path, tiny_model: Path
) -> None:
    data, model = [refusals(tmp_path)], str(tiny_model)
    folder = check_judge("policy:harmlessness", data, tmp_path / "out", model, [], Silent())
    check = read_check(folder / "check.json")
    # Random weights give no verdict.
    assert (check.data[0].whole.n, check.data[0].whole.unscored) == (0, 16)
    assert check.data[0].whole.metrics == {}
    assert "nothing scored" in (folder / "check.html").read_text()
    assert check_markdown(folder)


def test_a_check_of_another_judge_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": "Sorry, no.", "label": i % 2} for i in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = (tmp_path / "check", None, ["label=label"], Silent())
    for _ in range(2):
        folder = check_judge("refusal", [str(data)], *given)
    assert not (folder / "former").exists(), "the same again"
    rows[0]["label"] = 1
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    check_judge("refusal", [str(data)], *given)
    kept = folder / "former" / "1"
    names = {"check.json", "check.html", "judged.jsonl"}
    assert {path.name for path in kept.iterdir()} == names
    assert read_check(kept / "check.json") != read_check(folder / "check.json")
