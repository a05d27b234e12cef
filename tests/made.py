"""What several tests make and look at: answers of runs, people's labels, whole pages."""

import csv
from html.parser import HTMLParser
from pathlib import Path

import pytest

from misstep.progress import Silent
from misstep.records import Answer, Response

XSTEST = Path(__file__).parents[1] / ".." / "shared" / "data" / "xstest"


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def answer_of(
    response: Response, method: str = "vanilla", test_set: str = "t", seed: int = 0
) -> Answer:
    """A response as a run has it."""
    return Answer(
        method=method,
        guided=response.guided,
        test_set=test_set,
        seed=seed,
        response=response,
    )


def xstest_answers() -> list[dict[str, str]]:
    """XSTest's rows with answers and people's labels; a test without them is skipped."""
    files = sorted(XSTEST.glob("xstest_v2_completions_*.csv"))
    if not files:
        pytest.skip("XSTest is not in ../shared/data, which is not part of the project")
    rows: list[dict[str, str]] = []
    for path in files:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows += csv.DictReader(file)
    return rows


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "link", "br"}:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def assert_balanced(html: str) -> None:
    """Pass if every element of a page ends where it should."""
    balance = _Balance()
    balance.feed(html)
    assert balance.open_tags == []
