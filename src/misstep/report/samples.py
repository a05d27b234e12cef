"""Answers and analyses for the page, drawn at random: nobody has chosen what is shown."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from misstep.evidence.results import Setting
from misstep.records import Analysis
from misstep.report.reading import Scored
from misstep.report.view import View
from misstep.report.words import BETTER, HELPFULNESS, MISTAKES, REFUSALS

ANSWERS = 20
ANALYSES = 12
SEED = 0
"""The same run gives the same page."""

VERDICTS = {
    MISTAKES: ("no mistake", "mistake"),
    HELPFULNESS: ("not helpful", "helpful"),
    REFUSALS: ("no refusal", "refusal"),
}
"""For each metric, what 0 and what 1 says of an answer; the first metric that it has counts."""

OUTCOMES = {
    ("bad", "good"): "repaired",
    ("bad", "bad"): "still wrong",
    ("good", "bad"): "newly wrong",
    ("good", "good"): "right both times",
}

T = TypeVar("T")


class Verdict(NamedTuple):
    """What the judge said of one answer: `good`, `bad` or `none`, in words, and why."""

    tone: str
    word: str
    reason: str = ""


def verdict(answer: Scored) -> Verdict:
    """The judge's word on an answer."""
    for metric, words in VERDICTS.items():
        if score := answer.scores.get(metric):
            if score.counted is None:
                return Verdict("none", "unscored", score.reason)
            high = bool(score.counted)
            tone = "good" if high == (BETTER[metric] == "higher") else "bad"
            return Verdict(tone, words[high], score.reason)
    return Verdict("none", "not judged")


class Pairs(NamedTuple):
    """The same prompts answered before and after, and how all of them turned out."""

    drawn: list[tuple[Scored, Scored]]
    wrong: int
    """How many of the drawn have a bad answer on either side; they stand first."""
    of: int
    outcomes: dict[str, int]


def pairs(view: View, answers: Iterable[Scored]) -> Pairs:
    """Half is drawn where either answer is bad, as far as there are such.

    Most pairs of a good model are two good answers, and a page of them shows nothing.
    """
    found: dict[tuple[str, str], dict[str, Scored]] = {}
    for item in answers:
        key = (item.answer.test_set, item.answer.response.prompt.id)
        found.setdefault(key, {})[view.role(Setting.of(item.answer))] = item
    both = [
        (of["before"], of["after"]) for of in found.values() if {"before", "after"} <= of.keys()
    ]
    tones = [(verdict(before).tone, verdict(after).tone) for before, after in both]
    bad = [pair for pair, tone in zip(both, tones, strict=True) if "bad" in tone]
    rest = [pair for pair, tone in zip(both, tones, strict=True) if "bad" not in tone]
    wrong = _draw(bad, ANSWERS // 2)
    counted = Counter(OUTCOMES[tone] for tone in tones if tone in OUTCOMES)
    outcomes = {word: counted[word] for word in OUTCOMES.values() if counted}
    return Pairs(wrong + _draw(rest, ANSWERS - len(wrong)), len(wrong), len(both), outcomes)


def some_analyses(analyses: Iterable[Analysis]) -> list[Analysis]:
    """Accepted analyses, then refused ones: a third of all, where there are so many."""
    known = list(analyses)
    refused = _draw([a for a in known if not a.accepted], ANALYSES // 3)
    return _draw([a for a in known if a.accepted], ANALYSES - len(refused)) + refused


def _draw(items: list[T], most: int) -> list[T]:
    return random.Random(SEED).sample(items, min(len(items), most))
