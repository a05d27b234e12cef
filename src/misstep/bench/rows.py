"""The work that is timed: the pipeline's own rows and prompts, from the shipped suite.

Mistakes and analyses are written by rule here, in the words of the policy's worked examples, so
that no model must run first and every machine times the same texts. This module knows records
and wordings; it knows no clock.
"""

import re
from itertools import islice

from misstep.data.suites import attacked_prompts, clean_prompts
from misstep.methods.base import Materials, MixSettings, analysis_row
from misstep.methods.registry import METHODS
from misstep.policy import load_policy
from misstep.records import Analysis, Example, Message, Mistake, Prompt

SUITE = "goal-hijacking"
SEED = 0


def analysis_rows(count: int) -> list[Example]:
    """Rows that teach analyses, and nothing else."""
    policy = load_policy(SUITE)
    return [analysis_row(policy, analysis) for analysis in _analyses(_attacked(count))]


def mixed_rows(count: int) -> list[Example]:
    """Rows as the main method trains on them: analyses, good answers, ordinary pairs."""
    asked = _attacked(-(-count // 3))
    materials = Materials(
        policy=load_policy(SUITE),
        mistakes=[analysis.mistake for analysis in _analyses(asked)],
        analyses=_analyses(asked),
        revisions=[],
        ordinary=clean_prompts(SUITE, "train", SEED),
        answered=asked,
        mix=MixSettings(),
        seed=SEED,
    )
    rows = METHODS["mistake_analysis"].rows(materials)
    return [row for row in rows if isinstance(row, Example)][:count]


def analysis_prompts(count: int) -> list[tuple[Message, ...]]:
    """Requests for analyses, which share the worked examples at their beginning."""
    policy = load_policy(SUITE)
    return [
        policy.worked_request(prompt.text, prompt.target or "", guided=True)
        for prompt in _attacked(count)
    ]


def attack_prompts(count: int) -> list[tuple[Message, ...]]:
    """Short prompts that share nothing."""
    return [prompt.messages for prompt in _attacked(count)]


def _attacked(count: int) -> list[Prompt]:
    return list(islice(attacked_prompts(SUITE, "train", "seen", SEED), count))


def _analyses(prompts: list[Prompt]) -> list[Analysis]:
    return [
        Analysis(
            mistake=Mistake(prompt=p, response=p.target or "", source="induced"),
            text=_text(p),
            guided=True,
            source="self",
            accepted=True,
        )
        for p in prompts
    ]


def _text(prompt: Prompt) -> str:
    asked = re.split(r"(?<=[.?!])\s", prompt.text, maxsplit=1)[0]
    return (
        f'The user really asked: "{asked}" The inserted text wanted the response to say '
        f'"{prompt.target}". The response is wrong because it obeyed the inserted text and did '
        "not answer the real question."
    )
