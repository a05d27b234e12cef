"""How a judge does on labelled data: the content of check.json, and how it is counted.

A label, and a verdict, is 1 where the judge's metric counts the answer: as a mistake, a refusal
or a helpful answer. `false_safe` is the share of cases labelled 1 that the judge calls 0,
`false_unsafe` that of cases labelled 0 that it calls 1. A case without a score is counted apart
and is in no number. Several answers to one prompt are no independent cases, and no interval
takes them for such. Knows numbers and labels; prints no text of the data.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat

from misstep.data.labelled import MISTAKES, REFUSALS, labels_for
from misstep.errors import DataError
from misstep.evidence.results import LENGTH_BIAS, Corrected, Metric
from misstep.records import (
    VERDICT_FROM,
    VERDICTS,
    Record,
    Response,
    Score,
    read_json,
    write_json,
)

# stats and agreement are imported where they are needed: numpy is slow to load, and the command
# starts without it.

GRADES = 9.0
"""Points from the lowest grade, 1, to the highest."""
VOTES_AGREE = "votes_agree"
"""Of several votes on each answer: how often all of them say the same."""
SAME = "both answers have the same score"
"""Why a judge of single answers prefers neither of two."""
MOST_CATEGORIES = 100
"""A column with more values than that names cases and not categories."""


class JudgedCase(Record):
    """A line of judged.jsonl: a labelled answer, or a pair of them, and the judge's score."""

    data: str
    """The name of the data set."""
    where: str
    response: Response
    other: Response | None = None
    """Of a pair: the second answer; label and score say whether the first is better."""
    label: bool
    categories: tuple[str, ...] = ()
    value: FiniteFloat | None
    reason: str = ""
    votes: tuple[float | None, ...] = ()
    """What each said where several were asked."""
    swayed: bool | None = None
    """Of a pair that was judged in either order: whether the verdict changed with it."""

    @property
    def verdict(self) -> bool | None:
        """What the judge says, or None where it says nothing."""
        return None if self.value is None else self.value >= VERDICT_FROM

    @property
    def asked(self) -> str:
        """The conversation that is answered; equal ones are one prompt."""
        return self.response.prompt.conversation


class Confusion(Record):
    """Scored cases by label and verdict."""

    hit: int
    """Labelled 1 and called 1."""
    missed: int
    """Labelled 1 and called 0."""
    false_alarm: int
    """Labelled 0 and called 1."""
    passed: int
    """Labelled 0 and called 0."""


class CalibrationBin(Record):
    """Cases with similar scores: their mean score, and the share of them labelled 1."""

    low: float
    high: float
    score: float
    share: float
    n: int


class Measured(Record):
    """The judge on some cases."""

    n: int
    """Cases with a score."""
    unscored: int
    confusion: Confusion
    metrics: dict[str, Metric]
    """`accuracy`, `balanced_accuracy`, `auc`, `kappa`, `calibration_error`, `false_safe`,
    `false_unsafe`; of several votes `votes_agree`; of pairs `position_bias` and `length_bias`.
    One that the cases cannot give is absent."""


class DataCheck(Record):
    """The judge on one data set."""

    name: str
    digest: str
    pairs: bool
    """Whether each case is a pair of answers, of which the label says which is better."""
    left_out: dict[str, int]
    """Rows without a label of this kind, by the reason."""
    whole: Measured
    categories: dict[str, Measured]
    calibration: tuple[CalibrationBin, ...]
    """Empty where the judge gives no graded score."""


class Check(Record):
    """The whole of check.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    judge: str
    """As its scores name it: by everything that they depend on."""
    title: str
    """As the user named it."""
    metric: str
    data: tuple[DataCheck, ...]
    pooled: Measured | None
    """All data sets together, pairs left out; None where there are only pairs."""


def pair_score(first: Score, second: Score, metric: str) -> Score:
    """One score of two: above one half where the first answer is the better one.

    Answers with equal scores are unscored: the judge prefers neither. The votes kept are those
    on the answer that they agree on less.
    """
    votes = second.votes if agree(first.votes) else first.votes
    first = first.model_copy(update={"votes": votes})
    if first.value is None or second.value is None:
        lacking = first if first.value is None else second
        return first.model_copy(update={"value": None, "reason": lacking.reason})
    ahead = first.value - second.value
    if metric in (MISTAKES, REFUSALS):
        ahead = -ahead
    if metric not in VERDICTS:
        ahead /= GRADES
    if ahead == 0:
        return first.model_copy(update={"value": None, "reason": SAME})
    return first.model_copy(update={"value": (1 + ahead) / 2})


def agree(votes: Sequence[float | None]) -> bool:
    """Whether all votes say the same; none that say nothing do."""
    return len(set(votes)) == 1 and votes[0] is not None


def grade_score(score: Score) -> Score:
    """A grade from 1 to 10 as a score from 0 to 1 for what its labels call 1.

    The middle of the scale parts the verdicts; it is no probability.
    """
    if score.value is None:
        return score
    good = (score.value - 1) / GRADES
    bad = labels_for(score.metric) == MISTAKES
    return score.model_copy(update={"value": 1 - good if bad else good})


def measure_data(
    name: str,
    digest: str,
    pairs: bool,
    left_out: dict[str, int],
    cases: Sequence[JudgedCase],
    grades: bool = False,
) -> DataCheck:
    """Count one data set, whole and by category; grades are no probabilities."""
    known = dict.fromkeys(category for case in cases for category in case.categories)
    if not 1 < len(known) <= MOST_CATEGORIES:
        known = {}
    return DataCheck(
        name=name,
        digest=digest,
        pairs=pairs,
        left_out=left_out,
        whole=measure(cases, grades),
        categories={
            category: measure([case for case in cases if category in case.categories], grades)
            for category in known
        },
        calibration=() if grades else _calibration(cases),
    )


def measure(cases: Sequence[JudgedCase], grades: bool = False) -> Measured:
    """Count the judge's verdicts against the labels; of grades without a calibration."""
    scored = [case for case in cases if case.value is not None]
    called = [(case.label, case.verdict) for case in scored]
    confusion = Confusion(
        hit=called.count((True, True)),
        missed=called.count((True, False)),
        false_alarm=called.count((False, True)),
        passed=called.count((False, False)),
    )
    unscored = len(cases) - len(scored)
    metrics = (_metrics(cases, scored, grades) if scored else {}) | _of_judging(cases)
    return Measured(n=len(scored), unscored=unscored, confusion=confusion, metrics=metrics)


def _metrics(
    cases: Sequence[JudgedCase], scored: Sequence[JudgedCase], grades: bool
) -> dict[str, Metric]:
    from misstep.evidence.agreement import auc, calibration_error, kappa
    from misstep.evidence.stats import Interval, clustered_rate, mean_of_two

    prompts = [case.asked for case in scored]
    labels = [case.label for case in scored]
    verdicts = [bool(case.verdict) for case in scored]
    values = [float(case.value or 0.0) for case in scored]
    of_pairs = any(case.other for case in cases)

    def share(label: bool | None, right: bool) -> Interval | None:
        """The share of the cases with this label that are judged rightly, or wrongly."""
        chosen = [case for case in scored if label is None or case.label == label]
        hits = [(case.verdict == case.label) == right for case in chosen]
        return clustered_rate(hits, [case.asked for case in chosen]) if chosen else None

    found = {"accuracy": share(None, True)}
    of_bad, of_good = share(True, True), share(False, True)
    if of_bad and of_good:
        found["balanced_accuracy"] = mean_of_two(of_bad, of_good)
        if _graded(scored):
            found["auc"] = auc(values, labels, prompts)
        found["kappa"] = kappa(verdicts, labels, prompts)
    if _graded(scored) and not of_pairs and not grades:
        found["calibration_error"] = calibration_error(values, labels, prompts)
    if not of_pairs:
        found |= {"false_safe": share(True, False), "false_unsafe": share(False, False)}
    unscored = {"false_safe": (True,), "false_unsafe": (False,)}
    return {
        name: Metric.of(
            interval,
            sum(
                case.value is None and case.label in unscored.get(name, (True, False))
                for case in cases
            ),
        )
        for name, interval in found.items()
        if interval is not None
    }


def _of_judging(cases: Sequence[JudgedCase]) -> dict[str, Metric]:
    """How the verdicts were come by: whether votes agree, what order and length did."""
    from misstep.evidence.stats import clustered_balance, clustered_rate

    voted = [case for case in cases if len(case.votes) > 1]
    ordered = [case for case in cases if case.swayed is not None]
    pulls = [(pull, case.asked) for case in cases if (pull := _pull(case)) is not None]
    shares = {
        VOTES_AGREE: ([agree(c.votes) for c in voted], voted),
        "position_bias": ([bool(c.swayed) for c in ordered], ordered),
    }
    found = {
        name: clustered_rate(hits, [case.asked for case in of])
        for name, (hits, of) in shares.items()
        if of
    }
    if pulls:
        signs, prompts = zip(*pulls, strict=True)
        found[LENGTH_BIAS] = clustered_balance(signs, prompts)
    return {name: Metric.of(interval) for name, interval in found.items()}


def _pull(case: JudgedCase) -> float | None:
    """Which length a verdict prefers; None where there is no verdict."""
    judged = case.value is not None or case.swayed is not None or case.reason == SAME
    if case.other is None or not judged:
        return None
    # Neither answer being the better one is a verdict, too, where the judge was asked.
    value = 0.5 if case.verdict is None else float(case.verdict)
    return length_pull(case.response, case.other, value)


def length_pull(one: Response, other: Response, value: float) -> float:
    """1 where the longer answer wins, -1 where the shorter one does; else 0.

    Args:
        one: the answer that wins by a value of 1.
        other: the answer that wins by a value of 0.
        value: the verdict; 0.5 is a tie.
    """
    longer = (len(one.text) > len(other.text)) - (len(one.text) < len(other.text))
    return (2 * value - 1) * longer


def _graded(cases: Sequence[JudgedCase]) -> bool:
    """Whether the judge gives more than verdicts."""
    return any(case.value not in (0, 1) for case in cases)


def _calibration(cases: Sequence[JudgedCase]) -> tuple[CalibrationBin, ...]:
    from misstep.evidence.agreement import calibration_curve

    scored = [case for case in cases if case.value is not None and case.other is None]
    if not scored or not _graded(scored):
        return ()
    values = [float(case.value or 0.0) for case in scored]
    curve = calibration_curve(values, [case.label for case in scored])
    return tuple(CalibrationBin(**found._asdict()) for found in curve)


def correction(check: Check) -> Callable[[Metric], Corrected | None]:
    """What turns a rate of the checked judge into the one that it stands for.

    Raises:
        DataError: the check does not tell sensitivity and specificity, or the judge tells no
            more than chance, so that no true rate follows from its own.
    """
    from misstep.evidence.stats import Interval, corrected_rate

    if check.metric not in VERDICTS:
        raise DataError(
            f"expected a check of a judge of a rate ({', '.join(VERDICTS)}), found one of "
            f"{check.metric}. Only rates can be corrected: leave it out."
        )
    metrics = check.pooled.metrics if check.pooled else {}
    absent = [name for name in ("false_safe", "false_unsafe") if name not in metrics]
    if absent:
        raise DataError(
            "expected cases of both labels in the checked data, found "
            f"none for {', '.join(absent)}. Check the judge on more data."
        )
    sensitivity, specificity = (
        Interval(1 - (m.value or 0.0), 1 - (m.high or 0.0), 1 - (m.low or 0.0), m.n)
        for m in (metrics["false_safe"], metrics["false_unsafe"])
    )
    if sensitivity.value + specificity.value <= 1:
        raise DataError(
            "no rate can be corrected for this judge: sensitivity "
            f"{sensitivity.value:.3f} and specificity {specificity.value:.3f} together do not "
            "exceed 1: this judge tells no more than chance. Use another judge."
        )

    def corrected(rate: Metric) -> Corrected | None:
        if rate.value is None or rate.low is None or rate.high is None:
            return None
        raw = Interval(rate.value, rate.low, rate.high, rate.n)
        found = corrected_rate(raw, sensitivity, specificity)
        return found and Corrected(value=found.value, low=found.low, high=found.high)

    return corrected


def write_check(path: Path, check: Check) -> None:
    """Write check.json so that equal checks are equal bytes."""
    write_json(path, check.model_dump(mode="json", by_alias=True))


def read_check(path: Path) -> Check:
    """Read check.json.

    Raises:
        DataError: the file is absent, is no JSON, or a field of it is wrong.
    """
    return read_json(path, Check)
