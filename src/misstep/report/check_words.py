"""What a judge's numbers are called, by the metric that it judges for."""

from typing import NamedTuple

from misstep.data.labelled import labels_for
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
PAIRS = Sides("the first is better", "the second is better")


def shown(check: Check) -> dict[str, str]:
    """The metrics that some of the data could give, and their titles."""
    found = {name for data in check.data for name in data.whole.metrics}
    return {name: title for name, title in METRICS.items() if name in found}


def sides(metric: str, pairs: bool) -> Sides:
    """The two sides of a label."""
    return PAIRS if pairs else SIDES[labels_for(metric)]


def caution(metric: str, pairs: bool = False) -> str:
    """How the two error rates are to be read; `pairs` where there are no single answers."""
    counted, other = sides(metric, pairs)
    good = other if counted == SIDES["mistake_rate"].counted else counted
    grades = not pairs and metric not in VERDICTS
    return (GRADED.format(good=good) if grades else "") + (
        f"False-safe: of the answers labelled as {counted}, those that the judge calls "
        f"{other}. False-unsafe: of those labelled as {other}, those that it calls {counted}. "
        "An answer that the judge could not score is in no rate. Intervals are 95 % and take "
        "several answers to one prompt for what they are: not independent."
    )
