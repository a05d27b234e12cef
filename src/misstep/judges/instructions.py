"""Instruction following by IFEval's published checks (Zhou et al. 2023, arXiv 2311.07911).

The checks are Google's, from the package `if-verifiable`. Strict: the answer as it is. Loose:
it counts if the answer would pass without its first line, its last, or its asterisks. At prompt
level an answer follows all of its prompt's instructions or it does not; at instruction level
each instruction counts, and those of one prompt are no independent cases.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from misstep.errors import InputError
from misstep.judges.base import EachJudge
from misstep.records import Prompt, Response, Score

STRICT, LOOSE = "instruction_following", "instruction_following_loose"
STRICT_EACH, LOOSE_EACH = "instructions_followed", "instructions_followed_loose"
INSTALL = 'pip install "misstep[ifeval]"'
SENTENCES = "tokenizers/punkt_tab/english/"
"""Of nltk's data, which two of the checks split sentences and words by."""


class Followed(NamedTuple):
    """Of one answer, each instruction in order."""

    strict: list[bool]
    loose: list[bool]


class InstructionJudge(EachJudge):
    """1 where an answer follows all instructions of its prompt, strictly; else 0."""

    name = "ifeval:if-verifiable/1"
    metric = STRICT

    def applies(self, prompt: Prompt) -> bool:
        return bool(prompt.instructions)

    def score_one(self, response: Response) -> Score:
        if not self.applies(response.prompt):
            return self.unscored(response, "the prompt carries no instructions to check")
        strict = followed(response).strict
        broken = zip(response.prompt.instructions, strict, strict=True)
        names = ", ".join(of.name for of, kept in broken if not kept)
        return self.scored(response, float(all(strict)), names and f"not followed: {names}")

    def further(self, response: Response, score: Score) -> list[Score]:
        if not self.applies(response.prompt):
            return []
        n = len(response.prompt.instructions)
        values: dict[str, float | None] = dict.fromkeys((LOOSE, STRICT_EACH, LOOSE_EACH))
        if score.scored:
            strict, loose = followed(response)
            values = {
                LOOSE: float(all(loose)),
                STRICT_EACH: sum(strict) / n,
                LOOSE_EACH: sum(loose) / n,
            }
        return [
            score.model_copy(
                update={"metric": metric, "value": value, "cases": 1 if metric == LOOSE else n}
            )
            for metric, value in values.items()
        ]


def check_instructions(prompts: Iterable[Prompt]) -> None:
    """Pass if all instructions of these prompts can be checked here.

    Raises:
        InputError: the checks or their data are not installed, or there is no such check.
    """
    wanted = {instruction.name for prompt in prompts for instruction in prompt.instructions}
    if not wanted:
        return
    unknown = sorted(wanted - set(_registry()))
    if unknown:
        raise InputError(
            f"instruction_id_list: expected IFEval's instructions, found {', '.join(unknown)}."
        )
    import nltk

    try:
        nltk.data.find(SENTENCES)
    except LookupError as fault:
        raise InputError(
            "IFEval's checks need nltk's data for sentences, which are not here. Get them "
            "with: python -m nltk.downloader punkt_tab"
        ) from fault


@cache
def _registry() -> dict[str, Any]:
    try:
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        from langdetect import DetectorFactory
    except ImportError as fault:
        raise InputError(
            f"prompts with IFEval's instructions need a package that is not here "
            f"({fault.name}). Install it with: {INSTALL}"
        ) from fault
    # Its language check draws at random otherwise: the same answer must get the same score.
    DetectorFactory.seed = 0
    found: dict[str, Any] = INSTRUCTION_DICT
    return found


def followed(response: Response) -> Followed:
    """Which of its prompt's instructions an answer follows; an empty one follows none."""
    from if_verifiable.common import evaluate_instructions

    instructions = response.prompt.instructions
    results, _ = evaluate_instructions(
        response=response.text,
        instruction_id_list=[of.name for of in instructions],
        kwargs_list=[of.arguments for of in instructions],
        prompt=response.prompt.text,
        instruction_registry=_registry(),
    )
    if not results:
        return Followed([False] * len(instructions), [False] * len(instructions))
    return Followed([r.strict_pass for r in results], [r.loose_pass for r in results])
