"""The method contract: what a model is trained on, and how it is asked afterwards.

Every trained method shares one trainer, one renderer and one budget of rows, so that two
methods differ in their rows alone, and, where their authors say so, in how a prompt is put to
the trained model and what is taken from its answer.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field

from misstep.documents import Settings
from misstep.errors import RunError
from misstep.policy import Policy
from misstep.records import (
    Analysis,
    Example,
    Message,
    Mistake,
    Pair,
    Praise,
    Prompt,
    Revision,
)

T = TypeVar("T")
Rows = list[Example] | list[Pair]


class MixSettings(Settings):
    """How the rows of a training set are mixed, each as a multiple of N."""

    unit: Annotated[int, Field(ge=1)] | None = None
    """N itself, so that variants of a sweep train on equally many rows: what there is too much
    of is drawn from, what there is too little of comes again, the analyses too. Where it is
    left out, the number of accepted analyses; of mistakes, where no method reads analyses."""

    ordinary: Annotated[float, Field(ge=0)] = 1.0
    """Ordinary question-answer pairs, for each of N (paper, section 4.3)."""
    good_answers: Annotated[float, Field(ge=0)] = 1.0
    """Good answers to the prompts that mistakes were collected on, for each of N. Ours: the
    paper trains on none; 0 is its setting."""
    guided: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of ordinary pairs and good answers whose prompts carry the policy's guide, so
    that guidance at inference is no stranger to the model. Ours: the paper's rows carry none,
    and what methods make of pairs (`dpo`, `rlhf`, `coh`, `self_guard`) does not either."""


class Materials(NamedTuple):
    """What there is to train on; the same for all methods."""

    policy: Policy
    mistakes: Sequence[Mistake]
    """Confirmed ones."""
    analyses: Sequence[Analysis]
    """Accepted ones."""
    revisions: Sequence[Revision]
    """Where a method asks for them."""
    ordinary: Sequence[Prompt]
    """Prompts with references in which nothing provokes the mistake."""
    answered: Sequence[Prompt]
    """Prompts with references that mistakes were collected on."""
    mix: MixSettings
    seed: int
    sampled: Iterable[Analysis] = ()
    """Every analysis, refused ones too: all first samples, then all second ones, and so on."""
    unguided: Sequence[Analysis] = ()
    """What the model says of its mistakes without the guide, behind the same gate; where a
    method asks for it."""
    praise: Sequence[Praise] = ()
    """Accepted, of good answers to the prompts of mistakes; where a method asks for it."""

    @property
    def unit(self) -> int:
        """N, of which the parts of every method's budget are multiples."""
        return self.mix.unit or len(self.analyses)

    @property
    def lesson(self) -> float:
        """The rows that a method may spend on its own lesson, as a multiple of N."""
        return 1 + self.mix.good_answers

    @property
    def budget(self) -> float:
        """All rows that a method may spend, ordinary pairs among them, as a multiple of N."""
        return self.lesson + self.mix.ordinary

    def each_analysis(self) -> list[Analysis]:
        """Every accepted analysis once; so many of them where the recipe says how many."""
        if self.mix.unit is None:
            return list(self.analyses)
        return self.some(self.analyses, 1, "analyses")

    def some(self, records: Sequence[T], share: float, what: str) -> list[T]:
        """So many records for each of N, drawn by the seed.

        Where there are fewer, they come again: all methods train on equally many rows.

        Raises:
            RunError: there are none at all, but some are wanted.
        """
        wanted = round(share * self.unit)
        drawn = list(records)
        if wanted and not drawn:
            raise RunError(
                f"training: a method needs records of the kind '{what}', found none. Leave the "
                "method out, or give data that has some."
            )
        random.Random(f"{what} {self.seed}").shuffle(drawn)
        return list(islice(cycle(drawn), wanted)) if drawn else []

    def pairs(self) -> list[Pair]:
        """Every mistake beside a good answer to the same prompt, where one is known.

        A response that stopped at the token limit would teach that a bad answer ends abruptly:
        it is left out, unless there is no other.
        """
        known = [
            (m, Pair(messages=m.prompt.messages, chosen=good, rejected=m.response))
            for m in self.mistakes
            if (good := m.prompt.reference)
        ]
        whole = [pair for mistake, pair in known if not mistake.truncated]
        return whole or [pair for _, pair in known]


class Method(ABC):
    """One way to make a better model."""

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    """Whether there are rows at all; without them the model answers as it is."""
    uses_ordinary: ClassVar[bool] = True
    """Whether ordinary pairs are mixed in, as many as `mix.ordinary` says, where it trains."""
    uses_mistakes: ClassVar[bool] = False
    uses_analyses: ClassVar[bool] = False
    uses_revisions: ClassVar[bool] = False
    uses_unguided: ClassVar[bool] = False
    uses_praise: ClassVar[bool] = False
    needs_good_answers: ClassVar[bool] = False
    """Whether nothing can be trained without good answers to the prompts of mistakes."""
    trainer: ClassVar[Literal["fine-tune", "reinforce"]] = "fine-tune"
    """`reinforce`: the pairs make a reward model, whose reward the policy is optimised for."""
    on_pairs: ClassVar[bool] = False
    """Whether the rows are pairs, which are compared with the model without its adapter."""
    spare_tokens: ClassVar[int] = 0
    """What an answer needs beyond the recipe's limit, for what the user does not get of it."""
    guided: ClassVar[tuple[bool, ...]] = (False, True)
    """The settings of guidance in which the method is a setting of its own."""

    @abstractmethod
    def rows(self, materials: Materials) -> Rows:
        """The training rows; none for a method that trains nothing."""

    @property
    def plain(self) -> bool:
        """Whether the trained model is asked, and its answers read, as any other's."""
        return type(self).ask is Method.ask and type(self).read is Method.read

    def ask(self, policy: Policy, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """How the trained model is asked; as it stands, unless the method says otherwise."""
        del policy
        return messages

    def write(self, policy: Policy, answer: str) -> str:
        """How the trained model is to write an answer: what `read` makes the answer of."""
        del policy
        return answer

    def read(self, policy: Policy, text: str) -> str:
        """What a user gets of the trained model's answer; all of it, unless otherwise said."""
        del policy
        return text


def answers(
    materials: Materials, prompts: Sequence[Prompt], kind: str, guided: float = 0.0
) -> list[Example]:
    """Rows that teach the reference answers of prompts, in order.

    A share of them, evenly spread, has the guide around its prompt: the recipe's, or `guided`
    where that is more.
    """
    share = max(guided, materials.mix.guided)
    known = ((prompt, prompt.reference) for prompt in prompts if prompt.reference)
    return [
        Example(
            messages=materials.policy.turns(prompt, int(at * share) < int((at + 1) * share)),
            completion=reference,
            kind=kind,
        )
        for at, (prompt, reference) in enumerate(known)
    ]


def good_rows(materials: Materials, guided: float = 0.0) -> list[Example]:
    """The good answers to attacked prompts that are mixed in.

    Where none is known, analyses come again in their place: all methods train on equally many
    rows.
    """
    share = materials.mix.good_answers
    if materials.answered:
        drawn = materials.some(materials.answered, share, "answered")
        return answers(materials, drawn, "good_answer", guided)
    again = materials.some(materials.analyses, share, "analyses")
    return [analysis_row(materials.policy, analysis) for analysis in again]


def ordinary_rows(materials: Materials) -> list[Example]:
    """The ordinary pairs that every method mixes in."""
    found = materials.some(materials.ordinary, materials.mix.ordinary, "ordinary")
    return answers(materials, found, "ordinary")


def analysis_row(policy: Policy, analysis: Analysis) -> Example:
    """The row of one analysis, asked for without the guide."""
    mistake = analysis.mistake
    asked = policy.analysis_request(mistake.prompt.transcript, mistake.response, guided=False)
    return Example(messages=asked, completion=analysis.text, kind="analysis")


def praise_row(policy: Policy, praise: Praise) -> Example:
    """The row of what is right about a good answer: the same request, nothing in it says so."""
    prompt = praise.prompt
    asked = policy.analysis_request(prompt.transcript, prompt.reference or "", guided=False)
    return Example(messages=asked, completion=praise.text, kind="praise")
