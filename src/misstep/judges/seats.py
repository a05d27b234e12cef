"""The judges of a run side by side: what each is asked, and what its metrics are called there.

A check has a judge of refusals score any answer, since people's labels say of any whether it
refuses. In a run some refusals are due: whichever judge sees them, each has the name of its
kind, and those of attacks are not scored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from misstep.data.labelled import REFUSALS
from misstep.evidence.check_results import VOTES_AGREE
from misstep.judges.base import AnyJudge, Judge
from misstep.judges.refusal import ALL_REFUSALS, classes, is_attack, refusal_metric
from misstep.records import Prompt, Response, Score


class Seat(NamedTuple):
    """A judge of a run, and how its metrics are told from those of the judges before it."""

    judge: AnyJudge
    name: str = ""
    taken: frozenset[str] = frozenset()
    """What the judges before it give: of these it has its own, `mistake_rate@NAME`."""

    @property
    def metric(self) -> str:
        """What the judge's scores are called here."""
        return self.called(self.judge.metric)

    def called(self, metric: str) -> str:
        """One of the judge's metrics, with its name where that or its main one is taken."""
        return f"{metric}@{self.name}" if self.taken & {metric, self.judge.metric} else metric

    def asks(self, prompt: Prompt) -> bool:
        """Whether the judge is asked about answers to this prompt."""
        return self.judge.metric != REFUSALS or not is_attack(prompt)

    def applies(self, prompt: Prompt) -> bool:
        """Whether single answers to this prompt can be scored, as far as the prompt tells."""
        judge = self.judge
        return isinstance(judge, Judge) and self.asks(prompt) and judge.applies(prompt)

    def measures(self, prompt: Prompt) -> bool:
        """Whether a score of an answer to this prompt can be better or worse than another."""
        of_refusals = self.judge.metric == REFUSALS
        due_or_not = not of_refusals or refusal_metric(prompt) != ALL_REFUSALS
        return self.applies(prompt) and due_or_not

    def told(self, response: Response, score: Score) -> list[Score]:
        """A score and all that follows from it, by the names that they have here."""
        found = [score]
        if isinstance(self.judge, Judge):
            found += self.judge.further(response, score)
        if self.judge.metric == REFUSALS:
            found[0] = score.model_copy(update={"metric": refusal_metric(response.prompt)})
            found += classes(response, score)
        return [of.model_copy(update={"metric": self.called(of.metric)}) for of in found]


def seated(judges: Sequence[Judge], further: Mapping[str, AnyJudge]) -> list[Seat]:
    """Judges side by side; of the further ones, a second one of a metric keeps its name."""
    seats: list[Seat] = []
    for name, judge in (*(("", judge) for judge in judges), *further.items()):
        taken = {metric for seat in seats for metric in _given(seat.judge)}
        seats.append(Seat(judge, name, frozenset(taken)))
    return seats


def _given(judge: AnyJudge) -> set[str]:
    several = isinstance(judge, Judge) and judge.votes > 1
    return {judge.metric, VOTES_AGREE} if several else {judge.metric}
