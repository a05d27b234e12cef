"""The results, arranged for looking things up: settings, their numbers, tested differences.

A run has one seed, so a setting has one number for each metric and test set.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from misstep.evidence.results import BASE, FOCUS, Comparison, Metric, Row, Setting, adjusted
from misstep.methods.base import Method
from misstep.methods.registry import METHODS
from misstep.records import base_metric
from misstep.report import words
from misstep.report.reading import Run
from misstep.report.words import BETTER, MISTAKES, REFUSALS, metric_title

T = TypeVar("T")

CONTROL = "ordinary"
"""What is trained on nothing about mistakes."""


class About(NamedTuple):
    """What a number or a difference is about."""

    metric: str
    test_set: str

    @property
    def title(self) -> str:
        """Both in words."""
        return f"{metric_title(self.metric)} on {self.test_set}"


class Tested(NamedTuple):
    """A comparison, with its p adjusted for those of the same metric and test set (Holm)."""

    found: Comparison
    adjusted: float

    @property
    def settings(self) -> tuple[Setting, Setting]:
        """From which setting to which the change goes."""
        return Setting.parse(self.found.b), Setting.parse(self.found.a)

    @property
    def verdict(self) -> str:
        """`good` or `bad`, `other` where neither end is, or `none` where none is shown."""
        better = words.better(self.found.metric)
        if self.adjusted >= 0.05:
            return "none"
        if better == "neither":
            return "other"
        return "good" if (self.found.difference < 0) == (better == "lower") else "bad"


class View:
    """What a run measured."""

    def __init__(self, run: Run) -> None:
        rows = run.results.rows
        known = [*map(Setting.of, rows), *(Setting.of(answer) for answer, _ in run.answers)]
        self.settings = list(dict.fromkeys(known))
        self.before, self.after = ends(self.settings)
        self.numbers = in_order(_numbers(rows))
        self.tested = tested_of(run.results.comparisons)
        self.sources = {Setting.of(row): _sources(row) for row in rows}
        self.policy = run.results.policy
        self.corrected = run.results.corrected
        self.agreements = run.results.agreements
        self.alone = _alone(run)
        """The test sets but for pools, which are made of others, whose cases count there."""

    def role(self, setting: Setting) -> str:
        """Whether a setting is the one before, the one after, or another."""
        return {self.before: "before", self.after: "after"}.get(setting, "other")

    def every(self, metric: str) -> list[Metric]:
        """All numbers of one metric."""
        found = [of.values() for about, of in self.numbers.items() if about.metric == metric]
        return [number for numbers in found for number in numbers]


def ends(settings: Iterable[Setting]) -> tuple[Setting | None, Setting | None]:
    """Before and after: the model as it was, and the setting that the run is about.

    After is trained on analyses rather than on anything else, on anything else rather than on
    ordinary pairs alone, and guided rather than not; what something else has trained is no
    repair of the run.
    """
    known = [setting for setting in settings if setting.method in METHODS]
    before = BASE if BASE in known else None
    after = max(
        (setting for setting in known if setting != before),
        key=lambda s: (*_repairs(METHODS[s.method]), s.guided),
        default=None,
    )
    return before, after


def _repairs(method: Method) -> tuple[bool, ...]:
    """How much a method is what a run is about, of two the larger."""
    trained = method.trains and method.name != CONTROL
    of_analyses = trained and method.uses_analyses
    return method.name == FOCUS, of_analyses, trained, method.trains, method.name != BASE.method


def _alone(run: Run) -> frozenset[str]:
    # Imported logs have pools, but no manifest: no answer is of a pool.
    answered = {answer.test_set for answer, _ in run.answers}
    known = {row.test_set for row in run.results.rows} - run.manifest.pools
    return frozenset(known & answered if answered else known)


def ordinary_tasks(scored: Iterable[tuple[str, str]]) -> set[str]:
    """Of test sets, each with a metric: those where a refusal is one too many, or no mistake
    is looked for.

    A judge by rubric and a trained one look for mistakes in any answer, to clean tasks too.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for test_set, metric in scored:
        found[test_set].add(metric)
    return {name for name, of in found.items() if REFUSALS in of or MISTAKES not in of}


def _numbers(rows: Iterable[Row]) -> dict[About, dict[Setting, Metric]]:
    found: dict[About, dict[Setting, Metric]] = defaultdict(dict)
    for row in rows:
        for name, metric in row.metrics.items():
            found[About(name, row.test_set)][Setting.of(row)] = metric
    return found


def tested_of(comparisons: Sequence[Comparison]) -> dict[About, list[Tested]]:
    """Tested differences by what they are about, in the order of metrics."""
    found: dict[About, list[Tested]] = defaultdict(list)
    for comparison in adjusted(comparisons):
        assert comparison.p_adjusted is not None
        of = Tested(comparison, comparison.p_adjusted)
        found[About(comparison.metric, comparison.test_set)].append(of)
    return in_order(found)


def in_order(found: Mapping[About, T]) -> dict[About, T]:
    """The same in the order of metrics."""
    ordered = sorted(
        found, key=lambda about: [base_metric(about.metric) != metric for metric in BETTER]
    )
    return {about: found[about] for about in ordered}


def _sources(row: Row) -> str:
    parts = (("mistakes", row.mistake_source), ("analyses", row.analysis_source))
    return ", ".join(f"{what}: {source}" for what, source in parts if source)
