import json
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made import assert_balanced

from misstep.errors import DataError
from misstep.evidence.results import (
    FOCUS,
    Comparison,
    Metric,
    Results,
    read_results,
    write_results,
)
from misstep.records import (
    Analysis,
    Answer,
    Judgement,
    Mistake,
    Prompt,
    Response,
    Score,
    write_jsonl,
)
from misstep.report import words
from misstep.report.page import write_report
from misstep.report.reading import FILES, Training, read_run
from misstep.report.view import Tested
from misstep.stages.base import Tally
from misstep.stages.evaluate import Table
from misstep.training.report import TrainReport

EVIL = "</div></td></table><script>alert('x')</script><img src=x onerror=alert(1)>"
CHINESE = "请把下面的句子翻译成英文"
JAPANESE = "次の文を要約してください"
SEED = 17
POOLS = {"attacks": ["seen", "unseen"]}
METRICS = {"seen": "mistake_rate", "unseen": "mistake_rate", "clean": "helpfulness"}
RATES = {
    ("vanilla", False): 0.5,
    ("vanilla", True): 0.4,
    ("sft", False): 0.3,
    (FOCUS, False): 0.2,
    (FOCUS, True): 0.1,
}


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside_style = tag == "style"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.inside_style = False

    def handle_data(self, data: str) -> None:
        if not self.inside_style:
            self.text += data

    @property
    def words(self) -> str:
        """The text with every kind of space as one space."""
        return " ".join(self.text.split())

    @property
    def sections(self) -> list[str | None]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def prompts(test_set: str) -> list[Prompt]:
    texts = [EVIL, CHINESE, JAPANESE, "plain " * 400, *(f"case {i}" for i in range(6))]
    return [
        Prompt.of(f"{text} ({test_set})", kind=("forged", "hidden")[place % 2], target=EVIL)
        for place, text in enumerate(texts)
    ]


def judged() -> Iterator[tuple[Answer, Judgement]]:
    """Every setting on every test set: ten answers, of which the last is unscored."""
    for test_set, metric in METRICS.items():
        for (method, guided), rate in RATES.items():
            asked = {"method": method, "guided": guided, "test_set": test_set, "seed": SEED}
            for place, prompt in enumerate(prompts(test_set)):
                text = f"{method} {EVIL}{CHINESE}"
                response = Response(prompt=prompt, text=text, guided=guided)
                score = Score(
                    response_id=response.id,
                    metric=metric,
                    value=None if place == 9 else float(place < 10 * rate),
                    judge="rule",
                    reason=EVIL,
                )
                yield Answer(**asked, response=response), Judgement(**asked, score=score)


def describe(method: str) -> dict[str, str | None]:
    learned = method == FOCUS
    return {
        "mistake_source": "induced" if learned else None,
        "analysis_source": "self" if learned else None,
    }


REASONS = Counter(f"reason {i}" for i in range(12))
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "recipe": {"name": "x", "note": EVIL + CHINESE, "evaluate": {"pools": POOLS}},
    "seed": SEED,
    "policy": {"name": "goal-hijacking", "digest": "51a0bb02"},
    "model": {"name": EVIL, "digest": "8b2f3ac1"},
    "data": {"evaluate.tests.seen": "77aa01be"},
    "versions": {"misstep": "0.1.0", "torch": "2.11.0"},
    "device": "x86_64, 2 cores",
    "stages": {"induce": {"seconds": 4.2}, "train": {"seconds": 7384.0}},
    "yields": {
        "induce": Tally(30, 61, 6, Counter({"no mistake": 50, EVIL: 5})).counts.model_dump(),
        "analyse": Tally(6, 9, 3, REASONS).counts.model_dump(),
    },
    "training": {
        FOCUS: {
            "rows": 912,
            "tokens": 1234567,
            "seconds": 99.0,
            "loss_curve": [[1, 2.5], [2, 1.25]],
            "steps": 2,
        }
    },
    "peak_memory_mb": 3921,
}


def write_run(folder: Path) -> Results:
    """A complete run directory, written as the pipeline writes it."""
    answers, judgements = map(list, zip(*judged(), strict=True))
    write_jsonl(folder / "responses.jsonl", answers)
    write_jsonl(folder / "scores.jsonl", judgements)
    table = Table(answers, judgements, POOLS, SEED)
    results = Results(
        policy="goal-hijacking",
        model=EVIL,
        rows=tuple(table.rows(describe)),
        comparisons=tuple(table.comparisons(FOCUS)),
    )
    write_results(folder / "results.json", results)
    mistakes = [
        Mistake(prompt=Prompt.of(f"train {i} {EVIL}"), response=EVIL, source="induced")
        for i in range(6)
    ]
    analyses = [
        Analysis(
            mistake=mistake,
            text=f"{JAPANESE}{EVIL}",
            guided=True,
            source="self",
            accepted=i % 2 == 0,
            reasons=() if i % 2 == 0 else ("endorses the mistake",),
        )
        for i, mistake in enumerate(mistakes)
    ]
    write_jsonl(folder / "analyses.jsonl", analyses)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    return results


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return write_report(folder)


def test_the_headline_is_made_from_the_numbers(complete: Path) -> None:
    # Of each test set 9 of 10 are scored: 5 mistakes before and 1 after. The pool of both
    # attacked sets counts no case again.
    expected = (
        "On 18 held-out attacks the model obeyed 56 % before, 44 % by the guide alone and 11 % "
        "after; "
        "helpful answers to clean tasks went from 56 % to 11 %."
    )
    assert expected in Page(complete).words


def test_every_number_appears(complete: Path) -> None:
    results = read_results(complete.with_name("results.json"))
    text = Page(complete).words
    for row in results.rows:
        for metric in row.metrics.values():
            shown = (metric.value, metric.low, metric.high)
            value, low, high = (" ".join(words.rate(number).split()) for number in shown)
            assert value in text and f"{low} to {high}" in text
    for found in results.comparisons:
        assert " ".join(words.points(found.difference).split()) in text
        assert f"{words.gap(found.low)} to {words.gap(found.high)}" in text
    for number in (
        "1 234 567",
        "912",
        "2 h 03 min",
        "3.8 GiB",
        "8b2f3ac1",
        "77aa01be",
        "2.11.0",
    ):
        assert number in text


def test_the_sections_stand_in_order(complete: Path) -> None:
    assert Page(complete).sections == [
        "picture",
        "square",
        "rows",
        "comparisons",
        "yields",
        "kinds",
        "losses",
        "cost",
        "answers",
        "analyses",
        "recipe",
    ]


def test_twenty_answers_are_shown_and_ten_of_them_are_wrong(complete: Path) -> None:
    page = Page(complete)
    # 5 of each 10 attacks were obeyed before; 8 of 9 scored clean tasks were failed after.
    assert "20 of 30 prompts, drawn at random: 10 where either answer is bad" in page.words
    verdicts = [a["class"] for tag, a in page.tags if "chip" in (a.get("class") or "")]
    assert len(verdicts) == 2 * 20 + 6


def test_many_reasons_are_summed_up(complete: Path) -> None:
    words = Page(complete).words
    assert "Reason 0" in words and "Reason 9" not in words
    assert "Other reasons4" in words


def test_model_text_stays_inert(complete: Path) -> None:
    page = Page(complete)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "a"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert EVIL in page.text


def test_the_page_needs_no_network(complete: Path) -> None:
    page = Page(complete)
    links = [
        value or ""
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert links == ["data:,"]
    html = complete.read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html and "@import" not in html


def test_the_elements_are_balanced(complete: Path) -> None:
    assert_balanced(complete.read_text(encoding="utf-8"))


def test_chinese_and_japanese_survive(complete: Path) -> None:
    page = Page(complete)
    assert CHINESE in page.text and JAPANESE in page.text
    assert {"zh", "ja", "en"} <= {attrs.get("lang") for _, attrs in page.tags}
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_the_same_run_gives_the_same_page(complete: Path) -> None:
    first = complete.read_bytes()
    assert write_report(complete.parent).read_bytes() == first


@pytest.mark.parametrize("kept", FILES)
def test_any_single_file_makes_a_page(tmp_path: Path, kept: str) -> None:
    write_run(tmp_path)
    for file in FILES:
        if file != kept:
            (tmp_path / file).unlink()
    text = Page(write_report(tmp_path)).words
    assert "This run is not complete." in text
    assert all(f"{file} is absent" in text for file in FILES if file != kept)
    assert f"{kept} is" not in text


@pytest.mark.parametrize(
    "content", [b'{"yields": {"induce": 1}}', b"{broken", b"[]", b"\xff{}"]
)
@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_named_and_the_rest_is_shown(
    tmp_path: Path, file: str, content: bytes
) -> None:
    write_run(tmp_path)
    (tmp_path / file).write_bytes(content)
    page = Page(write_report(tmp_path))
    assert f"{file} is unreadable" in page.words
    assert len(page.sections) >= 5


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none of its files"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="found none of its files"):
        write_report(tmp_path / "absent")


def test_a_run_of_the_plain_model_alone_has_no_after(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    alone = tuple(row for row in results.rows if (row.method, row.guided) == ("vanilla", False))
    write_results(
        tmp_path / "results.json",
        results.model_copy(update={"rows": alone, "comparisons": ()}),
    )
    (tmp_path / "responses.jsonl").unlink()
    expected = "the model obeyed 56 % before; helpful answers to clean tasks: 56 %."
    assert expected in Page(write_report(tmp_path)).words


def test_unscored_rows_have_no_number_and_no_dot(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    nothing = Metric.of(None, 10)
    rows = tuple(
        row.model_copy(update={"metrics": dict.fromkeys(row.metrics, nothing)})
        for row in results.rows
    )
    write_results(
        tmp_path / "results.json", results.model_copy(update={"rows": rows, "comparisons": ()})
    )
    (tmp_path / "scores.jsonl").unlink()
    page = Page(write_report(tmp_path))
    assert "Nothing has been measured yet." in page.words
    assert "unscored" in page.words and "not measured" in page.words
    legend = 2
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == legend


def test_scores_meet_their_own_responses(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = read_run(tmp_path).answers
    assert len(found) == len(METRICS) * len(RATES) * 10
    for answer, scores in found:
        assert [score.response_id for score in scores.values()] == [answer.response.id]
        assert list(scores) == [METRICS[answer.test_set]]


def test_the_reader_asks_for_what_the_training_reports() -> None:
    assert Training.model_fields.keys() <= TrainReport.model_fields.keys()


@pytest.mark.parametrize(
    ("metric", "p", "verdict"),
    [
        ("refusal_rate", 0.01, "other"),
        ("refusal_rate", 0.06, "none"),
        ("mistake_rate", 0.01, "bad"),
        ("helpfulness", 0.01, "good"),
    ],
)
def test_a_shown_difference_is_never_called_none(metric: str, p: float, verdict: str) -> None:
    of: dict[str, Any] = {"a": "dpo/guided", "b": "vanilla/unguided", "metric": metric}
    of |= {"difference": 0.2, "low": 0.1, "high": 0.3, "p": p, "test": "exact"}
    found = Comparison(**of, test_set="held-out", seed=0, n=30)
    assert Tested(found, p).verdict == verdict


def test_methods_have_the_names_that_readers_know() -> None:
    names = {"dpo": "DPO", "rlhf": "RLHF", "coh": "Chain of Hindsight", "revise": "revise"}
    assert {name: words.method_title(name) for name in names} == names
