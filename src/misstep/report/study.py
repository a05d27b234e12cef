"""A study as one HTML page: what study.json holds, put into study.html.j2.

Arranges numbers that were counted before and adjusts p for their number; reads the analyses for
a few samples, where they lie beside it. Runs nothing.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import yaml

from misstep.errors import DataError
from misstep.evidence.results import Metric
from misstep.evidence.study_results import (
    Paired,
    Study,
    StudyScore,
    Task,
    Tested,
    Told,
    Verdict,
    read_study,
)
from misstep.records import read_jsonl
from misstep.report import words
from misstep.report.pictures import Panel, Strip, marks, rate_scale, scale
from misstep.report.reading import read_manifest
from misstep.report.scatter import COLOURS, Scatter, from_below, point, write_svg
from misstep.report.template import write_page
from misstep.stages.discriminate import Discrimination

SAMPLES = 4
"""Answers of each model that are shown with both analyses."""
SEED = 0
"""The same study gives the same page."""

Way = tuple[str, Task, bool]
WAYS: tuple[Way, ...] = (
    ("answering", "answering", False),
    ("unguided", "analysing", False),
    ("guided", "analysing", True),
)
"""The role that decides a colour, and the task and the guidance that it stands for."""
TITLES = {
    "answering/unguided": "answering",
    "answering/guided": "guided answering",
    "analysing/unguided": "unguided analysis",
    "analysing/guided": "guided analysis",
}


T = TypeVar("T", bound=Tested)


class Adjusted(NamedTuple, Generic[T]):
    """A difference, with its p adjusted for all of its kind in the study."""

    model: str
    what: str
    """What is set against what, in words."""
    found: T
    adjusted: float

    @property
    def verdict(self) -> str:
        """`good` or `bad` for what stands first, or `none` where no difference is shown."""
        if self.adjusted >= 0.05:
            return "none"
        return "good" if self.found.difference > 0 else "bad"

    @property
    def sentence(self) -> str:
        """The difference in words."""
        found = self.found
        change = words.difference(found, self.adjusted, more=f", {words.sample_size(found.n)}")
        return f"{self.model}, {self.what}: {change}"


class Said(NamedTuple):
    """What one analysis says, and whether the judge agrees: `good`, `bad` or `none`."""

    tone: str
    word: str
    text: str
    title: str


class Sample(NamedTuple):
    """An answer with both its analyses."""

    model: str
    mistake: Verdict
    unguided: Discrimination
    analyses: list[Said]


def write_study_report(folder: Path) -> Path:
    """Write study.html into a study's directory, from what stands there, and return its path.

    Raises:
        DataError: study.json or manifest.json is absent or unreadable.
    """
    study, manifest = read_study(folder / "study.json"), read_manifest(folder)
    tests, tellings = tested(study), told(study)
    content = {
        "study": study,
        "manifest": manifest,
        "headline": headline(study, tests, tellings),
        "tested": tests,
        "told": tellings,
        "panels": [_right(study), _balanced(study), _wins(study)],
        "samples": list(_samples(folder, study.analysed)),
        "recipe": yaml.safe_dump(manifest["recipe"], allow_unicode=True, sort_keys=False),
    }
    filters = {"way": lambda name: TITLES[name]}
    return write_page(folder / "study.html", "study.html.j2", content, filters)


def write_study_picture(folder: Path) -> Path:
    """Write what analyses tell apart as picture.svg and return its path.

    Raises:
        DataError: study.json is absent or unreadable, or no analysis has a verdict.
    """
    found = told_apart(read_study(folder / "study.json"))
    if not found.points:
        raise DataError(f"{folder}: expected analyses with a verdict, found none to draw.")
    return write_svg(found, folder)


def told_apart(study: Study) -> Scatter:
    """Mistakes called mistakes against right answers called mistakes."""
    axis = scale(1.0, lambda v: f"{100 * v:g}%")
    points = []
    for number, model in enumerate(study.models):
        for role, task, guided in WAYS:
            if task != "analysing":
                continue
            right, found = (
                model.metric(task, guided, name) for name in ("specificity", "sensitivity")
            )
            if right.value is None or found.value is None:
                continue
            place = (_complement(right), found)
            title = f"{model.model}, {role}"
            colour = COLOURS[number % len(COLOURS)]
            points.append(point(title, colour, guided, place, (axis, axis)))
    return Scatter(
        across_title="right answers called mistakes (left is better)",
        up_title="mistakes called mistakes (up is better)",
        across=axis.ticks,
        up=from_below(axis),
        points=points,
        note="Filled: guided. Dashed: chance.",
        chance=True,
    )


def _complement(rate: Metric) -> Metric:
    value, low, high = (None if v is None else 1 - v for v in (rate.value, rate.high, rate.low))
    return rate.model_copy(update={"value": value, "low": low, "high": high})


def tested(study: Study) -> list[Adjusted[Paired]]:
    """Every comparison, telling against doing first, then guided against unguided."""
    found = [
        (model.model, paired)
        for model in study.models
        for paired in (*model.comparisons, model.wins.tested)
        if paired is not None
    ]
    adjusted = _holm([paired for _, paired in found])
    return [
        Adjusted(model, f"{TITLES[paired.a]} against {TITLES[paired.b]}", paired, p)
        for (model, paired), p in zip(found, adjusted, strict=True)
    ]


def told(study: Study) -> list[Adjusted[Told]]:
    """Every model beside the first, where all analysed the same answers."""
    return [
        Adjusted(
            found.model,
            f"{'guided' if found.guided else 'unguided'}, telling those mistakes against the "
            "first",
            found,
            p,
        )
        for found, p in zip(study.told, _holm(study.told), strict=True)
    ]


def _holm(found: Sequence[Tested]) -> list[float]:
    # numpy, which stats needs, is slow to load, and the command starts without it.
    from misstep.evidence.stats import holm

    return holm([one.p for one in found])


def headline(
    study: Study, tests: list[Adjusted[Paired]], tellings: list[Adjusted[Told]]
) -> str:
    """What the study shows, in plain words.

    Accuracy can be had without looking, so the first words never stand without the last.
    """
    guide = _tally(tests, "analysing/guided", "analysing/unguided")
    models = len(study.models)
    return (
        f"Of {models} model{'s' if models > 1 else ''}, {_first_words(study, tests, tellings)};"
        f" the guide made the analyses of {guide['good']} better and of {guide['bad']} worse; "
        f"better than chance were {_better_than_chance(study, False)} unguided and "
        f"{_better_than_chance(study, True)} guided."
    )


def _first_words(
    study: Study, tests: list[Adjusted[Paired]], tellings: list[Adjusted[Told]]
) -> str:
    if study.analysed is None:
        telling = _tally(tests, "analysing/unguided", "answering/unguided")
        return (
            f"analysing was right more often than answering for {telling['good']} and less "
            f"often for {telling['bad']}"
        )
    better, worse = (
        [
            sum(t.verdict == verdict and t.found.guided == guided for t in tellings)
            for guided in (False, True)
        ]
        for verdict in ("good", "bad")
    )
    return (
        f"{better[0]} told the mistakes of {study.analysed} better than it does and {worse[0]} "
        f"told them worse, guided {better[1]} and {worse[1]}"
    )


def _better_than_chance(study: Study, guided: bool) -> int:
    """How many models have a balanced accuracy whose whole interval lies above one half."""
    found = (model.metric("analysing", guided, "balanced_accuracy") for model in study.models)
    return sum(metric.low is not None and metric.low > 0.5 for metric in found)


def _tally(tests: list[Adjusted[Paired]], a: str, b: str) -> Mapping[str, int]:
    tally: dict[str, int] = defaultdict(int)
    for test in tests:
        tally[test.verdict] += (test.found.a, test.found.b) == (a, b)
    return tally


def _right(study: Study) -> Panel:
    """Answering and both analyses on one scale."""
    return _panel(
        "Share that is right",
        f"n\u202f=\u202f{study.prompts} prompts, undecided analyses left out",
        {m.model: [(r, m.metric(t, g, "accuracy")) for r, t, g in WAYS] for m in study.models},
    )


def _balanced(study: Study) -> Panel:
    return _panel(
        "Balanced accuracy of analyses",
        "50\u202f% for who always praises and for who always finds fault",
        {
            m.model: [
                (role, m.metric(task, guided, "balanced_accuracy"))
                for role, task, guided in WAYS
                if task == "analysing"
            ]
            for m in study.models
        },
    )


def _wins(study: Study) -> Panel:
    return _panel(
        "Guided against unguided analysis, answer by answer",
        "guided wins, unguided wins; all else is a tie",
        {m.model: [("guided", m.wins.win), ("unguided", m.wins.lose)] for m in study.models},
    )


def _panel(title: str, hint: str, numbers: Mapping[str, list[tuple[str, Metric]]]) -> Panel:
    axis = rate_scale(metric for of in numbers.values() for _, metric in of)
    strips = [
        Strip("kind", name, "", marks(of, axis), " · ".join(_brief(m) for _, m in of))
        for name, of in numbers.items()
    ]
    return Panel(title, hint, axis.ticks, strips)


def _brief(metric: Metric) -> str:
    return "–" if metric.value is None else words.brief(metric.value)


def _samples(folder: Path, author: str | None) -> Iterator[Sample]:
    """What each model analysed, drawn at random; none where the analyses do not lie there.

    The answers are those of `author`, or each model's own.
    """
    files = folder / "analyses.jsonl", folder / "scores.jsonl"
    if not all(file.is_file() for file in files):
        return
    mistakes = {
        (item.model, item.score.response_id): item.score.counted
        for item in read_jsonl(files[1], StudyScore)
    }
    found: dict[str, dict[str, dict[bool, Discrimination]]] = defaultdict(dict)
    for analysis in read_jsonl(files[0], Discrimination):
        both = found[analysis.model].setdefault(analysis.response.id, {})
        both[analysis.guided] = analysis
    for model, answers in found.items():
        for name in random.Random(SEED).sample(sorted(answers), min(SAMPLES, len(answers))):
            value = mistakes[author or model, name]
            mistake = None if value is None else bool(value)
            both = answers[name]
            said = [_said(both[guided], mistake) for guided in (False, True)]
            yield Sample(model, mistake, both[False], said)


def _said(analysis: Discrimination, mistake: Verdict) -> Said:
    title = f"{'Guided' if analysis.guided else 'Unguided'} analysis"
    says = analysis.says_mistake
    if says is None:
        return Said("none", "undecided", analysis.text, title)
    tone = "none" if mistake is None else "good" if says == mistake else "bad"
    word = "calls it a mistake" if says else "calls it right"
    return Said(tone, word, analysis.text, title)
