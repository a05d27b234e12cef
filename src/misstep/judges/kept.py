"""A judge with weights of its own that reads no answer twice: its scores are kept.

A score is kept under the judge's name, which is made of all that its scores depend on, and what
it read: the conversation and the answer. So a run that is gone on with, the cells of a
comparison and a second check have it at once. What got no score is read again the next time.
They lie in the file that keeps the answers of engines; this module knows no run.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from misstep.engines.base import Completion
from misstep.engines.store import Store
from misstep.judges.base import Judge
from misstep.records import Prompt, Response, Score

AT_ONCE = 512
"""Answers that are scored before their scores are kept: what a killed run loses at most."""


class KeptJudge(Judge):
    """Scores from the store where it can, from the judge where it must."""

    def __init__(self, judge: Judge, path: Path) -> None:
        self.name, self.metric, self.votes = judge.name, judge.metric, judge.votes
        self._judge, self._path = judge, path

    def applies(self, prompt: Prompt) -> bool:
        return self._judge.applies(prompt)

    def score(self, responses: Sequence[Response]) -> list[Score]:
        keys = [self._key(response) for response in responses]
        # Opened for as long as it is needed: a judge lives longer than a stage.
        with Store(self._path) as store:
            known = store.look_up(keys)
            missing = {k: r for k, r in zip(keys, responses, strict=True) if k not in known}
            found: dict[bytes, Score] = {}
            waiting = [*missing]
            for start in range(0, len(waiting), AT_ONCE):
                some = waiting[start : start + AT_ONCE]
                scores = self._judge.score([missing[key] for key in some])
                new = dict(zip(some, scores, strict=True))
                store.keep(self.name, {k: _kept(s) for k, s in new.items() if s.scored})
                found |= new
        return [
            found[key].model_copy(update={"response_id": response.id})
            if key in found
            else self._read(response, known[key])
            for key, response in zip(keys, responses, strict=True)
        ]

    def further(self, response: Response, score: Score) -> list[Score]:
        return self._judge.further(response, score)

    def close(self) -> None:
        self._judge.close()

    def _key(self, response: Response) -> bytes:
        turns = [(turn.role, turn.content) for turn in response.prompt.messages]
        read = json.dumps([self.name, turns, response.text])
        return sha256(read.encode()).digest()[:16]

    def _read(self, response: Response, kept: Completion) -> Score:
        value, reason = json.loads(kept.text)
        return self.scored(response, value, reason)


def _kept(score: Score) -> Completion:
    """A score as the store holds it; the number is read again as it was, to the last bit."""
    return Completion(text=json.dumps([score.value, score.reason]), tokens=0)
