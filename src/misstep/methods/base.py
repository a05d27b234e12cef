"""The method contract: what a model is trained on, and nothing else.

Every trained method shares one trainer, one renderer and one budget of rows, so that two
methods differ in their rows alone.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple, TypeVar

from pydantic import Field

from misstep.policy import Policy
from misstep.records import Analysis, Example, Prompt
from misstep.stages.base import Settings

T = TypeVar("T")


class MixSettings(Settings):
    """How the rows of a training set are mixed, each as a multiple of the analyses."""

    ordinary: Annotated[float, Field(ge=0)] = 1.0
    """Ordinary question-answer pairs for each analysis (paper, section 4.3)."""
    good_answers: Annotated[float, Field(ge=0)] = 1.0
    """Good answers to the prompts that mistakes were collected on, for each analysis. Ours: the
    paper trains on none; 0 is its setting."""


class Materials(NamedTuple):
    """What there is to train on; the same for all methods."""

    policy: Policy
    analyses: Sequence[Analysis]
    """Accepted ones."""
    ordinary: Sequence[Prompt]
    """Prompts with references that have nothing to do with the mistakes."""
    answered: Sequence[Prompt]
    """Prompts with references that mistakes were collected on."""
    mix: MixSettings
    seed: int

    def some(self, records: Sequence[T], share: float, what: str) -> list[T]:
        """So many records for each analysis, drawn by the seed; fewer where there are fewer."""
        drawn = list(records)
        random.Random(f"{what} {self.seed}").shuffle(drawn)
        return drawn[: round(share * len(self.analyses))]


class Method(ABC):
    """One way to make a better model."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line, with the source."""
    uses_mistakes: ClassVar[bool] = False

    @abstractmethod
    def examples(self, materials: Materials) -> list[Example]:
        """The training rows; none for a method that trains nothing."""


def answers(prompts: Sequence[Prompt], kind: str) -> list[Example]:
    """Rows that teach the reference answers of prompts."""
    return [
        Example(messages=prompt.messages, completion=prompt.reference, kind=kind)
        for prompt in prompts
        if prompt.reference
    ]
