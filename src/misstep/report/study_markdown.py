"""A study as a Markdown page, for a repository's own documents.

Made from study.json and manifest.json alone, as the page of a run is from its own two files.
"""

from collections.abc import Iterator
from pathlib import Path

from misstep.evidence.study_results import Study, StudyModel, StudyRow, read_study
from misstep.report.markdown import line, made_by, metric_cell, named, table
from misstep.report.reading import read_manifest
from misstep.report.study import TITLES, tested, told
from misstep.report.words import capitalised, rate

METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "decided")
CAUTION = (
    "Accuracy: answers that the judge calls no mistake; analyses that say of the unguided "
    "answer what the judge says. A model that always praises is right about an answer exactly "
    "as often as its answers are, one that always finds fault gets every mistake right; both "
    "have a balanced accuracy of 50 %. Sensitivity: mistakes called mistakes. Specificity: "
    "right answers called right. An analysis that neither names a fault nor endorses the "
    "answer is undecided: counted as unscored, and in no accuracy."
)


def study_markdown(folder: Path) -> str:
    """The page of a study's directory.

    Raises:
        DataError: study.json or manifest.json is absent or unreadable.
    """
    study, manifest = read_study(folder / "study.json"), read_manifest(folder)
    parts = [
        f"# {named(folder, manifest)}: {study.policy}, {study.prompts} prompts",
        made_by(manifest, "study.json"),
        "## Answering and analysing, with 95 % intervals",
        "\n".join(_rows(study)),
        CAUTION,
        *_same_answers(study),
        "## What the analyses said",
        "\n".join(_counts(study)),
        "## Guided against unguided analysis, answer by answer",
        "\n".join(_wins(study)),
        "A right analysis wins against a wrong or an undecided one of the same answer.",
        "## Paired differences in the share that is right",
        "\n".join(_comparisons(study)),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(study: Study) -> Iterator[str]:
    titles = [capitalised(name.replace("_", " ")) for name in METRICS]
    yield from table(["model", "task", "guided", *titles])
    for model, row in _each(study):
        cells = [metric_cell(row.metrics.get(name)) for name in METRICS]
        yield line([model.model, row.task, "yes" if row.guided else "no", *cells])


def _same_answers(study: Study) -> Iterator[str]:
    """The section on what all models analysed, where they did."""
    if not study.told:
        return
    yield "## The same answers, told by each model"
    yield (
        f"All analysed the unguided answers of {study.analysed}. Told: balanced accuracy with "
        "an undecided analysis as half right, 50 % for who always finds fault, who always "
        "praises and who never decides."
    )
    first = f"by {study.analysed}"
    titles = ["model", "guided", "told", first, "difference", "95 % interval"]
    lines = list(table([*titles, "p", "p adjusted (Holm)", "n"]))
    for _, _, found, adjusted in told(study):
        values = [rate(value) for value in (found.value, found.first)]
        numbers = [f"{found.difference:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}"]
        ps = [f"{p:.2g}" for p in (found.p, adjusted)]
        way = "yes" if found.guided else "no"
        lines.append(line([found.model, way, *values, *numbers, *ps, str(found.n)]))
    yield "\n".join(lines)


def _counts(study: Study) -> Iterator[str]:
    kinds = [
        f"{kind}: {said}"
        for kind in ("mistakes", "right answers")
        for said in ("called mistake", "called right", "undecided")
    ]
    yield from table(["model", "guided", *kinds, "unjudged"])
    for model, row in _each(study):
        if row.counts is not None:
            both = (row.counts.mistakes, row.counts.right_answers)
            numbers = [n for of in both for n in (of.mistake, of.right, of.undecided)]
            way = "yes" if row.guided else "no"
            yield line([model.model, way, *map(str, [*numbers, row.counts.unjudged])])


def _each(study: Study) -> Iterator[tuple[StudyModel, StudyRow]]:
    return ((model, row) for model in study.models for row in model.rows)


def _wins(study: Study) -> Iterator[str]:
    yield from table(["model", "guided wins", "tie", "guided loses", "n"])
    for model in study.models:
        wins = model.wins
        cells = [metric_cell(metric) for metric in (wins.win, wins.tie, wins.lose)]
        yield line([model.model, *cells, str(wins.win.n)])


def _comparisons(study: Study) -> Iterator[str]:
    titles = ["model", "a", "b", "a minus b", "95 % interval", "p", "p adjusted (Holm)", "n"]
    yield from table(titles)
    for model, _, found, adjusted in tested(study):
        numbers = [f"{found.difference:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}"]
        ps = [f"{p:.2g}" for p in (found.p, adjusted)]
        yield line([model, TITLES[found.a], TITLES[found.b], *numbers, *ps, str(found.n)])
