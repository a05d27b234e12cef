"""The judge contract: one score a response, in order, or the reason why there is none.

A judge of pairs says which of two answers is better instead, or that neither is. A score that
is missing never counts as good or as bad.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from misstep.records import Prompt, Response, Score

VOTES_AGREE = "votes_agree"


class Judge(ABC):
    """Gives one number to each response."""

    name: str
    """Names the judge by everything that its scores depend on."""
    metric: str
    """What the mean of its scores is called in results."""

    def applies(self, prompt: Prompt) -> bool:
        """Whether answers to this prompt can be scored at all, as far as the prompt tells."""
        del prompt
        return True

    @abstractmethod
    def score(self, responses: Sequence[Response]) -> list[Score]:
        """Score every response, in order."""

    def metric_of(self, prompt: Prompt) -> str:
        """What scores of answers to this prompt are called, where not all are of one metric."""
        del prompt
        return self.metric

    def further(self, response: Response, score: Score) -> list[Score]:
        """What the look that gave a score says beside it, as scores by other metrics."""
        del response
        return agreement_of(score)

    def scored(self, response: Response, value: float, reason: str = "") -> Score:
        """A score of this judge."""
        return Score(
            response_id=response.id,
            metric=self.metric_of(response.prompt),
            value=value,
            judge=self.name,
            reason=reason,
        )

    def unscored(self, response: Response, because: str) -> Score:
        """The absence of a score, with its reason."""
        return Score(
            response_id=response.id,
            metric=self.metric_of(response.prompt),
            value=None,
            judge=self.name,
            reason=because,
        )


class Preference(NamedTuple):
    """Which of two answers is better, in a judge's eyes."""

    value: float | None
    """1 for the first, 0 for the second, 0.5 for neither; None where the judge cannot say."""
    swayed: bool | None
    """Whether the verdict changed with the order; None where nobody was asked."""
    reason: str


class PairJudge(ABC):
    """Compares the answers to one prompt, two at a time."""

    name: str
    """Names the judge by everything that its verdicts depend on."""
    metric = "win_rate"

    @abstractmethod
    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Preference]:
        """A preference for every pair, in order."""


def agreement_of(score: Score) -> list[Score]:
    """Where several were asked, whether all say the same; who says nothing does not."""
    if len(score.votes) < 2:
        return []
    same = len(set(score.votes)) == 1 and score.votes[0] is not None
    return [score.model_copy(update={"metric": VOTES_AGREE, "value": float(same)})]


class Seat(NamedTuple):
    """A judge of a run, and how its metrics are told from those of the judges before it."""

    judge: Judge | PairJudge
    name: str = ""
    """Stands behind its metrics, `mistake_rate@NAME`; empty for the first judge of one."""

    @property
    def metric(self) -> str:
        """What the judge's scores are called here."""
        return self.called(self.judge.metric)

    def called(self, metric: str) -> str:
        """One of the judge's metrics, with its name where it has one."""
        return f"{metric}@{self.name}" if self.name else metric


def seated(judges: Sequence[Judge], further: Mapping[str, Judge | PairJudge]) -> list[Seat]:
    """Judges side by side; of the further ones, a second one of a metric keeps its name."""
    seats = [Seat(judge) for judge in judges]
    for name, judge in further.items():
        taken = {seat.judge.metric for seat in seats}
        seats.append(Seat(judge, name if judge.metric in taken else ""))
    return seats
