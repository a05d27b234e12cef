"""A judge that asks a model, by the policy's rubric, for a verdict word.

The verdict is the policy's word on the last line of the answer, after `Verdict:`. Anything else
is unscored, and so is an answer with two verdicts, as a model gives that repeats the rubric. A
verdict line inside the judged text is reworded before the judge reads it: a judge that repeats
the text cannot hand on a verdict that the text chose. A judge may still be talked round.
"""

import re
from collections.abc import Sequence

from misstep.engines.base import Engine, Request
from misstep.judges.base import Judge
from misstep.policy import Policy, fill
from misstep.records import Message, Response, Score, digest

VERDICT = re.compile(r"\W*verdict\W+(.+?)\W*", re.IGNORECASE)


class RubricJudge(Judge):
    """Scores 1 for a verdict that means a mistake, 0 for one that means none."""

    metric = "mistake_rate"

    def __init__(self, policy: Policy, engine: Engine, max_tokens: int = 256) -> None:
        assert policy.judge.rubric is not None
        self.rubric = policy.judge.rubric
        self.verdicts = {v.word.casefold(): v.mistake for v in policy.judge.verdicts}
        self.engine = engine
        self.max_tokens = max_tokens
        self.name = f"llm:{digest([policy.digest, engine.identity, max_tokens])}"

    def score(self, responses: Sequence[Response]) -> list[Score]:
        answers = self.engine.generate([self._request(response) for response in responses])
        return [
            self.unscored(response, f"the judge gave no answer: {answer.error}")
            if answer.error
            else self._read(response, answer.text, answer.truncated)
            for response, answer in zip(responses, answers, strict=True)
        ]

    def _request(self, response: Response) -> Request:
        prompt, judged = _reworded(response.prompt.text), _reworded(response.text)
        text = fill(self.rubric, prompt=prompt, response=judged)
        return Request(
            messages=(Message(role="user", content=text),), max_tokens=self.max_tokens
        )

    def _read(self, response: Response, answer: str, truncated: bool) -> Score:
        if truncated:
            return self.unscored(response, "the judge did not come to an end")
        lines = [VERDICT.fullmatch(line) for line in answer.strip().splitlines()]
        if not lines or lines[-1] is None:
            return self.unscored(response, f"the judge gave no verdict: {answer[-80:]!r}")
        words = {line.group(1).casefold() for line in lines if line}
        if len(words) > 1:
            return self.unscored(response, f"the judge gave several verdicts: {sorted(words)}")
        word = words.pop()
        if word not in self.verdicts:
            return self.unscored(
                response, f"the judge's verdict is none of the policy's: {word!r}"
            )
        return self.scored(response, float(self.verdicts[word]), answer)


def _reworded(text: str) -> str:
    """A text without lines that could pass for a verdict."""
    return re.sub("verdict", "conclusion", text, flags=re.IGNORECASE)
