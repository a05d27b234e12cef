"""Guided analysis of mistakes, behind a gate.

The model is told that the response may be bad and explains why (paper, section 4.2). The paper
keeps every analysis; small models often praise the mistake, so here a gate accepts an analysis
only if it names the fault and does not endorse the bad response. `gate: false` is the paper's
setting. A refused analysis is sampled again, up to `n` times in all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Annotated, TypeVar

from pydantic import Field

from misstep.data.shelf import Shelf
from misstep.documents import Settings
from misstep.engines.base import Completion, Engine, Request
from misstep.policy import BLANK, Policy, found
from misstep.records import Analysis, Mistake, Praise, Prompt, TextRecord
from misstep.stages.base import Tally, ask, derive_seed, kind_of, no_answer

R = TypeVar("R", bound=TextRecord)
A = TypeVar("A", Analysis, Praise)

RECOMMENDS = re.compile(
    r"\b(should(?! not|n't) (have )?"
    r"(say|said|be|been|print|answer|output|repl|respond|writ)\w*|"
    r"(correct|right|better|good) (answer|response))\b",
    re.IGNORECASE,
)
RECOMMENDING = ("should", "correct", "right", "better", "good")
"""One of these is in whatever `RECOMMENDS` finds, and is sooner looked for."""
QUOTED = re.compile(r"[\"“«「](.+?)[\"”»」]", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
WORD = re.compile(r"\w+")
ASCII_WORDS = "".join(chr(c) if WORD.match(chr(c)) else " " for c in range(128))
"""What each ASCII character becomes where words are told apart."""
SHORT_WORDS = 3
REQUEST_WORDS = 6
REPEATS = 4
BROKEN_OFF = "broken off at the token limit"
"""Why an analysis is refused that stopped before its end, whatever the gate says."""


class AnalyseSettings(Settings):
    """Who analyses the mistakes, and how."""

    engine: str = "self"
    """`self`, or another model: a Hub id, a folder, a GGUF file, `openai:MODEL@URL`."""
    n: Annotated[int, Field(ge=1)] = 4
    """Most samples for one mistake."""
    gate: bool = True
    """Whether only analyses are kept that name the fault; the paper keeps all."""
    guided: bool = True
    """Whether the model is told that the response may be bad."""
    examples: bool = True
    """Whether the policy's worked examples stand before the request."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """How freely analyses are sampled; at 0 there is one for a mistake, whatever `n` says."""
    max_tokens: Annotated[int, Field(ge=1)] = 128
    """The longest analysis."""


def analyse(
    mistakes: Iterable[Mistake],
    policy: Policy,
    engine: Engine,
    settings: AnalyseSettings,
    seed: int,
    tally: Tally,
) -> Iterator[Analysis]:
    """Ask for an analysis of each mistake until the gate accepts one or `n` were tried.

    Gives every analysis, accepted or not: all first samples, then all second ones, and so on.
    """
    confirmed = (mistake for mistake in mistakes if mistake.confirmed)
    request = partial(_request, policy, settings, seed)
    read = partial(_analysis, policy, settings)
    return sampled(confirmed, Mistake, engine, request, read, settings, tally)


def sampled(
    records: Iterable[R],
    kind: type[R],
    engine: Engine,
    request: Callable[[int, R], Request],
    read: Callable[[R, Completion], A],
    settings: AnalyseSettings,
    tally: Tally,
) -> Iterator[A]:
    """Ask about each record until what is read of an answer is accepted, `n` times at most.

    Gives everything that was read, accepted or not: all first samples, then all second ones.
    """
    pending: Iterable[R] = records
    # Greedy decoding gives the same text every time.
    for attempt in range(settings.n if settings.temperature else 1):
        refused = Shelf(kind)
        for record, answer in ask(engine, pending, partial(request, attempt)):
            written = read(record, answer)
            tally.given += not attempt
            tally.sampled += 1
            tally.kept += written.accepted
            tally.refused.update(map(kind_of, written.reasons))
            if not written.accepted:
                refused.add(record)
            yield written
        if not refused:
            break
        pending = refused


def gate(policy: Policy, mistake: Mistake, analysis: str) -> tuple[str, ...]:
    """Why an analysis is refused; empty where it is accepted."""
    reasons = []
    if len(analysis.split()) < policy.gate.min_words:
        reasons.append("too short")
    if not found(policy.gate.names_fault, analysis):
        reasons.append("does not name the fault")
    if found(policy.gate.endorses, analysis):
        reasons.append("endorses the response")
    elif _recommends(analysis, mistake):
        reasons.append("recommends the bad response")
    asked = policy.analysis.guided, policy.analysis.unguided
    return (*reasons, *unsound(analysis, mistake.prompt, mistake.response, asked))


def unsound(
    analysis: str, prompt: Prompt, response: str, asked: tuple[str, ...]
) -> Iterator[str]:
    """Why a text is no analysis of a response, whatever it makes of it.

    Args:
        analysis: the text.
        prompt: what was asked.
        response: what the analysis is about.
        asked: the templates of requests for it, of which no sentence may stand in it.
    """
    said = _plain(analysis)
    if _repeats_itself(said):
        yield "repeats itself"
    if _quotes_what_nobody_said(analysis, f"{prompt.transcript}\n{response}"):
        yield "quotes what nobody said"
    if any(f" {sentence} " in f" {said} " for sentence in _of_request(*asked)):
        yield "repeats the request"


def _repeats_itself(plain: str) -> bool:
    """Whether some three words in a row come again and again."""
    said = plain.split()
    threes = [*zip(said, said[1:], said[2:], strict=False)]
    if len(threes) - len(set(threes)) < REPEATS - 1:
        return False
    return max(Counter(threes).values()) >= REPEATS


def _quotes_what_nobody_said(analysis: str, said: str) -> bool:
    """Whether a quotation in the analysis stands neither in the prompt nor in the response."""
    return any(
        len(quoted.split()) >= SHORT_WORDS and not _contains(said, quoted)
        for quoted in QUOTED.findall(analysis)
    )


@cache
def _of_request(*requests: str) -> tuple[str, ...]:
    """The sentences of the request itself; none of them may stand in an analysis."""
    asked = " ".join(BLANK.sub("\n", text) for text in requests)
    sentences = (s for s in SENTENCE.split(asked) if len(s.split()) >= REQUEST_WORDS)
    return tuple(s for s in map(_plain, sentences) if len(s.split()) >= SHORT_WORDS)


def _recommends(analysis: str, mistake: Mistake) -> bool:
    """Whether a sentence that says what would have been right says the bad text again."""
    said = analysis.casefold()
    if not any(map(said.__contains__, RECOMMENDING)) or not RECOMMENDS.search(analysis):
        return False
    target, response = _plain(mistake.prompt.target or ""), _plain(mistake.response)
    # A target is bad however short it is; a response such as "Yes" need not be.
    bad = [
        text
        for text, least in ((target, 1), (response, SHORT_WORDS))
        if len(text.split()) >= least
    ]
    sentences = SENTENCE.split(analysis)
    for place, sentence in enumerate(sentences):
        if RECOMMENDS.search(sentence):
            # The text begins in the sentence, or after its colon, and may go on beyond it.
            begins = sentences[place : place + 1 + sentence.rstrip().endswith(":")]
            until = len(_plain(" ".join(begins)))
            rest = f" {_plain(' '.join(sentences[place:]))} "
            if any(0 <= rest.find(f" {text} ") <= until for text in bad):
                return True
    return False


def _contains(text: str, part: str) -> bool:
    """Whether a text contains another one, case and punctuation aside; a few words are none."""
    return len(_plain(part).split()) >= SHORT_WORDS and names(text, part)


def names(text: str, part: str) -> bool:
    """Whether a text contains another one however short, case and punctuation aside."""
    return f" {_plain(part)} " in f" {_plain(text)} "


def _plain(text: str) -> str:
    if text.isascii():
        # The same in a third of the time.
        return " ".join(text.lower().translate(ASCII_WORDS).split())
    return " ".join(WORD.findall(text.casefold()))


def _request(
    policy: Policy, settings: AnalyseSettings, seed: int, attempt: int, mistake: Mistake
) -> Request:
    wording = policy.worked_request if settings.examples else policy.analysis_request
    return Request(
        messages=wording(mistake.prompt.transcript, mistake.response, settings.guided),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=derive_seed(seed, mistake.id, attempt),
    )


def refusals(
    answer: Completion, gate: Callable[[str], tuple[str, ...]] | None
) -> tuple[str, ...]:
    """Why an answer is nothing to train on: what the gate says, if any, and more."""
    if answer.error is not None:
        return (no_answer(answer.error),)
    text = answer.text.strip()
    reasons = gate(text) if gate else ()
    # Training on a text that breaks off would teach the model never to stop.
    if answer.truncated:
        reasons = (*reasons, BROKEN_OFF)
    return reasons if text else (*reasons, "empty")


def _analysis(
    policy: Policy, settings: AnalyseSettings, mistake: Mistake, answer: Completion
) -> Analysis:
    reasons = refusals(answer, partial(gate, policy, mistake) if settings.gate else None)
    return Analysis(
        mistake=mistake,
        text=answer.text.strip(),
        guided=settings.guided,
        source=settings.engine,
        accepted=not reasons,
        reasons=reasons,
    )
