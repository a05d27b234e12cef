"""What the stages share: yields, seeds named by content, samples, scoring."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from pydantic import Field

from misstep.engines.base import AT_ONCE, Completion, Engine, Request
from misstep.engines.threads import behind
from misstep.judges.base import Judge
from misstep.records import Message, Prompt, Record, Response, Score, text_digest

Notify = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""

Ask = Callable[[tuple[Message, ...]], tuple[Message, ...]]
"""Puts a conversation, its guide included, into the words that a model was trained on."""
Read = Callable[[str], str]
"""Takes from a model's text what a user gets to see."""
T = TypeVar("T")
R = TypeVar("R")
PARTS = 8
"""Of an engine's call, where a judge elsewhere looks at one while the next is answered."""
AHEAD = 16
"""Parts that the model may be ahead of such a judge."""


class Yield(Record):
    """How much of what went into a stage came out of it, and why the rest did not."""

    given: int
    """Prompts, or mistakes."""
    sampled: int
    """Texts that the model wrote for them."""
    kept: int
    refused: dict[str, int] = Field(default_factory=dict)
    """The texts that were not kept, counted by reason."""


@dataclass
class Tally:
    """Counts what becomes of a stage's records while they pass."""

    given: int = 0
    sampled: int = 0
    kept: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Yield:
        """What was counted so far; reasons most frequent first."""
        return Yield(
            given=self.given,
            sampled=self.sampled,
            kept=self.kept,
            refused=dict(self.refused.most_common()),
        )

    @property
    def reasons(self) -> str:
        """Why records were refused, in words; the most frequent reason first."""
        return ", ".join(f"{n} {why}" for why, n in self.refused.most_common()) or "none"


def portions(items: Iterable[T], size: int = AT_ONCE) -> Iterator[list[T]]:
    """The items in lists of a size, the last as long as it comes."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def ask(
    engine: Engine, items: Iterable[T], request: Callable[[T], Request]
) -> Iterator[tuple[T, Completion]]:
    """Every item, in order, with the engine's answer to what is asked about it."""
    for some in portions(items, engine.at_once):
        yield from zip(some, engine.generate([request(i) for i in some]), strict=True)


def score_all(judge: Judge, responses: Sequence[Response]) -> list[Score]:
    """Score every response, in order; one that never came is unscored and no judge reads it."""
    came = iter(judge.score([response for response in responses if response.error is None]))
    return [
        next(came) if r.error is None else judge.unscored(r, no_answer(r.error))
        for r in responses
    ]


def response_of(
    engine: Engine, prompt: Prompt, answer: Completion, read: Read = str, guided: bool = False
) -> Response:
    """An engine's answer to a prompt, with what `read` takes from its text."""
    return Response(
        prompt=prompt,
        text="" if answer.error else read(answer.text),
        model=engine.identity,
        guided=guided,
        truncated=answer.truncated,
        error=answer.error,
    )


def judged_samples(
    asked: Iterable[tuple[Prompt, list[Request]]],
    engine: Engine,
    judge: Judge,
    most: int,
    read: Read = str,
    guided: bool = False,
) -> Iterator[tuple[Prompt, list[tuple[Response, Score]]]]:
    """Every prompt, in order, with its answers, `most` at most, and what the judge says."""
    size = engine.at_once // (PARTS if judge.elsewhere else 1)

    def answered() -> Iterator[list[tuple[Prompt, list[Response]]]]:
        for some in portions(asked, max(1, size // most)):
            came = iter(engine.generate([r for _, requests in some for r in requests]))
            yield [
                (p, [response_of(engine, p, next(came), read, guided) for _ in requests])
                for p, requests in some
            ]

    def judged(
        part: list[tuple[Prompt, list[Response]]],
    ) -> list[tuple[Prompt, list[tuple[Response, Score]]]]:
        scores = iter(score_all(judge, [r for _, responses in part for r in responses]))
        return [(p, [(r, next(scores)) for r in responses]) for p, responses in part]

    for part in meanwhile(judge.elsewhere, judged, answered()):
        yield from part


def meanwhile(elsewhere: bool, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What is made of each item, in order; elsewhere while the next item is waited for."""
    return behind(work, items, AHEAD) if elsewhere else map(work, items)


def kind_of(reason: str) -> str:
    """Why something was not kept, without a judge's own words and without lengths of the
    case's own: equal reasons count as one."""
    said = re.split(r""": ['"]""", reason, maxsplit=1)[0]
    return re.sub(r"(?<!status )\b\d{3,}", "N", said)


def no_answer(error: str) -> str:
    """How an answer that never came is counted."""
    return f"no answer: {error}"


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int(text_digest([str(part) for part in parts])[:7], 16)
