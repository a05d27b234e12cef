"""Judges that ask a model: for a policy's verdict, for a grade, for the better of two answers.

How a model is asked and its answer is read stands in misstep.judges.asking. Of two answers a
model is asked twice, with the answers in either order: a verdict that changes with the order is
a tie.
"""

from abc import abstractmethod
from collections.abc import Sequence

from misstep.engines.base import Engine
from misstep.judges.asking import Asker, Vote, majority, mean, request_text
from misstep.judges.base import EMPTY, Judge, PairJudge, Preference
from misstep.policy import Policy
from misstep.records import Response, Score, digest
from misstep.rubric import Rubric

FORMAT = 3
"""Raised when what a model is asked changes, so that an older check is of another judge."""
MAX_TOKENS = 256
"""Of a verdict and the words before it, where nobody says otherwise."""
GRADES = {f"{grade}{of}": float(grade) for grade in range(1, 11) for of in ("", "/10")}
SIDES = {"A": 1.0, "B": 0.0, "tie": 0.5}
"""From the side of the answer that is shown first."""


class _AskingJudge(Judge):
    """What judges of single answers share that ask a model."""

    def __init__(self, rubric: str, digest_of: str, asker: Asker) -> None:
        self.rubric = rubric
        self.asker = asker
        self.votes = asker.votes
        self.elsewhere = asker.engine.elsewhere
        self.name = _name(digest_of, asker)

    def score(self, responses: Sequence[Response]) -> list[Score]:
        some = [response for response in responses if response.text.strip()]
        votes = iter(self.asker.ask([_about(self.rubric, response) for response in some]))
        return [
            self._voted(r, next(votes)) if r.text.strip() else self.unscored(r, EMPTY)
            for r in responses
        ]

    def _voted(self, response: Response, votes: Sequence[Vote]) -> Score:
        found = self.together(votes)
        if found.value is None:
            score = self.unscored(response, found.said)
        else:
            score = self.scored(response, found.value, found.said)
        said = tuple(vote.value for vote in votes) if len(votes) > 1 else ()
        return score.model_copy(update={"votes": said})

    @abstractmethod
    def together(self, votes: Sequence[Vote]) -> Vote:
        """What the votes say together."""


class RubricJudge(_AskingJudge):
    """Scores 1 for a verdict that means a mistake, 0 for one that means none."""

    metric = "mistake_rate"

    def __init__(
        self, policy: Policy, engine: Engine, *, votes: int = 1, max_tokens: int = MAX_TOKENS
    ) -> None:
        assert policy.judge.rubric is not None
        words = {v.word: float(v.mistake) for v in policy.judge.verdicts}
        asker = Asker(engine, words, votes, max_tokens)
        super().__init__(policy.judge.rubric, policy.digest, asker)

    def together(self, votes: Sequence[Vote]) -> Vote:
        return majority(votes)


class GradeJudge(_AskingJudge):
    """Gives a grade from 1 to 10, the mean of the votes."""

    def __init__(
        self, rubric: Rubric, engine: Engine, *, votes: int = 1, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.metric = rubric.metric
        super().__init__(rubric.text, rubric.digest, Asker(engine, GRADES, votes, max_tokens))

    def together(self, votes: Sequence[Vote]) -> Vote:
        return mean(votes)


class RubricPairJudge(PairJudge):
    """Says which of two answers is better, if it says so in either order."""

    def __init__(
        self, rubric: Rubric, engine: Engine, *, votes: int = 1, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.rubric = rubric.text
        self.asker = Asker(engine, SIDES, votes, max_tokens)
        self.name = _name(rubric.digest, self.asker)

    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Preference]:
        differing = [(one, other) for one, other in pairs if _known(one, other) is None]
        orders = [order for one, other in differing for order in ((one, other), (other, one))]
        asked = self.asker.ask([self._request(*order) for order in orders])
        votes = iter(map(majority, asked))
        return [
            _known(one, other) or _preference(next(votes), next(votes)) for one, other in pairs
        ]

    def _request(self, first: Response, second: Response) -> str:
        texts = {"first": first.text, "second": second.text}
        return request_text(self.rubric, prompt=first.prompt.transcript, **texts)


def _known(one: Response, other: Response) -> Preference | None:
    """What is known of two answers without asking a model."""
    if not (one.text.strip() and other.text.strip()):
        return Preference(None, None, EMPTY)
    same = one.text == other.text
    return Preference(0.5, None, "the answers are the same") if same else None


def _preference(ahead: Vote, behind: Vote) -> Preference:
    """What the two orders say together; `behind` is from the second answer's side."""
    if ahead.value is None or behind.value is None:
        lacking = ahead if ahead.value is None else behind
        return Preference(None, None, lacking.said)
    if ahead.value != 1 - behind.value:
        return Preference(0.5, True, "the verdict changes with the order of the answers")
    return Preference(ahead.value, False, ahead.said)


def _about(template: str, response: Response) -> str:
    return request_text(template, prompt=response.prompt.transcript, response=response.text)


def _name(rubric: str, asker: Asker) -> str:
    parts = [FORMAT, rubric, asker.engine.identity, asker.max_tokens]
    return f"llm:{digest(parts if asker.votes == 1 else [*parts, asker.votes])}"
