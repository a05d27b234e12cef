"""A guard model as a judge: the probability of its labels that count.

Its engine puts the answer into the guard's template and gives each label's probability; judged
text cannot be a control token there, and no text of the guard's is read. An answer that the
guard could not look at is unscored.
"""

import json
import math
from collections.abc import Sequence

from misstep.engines.base import Completion, Engine, Request
from misstep.guard import Guard
from misstep.judges.base import EMPTY, Judge
from misstep.records import Message, Response, Score, digest


class GuardJudge(Judge):
    """Scores with the probability that the guard counts an answer, its threshold put at 0.5."""

    def __init__(self, guard: Guard, engine: Engine) -> None:
        self.guard = guard
        self.engine = engine
        self.metric = guard.metric
        self.name = f"guard:{digest([guard.digest, engine.identity])}"

    def score(self, responses: Sequence[Response]) -> list[Score]:
        some = [response for response in responses if response.text.strip()]
        answers = iter(self.engine.generate([_request(response) for response in some]))
        return [
            self._read(r, next(answers)) if r.text.strip() else self.unscored(r, EMPTY)
            for r in responses
        ]

    def _read(self, response: Response, answer: Completion) -> Score:
        if answer.error:
            return self.unscored(response, f"the guard gave no answer: {answer.error}")
        shares = json.loads(answer.text)
        if not all(map(math.isfinite, shares)):
            return self.unscored(response, "the guard's labels have no probability")
        labels = zip(self.guard.labels, shares, strict=True)
        p = min(1.0, sum(share for label, share in labels if label.counts))
        return self.scored(response, centred(p, self.guard.threshold), f"probability {p:.3f}")


def centred(p: float, threshold: float) -> float:
    """A probability with its log-odds shifted, so that the threshold comes to lie at 0.5."""
    ahead, behind = p * (1 - threshold), (1 - p) * threshold
    return ahead / (ahead + behind)


def _request(response: Response) -> Request:
    answer = Message(role="assistant", content=response.text)
    return Request(messages=(*response.prompt.messages, answer), max_tokens=1)
