"""Dots, whiskers and curves as places in an SVG.

Places are percentages of a width that the reader's screen decides; the template draws them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from misstep.evidence.results import BASE, FOCUS, Metric, Setting, metric_from_scores
from misstep.records import base_metric
from misstep.report.reading import Scored, Training
from misstep.report.view import About, View
from misstep.report.words import (
    MISTAKES,
    direction,
    method_title,
    points,
    rate,
    sample_size,
    setting_title,
    unit,
)

Ticks = list[tuple[float, str]]
"""Place and text."""


class Scale(NamedTuple):
    """An axis from 0 to a round number."""

    top: float
    ticks: Ticks
    metric: str = ""
    """Whose values the axis shows; rates where left out."""

    def at(self, value: float) -> float:
        """The place of a value."""
        return round(100 * value / self.top, 3)


def scale(largest: float, show: Callable[[float], str]) -> Scale:
    """An axis for values up to the largest, with at most six round ticks."""
    largest = largest if largest > 0 else 1.0
    power = 10 ** math.floor(math.log10(largest / 5))
    step = next(f * power for f in (1, 2, 5, 10) if largest / (f * power) <= 5)
    steps = math.ceil(largest / step - 1e-9)
    ticks = [(round(100 * i / steps, 3), show(round(i * step, 10))) for i in range(steps + 1)]
    return Scale(steps * step, ticks)


def rate_scale(metrics: Iterable[Metric], metric: str = "") -> Scale:
    """One axis for all panels of a metric, so that they can be compared by eye."""
    largest = max((m.high or 0.0 for m in metrics), default=0.0)
    found = scale(largest, lambda v: f"{v:g}" if unit(metric) is not None else f"{100 * v:g}%")
    return found._replace(metric=metric)


class Mark(NamedTuple):
    """A dot with its whiskers."""

    role: str
    y: int
    x: float
    left: float
    right: float
    text: str


class Strip(NamedTuple):
    """A line of a panel: a name, its dots one below the other, and their number."""

    role: str
    label: str
    sub: str
    marks: list[Mark]
    text: str

    @property
    def height(self) -> int:
        """As high as its dots need."""
        return 14 + 14 * max(1, len(self.marks))


class Panel(NamedTuple):
    """Dots and whiskers of one metric on one axis."""

    title: str
    hint: str
    ticks: Ticks
    strips: list[Strip]


def panels(view: View, of_mistakes: bool) -> list[Panel]:
    """The before/after picture of mistakes, or of what their repair may have cost."""
    drawn = [
        about
        for about in view.numbers
        # A bias may lie below 0, where the pictures' axes begin.
        if (base_metric(about.metric) == MISTAKES) == of_mistakes
        and base_metric(about.metric) != "length_bias"
    ]
    return [
        panel(about, view.numbers[about], view.every(about.metric), view.role)
        for about in drawn
    ]


def panel(
    about: About,
    numbers: Mapping[Setting, Metric],
    every: Iterable[Metric],
    role_of: Callable[[Setting], str],
) -> Panel:
    """A line for each setting, on the axis of every number of the metric."""
    axis = rate_scale(every, about.metric)
    strips = []
    for setting, metric in numbers.items():
        role = role_of(setting)
        text = rate(metric.value, about.metric) if metric.n else "unscored"
        strips.append(
            Strip(role, setting_title(setting), "", marks([(role, metric)], axis), text)
        )
    sizes = [metric.n for metric in numbers.values()]
    hints = (sample_size(min(sizes), max(sizes)), direction(about.metric))
    return Panel(about.title, ", ".join(filter(None, hints)), axis.ticks, strips)


def marks(found: Iterable[tuple[str, Metric]], axis: Scale) -> list[Mark]:
    """Dots one below the other; what has no score has none."""
    drawn: list[Mark] = []
    for role, m in found:
        if m.value is None or m.low is None or m.high is None:
            continue
        value, low, high = (rate(v, axis.metric) for v in (m.value, m.low, m.high))
        text = f"{value} ({low} to {high}, {sample_size(m.n)})"
        places = (axis.at(m.value), axis.at(m.low), axis.at(m.high))
        drawn.append(Mark(role, 14 + 14 * len(drawn), *places, text))
    return drawn


def kinds_panel(view: View, answers: Sequence[Scored]) -> Panel | None:
    """Mistake rates by kind, before and after; None where there are not several kinds."""
    found = _by_kind(view, answers)
    if view.before is None or view.after is None or len(found) < 2:
        return None
    axis = rate_scale(metric for ends in found.values() for metric in ends)
    strips = []
    for kind, (before, after) in sorted(found.items(), key=lambda item: -item[1][0].n):
        dots = marks([("before", before), ("after", after)], axis)
        text = f"{rate(before.value)} → {rate(after.value)}"
        strips.append(Strip("kind", kind, sample_size(before.n), dots, text))
    hint = f"all test sets together, {direction(MISTAKES)}"
    return Panel("Mistake rate by kind", hint, axis.ticks, strips)


def _by_kind(view: View, answers: Sequence[Scored]) -> dict[str, list[Metric]]:
    judged = [
        (answer.response.prompt.kind, view.role(Setting.of(answer)), scores[MISTAKES])
        for answer, scores in answers
        if MISTAKES in scores
    ]
    return {
        kind: [
            metric_from_scores([score for *of, score in judged if of == [kind, role]])
            for role in ("before", "after")
        ]
        for kind in dict.fromkeys(kind for kind, _, _ in judged)
    }


class Square(NamedTuple):
    """The 2 x 2 of one test set: trained on analyses or not, guided or not."""

    test_set: str
    lines: list[tuple[str, list[Metric | None]]]
    """A title, and the rates unguided and guided; None where it was not measured."""
    worst: float
    """The highest rate of the run, which is the darkest field of all squares."""
    sentence: str


def squares(view: View) -> list[Square]:
    """Whether training on analyses and guidance work together, test set by test set."""
    if not any(setting.method == FOCUS for setting in view.settings):
        return []
    worst = max((metric.value or 0.0 for metric in view.every(MISTAKES)), default=0.0) or 1.0
    attacked = [about for about in view.numbers if about.metric == MISTAKES]
    return [_square(about.test_set, worst, view.numbers[about]) for about in attacked]


def _square(test_set: str, worst: float, numbers: Mapping[Setting, Metric]) -> Square:
    plain, trained = (
        [numbers.get(Setting(method, guided)) for guided in (False, True)]
        for method in (BASE.method, FOCUS)
    )
    lines = [(method_title(BASE.method), plain), ("Trained on analyses", trained)]
    return Square(test_set, lines, worst, _effects(*plain, *trained))


def _effects(base: Metric | None, *others: Metric | None) -> str:
    names = ("Guidance alone", "training alone", "both")
    parts = [
        f"{name} {points(metric.value - base.value)}"
        for name, metric in zip(names, others, strict=True)
        if base and base.value is not None and metric and metric.value is not None
    ]
    return ", ".join(parts) + "." if parts else ""


class Curve(NamedTuple):
    """A method's loss: points on a field of 100 x 100, and the last value."""

    title: str
    points: str
    last: str


class Losses(NamedTuple):
    """The loss curves of all trained methods."""

    across: Ticks
    up: Ticks
    curves: list[Curve]


def losses(training: Mapping[str, Training]) -> Losses | None:
    """A line for each method that was trained on completions: other losses are no such mean."""
    found = {
        name: report.loss_curve
        for name, report in training.items()
        if report.loss_curve and not (report.ranks or report.reinforced)
    }
    if not found:
        return None
    every = [point for points in found.values() for point in points]
    across = scale(max(step for step, _ in every), lambda v: f"{v:g}")
    up = scale(max(loss for _, loss in every), lambda v: f"{v:g}")
    curves = [
        Curve(method_title(name), _points(points, across, up), f"{points[-1][1]:.3g}")
        for name, points in found.items()
    ]
    return Losses(across.ticks, [(100 - place, text) for place, text in up.ticks], curves)


def _points(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    return " ".join(f"{across.at(step):.2f},{100 - up.at(loss):.2f}" for step, loss in points)
