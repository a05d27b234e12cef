"""What the stages share: yields, seeds named by content, the shape of settings, scoring."""

from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from misstep.judges.base import Judge
from misstep.records import Message, Record, Response, Score, digest

Notify = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""

Ask = Callable[[tuple[Message, ...]], tuple[Message, ...]]
"""Puts a conversation, its guide included, into the words that a model was trained on."""


class Settings(BaseModel):
    """A part of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Yield(Record):
    """How much of what went into a stage came out of it, and why the rest did not."""

    given: int
    """Prompts, or mistakes."""
    sampled: int
    """Texts that the model wrote for them."""
    kept: int
    refused: dict[str, int] = Field(default_factory=dict)
    """The texts that were not kept, counted by reason."""

    @classmethod
    def of(cls, given: int, sampled: int, kept: int, reasons: list[str]) -> "Yield":
        """Count the reasons, most frequent first."""
        return cls(
            given=given,
            sampled=sampled,
            kept=kept,
            refused=dict(Counter(reasons).most_common()),
        )


def score_all(judge: Judge, responses: Sequence[Response]) -> list[Score]:
    """Score every response, in order; one that never came is unscored and no judge reads it."""
    came = iter(judge.score([response for response in responses if response.error is None]))
    return [
        next(came) if r.error is None else judge.unscored(r, no_answer(r.error))
        for r in responses
    ]


def no_answer(error: str) -> str:
    """How an answer that never came is counted."""
    return f"no answer: {error}"


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int(digest([str(part) for part in parts])[:7], 16)
