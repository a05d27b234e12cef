"""The judge contract: one score a response, in order, or the reason why there is none.

A judge of pairs says which of two answers is better instead, or that neither is. A score that
is missing never counts as good or as bad.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from misstep.evidence.check_results import VOTES_AGREE, agree
from misstep.records import Prompt, Response, Score

EMPTY = "the answer is empty"
"""Why most judges say nothing of an answer: it does neither."""


class Judge(ABC):
    """Gives one number to each response."""

    name: str
    """Names the judge by everything that its scores depend on."""
    metric: str
    """What the mean of its scores is called in results."""
    votes: int = 1
    """How many are asked about each answer."""
    elsewhere: bool = False
    """Whether it only waits for other machines: a model can answer here meanwhile."""

    def applies(self, prompt: Prompt) -> bool:
        """Whether answers to this prompt can be scored at all, as far as the prompt tells."""
        del prompt
        return True

    @abstractmethod
    def score(self, responses: Sequence[Response]) -> list[Score]:
        """Score every response, in order."""

    def close(self) -> None:  # noqa: B027  (a judge that holds nothing has nothing to do)
        """Give back the memory that the judge's own model holds; engines are not its own."""

    def further(self, response: Response, score: Score) -> list[Score]:
        """What the look that gave a score says beside it, as scores by other metrics.

        Where several were asked, whether all say the same; who says nothing does not.
        """
        del response
        if len(score.votes) < 2:
            return []
        value = float(agree(score.votes))
        return [score.model_copy(update={"metric": VOTES_AGREE, "value": value})]

    def scored(self, response: Response, value: float, reason: str = "") -> Score:
        """A score of this judge."""
        return Score(
            response_id=response.id,
            metric=self.metric,
            value=value,
            judge=self.name,
            reason=reason,
        )

    def unscored(self, response: Response, because: str) -> Score:
        """The absence of a score, with its reason."""
        return Score(
            response_id=response.id,
            metric=self.metric,
            value=None,
            judge=self.name,
            reason=because,
        )


class EachJudge(Judge):
    """A judge that looks at one response at a time."""

    @abstractmethod
    def score_one(self, response: Response) -> Score:
        """Score a response."""

    def score(self, responses: Sequence[Response]) -> list[Score]:
        return [self.score_one(response) for response in responses]


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


AnyJudge = Judge | PairJudge
