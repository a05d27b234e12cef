"""The judge contract: one score a response, in order, or the reason why there is none.

A score that is missing never counts as good or as bad.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from misstep.records import Prompt, Response, Score


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
        del response, score
        return []

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
