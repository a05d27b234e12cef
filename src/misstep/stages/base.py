"""What the stages share: counted yields, seeds named by content, and the shape of settings."""

from collections import Counter
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from misstep.records import Record, digest

Notify = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


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


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int(digest([str(part) for part in parts])[:7], 16)
