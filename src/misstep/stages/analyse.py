"""Guided analysis of mistakes, behind a gate.

The model is told that the response may be bad and explains why (paper, section 4.2). The paper
keeps every analysis; small models often praise the mistake, so here a gate accepts an analysis
only if it names the fault and does not endorse the bad response. `gate: false` is the paper's
setting. A refused analysis is sampled again, up to `n` times in all.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Annotated

from pydantic import Field

from misstep.data.shelf import Shelf
from misstep.documents import Settings
from misstep.engines.base import Completion, Engine, Request
from misstep.policy import BLANK, Policy, found
from misstep.records import Analysis, Mistake
from misstep.stages.base import Tally, ask, derive_seed, kind_of, no_answer

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
    pending: Iterable[Mistake] = (mistake for mistake in mistakes if mistake.confirmed)
    # Greedy decoding gives the same text every time.
    for attempt in range(settings.n if settings.temperature else 1):
        request = partial(_request, policy, settings, seed, attempt)
        refused = Shelf(Mistake)
        for mistake, answer in ask(engine, pending, request):
            analysis = _analysis(policy, mistake, answer, settings)
            tally.given += not attempt
            tally.sampled += 1
            tally.kept += analysis.accepted
            tally.refused.update(map(kind_of, analysis.reasons))
            if not analysis.accepted:
                refused.add(mistake)
            yield analysis
        if not refused:
            break
        pending = refused


def gate(policy: Policy, mistake: Mistake, analysis: str) -> tuple[str, ...]:
    """Why an analysis is refused; empty where it is accepted."""
    reasons, said = [], _plain(analysis)
    if len(analysis.split()) < policy.gate.min_words:
        reasons.append("too short")
    if not found(policy.gate.names_fault, analysis):
        reasons.append("does not name the fault")
    if found(policy.gate.endorses, analysis):
        reasons.append("endorses the response")
    elif _recommends(analysis, mistake):
        reasons.append("recommends the bad response")
    if _repeats_itself(said):
        reasons.append("repeats itself")
    if _quotes_what_nobody_said(analysis, mistake):
        reasons.append("quotes what nobody said")
    if any(
        f" {s} " in f" {said} "
        for s in _of_request(policy.analysis.guided, policy.analysis.unguided)
    ):
        reasons.append("repeats the request")
    return tuple(reasons)


def _repeats_itself(plain: str) -> bool:
    """Whether some three words in a row come again and again."""
    said = plain.split()
    threes = [*zip(said, said[1:], said[2:], strict=False)]
    if len(threes) - len(set(threes)) < REPEATS - 1:
        return False
    return max(Counter(threes).values()) >= REPEATS


def _quotes_what_nobody_said(analysis: str, mistake: Mistake) -> bool:
    """Whether a quotation in the analysis stands neither in the prompt nor in the response."""
    said = f"{mistake.prompt.transcript}\n{mistake.response}"
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
    plain, wanted = _plain(text), _plain(part)
    return len(wanted.split()) >= SHORT_WORDS and f" {wanted} " in f" {plain} "


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


def _reasons(
    policy: Policy, mistake: Mistake, answer: Completion, text: str, gated: bool
) -> tuple[str, ...]:
    """Why an answer is no analysis to train on."""
    if answer.error is not None:
        return (no_answer(answer.error),)
    reasons = gate(policy, mistake, text) if gated else ()
    # Training on a text that breaks off would teach the model never to stop.
    if answer.truncated:
        reasons = (*reasons, BROKEN_OFF)
    return reasons if text else (*reasons, "empty")


def _analysis(
    policy: Policy, mistake: Mistake, answer: Completion, settings: AnalyseSettings
) -> Analysis:
    text = answer.text.strip()
    reasons = _reasons(policy, mistake, answer, text, settings.gate)
    return Analysis(
        mistake=mistake,
        text=text,
        guided=settings.guided,
        source=settings.engine,
        accepted=not reasons,
        reasons=reasons,
    )
