"""A comparison as a page: one table over all seeds, harm against helpfulness, differences.

Made from results.json and manifest.json alone. The picture is plain SVG, whose places are
computed here; compared.html.j2 draws them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from misstep.errors import DataError
from misstep.records import base_metric
from misstep.report import words
from misstep.report.pictures import Scale, scale
from misstep.report.template import write_page
from misstep.report.words import BETTER, HELPFULNESS, MISTAKES, REFUSALS, rate
from misstep.results import (
    Comparison,
    Corrected,
    Metric,
    Pooled,
    Results,
    Setting,
    read_results,
)

COLOURS = (
    *("#4c566a", "#9aa0ac", "#b58900", "#2a78b5", "#7a5195", "#bc5090"),
    *("#1b998b", "#8c6d46", "#d1495b", "#e4572e", "#2e8b57", "#5b6ee1"),
)
"""Of the methods, in the order of the table."""
RADIUS = 6.0


class Point(NamedTuple):
    """A setting in the picture; places are percentages."""

    title: str
    colour: str
    guided: bool
    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    radius: float
    """Grows with over-refusal, where that was measured."""


class Scatter(NamedTuple):
    """Harm from left to right, helpfulness from below."""

    harm: str
    helpful: str
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    points: list[Point]


def write_comparison(folder: Path) -> Path:
    """Write report.html into the directory of a comparison and return its path.

    Raises:
        DataError: results.json is absent or unreadable.
    """
    results = read_results(folder / "results.json")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    content = _content(results, manifest)
    return write_page(folder / "report.html", "compared.html.j2", content)


def write_picture(folder: Path) -> Path:
    """Write harm against helpfulness as picture.svg and return its path.

    Raises:
        DataError: results.json is absent or unreadable, or has no such two rates.
    """
    found = scatter(read_results(folder / "results.json").pooled)
    if found is None:
        raise DataError(
            f"{folder}: expected a comparison with a mistake rate and helpfulness on ordinary "
            "tasks, found none to draw."
        )
    height = max(460, 18 * len(found.points) + 50)
    content = {"scatter": found, "height": height}
    return write_page(folder / "picture.svg", "picture.svg.j2", content)


def _content(results: Results, manifest: dict[str, Any]) -> dict[str, Any]:
    metrics = in_order(p.metric for p in results.pooled)
    return {
        "name": manifest["recipe"]["name"],
        "results": results,
        "manifest": manifest,
        "scatter": scatter(results.pooled),
        "metrics": [(words.metric_title(m), words.direction(m)) for m in metrics],
        "sections": [
            (test_set, [(s, [cell(of.get(m)) for m in metrics]) for s, of in lines.items()])
            for test_set, lines in by_test_set(results.pooled).items()
        ],
        "differences": [differences_line(c) for c in of_interest(results.comparisons)],
        "seeds": sorted({row.seed for row in results.rows}),
    }


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics, the known ones first, each with those of further judges behind it."""
    found = dict.fromkeys(metrics)
    known = list(BETTER)
    return sorted(
        found, key=lambda m: known.index(b) if (b := base_metric(m)) in known else len(known)
    )


def by_test_set(pooled: Iterable[Pooled]) -> dict[str, dict[Setting, dict[str, Pooled]]]:
    """Test set, setting, metric."""
    found: dict[str, dict[Setting, dict[str, Pooled]]] = {}
    for p in sorted(pooled, key=lambda p: p.test_set):
        found.setdefault(p.test_set, {}).setdefault(p.setting, {})[p.metric] = p
    return found


def cell(metric: Pooled | None) -> str:
    """A number of the table: interval, spread over the seeds, what has no score."""
    if metric is None or metric.value is None:
        return "–"
    spread, name = "", metric.metric
    if len(metric.by_seed) > 1:
        low, high = min(metric.by_seed.values()), max(metric.by_seed.values())
        spread = f"; seeds {rate(low, name)} to {rate(high, name)}"
    unscored = f", {metric.unscored} unscored" if metric.unscored else ""
    interval = f"{rate(metric.low, name)} to {rate(metric.high, name)}"
    shown = f"{rate(metric.value, name)} ({interval}{unscored}{spread})"
    return shown + corrected_text(metric.corrected)


def corrected_text(true: Corrected | None) -> str:
    """What follows a rate that was corrected for its judge."""
    if true is None:
        return ""
    return f"; corrected {rate(true.value)} ({rate(true.low)} to {rate(true.high)})"


def of_interest(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Ordered by metric, test set and settings."""
    return sorted(comparisons, key=lambda c: (c.metric, c.test_set, c.a, c.b))


def differences_line(c: Comparison) -> list[str]:
    """The cells of one comparison."""
    p = "" if c.p_adjusted is None else words.p_text(c.p_adjusted)
    interval = f"{words.gap(c.low, c.metric)} to {words.gap(c.high, c.metric)}"
    change = words.points(c.difference, c.metric)
    parts = [words.metric_title(c.metric), c.test_set, c.a, c.b, change]
    return [*parts, interval, words.p_text(c.p), p, str(c.n)]


def scatter(pooled: Sequence[Pooled]) -> Scatter | None:
    """Harm against helpfulness, on the largest test sets that measure each."""
    harm, helpful = (_largest(pooled, m) for m in (MISTAKES, HELPFULNESS))
    if harm is None or helpful is None:
        return None
    by_setting = {
        m: {p.setting: p for p in pooled if (p.metric, p.test_set) == (m, t)}
        for m, t in ((MISTAKES, harm), (HELPFULNESS, helpful), (REFUSALS, helpful))
    }
    x, y, size = by_setting.values()
    both = [s for s in x if s in y and x[s].n and y[s].n]
    across = scale(max(x[s].high or 0 for s in both), lambda v: f"{100 * v:g}%")
    up = scale(max(y[s].high or 0 for s in both), lambda v: f"{100 * v:g}%")
    methods = list(dict.fromkeys((s.method, s.variant) for s in both))
    points = [
        _point(s, COLOURS[methods.index((s.method, s.variant)) % len(COLOURS)], places, size)
        for s in both
        for places in [(_places(x[s], across), _places(y[s], up))]
    ]
    flipped = [(100 - place, text) for place, text in up.ticks]
    return Scatter(harm, helpful, across.ticks, flipped, points)


def _largest(pooled: Iterable[Pooled], metric: str) -> str | None:
    """The test set on which most prompts have a score; ordinary tasks count for helpfulness."""
    attacked = {p.test_set for p in pooled if p.metric == MISTAKES}
    found = [
        p
        for p in pooled
        if p.metric == metric and (metric == MISTAKES or p.test_set not in attacked)
    ]
    best = max(found, key=lambda p: p.n, default=None)
    return best.test_set if best and best.n else None


def _places(metric: Metric, axis: Scale) -> tuple[float, float, float]:
    return tuple(axis.at(v or 0.0) for v in (metric.value, metric.low, metric.high))  # type: ignore[return-value]


def _point(
    setting: Setting,
    colour: str,
    places: tuple[tuple[float, float, float], tuple[float, float, float]],
    size: dict[Setting, Pooled],
) -> Point:
    (x, left, right), (y, low, high) = places
    refused = size[setting].value if setting in size else None
    return Point(
        title=setting.name,
        colour=colour,
        guided=setting.guided,
        x=x,
        y=100 - y,
        left=left,
        right=right,
        low=100 - low,
        high=100 - high,
        radius=round(RADIUS * (1 + 2 * (refused or 0.0)), 1),
    )
