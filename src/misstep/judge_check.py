"""A judge measured against people's labels, over whole data sets.

The judge scores every labelled answer; check.json holds the numbers, judged.jsonl each answer
with its score, check.html the page. The directory keeps a model's verdicts, so that the same
command goes on after an interruption. A trained judge is measured on questions that it has not
seen, and its card keeps the numbers, too. What they mean stands in misstep.check_results.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from misstep.check_results import (
    Check,
    JudgedCase,
    measure,
    measure_data,
    pair_score,
    write_check,
)
from misstep.documents import check, read_yaml
from misstep.engines.base import Engine
from misstep.engines.cached import CachedEngine
from misstep.engines.choose import choose
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import DataError, RecipeError
from misstep.judge_card import enter_check, unseen
from misstep.judge_config import JudgeConfig, load_judge
from misstep.judges.base import Judge
from misstep.judges.choose import mistake_judge, rule_judge
from misstep.judges.classifier import ClassifierJudge
from misstep.labelled import DataSet, load_labelled
from misstep.models import Model, locate
from misstep.pipeline import writable
from misstep.policy import Policy, load_policy
from misstep.progress import Progress
from misstep.records import write_jsonl
from misstep.report.check import write_check_report
from misstep.sources import Source, check_source

AT_ONCE = 512
"""Answers judged between two lines of progress."""


class CheckInputs(NamedTuple):
    """All that a check reads, read before any model loads."""

    title: str
    """The judge as the user named it."""
    config: JudgeConfig
    policy: Policy | None
    model: Model | None
    """Of a policy with a rubric."""
    data: dict[str, DataSet]
    """By the names that stand in the results."""


def read_check_inputs(
    judge: str, data: Sequence[str], model: str | None, fields: Sequence[str]
) -> CheckInputs:
    """Read and check everything that a check depends on.

    Raises:
        InputError: what is wrong with the judge, its model, or the data.
    """
    config = load_judge(judge, model)
    policy = load_policy(config.policy) if config.policy else None
    weights = _weights(judge, config, policy)
    # A judge says before it has a model which answers it can score, and by what metric.
    probe = _judge(config, policy, ScriptedEngine())
    sets = labelled_sets(data, fields, probe.metric)
    if config.classifier is not None:
        sets = {name: unseen(of, Path(config.classifier)) for name, of in sets.items()}
    for given, found in sets.items():
        _check_applies(probe, given, found)
    return CheckInputs(judge, config, policy, weights, sets)


def labelled_sets(
    data: Sequence[str], fields: Sequence[str], metric: str
) -> dict[str, DataSet]:
    """Labelled data of a command's arguments, by the names that stand in results.

    Raises:
        DataError: what is wrong with a file, a line or a mapping.
    """
    mapped = _fields(fields)
    return _named(data, [load_labelled(_source(name, mapped), metric) for name in data])


def _weights(judge: str, config: JudgeConfig, policy: Policy | None) -> Model | None:
    if policy is None or policy.judge.rubric is None:
        if config.model is not None:
            raise RecipeError(
                f"judge {judge}: expected no model, since its policy judges by a rule; found "
                f"{config.model}. Leave the model out."
            )
        return None
    if config.model is None:
        raise RecipeError(
            f"judge {judge}: expected a model, since the policy {policy.name} judges by a "
            "rubric; found none. Name one with --model MODEL."
        )
    return locate(config.model)


def _judge(config: JudgeConfig, policy: Policy | None, engine: Engine) -> Judge:
    if policy is not None:
        return mistake_judge(policy, engine)
    if config.classifier is not None:
        return ClassifierJudge(Path(config.classifier))
    assert config.rule is not None
    return rule_judge(config.rule)


def _fields(mapped: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in mapped]
    for (field, equals, column), text in zip(pairs, mapped, strict=True):
        if not (field and equals and column):
            raise DataError(f"--field {text}: expected FIELD=COLUMN, such as label=is_bad.")
    return {field: column for field, _, column in pairs}


def _source(name: str, fields: dict[str, str]) -> Source:
    """A file or a Hugging Face data set; or a YAML file that says how to read one."""
    if name.endswith((".yaml", ".yml")):
        data, lines = read_yaml(Path(name), DataError)
        source = check(Source, data, DataError, name, lines)
    else:
        source = check(Source, {"path": name, "fields": fields}, DataError, f"data {name}")
    if source.path is None:
        raise DataError(f"{name}: expected labelled data, found a suite, which has no labels.")
    check_source(source)
    return source


def _check_applies(judge: Judge, name: str, data: DataSet) -> None:
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
) -> Path:
    """Measure a judge on labelled data and give the directory of the numbers.

    Raises:
        InputError: judge, model, data or folder; before any model loads.
        RunError: the judging failed; the same command goes on from there.
    """
    inputs = read_check_inputs(judge, data, model, fields)
    if inputs.config.classifier is not None:
        writable(Path(inputs.config.classifier))
    short = Path(judge).stem if inputs.config.policy is None else inputs.config.policy
    folder = writable(out or Path("runs") / f"check-{Path(short).stem}")
    with _engine(inputs, folder, progress) as engine:
        asked = _judge(inputs.config, inputs.policy, engine)
        cases = {
            name: judge_cases(asked, name, found, progress)
            for name, found in inputs.data.items()
        }
    write_jsonl(folder / "judged.jsonl", [case for of in cases.values() for case in of])
    check = _counted(inputs, asked, cases)
    write_check(folder / "check.json", check)
    if inputs.config.classifier is not None:
        enter_check(Path(inputs.config.classifier), check)
    write_check_report(folder)
    return folder


@contextmanager
def _engine(inputs: CheckInputs, folder: Path, progress: Progress) -> Iterator[Engine]:
    """A cached engine for a judge that asks a model; a rule is given one that it never asks."""
    if inputs.model is None:
        yield ScriptedEngine()
        return
    chosen = choose(inputs.config.engine, inputs.model)
    progress.say(f"Engine: {chosen.why}")
    with CachedEngine(chosen.identity, chosen.open, folder / "cache.sqlite") as engine:
        engine.notify = partial(progress.update, "judging")
        yield engine


def judge_cases(judge: Judge, name: str, data: DataSet, progress: Progress) -> list[JudgedCase]:
    """Have a judge score every case of a data set."""
    found: list[JudgedCase] = []
    for start in range(0, len(data.cases), AT_ONCE):
        cases = data.cases[start : start + AT_ONCE]
        scores = judge.score([case.response for case in cases])
        if data.pairs:
            others = judge.score([case.other for case in cases if case.other is not None])
            scores = [
                pair_score(one, other, judge.metric)
                for one, other in zip(scores, others, strict=True)
            ]
        found += [
            JudgedCase(
                data=name,
                where=case.where,
                response=case.response,
                other=case.other,
                label=case.label,
                categories=case.categories,
                value=score.value,
                reason=score.reason,
            )
            for case, score in zip(cases, scores, strict=True)
        ]
        progress.update(name, len(found), len(data.cases))
    return found


def _counted(inputs: CheckInputs, judge: Judge, cases: dict[str, list[JudgedCase]]) -> Check:
    single = [case for name, of in cases.items() if not inputs.data[name].pairs for case in of]
    return Check(
        judge=judge.name,
        title=inputs.title,
        metric=judge.metric,
        data=tuple(
            measure_data(name, found.digest, found.pairs, found.left_out, cases[name])
            for name, found in inputs.data.items()
        ),
        pooled=measure(single) if single else None,
    )
