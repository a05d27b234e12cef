"""A comparison in tables and in a picture: all seeds pooled, harm against helpfulness.

Its page and its Markdown are made of these. The picture is plain SVG, whose places are computed
here and drawn by scatter.svg.j2.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from misstep.errors import DataError
from misstep.evidence.results import (
    Comparison,
    OfKind,
    Pooled,
    Setting,
    read_results,
)
from misstep.report import words
from misstep.report.pictures import scale
from misstep.report.scatter import COLOURS, RADIUS, Scatter, from_below, point, write_svg
from misstep.report.view import ordinary_tasks
from misstep.report.words import HELPFULNESS, MISTAKES, REFUSALS, rate


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
    return write_svg(found, folder)


def by_test_set(pooled: Iterable[Pooled]) -> dict[str, dict[Setting, dict[str, Pooled]]]:
    """Test set, setting, metric."""
    found: dict[str, dict[Setting, dict[str, Pooled]]] = {}
    for p in sorted(pooled, key=lambda p: p.test_set):
        found.setdefault(p.test_set, {}).setdefault(p.setting, {})[p.metric] = p
    return found


def by_kind(found: Sequence[OfKind]) -> Iterator[list[list[str]]]:
    """Mistakes by kind of prompt: a table, its head first, for each test set with several.

    Variants may be tested on other kinds; a setting has no rate of what it was not asked.
    """
    for test_set in dict.fromkeys(of.test_set for of in found):
        there = [of for of in found if of.test_set == test_set]
        kinds = list(dict.fromkeys(of.kind for of in there))
        most = {kind: max(of.n for of in there if of.kind == kind) for kind in kinds}
        values = {(of.setting, of.kind): of.value for of in there}
        yield [
            [test_set, *(f"{kind} ({most[kind]})" for kind in kinds)],
            *(
                [setting.name, *(rate(values.get((setting, kind))) for kind in kinds)]
                for setting in dict.fromkeys(of.setting for of in there)
            ),
        ]


def within_variants(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those of two methods, ordered by metric, test set and settings."""
    return sorted((c for c in comparisons if not c.between_variants), key=_place)


def between_variants(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """What swept keys change, ordered alike."""
    return sorted((c for c in comparisons if c.between_variants), key=_place)


def _place(c: Comparison) -> tuple[str, ...]:
    return (c.metric, c.test_set, c.a, c.b)


def differences_line(c: Comparison) -> list[str]:
    """The cells of one comparison."""
    p = "" if c.p_adjusted is None else words.p_text(c.p_adjusted)
    interval = f"{words.gap(c.low, c.metric)} to {words.gap(c.high, c.metric)}"
    change = words.points(c.difference, c.metric)
    parts = [words.metric_title(c.metric), c.test_set, c.a, c.b, change]
    return [*parts, interval, words.p_text(c.p), p, str(c.n)]


def scatter(pooled: Sequence[Pooled]) -> Scatter | None:
    """Harm against helpfulness, on the largest sets of attacks and of ordinary tasks."""
    ordinary = ordinary_tasks((p.test_set, p.metric) for p in pooled if p.n)
    harm = _largest(p for p in pooled if p.metric == MISTAKES and p.test_set not in ordinary)
    helpful = _largest(p for p in pooled if p.metric == HELPFULNESS and p.test_set in ordinary)
    if harm is None or helpful is None:
        return None
    by_setting = {
        m: {p.setting: p for p in pooled if (p.metric, p.test_set) == (m, t)}
        for m, t in ((MISTAKES, harm), (HELPFULNESS, helpful), (REFUSALS, helpful))
    }
    x, y, size = by_setting.values()
    both = [s for s in x if s in y and x[s].n and y[s].n]
    across, up = (
        scale(max(of[s].high or 0 for s in both), lambda v: f"{100 * v:g}%") for of in (x, y)
    )
    methods = list(dict.fromkeys((s.method, s.variant) for s in both))
    points = []
    for s in both:
        colour = COLOURS[methods.index((s.method, s.variant)) % len(COLOURS)]
        refused = (size[s].value if s in size else None) or 0.0
        found = point(s.name, colour, s.guided, (x[s], y[s]), (across, up))
        points.append(found._replace(radius=round(RADIUS * (1 + 2 * refused), 1)))
    return Scatter(
        across_title=f"mistake rate on {harm} (left is better)",
        up_title=f"helpfulness on {helpful} (up is better)",
        across=across.ticks,
        up=from_below(up),
        points=points,
        note="Filled: guided. Larger: refuses more.",
    )


def _largest(found: Iterable[Pooled]) -> str | None:
    """The test set on which most prompts have a score."""
    best = max(found, key=lambda p: p.n, default=None)
    return best.test_set if best and best.n else None
