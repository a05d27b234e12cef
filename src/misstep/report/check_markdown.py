"""A check of a judge as a Markdown page: numbers only, no text of the data.

Made from check.json alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from misstep.evidence.check_results import Check, DataCheck, Measured, read_check
from misstep.evidence.results import Metric
from misstep.report.check import number
from misstep.report.check_words import caution, shown, sides
from misstep.report.markdown import line, table


def check_markdown(folder: Path) -> str:
    """The page of a check's directory.

    Raises:
        DataError: check.json is absent or unreadable.
    """
    check = read_check(folder / "check.json")
    parts = [
        f"# {check.title}, measured against labels",
        f"`check.json` lies beside this page. Judge `{check.judge}`, metric `{check.metric}`.",
        "## Data sets",
        "\n".join(_whole(check)),
        caution(check.metric, all(data.pairs for data in check.data)),
        "## Verdicts by label",
        "\n".join(_confusion(check)),
    ]
    for data in check.data:
        if data.categories:
            lines = _categories(data, shown(check))
            parts += [f"## {plain(data.name)}, by category", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """A name out of the data, as it can stand in a table."""
    return " ".join(text.split()).replace("|", "/")[:60]


def _whole(check: Check) -> Iterator[str]:
    titles = shown(check)
    yield from table(["data", "n", "unscored", "left out", *titles.values()])
    for data in check.data:
        left = str(sum(data.left_out.values()))
        yield line([plain(data.name), *_counts(data.whole, left), *_cells(data.whole, titles)])
    if check.pooled is not None and len(check.data) > 1:
        yield line(["all together", *_counts(check.pooled, ""), *_cells(check.pooled, titles)])


def _counts(measured: Measured, left: str) -> list[str]:
    return [str(measured.n), str(measured.unscored), left]


def _cells(measured: Measured, titles: Iterable[str]) -> list[str]:
    return [number_cell(measured.metrics.get(name), name) for name in titles]


def number_cell(metric: Metric | None, name: str) -> str:
    """A judge's number with its interval."""
    value, interval = number(metric, name)
    return f"{value} ({interval})" if interval else value


def _confusion(check: Check) -> Iterator[str]:
    yield from table(["data", "label", "judged so", "judged otherwise"])
    for data in check.data:
        counted, other = sides(check.metric, data.pairs)
        found = data.whole.confusion
        yield line([plain(data.name), counted, str(found.hit), str(found.missed)])
        yield line([plain(data.name), other, str(found.passed), str(found.false_alarm)])


def _categories(data: DataCheck, titles: Mapping[str, str]) -> Iterator[str]:
    yield from table(["category", "n", "unscored", *titles.values()])
    for category, of in sorted(data.categories.items(), key=lambda item: -item[1].n):
        yield line([plain(category), str(of.n), str(of.unscored), *_cells(of, titles)])
