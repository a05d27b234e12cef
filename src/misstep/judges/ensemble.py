"""Several judges of one question, and what they say together.

Each member gives its verdict, or none. The ensemble's score is the verdict of more than half of
the members, or of all of them, or the mean of all their scores; without it the answer is
unscored.
"""

from collections.abc import Sequence
from typing import Literal

from misstep.judges.base import Judge
from misstep.records import VERDICT_FROM, Prompt, Response, Score, digest

Needs = Literal["majority", "all", "mean"]


class EnsembleJudge(Judge):
    """Scores with the verdict that enough of its members give."""

    def __init__(self, members: Sequence[Judge], needs: Needs) -> None:
        self.members = members
        self.metric = members[0].metric
        self.votes = len(members)
        self.elsewhere = all(member.elsewhere for member in members)
        assert all(member.metric == self.metric for member in members)
        self.mean = needs == "mean"
        self.enough = len(members) // 2 + 1 if needs == "majority" else len(members)
        by = "mean" if self.mean else self.enough
        self.name = f"ensemble:{digest([[member.name for member in members], by])}"

    def applies(self, prompt: Prompt) -> bool:
        return any(member.applies(prompt) for member in self.members)

    def score(self, responses: Sequence[Response]) -> list[Score]:
        said = [member.score(responses) for member in self.members]
        return [
            self._together(response, scores)
            for response, scores in zip(responses, zip(*said, strict=True), strict=True)
        ]

    def close(self) -> None:
        for member in self.members:
            member.close()

    def _together(self, response: Response, scores: Sequence[Score]) -> Score:
        votes = tuple(score.counted for score in scores)
        told = "; ".join(
            f"{member.name}: {score.value:g}" if score.value is not None else score.reason
            for member, score in zip(self.members, scores, strict=True)
        )
        value = _mean(scores) if self.mean else self._verdict(votes)
        if value is None:
            silent = self.mean and None in votes
            lack = "not all judges give a score" if silent else "the judges do not agree"
            found = self.unscored(response, f"{lack}: {told}")
        else:
            found = self.scored(response, value, told)
        return found.model_copy(update={"votes": votes})

    def _verdict(self, votes: Sequence[float | None]) -> float | None:
        return next((v for v in (0.0, 1.0) if votes.count(v) >= self.enough), None)


def _mean(scores: Sequence[Score]) -> float | None:
    values = [score.value for score in scores if score.value is not None]
    if len(values) < len(scores):
        return None
    mean = sum(values) / len(values)
    # As many verdicts for as against are no verdict; probabilities do not balance by chance.
    return None if mean == VERDICT_FROM and set(values) <= {0.0, 1.0} else mean
