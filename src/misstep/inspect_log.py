"""Logs of `inspect_ai` become results: the answers and scores of misstep's task, as a run's.

Several logs stand beside each other and are compared: a model before and after, guided and not.
Nothing is judged anew. A sample that failed is an answer that never came.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from misstep.claims import claimed
from misstep.data.labelled import REFUSALS
from misstep.errors import DataError, MissingExtra
from misstep.evidence.check_results import Check
from misstep.evidence.results import FOCUS, Results, write_results
from misstep.judges.refusal import refusal_metric
from misstep.records import (
    Answer,
    Judgement,
    Prompt,
    Record,
    Response,
    Score,
    base_metric,
    parse_row,
    write_jsonl,
)
from misstep.report.page import write_report
from misstep.run_folder import beside_runs
from misstep.stages.base import no_answer
from misstep.stages.evaluate import Table, agreements, corrections, derived

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

KEY = "misstep"
"""Of metadata: what misstep wrote into a log."""
OWN = ("responses.jsonl", "scores.jsonl", "results.json", "report.html")


class Asked(Record):
    """What a task asked, and in which way; of its log."""

    name: str
    """The recipe's."""
    policy: str
    method: str
    guided: bool
    seed: int
    policy_digest: str = ""
    """Of the policy's content, from which the guide is; empty in logs of earlier versions."""
    pools: dict[str, tuple[str, ...]]
    judges: dict[str, str]
    """Metrics, and the names of the judges that give them."""
    checks: tuple[Check, ...] = ()
    """Of these judges, to correct their rates by."""


class Judged(Record):
    """What one judge said of an answer; of a score in a log."""

    response: Response
    scores: tuple[Score, ...]


def import_logs(logs: Sequence[Path], out: Path | None) -> Path:
    """Write what logs hold as responses.jsonl, scores.jsonl, results.json and report.html.

    Raises:
        InputError: inspect_ai is not installed; a log is none of misstep's task, or asks a
            prompt several times; two are of the same setting, or of recipes or judges that
            differ; or the folder is another's.
    """
    logs = list({log.resolve(): log for log in logs}.values())
    found = [_read(log) for log in logs]
    asked = [of for of, _ in found]
    _refuse_several(asked)
    answers: list[Answer] = []
    judgements: list[Judgement] = []
    taken: dict[tuple[str, bool, str], Path] = {}
    for path, (of, log) in zip(logs, found, strict=True):
        for answer, scores in _answers(of, log, path):
            where = (answer.method, answer.guided, answer.test_set)
            if taken.setdefault(where, path) != path:
                raise DataError(
                    f"{path}: expected another setting than that of {taken[where]}, found "
                    f"{where[0]}, {'guided' if of.guided else 'unguided'}, on {where[2]} in "
                    "both. Name a trained model's method in its task: -T method=sft."
                )
            answers.append(answer)
            judgements += [Judgement.of(answer, score) for score in scores]
    judgements += list(derived(answers, judgements))
    # A log of one test set knows only the judges that have something to say of it.
    judges = {metric: name for of in asked for metric, name in of.judges.items()}
    checked = corrections((check for of in asked for check in of.checks), judges)
    table = Table(answers, judgements, asked[0].pools, asked[0].seed, checked)
    unknown = {"mistake_source": None, "analysis_source": None}
    results = Results(
        policy=asked[0].policy,
        model=", ".join(dict.fromkeys(str(log.eval.model) for _, log in found)),
        rows=tuple(table.rows(lambda _: dict(unknown))),
        comparisons=tuple(table.comparisons(FOCUS)),
        agreements=tuple(agreements(answers, judgements)),
    )
    place = beside_runs(out or Path("runs") / f"inspect-{asked[0].name}", OWN)
    with claimed(place) as folder:
        write_jsonl(folder / "responses.jsonl", answers)
        write_jsonl(folder / "scores.jsonl", judgements)
        write_results(folder / "results.json", results)
        write_report(folder)
    return folder


def _refuse_several(asked: Sequence[Asked]) -> None:
    """Refuse to compare what was asked or judged otherwise."""
    names = [f"{of.name} ({of.policy}, seed {of.seed})" for of in asked]
    contents = {of.policy_digest for of in asked} - {""}
    if len(contents) > 1:
        names = [
            f"{name}, policy {of.policy_digest}" for name, of in zip(names, asked, strict=True)
        ]
    if len(recipes := sorted(set(names))) > 1:
        raise DataError(
            f"expected logs of one recipe, found {', '.join(recipes)}. Import those of each "
            "recipe into a directory of its own."
        )
    judges: dict[str, set[str]] = defaultdict(set)
    for metric, judge in (item for of in asked for item in of.judges.items()):
        judges[metric].add(judge)
    for metric, found in judges.items():
        if len(found) > 1:
            raise DataError(
                f"expected one judge of {metric}, found {', '.join(sorted(found))}: what they "
                "say differently would look like a difference between models. Run the task "
                "again with one of them."
            )


def _read(path: Path) -> tuple[Asked, "EvalLog"]:
    try:
        from inspect_ai.log import read_eval_log
    except ImportError as fault:
        raise MissingExtra("inspect_ai", "inspect") from fault
    try:
        # Long texts are kept apart in a log, and put back on reading.
        log = read_eval_log(str(path), resolve_attachments=True)
    except (OSError, ValueError, KeyError, EOFError) as fault:
        raise DataError(
            f"{path}: expected a log of inspect_ai ({type(fault).__name__}: {fault})."
        ) from fault
    written = (log.eval.metadata or {}).get(KEY)
    if written is None:
        raise DataError(
            f"{path}: expected a log of the task misstep/recipe, found one of {log.eval.task}."
        )
    if (epochs := log.eval.config.epochs or 1) > 1:
        raise DataError(
            f"{path}: expected one answer to each prompt, found {epochs} epochs. Several "
            "answers to a prompt are no independent cases; run the task again with --epochs 1."
        )
    return parse_row(Asked, written, f"{path}, metadata"), log


def _answers(
    asked: Asked, log: "EvalLog", path: Path
) -> Iterator[tuple[Answer, tuple[Score, ...]]]:
    if not log.samples:
        raise DataError(
            f"{path}: expected answers, found none; the log's status is {log.status}."
        )
    judged = [_judged(sample, path) for sample in log.samples]
    given: dict[str, set[str]] = defaultdict(set)
    for sample, of in zip(log.samples, judged, strict=True):
        given[_test_set(sample)] |= {score.metric for one in of for score in one.scores}
    for sample, of in zip(log.samples, judged, strict=True):
        test_set = _test_set(sample)
        response = of[0].response if of else _failed(asked, sample)
        scores = [score for one in of for score in one.scores]
        if sample.error or not scores:
            # A judge that comes after the one that failed was not asked.
            had = {score.metric for score in scores}
            scores += _unscored(asked, response, had, given[test_set], _why(sample))
        yield (
            Answer(
                method=asked.method,
                guided=asked.guided,
                test_set=test_set,
                seed=asked.seed,
                response=response,
            ),
            tuple(scores),
        )


def _test_set(sample: "EvalSample") -> str:
    return str(sample.metadata["test_set"])


def _judged(sample: "EvalSample", path: Path) -> list[Judged]:
    return [
        parse_row(Judged, score.metadata[KEY], f"{path}, sample {sample.id}")
        for score in (sample.scores or {}).values()
        if score.metadata and KEY in score.metadata
    ]


def _failed(asked: Asked, sample: "EvalSample") -> Response:
    """An answer that never came, or that nobody came to judge."""
    prompt = Prompt.model_validate(sample.metadata["prompt"])
    return Response(prompt=prompt, text="", guided=asked.guided, error=_why(sample))


def _why(sample: "EvalSample") -> str:
    return str(sample.error.message) if sample.error else "the sample was not scored"


def _unscored(
    asked: Asked, response: Response, had: set[str], given: set[str], why: str
) -> Iterator[Score]:
    """No score of the judges that had something to say of the test set's other answers."""
    for called, judge in asked.judges.items():
        due = base_metric(called) == REFUSALS
        metric = called.replace(REFUSALS, refusal_metric(response.prompt), 1) if due else called
        if metric in had or (given and metric not in given):
            continue
        reason = no_answer(why) if response.error else f"no judgement: {why}"
        yield Score(
            response_id=response.id, metric=metric, value=None, judge=judge, reason=reason
        )
