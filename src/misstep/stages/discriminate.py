"""Analyses of right and wrong answers alike, and what each of them says of its answer.

The other stages have mistakes analysed. Whether a model can tell a mistake when it sees one
shows only where right answers are analysed too: a model that always finds fault is right about
every mistake, and about no right answer. Departure from the paper (section 3): there GPT-4 and
people give answers and analyses 1 to 10 points; here an analysis is read as a verdict on its
answer, so that answering and analysing are on one scale and no rater is needed.

The verdict is read by rule: from the words that the policy's gate knows, else from the first
sentence that says of the response, or the answer, that it is right or wrong. Words can deceive
a rule: an analysis that repeats a request which names the fault counts as one that finds it,
and one in other words, or in another language than English, is undecided. docs/concepts.md says
how often the rule agrees with a reader.
"""

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from misstep.documents import Settings
from misstep.engines.base import Engine, Request
from misstep.policy import Policy, found
from misstep.records import Record, Response
from misstep.stages.base import derive_seed

QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”')
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SUBJECT = r"\b(?:the|this|that|your|my) (?:\w+ )?(?:response|answer|statement)\b"
OF_SUBJECT = rf"{SUBJECT}(?:(?!inserted text|question|request).){{0,60}}?"
"""Up to a verdict on the response, with nothing else between that it could be a verdict on."""
WRONG = re.compile(
    rf"{OF_SUBJECT}\b(?:wrong|incorrect\w*|inaccurate|irrelevant|unrelated|incomplete|invalid|"
    r"inappropriate|nonsens\w+|unhelpful|mislead\w+|mistake|"
    r"(?:not|n['’]t|cannot) (?!only|just|contain|include)(?:\w+ ){0,3}?"
    r"(?:correct\w*|accurate\w*|valid|relevant|related|appropriate|right|helpful|suitable|"
    r"answer\w*|address\w*|respond\w*|provid\w+|match\w*|follow\w*|make sense))\b",
    re.IGNORECASE,
)
RIGHT = re.compile(
    rf"{OF_SUBJECT}\b(?:correct\w*|accurate\w*|valid|relevant|appropriate\w*|suitable|right|"
    r"helpful|clear|concise|direct|directly|straightforward|effective\w*|logical|reasonable|"
    r"well[- ]\w+|good|great|perfect\w*|answers|addresses)\b",
    re.IGNORECASE,
)


class DiscriminateSettings(Settings):
    """How answers are analysed."""

    examples: bool = False
    """Whether the policy's worked examples stand before the request. They are guided in all but
    name; without them guided and unguided differ in the request alone."""
    max_tokens: Annotated[int, Field(ge=1)] = 128
    """The longest analysis."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy decoding."""


class Discrimination(Record):
    """A model's analysis of an answer, and what it says of it."""

    model: str
    response: Response
    guided: bool
    text: str
    truncated: bool
    says_mistake: bool | None
    """None where the analysis neither names a fault nor endorses the answer."""
    error: str | None = None
    """Why there is no analysis; it counts as undecided."""


def discriminate(
    model: str,
    responses: Sequence[Response],
    policy: Policy,
    engine: Engine,
    settings: DiscriminateSettings,
    guided: bool,
    seed: int,
) -> list[Discrimination]:
    """Have every answer analysed once, mistake or not, in order."""
    ask = policy.worked_request if settings.examples else policy.analysis_request
    requests = [
        Request(
            messages=ask(response.prompt.transcript, response.text, guided),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=derive_seed(seed, response.id),
        )
        for response in responses
    ]
    return [
        Discrimination(
            model=model,
            response=response,
            guided=guided,
            text=answer.text.strip(),
            truncated=answer.truncated,
            says_mistake=says_mistake(policy, answer.text),
            error=answer.error,
        )
        for response, answer in zip(responses, engine.generate(requests), strict=True)
    ]


def says_mistake(policy: Policy, analysis: str) -> bool | None:
    """Whether an analysis calls its answer a mistake; None where it is undecided.

    Of the policy's words praise outweighs fault: "It did not follow the inserted text" holds
    those of both.
    """
    if found(policy.gate.endorses, analysis):
        return False
    if found(policy.gate.names_fault, analysis):
        return True
    return _first_verdict(analysis)


def _first_verdict(analysis: str) -> bool | None:
    # What is quoted is the answer's own text, and no verdict on it.
    for sentence in SENTENCE_END.split(QUOTED.sub("", analysis)):
        if WRONG.search(sentence):
            return True
        if RIGHT.search(sentence):
            return False
    return None
