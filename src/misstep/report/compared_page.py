"""A comparison as a page: the untrained model against all else, in words, pictures and tables.

Made from results.json and manifest.json alone. What was tested decides the colours: a setting
is good or bad where its difference from the untrained model of its variant is shown, and never
because its number looks so.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from misstep.data.held_out import told
from misstep.evidence.results import BASE, Pooled, Results, Setting, read_results
from misstep.records import base_metric
from misstep.report.compared import by_kind, scatter
from misstep.report.pictures import Panel, panel
from misstep.report.reading import read_manifest
from misstep.report.template import write_page
from misstep.report.view import About, Tested, in_order, ordinary_tasks, tested_of
from misstep.report.words import HELPFULNESS, MISTAKES, REFUSALS, rate

DRAWN = (MISTAKES, HELPFULNESS, REFUSALS, "answered_without_mistake")
"""Metrics that have pictures; all have tables."""
Numbers = Mapping[About, Mapping[Setting, Pooled]]


def write_comparison(folder: Path) -> Path:
    """Write report.html into the directory of a comparison and return its path.

    Raises:
        DataError: results.json is absent or unreadable.
    """
    content = _content(read_results(folder / "results.json"), read_manifest(folder))
    return write_page(folder / "report.html", "compared.html.j2", content)


def _content(results: Results, manifest: dict[str, Any]) -> dict[str, Any]:
    numbers = _numbers(results.pooled)
    tested = tested_of(results.comparisons)
    within, between = (_of_kind(tested, swept) for swept in (False, True))
    verdicts = _verdicts(within)
    panels = list(_panels(numbers, verdicts))
    return {
        "name": manifest["recipe"]["name"],
        "results": results,
        "seeds": sorted({row.seed for row in results.rows}),
        "overlaps": list(told(manifest.get("overlaps", {}))),
        "manifest": manifest,
        "headline": _headline(numbers, verdicts) or manifest["recipe"]["name"],
        "scatter": scatter(results.pooled),
        "mistake_panels": [drawn for about, drawn in panels if _is_mistakes(about)],
        "other_panels": [drawn for about, drawn in panels if not _is_mistakes(about)],
        "numbers": numbers,
        "kinds": list(by_kind(results.kinds)),
        "within": within,
        "between": between,
        "verdicts": verdicts,
    }


def _numbers(pooled: Iterable[Pooled]) -> Numbers:
    found: dict[About, dict[Setting, Pooled]] = {}
    for p in pooled:
        found.setdefault(About(p.metric, p.test_set), {})[p.setting] = p
    return in_order(found)


Tests = dict[About, list[Tested]]
Verdicts = Mapping[tuple[About, Setting], str]
"""Of what was tested against the untrained model, the verdict."""


def _of_kind(tested: Tests, swept: bool) -> Tests:
    """Differences that swept keys make, or those between methods."""
    found = {
        about: [t for t in of if t.found.between_variants == swept]
        for about, of in tested.items()
    }
    return {about: of for about, of in found.items() if of}


def _verdicts(within: Tests) -> Verdicts:
    found = {}
    for about, of in within.items():
        for tested in of:
            first, second = tested.settings
            if first == BASE._replace(variant=second.variant):
                found[about, second] = tested.verdict
    return found


def _panels(numbers: Numbers, verdicts: Verdicts) -> Iterator[tuple[About, Panel]]:
    drawn = [about for about in numbers if base_metric(about.metric) in DRAWN]
    for about in drawn or numbers:
        every = [
            p for a, of in numbers.items() if a.metric == about.metric for p in of.values()
        ]
        yield about, panel(about, numbers[about], every, partial(_role, verdicts, about))


def _role(verdicts: Verdicts, about: About, setting: Setting) -> str:
    """Before is the untrained model of a variant; of the others, what was shown."""
    if setting == BASE._replace(variant=setting.variant):
        return "before"
    verdict = verdicts.get((about, setting))
    return verdict if verdict in ("good", "bad") else "other"


def _is_mistakes(about: About) -> bool:
    return base_metric(about.metric) == MISTAKES


def _headline(numbers: Numbers, verdicts: Verdicts) -> str:
    """On the largest set of attacks, what is shown of how many; empty where nothing is."""
    ordinary = ordinary_tasks((about.test_set, about.metric) for about in numbers)
    judged = [about for about in numbers if about.metric == MISTAKES]
    # Where a test has none but ordinary tasks, mistakes in these are what there is to tell.
    attacked = [about for about in judged if about.test_set not in ordinary] or judged
    harm = max(attacked, key=lambda a: max(p.n for p in numbers[a].values()), default=None)
    tested = [verdict for (about, _), verdict in verdicts.items() if about == harm]
    if harm is None or not tested:
        return ""
    fewer, more = tested.count("good"), tested.count("bad")
    untrained = {
        p.value for s, p in numbers[harm].items() if s == BASE._replace(variant=s.variant)
    }
    made = f", {rate(untrained.pop())} of its answers" if len(untrained) == 1 else ""
    verb = "is" if more == 1 else "are"
    return (
        f"{fewer} of {len(tested)} settings are shown to make fewer mistakes on "
        f"{harm.test_set} than the untrained model{made}; {more or 'none'} {verb} shown to "
        "make more."
    )
