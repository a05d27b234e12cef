"""Mistakes from three sources: labelled data, users' reports, the model's own answers.

`origin` data is believed. `reported` data are candidates until the judge confirms them.
`induced` mistakes are the model's answers to attack prompts, or to prompts with one of the
policy's hint words added (paper, section 4.1); refusals and harmless answers are filtered out
by the judge. The hint is not part of the mistake that is kept. Knows no file and no method.
"""

from collections.abc import Iterable, Iterator, Sequence
from heapq import nsmallest
from typing import Annotated

from pydantic import Field, model_validator

from misstep.data.shelf import Names
from misstep.data.sources import Source
from misstep.documents import Settings
from misstep.engines.base import Engine, Request
from misstep.errors import NothingKept
from misstep.judges.base import Judge
from misstep.policy import Policy
from misstep.records import Message, Mistake, MistakeSource, Prompt, Response, Score
from misstep.stages.base import Tally, derive_seed, judged_samples, kind_of, portions

UNSCORED = "unscored"
NO_MISTAKE = "no mistake in the judge's eyes"
BETTER_JUDGE = "Name a better judge (judge): a small model often gives no verdict."


class InduceSettings(Settings):
    """Where mistakes come from."""

    source: MistakeSource = "induced"
    """`induced`: the model's own answers to prompts. `origin`: labelled data. `reported`:
    users' reports, of which those count that the judge confirms."""
    data: Source
    """Of `induced`: prompts. Of `origin` and `reported`: prompts with bad answers."""
    samples: Annotated[int, Field(ge=1)] = 2
    """Answers drawn for each prompt (`induced`); of an attack at temperature 0 there is one."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """How freely they are sampled; 0 takes the likeliest answer."""
    max_tokens: Annotated[int, Field(ge=1)] = 128
    """The longest answer that is drawn."""
    per_prompt: Annotated[int, Field(ge=1)] = 1
    """Different mistakes kept for one prompt (`induced`)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """So many mistakes at most are used, of all rounds together, drawn by the seed; a smaller
    limit draws a part of what a larger one draws."""

    @model_validator(mode="after")
    def _suites_have_no_answers(self) -> "InduceSettings":
        if self.source != "induced" and self.data.suite is not None:
            raise ValueError(
                f"source {self.source}: expected data with answers, found the suite "
                f"'{self.data.suite}', which has prompts alone. Use source: induced, or give "
                "data: { path: ... }"
            )
        return self


class NoMistakeError(NothingKept):
    """The model made no mistake at all, or none that the judge confirms."""


def induce(
    prompts: Iterable[Prompt],
    policy: Policy,
    engine: Engine,
    judge: Judge,
    settings: InduceSettings,
    seed: int,
    tally: Tally,
) -> Iterator[Mistake]:
    """Let the model answer, several samples a prompt, and keep what the judge calls a mistake.

    Raises:
        NoMistakeError: the model made none; at the end.
        NothingKept: the judge could score no answer; at the end.
    """
    seen = Names()
    asked = ((prompt, _requests(policy, prompt, settings, seed)) for prompt in prompts)
    for prompt, scored in judged_samples(asked, engine, judge, settings.samples):
        tally.given += 1
        # An equal prompt is asked with the same dice: it has no answer of its own to keep.
        most = settings.per_prompt if seen.add(prompt.id) else 0
        yield from _kept(scored, most, tally)
    if not tally.kept and all(why.startswith(UNSCORED) for why in tally.refused):
        raise NothingKept(
            f"the judge could score none of {tally.sampled} answers ({tally.reasons}). "
            f"{BETTER_JUDGE}"
        )
    if not tally.kept:
        raise NoMistakeError(
            f"the model made no mistake in {tally.sampled} answers to {tally.given} prompts "
            f"({tally.reasons}). Give stronger prompts or hints, or more "
            "samples (mistakes.samples)."
        )


def confirm(candidates: Iterable[Mistake], judge: Judge, tally: Tally) -> Iterator[Mistake]:
    """Let the judge look at users' reports: confirmed, dropped, or left as candidates.

    A report that the judge cannot score stays a candidate; candidates are not trained on.

    Raises:
        NoMistakeError: none was confirmed; at the end.
    """
    for some in portions(candidates):
        responses = [Response(prompt=m.prompt, text=m.response) for m in some]
        for candidate, score in zip(some, judge.score(responses), strict=True):
            tally.given += 1
            if score.value is None:
                tally.refused[f"left as a candidate: {kind_of(score.reason)}"] += 1
                yield candidate
            elif score.counted:
                tally.kept += 1
                yield candidate.model_copy(update={"confirmed": True})
            else:
                tally.refused[NO_MISTAKE] += 1
    if not tally.kept:
        raise NoMistakeError(
            f"none of {tally.given} reports was confirmed ({tally.reasons}). "
            f"{_unconfirmed(tally)}"
        )


def _unconfirmed(tally: Tally) -> str:
    """What to do about reports of which none was confirmed."""
    if tally.refused[NO_MISTAKE] < tally.given:
        return f"{BETTER_JUDGE} Of labels that can be believed: mistakes.source: origin."
    return (
        "Look at some of them: are the labels the other way round (mistakes.data.fields: "
        "{safe: COLUMN} where true is good), and does the policy's judge say what you mean?"
    )


def some_mistakes(mistakes: Sequence[Mistake], limit: int, seed: int) -> Iterator[Mistake]:
    """At most `limit` mistakes, in their order; confirmed ones before candidates."""
    drawn = (
        (not mistake.confirmed, derive_seed(seed, mistake.id), place)
        for place, mistake in enumerate(mistakes)
    )
    kept = nsmallest(limit, drawn)
    return (mistakes[place] for place in sorted(place for _, _, place in kept))


def _requests(
    policy: Policy, prompt: Prompt, settings: InduceSettings, seed: int
) -> list[Request]:
    """A prompt is asked once, where it would be asked the same and answered so."""
    hinted = policy.induction is not None and not prompt.target
    draws = settings.samples if settings.temperature or hinted else 1
    return [
        Request(
            messages=_messages(policy, prompt, draw),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=draw,
        )
        for draw in (derive_seed(seed, prompt.id, sample) for sample in range(draws))
    ]


def _messages(policy: Policy, prompt: Prompt, draw: int) -> tuple[Message, ...]:
    """An attack prompt as it is; any other with a hint word, where the policy has some."""
    if prompt.target or policy.induction is None:
        return prompt.messages
    hints = policy.induction.hints
    return policy.induction_request(prompt, hints[draw % len(hints)])


def _kept(
    scored: Sequence[tuple[Response, Score]], most: int, tally: Tally
) -> Iterator[Mistake]:
    """The mistakes among the answers to one prompt, different ones and `most` at most."""
    found: set[str] = set()
    for response, score in scored:
        tally.sampled += 1
        if score.value is None:
            tally.refused[f"{UNSCORED}: {kind_of(score.reason)}"] += 1
        elif not score.counted:
            tally.refused["no mistake"] += 1
        elif response.text in found or len(found) == most:
            tally.refused["one more mistake on the same prompt"] += 1
        else:
            found.add(response.text)
            tally.kept += 1
            yield Mistake(
                prompt=response.prompt,
                response=response.text,
                source="induced",
                truncated=response.truncated,
            )
