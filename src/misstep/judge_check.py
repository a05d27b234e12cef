"""A judge measured against people's labels, over whole data sets.

The judge scores every labelled answer; check.json holds the numbers, judged.jsonl each answer
with its score, check.html the page. The directory keeps what a model or a trained judge said,
so that the same command goes on after an interruption. A trained judge is measured on questions
it has not seen. What the numbers mean stands in misstep.evidence.check_results.
"""

from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from misstep.claims import claimed
from misstep.data.decoys import NAME, beside
from misstep.data.fields import LAYOUT
from misstep.data.labelled import MISTAKES, Case, DataSet, drawn, read_labelled
from misstep.data.sources import Source, check_source, rows
from misstep.documents import check, read_yaml
from misstep.engines.store import CACHE
from misstep.errors import DataError
from misstep.evidence.check_results import (
    Check,
    JudgedCase,
    grade_score,
    measure,
    measure_data,
    pair_score,
    read_check,
    write_check,
)
from misstep.evidence.judge_card import enter_check, unseen
from misstep.judges.base import AnyJudge, PairJudge
from misstep.judging import JudgeInputs, opened, read_judge
from misstep.progress import Engines, Progress
from misstep.records import VERDICTS, write_jsonl
from misstep.report.check import write_check_report
from misstep.run_folder import beside_runs, set_aside, writable

OWN = ("check.json", "check.html", "judged.jsonl")
TIE = 0.5
AT_ONCE = 512
"""Answers judged between two lines of progress."""


class CheckInputs(NamedTuple):
    """All that a check reads, read before any model loads."""

    judge: JudgeInputs
    data: dict[str, DataSet]
    """By the names that stand in the results."""
    given: Sequence[str]
    """The same sets as the command names them."""


def read_check_inputs(
    judge: str,
    data: Sequence[str],
    model: str | None,
    fields: Sequence[str],
    decoys: bool = False,
) -> CheckInputs:
    """Read and check everything that a check depends on.

    With `decoys` each set stands there once more, with harmless text beside its answers.

    Raises:
        InputError: what is wrong with the judge, its model, or the data.
    """
    read = read_judge(judge, model)
    # A judge says before it has a model which answers it can score, and by what metric.
    probe = read.probe()
    sets = labelled_sets(data, fields, probe.metric, read.trained())
    for given, found in sets.items():
        _check_applies(probe, given, found)
    if decoys:
        sets, data = _beside(probe.metric, sets, data)
    return CheckInputs(read, sets, data)


def _beside(
    metric: str, sets: dict[str, DataSet], given: Sequence[str]
) -> tuple[dict[str, DataSet], list[str]]:
    """Each set and then the same one with decoys, and their names as they are given."""
    if metric != MISTAKES or any(found.pairs for found in sets.values()):
        raise DataError(
            "--decoys: expected a judge of mistakes and single answers: only a mistake stays "
            "one whatever stands beside it. Leave it out."
        )
    both = dict[str, DataSet]()
    for name, found in sets.items():
        both |= {name: found, NAME.format(name): beside(found)}
    return both, [n for name in given for n in (name, NAME.format(name))]


def labelled_sets(
    data: Sequence[str], fields: Sequence[str], metric: str, trained: Sequence[Path] = ()
) -> dict[str, DataSet]:
    """Labelled data of a command's arguments, by the names that stand in results.

    What the `trained` judges have seen is left out before `n` cases are drawn, so that `n` are
    judged.

    Raises:
        DataError: what is wrong with a file, a line or a mapping.
    """
    mapped = _fields(fields)
    if mapped and all(map(_says_itself, data)):
        raise DataError(
            f"--field: {data[0]} says itself how its data are read. Map columns there, under "
            "'fields'."
        )
    sources = _with_own([_source(name, mapped) for name in data])
    return _named(data, [_drawn_unseen(source, metric, trained) for source in sources])


def _drawn_unseen(source: Source, metric: str, trained: Sequence[Path]) -> DataSet:
    found = read_labelled(source, metric)
    for folder in trained:
        found = unseen(found, folder)
    return drawn(found, source.n)


def _says_itself(name: str) -> bool:
    """Whether this is a YAML file that says how to read data; --field is of the others."""
    return name.endswith((".yaml", ".yml"))


def _with_own(sources: list[Source]) -> list[Source]:
    """The sources, each without the optional columns that only others have.

    A column that none has stays, and is refused when the data are read.
    """
    if len(sources) == 1 or not any(set(of.fields) - LAYOUT for of in sources):
        return sources
    plain = [of.model_copy(update={"fields": {}}) for of in sources]
    columns = [{name for _, row in rows(of) for name in row} for of in plain]
    known = set().union(*columns)

    def own(source: Source, has: set[str]) -> Source:
        kept = {
            f: c for f, c in source.fields.items() if f in LAYOUT or c in has or c not in known
        }
        return source.model_copy(update={"fields": kept})

    return [own(source, has) for source, has in zip(sources, columns, strict=True)]


def _fields(mapped: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in mapped]
    for (field, equals, column), text in zip(pairs, mapped, strict=True):
        if not (field and equals and column):
            raise DataError(f"--field {text}: expected FIELD=COLUMN, such as label=is_bad.")
    return {field: column for field, _, column in pairs}


def _source(name: str, fields: dict[str, str]) -> Source:
    """A file or a Hugging Face data set; or a YAML file that says how to read one."""
    if _says_itself(name):
        data, lines = read_yaml(Path(name), DataError)
        source = check(Source, data, DataError, name, lines)
    else:
        source = check(Source, {"path": name, "fields": fields}, DataError, f"data {name}")
    if source.path is None:
        raise DataError(f"{name}: expected labelled data, found a suite, which has no labels.")
    check_source(source)
    return source


def _check_applies(judge: AnyJudge, name: str, data: DataSet) -> None:
    if isinstance(judge, PairJudge):
        return
    if not any(judge.applies(case.response.prompt) for case in data.cases):
        raise DataError(
            f"{name}: expected prompts that the judge {judge.name} can tell of, found none in "
            f"{len(data.cases)} cases. A rule of obedience needs the attacks' target texts, "
            "one of helpfulness keys that the prompt does not hold: map them with "
            "target=COLUMN or accept=COLUMN."
        )


def _named(given: Sequence[str], sets: Sequence[DataSet]) -> dict[str, DataSet]:
    """The sets by their short names, where no two are called the same."""
    short = [found.name for found in sets]
    names = short if len(set(short)) == len(short) else list(given)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"expected each data set once; twice or more: {', '.join(twice)}")
    return dict(zip(names, sets, strict=True))


def check_judge(
    judge: str,
    data: Sequence[str],
    out: Path | None,
    model: str | None,
    fields: Sequence[str],
    progress: Progress,
    decoys: bool = False,
) -> Path:
    """Measure a judge on labelled data and give the directory of the numbers.

    Raises:
        InputError: judge, model, data or folder; before any model loads.
        RunError: the judging failed; the same command goes on from there.
    """
    inputs = read_check_inputs(judge, data, model, fields, decoys)
    trained = inputs.judge.config.classifier
    if trained is not None:
        writable(Path(trained))
    short = Path(judge.rpartition(":")[2]).name.removesuffix(".yaml").removesuffix(".yml")
    with claimed(beside_runs(out or Path("runs") / f"check-{short}", OWN)) as folder:
        _check_into(folder, inputs, progress)
    return folder


def _check_into(folder: Path, inputs: CheckInputs, progress: Progress) -> None:
    with (
        closing(Engines(folder / CACHE, progress)) as engines,
        opened(inputs.judge, partial(engines.opened, what="judging"), engines.cache) as asked,
    ):
        cases = {
            name: judge_cases(asked, name, found, progress)
            for name, found in inputs.data.items()
        }
    counted = _counted(inputs, asked, cases)
    _keep_former(folder, counted, progress)
    write_jsonl(folder / "judged.jsonl", [case for of in cases.values() for case in of])
    write_check(folder / "check.json", counted)
    if inputs.judge.config.classifier is not None:
        enter_check(Path(inputs.judge.config.classifier), counted, inputs.given)
    write_check_report(folder)


def _keep_former(folder: Path, counted: Check, progress: Progress) -> None:
    """Set aside a check of another judge, or on other data; a recipe may name it."""
    with suppress(DataError):
        former = read_check(folder / "check.json")
        if _about(former) != _about(counted):
            progress.say(f"The check that was here is kept in {set_aside(folder, OWN)}.")


def _about(check: Check) -> tuple[object, ...]:
    return check.judge, check.metric, [(data.name, data.digest) for data in check.data]


def judge_cases(
    judge: AnyJudge, name: str, data: DataSet, progress: Progress
) -> list[JudgedCase]:
    """Have a judge score every case of a data set."""
    found: list[JudgedCase] = []
    for start in range(0, len(data.cases), AT_ONCE):
        cases = data.cases[start : start + AT_ONCE]
        found += [
            JudgedCase(
                data=name,
                where=case.where,
                response=case.response,
                other=case.other,
                label=case.label,
                categories=case.categories,
                **said,
            )
            for case, said in zip(cases, _said(judge, cases, data.pairs), strict=True)
        ]
        progress.update(name, len(found), len(data.cases))
    return found


def _said(judge: AnyJudge, cases: Sequence[Case], pairs: bool) -> list[dict[str, Any]]:
    """What the judge says of each case: value and reason, and what is known of its making."""
    if isinstance(judge, PairJudge):
        asked = [(case.response, case.other) for case in cases if case.other is not None]
        return [
            {
                # Neither is better: as of equal scores, nothing follows for the label.
                "value": None if found.value == TIE else found.value,
                "reason": found.reason,
                "swayed": found.swayed,
            }
            for found in judge.compare(asked)
        ]
    scores = judge.score([case.response for case in cases])
    if pairs:
        others = judge.score([case.other for case in cases if case.other is not None])
        scores = [
            pair_score(one, other, judge.metric)
            for one, other in zip(scores, others, strict=True)
        ]
    elif judge.metric not in VERDICTS:
        scores = [grade_score(score) for score in scores]
    return [{"value": s.value, "reason": s.reason, "votes": s.votes} for s in scores]


def _counted(inputs: CheckInputs, judge: AnyJudge, cases: dict[str, list[JudgedCase]]) -> Check:
    # What stands beside answers was put there by us: rates are corrected by people's labels.
    plain = {n: of for n, of in cases.items() if not inputs.data[n].decoys}
    single = [case for name, of in plain.items() if not inputs.data[name].pairs for case in of]
    grades = judge.metric not in VERDICTS
    return Check(
        judge=judge.name,
        title=inputs.judge.title,
        metric=judge.metric,
        data=tuple(
            measure_data(name, found.digest, found.pairs, found.left_out, cases[name], grades)
            for name, found in inputs.data.items()
        ),
        pooled=measure(single, grades) if single else None,
    )
