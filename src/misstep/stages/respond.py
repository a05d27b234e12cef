"""Answers to test prompts, with the guide and without it.

The guide stands around the prompt's last user turn (paper, section 4.4: guided generation); the
record keeps the prompt as it was.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from misstep.documents import Settings, each_once
from misstep.engines.base import Engine, Request
from misstep.policy import Policy
from misstep.records import Answer, Prompt, Response
from misstep.stages.base import (
    Ask,
    Read,
    Tally,
    ask,
    derive_seed,
    kind_of,
    no_answer,
    response_of,
)


class RespondSettings(Settings):
    """How test prompts are answered."""

    max_tokens: Annotated[int, Field(ge=1)] = 256
    """The longest answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy decoding, so that a difference is the model's and not the dice's."""
    guided: Annotated[tuple[bool, ...], Field(min_length=1), AfterValidator(each_once)] = (
        False,
        True,
    )
    """Whether the policy's guide stands around the prompt: without it, with it, or both."""


CUT = "stopped at the token limit"
Asked = tuple[Prompt, bool]
"""A prompt, and whether the guide stands around it."""


def respond(
    asked: Iterable[Asked],
    policy: Policy,
    engine: Engine,
    settings: RespondSettings,
    seed: int,
    put: Ask = lambda messages: messages,
    read: Read = lambda text: text,
) -> Iterator[Response]:
    """Answer all that is asked, in order.

    What is asked at once is answered sooner: an engine that is full has no last answers of one
    test set to wait for before it begins with the next.
    """

    def request(each: Asked) -> Request:
        prompt, guided = each
        return Request(
            messages=put(policy.turns(prompt, guided)),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=derive_seed(seed, prompt.id),
        )

    for (prompt, guided), answer in ask(engine, asked, request):
        yield response_of(engine, prompt, answer, read, guided)


def whole_counted(answers: Iterable[Answer], tally: Tally) -> Iterator[Answer]:
    """The answers as they come, and a count of those that are whole.

    One that stopped at the token limit is judged as it stands, on less than the model meant to
    say: where many did, rates of mistakes and of help are too low.
    """
    for answer in answers:
        response = answer.response
        tally.given += 1
        tally.sampled += 1
        if response.error is not None:
            tally.refused[kind_of(no_answer(response.error))] += 1
        elif response.truncated:
            tally.refused[f"{CUT}, {answer.method}"] += 1
        else:
            tally.kept += 1
        yield answer
