"""What a study measured: the content of study.json, and how verdicts become it.

One scale for answering and for analysing: the share that is right. An answer is right where the
judge calls it no mistake; an analysis is right where it says of its answer what the judge says.
What has no verdict (an undecided analysis, an answer that the judge could not score) is counted
apart and is neither. Knows verdicts and numbers; no model, no text and no policy.

Accuracy alone can be had without looking: who always praises is right about an answer exactly
as often as the answers are, who always finds fault as often as they are not. Both have a
balanced accuracy of one half, the mean of sensitivity (mistakes called mistakes) and
specificity (right answers called right).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from pydantic import Field, FiniteFloat

from misstep.evidence.results import Metric, rate_of
from misstep.records import Record, Response, Score, read_json, write_json

# stats is imported where it is needed: numpy is slow to load, and the command starts without
# it.

Task = Literal["answering", "analysing"]
Verdict = bool | None
"""Whether it is a mistake, or is right; None where nobody can say."""


class Case(NamedTuple):
    """One prompt, as one model dealt with it."""

    answered_wrong: Verdict
    """Whether the model's unguided answer is a mistake, by the judge."""
    guided_wrong: Verdict
    """Whether its guided answer is one."""
    mistake: Verdict
    """Whether the answer that it analysed is one."""
    unguided_says: Verdict
    """What its unguided analysis says of that."""
    guided_says: Verdict
    """What its guided analysis says of it."""

    def says(self, guided: bool) -> Verdict:
        """What one of the two analyses says of the answer."""
        return self.guided_says if guided else self.unguided_says

    def right(self, guided: bool) -> Verdict:
        """Whether an analysis agrees with the judge."""
        said = self.says(guided)
        return None if said is None or self.mistake is None else said == self.mistake


class StudyAnswer(Record):
    """A line of responses.jsonl: an answer and the model's name in the results."""

    model: str
    response: Response


class StudyScore(Record):
    """A line of scores.jsonl: the judge's score of one answer."""

    model: str
    score: Score


class Called(Record):
    """What analyses called answers of one kind."""

    mistake: int
    right: int
    undecided: int


class Counts(Record):
    """The analyses of one model in one way, counted by what they are about."""

    mistakes: Called
    right_answers: Called
    unjudged: int
    """Analyses of answers that the judge could not score."""


class StudyRow(Record):
    """One model at one task, asked in one way."""

    task: Task
    guided: bool
    metrics: dict[str, Metric]
    """`accuracy`; of analysing also `sensitivity`, `specificity`, `balanced_accuracy` and
    `decided`, the share of analyses that have a verdict."""
    counts: Counts | None = None
    """Of analysing."""


class Tested(Record):
    """A paired difference, its 95 % interval and the p of none at all."""

    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: float
    """Not adjusted for the number of comparisons."""
    test: str
    n: int


class Paired(Tested):
    """Two ways over the same prompts: the share right of a minus that of b."""

    a: str
    """A way as `way_name` writes it."""
    b: str


class Wins(Record):
    """Guided against unguided analysis of the same answers.

    A right analysis wins against a wrong and against an undecided one; all else is a tie.
    """

    win: Metric
    tie: Metric
    lose: Metric
    tested: Paired | None = None
    """Wins against losses, so undecided analyses count as not right here; None where the judge
    scored no answer."""


class Told(Tested):
    """How well a model tells mistakes from right answers, set against the first model.

    Both analyse the same answers, asked in the same way. What is compared is the balanced
    accuracy with an undecided analysis as half right: 50 % for who always finds fault, for who
    always praises, and for who never decides.
    """

    model: str
    guided: bool
    value: float
    first: float
    """The same of the first model."""


class StudyModel(Record):
    """All that was measured of one model."""

    model: str
    digest: str
    rows: tuple[StudyRow, ...]
    wins: Wins
    comparisons: tuple[Paired, ...]
    """Over the prompts that have a verdict on both sides. Telling is set against doing where a
    model analysed its own answers."""

    def metric(self, task: Task, guided: bool, name: str) -> Metric:
        """A number of one of the rows."""
        rows = (row for row in self.rows if (row.task, row.guided) == (task, guided))
        return next((row.metrics[name] for row in rows if name in row.metrics), Metric.of(None))


class Study(Record):
    """The whole of study.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    policy: str
    judge: str
    """Names the judge by everything that its verdicts depend on."""
    seed: int
    prompts: int
    models: tuple[StudyModel, ...]
    analysed: str | None = None
    """The model whose answers all analysed; None where each analysed its own."""
    told: tuple[Told, ...] = ()
    """Each other model against that one; none where its answers are all right or all wrong."""


def way_name(task: Task, guided: bool) -> str:
    """The name of a way in comparisons, such as `analysing/guided`."""
    return f"{task}/{'guided' if guided else 'unguided'}"


def measure(model: str, digest: str, cases: Sequence[Case], own: bool = True) -> StudyModel:
    """Everything about one model, from its cases.

    Args:
        model: its name in the results.
        digest: its weights by content.
        cases: one a prompt.
        own: whether the answers that it analysed are its own.
    """
    answered = Way("answering", False, [_negated(case.answered_wrong) for case in cases])
    answered_guided = Way("answering", True, [_negated(case.guided_wrong) for case in cases])
    analysed, analysed_guided = (
        Way("analysing", guided, [case.right(guided) for case in cases])
        for guided in (False, True)
    )
    telling = (analysed, analysed_guided) if own else ()
    compared = [_paired(way, answered) for way in (*telling, answered_guided)]
    return StudyModel(
        model=model,
        digest=digest,
        rows=(
            *(_answering(way) for way in (answered, answered_guided)),
            *(_analysing(cases, guided) for guided in (False, True)),
        ),
        wins=_wins(cases),
        comparisons=tuple(found for found in compared if found is not None),
    )


def tell(cases: Mapping[str, Sequence[Case]], seed: int) -> tuple[Told, ...]:
    """Each model against the first, over the same answers, which are right and wrong ones.

    Args:
        cases: those of each model by its name, all in the order of the prompts.
        seed: that of resampling.
    """
    (_, base), *others = cases.items()
    if {case.mistake for case in base} < {True, False}:
        return ()
    return tuple(
        _told(name, base, of, guided, seed) for name, of in others for guided in (False, True)
    )


def _told(
    model: str, base: Sequence[Case], cases: Sequence[Case], guided: bool, seed: int
) -> Told:
    from misstep.evidence.stats import paired_mean

    mine, first = _balanced_shares(cases, guided), _balanced_shares(base, guided)
    found = paired_mean(mine, first, seed)
    value, other = fmean(mine), fmean(first)
    return Told(model=model, guided=guided, value=value, first=other, **found._asdict())


def _balanced_shares(cases: Sequence[Case], guided: bool) -> list[float]:
    """How right each analysis is, so weighted that the mean is a balanced accuracy."""
    judged = [case for case in cases if case.mistake is not None]
    mistakes = sum(case.mistake is True for case in judged)
    weights = {True: mistakes, False: len(judged) - mistakes}
    rights = ((case.mistake, case.right(guided)) for case in judged)
    return [
        len(judged) / (2 * weights[mistake]) * (0.5 if right is None else float(right))
        for mistake, right in rights
        if mistake is not None
    ]


class Way(NamedTuple):
    """A task, asked in one way, and what was right of it, prompt by prompt."""

    task: Task
    guided: bool
    right: Sequence[Verdict]


def _negated(verdict: Verdict) -> Verdict:
    return None if verdict is None else not verdict


def _answering(way: Way) -> StudyRow:
    return StudyRow(task=way.task, guided=way.guided, metrics={"accuracy": rate_of(way.right)})


def _analysing(cases: Sequence[Case], guided: bool) -> StudyRow:
    mistakes = [case.says(guided) for case in cases if case.mistake is True]
    right = [case.says(guided) for case in cases if case.mistake is False]
    sensitivity = rate_of(mistakes)
    specificity = rate_of(map(_negated, right))
    return StudyRow(
        task="analysing",
        guided=guided,
        metrics={
            "accuracy": rate_of(case.right(guided) for case in cases),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "balanced_accuracy": _balanced(sensitivity, specificity),
            "decided": rate_of(case.says(guided) is not None for case in cases),
        },
        counts=Counts(
            mistakes=_called(mistakes),
            right_answers=_called(right),
            unjudged=sum(case.mistake is None for case in cases),
        ),
    )


def _called(said: Sequence[Verdict]) -> Called:
    return Called(
        mistake=sum(verdict is True for verdict in said),
        right=sum(verdict is False for verdict in said),
        undecided=sum(verdict is None for verdict in said),
    )


def _balanced(sensitivity: Metric, specificity: Metric) -> Metric:
    """Their mean; there is none where one of the two kinds of answers is absent."""
    from misstep.evidence.stats import Interval, mean_of_two

    unscored = sensitivity.unscored + specificity.unscored
    intervals = [
        Interval(m.value, m.low, m.high, m.n)
        for m in (sensitivity, specificity)
        if m.value is not None and m.low is not None and m.high is not None
    ]
    return Metric.of(mean_of_two(*intervals) if len(intervals) == 2 else None, unscored)


def _wins(cases: Sequence[Case]) -> Wins:
    judged = [case for case in cases if case.mistake is not None]
    unscored = len(cases) - len(judged)
    guided, unguided = (
        Way("analysing", way, [case.right(way) is True for case in judged])
        for way in (True, False)
    )
    leads = [bool(g) - bool(u) for g, u in zip(guided.right, unguided.right, strict=True)]
    win, tie, lose = (
        rate_of(lead == outcome for lead in leads).model_copy(update={"unscored": unscored})
        for outcome in (1, 0, -1)
    )
    return Wins(win=win, tie=tie, lose=lose, tested=_paired(guided, unguided))


def _paired(a: Way, b: Way) -> Paired | None:
    """The difference over the prompts that have a verdict on both sides."""
    from misstep.evidence.stats import paired_binary

    common = [
        (one, other)
        for one, other in zip(a.right, b.right, strict=True)
        if one is not None and other is not None
    ]
    if not common:
        return None
    found = paired_binary([one for one, _ in common], [other for _, other in common])
    names = [way_name(way.task, way.guided) for way in (a, b)]
    return Paired(a=names[0], b=names[1], **found._asdict())


def write_study(path: Path, study: Study) -> None:
    """Write study.json so that equal studies are equal bytes."""
    write_json(path, study.model_dump(mode="json", by_alias=True))


def read_study(path: Path) -> Study:
    """Read study.json.

    Raises:
        DataError: the file is absent, is no JSON, or a field of it is wrong.
    """
    return read_json(path, Study)
