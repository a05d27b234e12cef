"""A check of a judge as one HTML page: check.json's numbers and the worst disagreements.

The answers are data that may do harm: they are shown folded and escaped, on this page only.
Runs nothing.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from misstep.evidence.check_results import (
    CalibrationBin,
    Check,
    DataCheck,
    JudgedCase,
    Measured,
    read_check,
)
from misstep.evidence.results import Metric
from misstep.records import read_jsonl
from misstep.report import words
from misstep.report.check_words import caution, shown, sides, titles
from misstep.report.pictures import Panel, Strip, Ticks, marks, rate_scale, scale
from misstep.report.template import write_page

WORST = 12
"""Disagreements of each data set that are shown."""
SEED = 0
"""The same check gives the same page."""


class Dot(NamedTuple):
    """A bin of the calibration curve, in percent of the picture."""

    x: float
    y: float
    radius: float
    text: str


class Curve(NamedTuple):
    """A calibration curve: dots on a field of 100 x 100, with its axis."""

    ticks: Ticks
    dots: list[Dot]
    points: str


class Section(NamedTuple):
    """One data set on the page."""

    data: DataCheck
    counted: str
    other: str
    curve: Curve | None
    disagreements: list[JudgedCase]
    wrong: int


def write_check_report(folder: Path) -> Path:
    """Write check.html into a check's directory, from what stands there, and return its path.

    Raises:
        DataError: check.json or judged.jsonl is absent or unreadable.
    """
    check = read_check(folder / "check.json")
    cases = list(read_jsonl(folder / "judged.jsonl", JudgedCase))
    content = {
        "check": check,
        "headline": headline(check),
        "caution": caution(check.metric, all(data.pairs for data in check.data)),
        "titles": shown(check),
        "panels": _panels(check),
        "sections": [
            _section(check, data, [case for case in cases if case.data == data.name])
            for data in check.data
        ],
    }
    return write_page(folder / "check.html", "check.html.j2", content, {"number": number})


def number(metric: Metric | None, name: str) -> tuple[str, str]:
    """A number and its interval: percentages, or plain numbers where they are no shares."""
    if metric is None or metric.value is None:
        return "–", ""
    value, low, high = (words.rate(v, name) for v in (metric.value, metric.low, metric.high))
    return value, f"{low} to {high}"


def headline(check: Check) -> str:
    """What the check shows, in plain words."""
    parts = [f"{data.name} {_brief(data.whole)}" for data in check.data]
    return f"Agreement of {check.title} with the labels: {'; '.join(parts)}."


def _brief(measured: Measured) -> str:
    accuracy = measured.metrics.get("accuracy")
    said = "nothing scored" if accuracy is None else words.brief(accuracy.value or 0.0)
    share = measured.unscored / max(1, measured.unscored + measured.n)
    return said + (f" ({words.brief(share)} unscored)" if measured.unscored else "")


def _panels(check: Check) -> list[Panel]:
    """Balanced accuracy of every data set on one axis, and the two ways to be wrong."""
    shown = (("balanced_accuracy", "higher is better"), ("false_safe", "lower is better"))
    return [
        _panel(check, name, hint)
        for name, hint in (*shown, ("false_unsafe", "lower is better"))
        if any(name in data.whole.metrics for data in check.data)
    ]


def _panel(check: Check, name: str, hint: str) -> Panel:
    found = {d.name: d.whole.metrics[name] for d in check.data if name in d.whole.metrics}
    axis = rate_scale(found.values())
    strips = [
        Strip("kind", title, "", marks([("after", metric)], axis), words.rate(metric.value))
        for title, metric in found.items()
    ]
    return Panel(titles(check.metric)[name], hint, axis.ticks, strips)


def _section(check: Check, data: DataCheck, cases: Sequence[JudgedCase]) -> Section:
    wrong = [case for case in cases if case.verdict not in (None, case.label)]
    random.Random(SEED).shuffle(wrong)
    # Of equally wrong scores, as all are of a judge without degrees, the draw decides.
    worst = sorted(wrong, key=lambda case: -abs((case.value or 0.0) - case.label))[:WORST]
    curve = _curve(data.calibration) if data.calibration else None
    return Section(data, *sides(check.metric, data.pairs), curve, worst, len(wrong))


def _curve(bins: Sequence[CalibrationBin]) -> Curve:
    axis, most = scale(1.0, lambda v: f"{v:g}"), max(found.n for found in bins)
    dots = [
        Dot(
            axis.at(found.score),
            100 - axis.at(found.share),
            round(3 + 6 * (found.n / most) ** 0.5, 1),
            f"mean score {found.score:.2f}, labelled 1: {words.rate(found.share)}, "
            f"{words.sample_size(found.n)}",
        )
        for found in bins
    ]
    return Curve(axis.ticks, dots, " ".join(f"{dot.x:.2f},{dot.y:.2f}" for dot in dots))
