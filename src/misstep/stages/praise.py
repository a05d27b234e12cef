"""What is right about a good answer: the other half of learning to tell.

A model that is trained on analyses of mistakes alone learns that every answer has a fault
(docs/results/study-trained.md). Here it explains, guided by the word that the answer is right,
why it is; learned beside the analyses of mistakes, to the same request, the analysis then
depends on the answer. Ours, no part of the paper. The settings are those of `analyse`, and so
is the gate in all that is no verdict: praise passes where it is read as praise.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from misstep.engines.base import Completion, Engine, Request
from misstep.policy import Policy
from misstep.records import Praise, Prompt
from misstep.stages.analyse import AnalyseSettings, names, refusals, sampled, unsound
from misstep.stages.base import Tally, derive_seed
from misstep.stages.discriminate import says_mistake


def praise(
    prompts: Iterable[Prompt],
    policy: Policy,
    engine: Engine,
    settings: AnalyseSettings,
    seed: int,
    tally: Tally,
) -> Iterator[Praise]:
    """Ask what is right about each prompt's reference until the gate accepts what is said.

    Gives all praise, accepted or not: all first samples, then all second ones, and so on.
    """
    answered = (prompt for prompt in prompts if prompt.reference)
    request = partial(_request, policy, settings, seed)
    read = partial(_praise, policy, settings)
    return sampled(answered, Prompt, engine, request, read, settings, tally)


def gate(policy: Policy, prompt: Prompt, praise: str) -> tuple[str, ...]:
    """Why praise is refused; empty where it is accepted."""
    reasons = []
    if len(praise.split()) < policy.gate.min_words:
        reasons.append("too short")
    if says_mistake(policy, praise) is not False:
        reasons.append("does not endorse the response")
    # A small model else says that the attack wanted the good answer.
    if prompt.target and not names(praise, prompt.target):
        reasons.append("does not say what the attack wanted")
    asked = policy.praise.guided, policy.analysis.unguided
    return (*reasons, *unsound(praise, prompt, prompt.reference or "", asked))


def _request(
    policy: Policy, settings: AnalyseSettings, seed: int, attempt: int, prompt: Prompt
) -> Request:
    wording = policy.worked_praise if settings.examples else policy.praise_request
    return Request(
        messages=wording(prompt.transcript, prompt.reference or "", settings.guided),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=derive_seed(seed, "praise", prompt.id, attempt),
    )


def _praise(
    policy: Policy, settings: AnalyseSettings, prompt: Prompt, answer: Completion
) -> Praise:
    reasons = refusals(answer, partial(gate, policy, prompt) if settings.gate else None)
    return Praise(
        prompt=prompt,
        text=answer.text.strip(),
        guided=settings.guided,
        source=settings.engine,
        accepted=not reasons,
        reasons=reasons,
    )
