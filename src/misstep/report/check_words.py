"""What a judge's numbers are called, by the metric that it judges for."""

from typing import NamedTuple

from misstep.data.labelled import MISTAKES, labels_for
from misstep.evidence.check_results import Check
from misstep.records import VERDICTS

METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC",
    "kappa": "Cohen's kappa",
    "calibration_error": "Calibration error",
    "false_safe": "False-safe rate",
    "false_unsafe": "False-unsafe rate",
    "votes_agree": "Votes agree",
    "position_bias": "Position bias",
    "length_bias": "Length bias",
}
"""In the order of every table."""
ERRORS = {"false_safe": "False negatives", "false_unsafe": "False positives"}
"""What the two ways to be wrong are called where neither side is safe or unsafe."""


class Sides(NamedTuple):
    """What an answer is called that the metric counts, and one that it does not."""

    counted: str
    other: str


SIDES = {
    "mistake_rate": Sides("mistake", "no mistake"),
    "over_refusal": Sides("refusal", "no refusal"),
    "helpfulness": Sides("helpful", "not helpful"),
}
GRADED = (
    "A grade from 1 to 10 is no verdict: here one above 5.5 says {good}, whatever the "
    "rubric calls its grades, and AUC alone goes by their order. "
)
READ = (
    "An answer that the judge could not score is in no rate. Intervals are 95 % and take "
    "several answers to one prompt for what they are: not independent."
)
PAIRS = Sides("the first is better", "the second is better")


def shown(check: Check) -> dict[str, str]:
    """The metrics that some of the data could give, and their titles."""
    found = {name for data in check.data for name in data.whole.metrics}
    return {name: title for name, title in titles(check.metric).items() if name in found}


def titles(metric: str) -> dict[str, str]:
    """What the numbers of a judge of this metric are called."""
    return METRICS if labels_for(metric) == MISTAKES else METRICS | ERRORS


def sides(metric: str, pairs: bool) -> Sides:
    """The two sides of a label."""
    return PAIRS if pairs else SIDES[labels_for(metric)]


def caution(metric: str, pairs: bool = False) -> str:
    """How the numbers are to be read; `pairs` where there are no single answers."""
    if pairs:
        return READ
    counted, other = sides(metric, pairs)
    good = other if counted == SIDES["mistake_rate"].counted else counted
    missed, alarm = (titles(metric)[name].removesuffix(" rate") for name in ERRORS)
    return ("" if metric in VERDICTS else GRADED.format(good=good)) + (
        f"{missed}: of the answers labelled as {counted}, those that the judge calls {other}. "
        f"{alarm}: of those labelled as {other}, those that it calls {counted}. {READ}"
    )
