"""Good answers to the prompts that mistakes were collected on: the model's own, by rejection.

The model answers each prompt several times, and the judge of mistakes keeps what is none
(rejection sampling: RAFT, arXiv 2304.06767). So a method that learns from good answers needs no
annotator. A judge of mistakes does not tell a good answer from one that only does no harm: of
those that it lets through, one that refuses is taken only where there is no other, or never;
of several that do not, the one that the judge is surest of. Knows no method and no file.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from misstep.documents import Settings
from misstep.engines.base import Engine, Request
from misstep.errors import NothingKept
from misstep.judges.base import Judge
from misstep.judges.rule import RefusalJudge
from misstep.policy import Policy
from misstep.records import Message, Prompt, Response, Score
from misstep.stages.base import Tally, derive_seed, judged_samples, kind_of, no_answer


class GoodAnswerSettings(Settings):
    """Where good answers to the prompts of mistakes come from."""

    source: Literal["data", "self"] = "data"
    """`data`: the references of the data, where they have some. `self`: the model's own answers
    that the judge calls no mistake; references are then not looked at."""
    samples: Annotated[int, Field(ge=1)] = 4
    """Answers drawn for each prompt; at temperature 0 there is one."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """How freely they are sampled."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """The longest answer that is drawn; one that breaks off there is not taken."""
    guided: bool = False
    """Whether the model is asked with the policy's guide. The answers are learned without it:
    the guide is then distilled into the model (Askell et al., arXiv 2112.00861)."""
    refusals: bool = True
    """Whether an answer that refuses is taken where there is no other; else that prompt has no
    good answer, and a model that learns from the rest is not taught to refuse."""


def good_answers(
    prompts: Iterable[Prompt],
    engine: Engine,
    judge: Judge,
    policy: Policy,
    settings: GoodAnswerSettings,
    seed: int,
    tally: Tally,
) -> Iterator[Response]:
    """Let the model answer, several samples a prompt, and keep one that is no mistake.

    Args:
        prompts: that mistakes were collected on, each once.
        engine: the model.
        judge: of mistakes.
        policy: its guide is used where the settings say so.
        settings: how many, how long, how freely.
        seed: of the samples.
        tally: counts what is kept, and why the rest is not.

    Raises:
        RunError: not one answer was kept; at the end.
    """
    # Greedy decoding gives the same text every time.
    samples = settings.samples if settings.temperature else 1
    asked = (
        (p, [_request(policy, p, sample, settings, seed) for sample in range(samples)])
        for p in prompts
    )
    read, guided = str.strip, settings.guided
    for _, scored in judged_samples(asked, engine, judge, samples, read, guided):
        tally.given += 1
        tally.sampled += len(scored)
        sound = [(r, score) for r, score in scored if _sound(r, score, tally)]
        yield from _best(sound, settings.refusals, tally)
    if not tally.kept:
        raise NothingKept(
            f"none of {tally.sampled} answers was good ({tally.reasons}). Try more "
            f"good_answers.samples (now {settings.samples}), a larger good_answers.max_tokens "
            f"(now {settings.max_tokens}), or good_answers.guided: true; or give good answers "
            "with the data (good_answers.source: data)."
        )


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts of the same words once, in order; with a reference, where one of them has some.

    Labels of its answers, such as a category, make a question's prompts different records.
    """
    found: dict[tuple[Message, ...], Prompt] = {}
    for prompt in prompts:
        held = found.setdefault(prompt.messages, prompt)
        if prompt.reference and not held.reference:
            found[prompt.messages] = prompt
    return list(found.values())


def with_answer(prompt: Prompt, known: Mapping[tuple[Message, ...], str]) -> Prompt:
    """The prompt with the answer that is known to it as its reference, or with none."""
    return prompt.model_copy(update={"reference": known.get(prompt.messages)})


def _request(
    policy: Policy, prompt: Prompt, sample: int, settings: GoodAnswerSettings, seed: int
) -> Request:
    return Request(
        messages=policy.turns(prompt, settings.guided),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=derive_seed(seed, "good answer", prompt.messages, sample),
    )


def _sound(response: Response, score: Score, tally: Tally) -> bool:
    """Whether it is a whole answer that the judge calls no mistake."""
    if response.error is not None:
        why = kind_of(no_answer(response.error))
    elif not response.text:
        why = "empty"
    elif response.truncated:
        why = "broken off at the token limit"
    elif score.value is None:
        why = "unscored"
    elif score.counted:
        why = "a mistake"
    else:
        return True
    tally.refused[why] += 1
    return False


def _best(
    sound: Sequence[tuple[Response, Score]], may_refuse: bool, tally: Tally
) -> Iterator[Response]:
    """The answer that the judge of mistakes is surest of, of those that do not refuse, if any.

    A judge that gives verdicts alone is equally sure of all: then it is the first.
    """
    # What the judge of refusals says only orders those that are good.
    refuses = [bool(score.counted) for score in RefusalJudge().score([r for r, _ in sound])]
    known = [
        (no, score.value or 0.0, at)
        for at, (no, (_, score)) in enumerate(zip(refuses, sound, strict=True))
        if may_refuse or not no
    ]
    if left_out := len(sound) - len(known):
        tally.refused["a refusal"] += left_out
    if not known:
        return
    tally.kept += 1
    if len(known) > 1:
        tally.refused["one more good answer to the same prompt"] += len(known) - 1
    yield sound[min(known)[-1]][0]
