"""Mistakes from three sources: labelled data, users' reports, the model's own answers.

`origin` data is believed. `reported` data are candidates until the judge confirms them.
`induced` mistakes are the model's answers to attack prompts, or to prompts with one of the
policy's hint words added (paper, section 4.1); refusals and harmless answers are filtered out
by the judge. The hint is not part of the mistake that is kept. Knows no file and no method.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from misstep.engines.base import Engine, Request
from misstep.errors import RunError
from misstep.judges.base import Judge
from misstep.policy import Policy
from misstep.records import Message, Mistake, MistakeSource, Prompt, Response
from misstep.sources import Source
from misstep.stages.base import Settings, Yield, derive_seed, score_all


class InduceSettings(Settings):
    """Where mistakes come from."""

    source: MistakeSource = "induced"
    data: Source
    """Of `induced`: prompts. Of `origin` and `reported`: prompts with bad answers."""
    samples: Annotated[int, Field(ge=1)] = 2
    """Answers drawn for each prompt (`induced`)."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    max_tokens: Annotated[int, Field(ge=1)] = 64
    per_prompt: Annotated[int, Field(ge=1)] = 1
    """Different mistakes kept for one prompt (`induced`)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """So many mistakes at most are used, drawn by the seed; a smaller limit draws a part
    of what a larger one draws."""


class NoMistakeError(RunError):
    """The model made no mistake at all."""


class Induced(NamedTuple):
    """What the stage gives: mistakes and how they were come by."""

    mistakes: list[Mistake]
    counts: Yield


def induce(
    prompts: Sequence[Prompt],
    policy: Policy,
    engine: Engine,
    judge: Judge,
    settings: InduceSettings,
    seed: int,
) -> Induced:
    """Let the model answer, several samples a prompt, and keep what the judge calls a mistake.

    Raises:
        NoMistakeError: the model made none.
    """
    drawn = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    requests = [_request(policy, prompt, sample, settings, seed) for prompt, sample in drawn]
    answers = engine.generate(requests)
    responses = [
        Response(
            prompt=prompt,
            text=answer.text,
            model=engine.identity,
            truncated=answer.truncated,
            error=answer.error,
        )
        for (prompt, _), answer in zip(drawn, answers, strict=True)
    ]
    mistakes, reasons = _keep(responses, judge, settings.per_prompt)
    if not mistakes:
        raise NoMistakeError(
            f"the model made no mistake in {len(responses)} answers to {len(prompts)} prompts "
            f"({Yield.of(0, 0, 0, reasons).refused}). Give stronger prompts or hints, or more "
            "samples (mistakes.samples)."
        )
    return Induced(mistakes, Yield.of(len(prompts), len(responses), len(mistakes), reasons))


def confirm(candidates: Sequence[Mistake], judge: Judge) -> Induced:
    """Let the judge look at users' reports: confirmed, dropped, or left as candidates.

    A report that the judge cannot score stays a candidate; candidates are not trained on.
    """
    responses = [Response(prompt=m.prompt, text=m.response) for m in candidates]
    kept: list[Mistake] = []
    reasons: list[str] = []
    for candidate, score in zip(candidates, judge.score(responses), strict=True):
        if score.value is None:
            kept.append(candidate)
            reasons.append("left as a candidate: the judge gave no score")
        elif score.counted:
            kept.append(candidate.model_copy(update={"confirmed": True}))
        else:
            reasons.append("no mistake in the judge's eyes")
    confirmed = sum(mistake.confirmed for mistake in kept)
    return Induced(kept, Yield.of(len(candidates), 0, confirmed, reasons))


def some_mistakes(mistakes: Sequence[Mistake], limit: int | None, seed: int) -> list[Mistake]:
    """At most `limit` mistakes, in their order; confirmed ones before candidates."""
    if limit is None or len(mistakes) <= limit:
        return list(mistakes)
    drawn = sorted(mistakes, key=lambda m: (not m.confirmed, derive_seed(seed, m.id)))
    kept = {mistake.id for mistake in drawn[:limit]}
    return [mistake for mistake in mistakes if mistake.id in kept]


def _request(
    policy: Policy, prompt: Prompt, sample: int, settings: InduceSettings, seed: int
) -> Request:
    draw = derive_seed(seed, prompt.id, sample)
    return Request(
        messages=_messages(policy, prompt, draw),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=draw,
    )


def _messages(policy: Policy, prompt: Prompt, draw: int) -> tuple[Message, ...]:
    """An attack prompt as it is; any other with a hint word, where the policy has some."""
    if prompt.target or policy.induction is None:
        return prompt.messages
    hints = policy.induction.hints
    return policy.induction_request(prompt, hints[draw % len(hints)])


def _keep(
    responses: list[Response], judge: Judge, per_prompt: int
) -> tuple[list[Mistake], list[str]]:
    kept: dict[str, dict[str, Mistake]] = {}
    reasons: list[str] = []
    for response, score in zip(responses, score_all(judge, responses), strict=True):
        found = kept.setdefault(response.prompt.id, {})
        if score.value is None:
            reasons.append(f"unscored: {score.reason}")
        elif not score.counted:
            reasons.append("no mistake")
        elif response.text in found or len(found) == per_prompt:
            reasons.append("one more mistake on the same prompt")
        else:
            found[response.text] = Mistake(
                prompt=response.prompt, response=response.text, source="induced"
            )
    return [m for found in kept.values() for m in found.values()], reasons
