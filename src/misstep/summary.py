"""What the terminal shows of a directory: of a run, a study or a check of a judge."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from misstep.evidence.check_results import Check, JudgedCase, Measured, read_check
from misstep.evidence.judge_card import CARD, read_card
from misstep.evidence.ratings import Ratings
from misstep.evidence.results import Metric, Results, read_results
from misstep.evidence.study_results import Study, Task, read_study
from misstep.records import Judgement, read_jsonl
from misstep.report.check_words import shown
from misstep.report.markdown import metric_cell
from misstep.report.words import in_order, metric_title, note, rate
from misstep.stages.base import kind_of

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 110
"""Columns of a table that goes into a file."""
MOST = 5
"""Metrics that a table has room for."""

STUDIED: tuple[tuple[str, Task, str], ...] = (
    ("answers that are right", "answering", "accuracy"),
    ("analyses that are right", "analysing", "accuracy"),
    ("balanced accuracy", "analysing", "balanced_accuracy"),
)
"""Of a study: a title, and the numbers that stand behind it."""


def print_comparison(folder: Path) -> None:
    """Print the pooled rates of a comparison and where its report lies."""
    results = read_results(folder / "results.json")
    found: Rates = {}
    for p in results.pooled:
        of = found.setdefault(p.test_set, {}).setdefault((p.setting.name,), {})
        of[p.metric] = p
    _show_rates(results, ("setting",), found)
    print(f"{folder / 'report.html'}\n{folder / 'results.json'}")


def print_summary(folder: Path) -> None:
    """Print the table of results and where the report lies."""
    results = read_results(folder / "results.json")
    metrics = list(dict.fromkeys(name for row in results.rows for name in row.metrics))
    found: Rates = {}
    for row in results.rows:
        setting = (row.method, "yes" if row.guided else "no")
        found.setdefault(row.test_set, {})[setting] = row.metrics
    _show_rates(results, ("method", "guided"), found)
    where = [str(folder / "report.html"), str(folder / "results.json"), *_serving(folder)]
    print("\n".join([*_without_scores(results, metrics, folder), *where]))


Rates = dict[str, dict[tuple[str, ...], dict[str, Metric]]]
"""Test set, setting and metric of what was measured."""


def _show_rates(results: Results, settings: Sequence[str], found: Rates) -> None:
    """Print a table a test set, of those metrics that it has, the first ones of them."""
    from rich.table import Table

    print(f"{results.model}, {results.policy}: rates with 95 % intervals")
    shown: dict[str, None] = {}
    for test_set in sorted(found):
        metrics = in_order(name for of in found[test_set].values() for name in of)
        table = Table(title=test_set, title_justify="left")
        for name in settings:
            # A name that is cut cannot be given to another command.
            table.add_column(name, overflow="fold")
        for name in metrics[:MOST]:
            table.add_column(metric_title(name), justify="right")
        for setting, of in found[test_set].items():
            table.add_row(
                *setting,
                *(metric_cell(of.get(name), name, spread=False) for name in metrics[:MOST]),
            )
        _print(table)
        shown |= dict.fromkeys(metrics[:MOST])
        if further := metrics[MOST:]:
            print(f"In the report: {', '.join(further)}.")
    for name in shown:
        if said := note(name):
            print(f"{metric_title(name)}: {said}.")


def _serving(folder: Path) -> Iterator[str]:
    """How to go on to a server; of methods, the page says which deserves it."""
    manifest = folder / "manifest.json"
    trained = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    if trained.get("training"):
        run = quote(str(folder))
        yield f"To serve it: misstep export {run} --method METHOD --out NAME [--guided]"


def _without_scores(results: Results, metrics: Sequence[str], folder: Path) -> Iterator[str]:
    """Metrics of which the run has no score at all, each with the commonest reason."""
    scored = {name for row in results.rows for name, metric in row.metrics.items() if metric.n}
    reasons = {name: Counter[str]() for name in metrics if name not in scored}
    if not reasons:
        return
    scores = folder / "scores.jsonl"
    for item in read_jsonl(scores, Judgement) if scores.is_file() else ():
        if item.score.metric in reasons:
            reasons[item.score.metric][kind_of(item.score.reason)] += 1
    for name, found in reasons.items():
        yield _nothing(name, found)
    if any("judge" in why for found in reasons.values() for why in found):
        yield "A model that gives no verdict needs a better one in its place (judge)."


def _nothing(name: str, reasons: Counter[str]) -> str:
    """That nothing was scored, with the commonest reason."""
    told = [f"; {n} of {reasons.total()}: {why}" for why, n in reasons.most_common(1)]
    return f"{name}: no answer has a score{''.join(told)}."


def print_study(folder: Path) -> None:
    """Print who was right how often, and where the page lies."""
    from rich.table import Table

    study = read_study(folder / "study.json")
    table = Table(title=f"{study.policy}, {study.prompts} prompts: rates with 95 % intervals")
    table.add_column("model")
    table.add_column("")
    for name in ("unguided", "guided"):
        table.add_column(name, justify="right")
    for cells in _study_cells(study):
        table.add_row(*cells)
    _print(table)
    print(f"{folder / 'study.html'}\n{folder / 'study.json'}")


def print_card(folder: Path) -> None:
    """Print how far a trained judge agrees with people, and where it lies."""
    from rich.table import Table

    card = read_card(folder)
    table = Table(title=f"{card.judge} on questions that it has not seen: 95 % intervals")
    for title in ("data", "n", "accuracy", "balanced", "AUC", "kappa"):
        table.add_column(title)
    of_card = ("accuracy", "balanced_accuracy", "auc", "kappa")
    for name, found in card.data.items():
        numbers = (metric_cell(getattr(found, metric), metric) for metric in of_card)
        table.add_row(name, str(found.n), *numbers)
    _print(table)
    print(folder / CARD)


def print_check(folder: Path) -> None:
    """Print how far a judge agrees with people, and where the page lies."""
    from rich.table import Table

    check = read_check(folder / "check.json")
    table = Table(title=f"{check.title} against labels: 95 % intervals")
    # Numbers below each other, so that all of them fit beside the names of the data sets.
    table.add_column("data", overflow="fold")
    table.add_column("")
    table.add_column("", justify="right")
    titles = shown(check)
    for data in check.data:
        left_out = [("Left out", str(sum(data.left_out.values())))]
        _add_measured(table, data.name, [*_measured(data.whole, titles), *left_out])
    if check.pooled is not None and len(check.data) > 1:
        _add_measured(table, "all together", _measured(check.pooled, titles))
    where = [str(folder / "check.html"), str(folder / "check.json")]
    _print(table)
    print("\n".join([*_silent(check, folder), *where]))


def _silent(check: Check, folder: Path) -> Iterator[str]:
    """Data of which the judge scored nothing, with the commonest reason."""
    silent = [of.name for of in check.data if of.whole.unscored and not of.whole.n]
    judged = folder / "judged.jsonl"
    if not silent or not judged.is_file():
        return
    cases = (case for case in read_jsonl(judged, JudgedCase) if case.data in silent)
    reasons = Counter(kind_of(case.reason) for case in cases)
    yield _nothing(", ".join(silent), reasons)
    if any("judge" in why for why in reasons):
        yield (
            "A model that gives no verdict needs a better one in its place (--model), or more "
            "tokens (max_tokens, in a YAML file of the judge)."
        )


def _measured(found: Measured, titles: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The numbers of a judge on some data, each with its title; those that there are."""
    for name, title in titles.items():
        if name in found.metrics:
            metric = found.metrics[name].model_copy(update={"unscored": 0})
            yield title, metric_cell(metric, name)
    yield "Scored", str(found.n)
    yield "Unscored", str(found.unscored)


def _add_measured(table: "Table", name: str, numbers: Iterable[tuple[str, str]]) -> None:
    for place, (title, number) in enumerate(numbers):
        table.add_row("" if place else name, title, number)
    table.add_section()


def print_ratings(path: Path, ratings: Ratings) -> None:
    """Print what raters found, how far they agree, and the judge with them."""
    for rater, count in ratings.raters.items():
        print(f"{rater}: {count} of {ratings.items} items rated")
    alphas = {name: of.alpha for name, of in ratings.agreement.items()}
    for name, alpha in alphas.items():
        said = "not defined" if alpha is None else f"{alpha:.3f}"
        cases = ratings.agreement[name].cases
        print(f"agreement on {name}: Krippendorff's alpha {said} ({cases} cases)")
    for setting, metric in ratings.mistake_rate.items():
        print(f"mistakes of {setting}: {metric_cell(metric)}")
    for setting, metric in ratings.better.items():
        print(f"{'tie' if setting == 'tie' else f'{setting} better'}: {metric_cell(metric)}")
    if ratings.against_judge is not None:
        for name, metric in ratings.against_judge.metrics.items():
            print(f"{ratings.judge} against the raters, {name}: {metric_cell(metric, name)}")
    print(path)


def _study_cells(study: Study) -> Iterator[list[str]]:
    for model in study.models:
        ways = [
            (
                title,
                [metric_cell(model.metric(task, guided, metric)) for guided in (False, True)],
            )
            for title, task, metric in STUDIED
        ]
        if told := [rate(found.value) for found in study.told if found.model == model.model]:
            ways.append((f"tells what {study.analysed} did", told))
        wins = model.wins
        guided = f"wins {metric_cell(wins.win)}, loses {metric_cell(wins.lose)}"
        for place, (title, cells) in enumerate([*ways, ("against unguided", ["", guided])]):
            yield ["" if place else model.model, title, *cells]


def _print(table: "Table") -> None:
    """Print a table as wide as the terminal is, if there is one.

    Text is printed as it is: a path that is broken into lines is none.
    """
    from rich.console import Console

    # Brackets and colons are part of a name, as of a variant's, and no markup of rich's.
    width = None if Console().is_terminal else WIDTH
    console = Console(width=width, markup=False, emoji=False)
    console.print(table, highlight=False)
