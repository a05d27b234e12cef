"""Critique and revision: the model criticises its mistakes and writes better responses.

Two model calls a mistake (Constitutional AI, arXiv 2212.08073, section 3.1). No judge looks at
a revision; only empty ones and those that break off are dropped. Knows no method.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import Field

from misstep.documents import Settings
from misstep.engines.base import Completion, Engine, Request
from misstep.policy import Policy
from misstep.records import Message, Mistake, Revision
from misstep.stages.base import Tally, derive_seed, kind_of, no_answer, portions


class ReviseSettings(Settings):
    """How mistakes are revised."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    """How freely critiques and revisions are sampled."""
    critique_tokens: Annotated[int, Field(ge=1)] = 96
    """The longest critique."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """The longest revision."""


def revise(
    mistakes: Iterable[Mistake],
    policy: Policy,
    engine: Engine,
    settings: ReviseSettings,
    seed: int,
    tally: Tally,
) -> Iterator[Revision]:
    """Criticise and revise every confirmed mistake."""
    confirmed = (mistake for mistake in mistakes if mistake.confirmed)
    for known in portions(confirmed, engine.at_once):
        asked = [policy.critique_request(mistake) for mistake in known]
        critiques = _ask(engine, asked, settings.temperature, settings.critique_tokens, seed)
        asked = [
            policy.revision_request(mistake, critique.text)
            for mistake, critique in zip(known, critiques, strict=True)
        ]
        revisions = _ask(engine, asked, settings.temperature, settings.max_tokens, seed)
        tally.given += len(known)
        tally.sampled += len(revisions)
        for mistake, critique, answer in zip(known, critiques, revisions, strict=True):
            text = answer.text.strip()
            if error := critique.error or answer.error:
                tally.refused[kind_of(no_answer(error))] += 1
            elif answer.truncated or not text:
                tally.refused["broken off at the token limit" if text else "empty"] += 1
            else:
                tally.kept += 1
                yield Revision(mistake=mistake, critique=critique.text, text=text)


def _ask(
    engine: Engine,
    asked: Sequence[tuple[Message, ...]],
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[Completion]:
    requests = [
        Request(
            messages=messages,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=derive_seed(seed, messages),
        )
        for messages in asked
    ]
    return engine.generate(requests)
