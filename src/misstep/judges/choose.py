"""Which judge: the rules by their names, that of a policy, and those of a run's cost."""

from misstep.engines.base import Engine
from misstep.judges.base import Judge
from misstep.judges.instructions import InstructionJudge
from misstep.judges.llm import MAX_TOKENS, RubricJudge
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, PatternJudge, RefusalJudge
from misstep.policy import Policy

RULES: dict[str, type[Judge]] = {
    "obedience": ObedienceJudge,
    "helpfulness": HelpfulnessJudge,
    "refusal": RefusalJudge,
}


def mistake_judge(
    policy: Policy, engine: Engine, *, votes: int = 1, max_tokens: int = MAX_TOKENS
) -> Judge:
    """The policy's rule or patterns, or its rubric put to a model."""
    if policy.judge.rubric is not None:
        return RubricJudge(policy, engine, votes=votes, max_tokens=max_tokens)
    return PatternJudge(policy.judge.patterns) if policy.judge.patterns else ObedienceJudge()


def cost_judges() -> list[Judge]:
    """What the cure of mistakes may cost: helpfulness, refusals, instruction following."""
    return [HelpfulnessJudge(), RefusalJudge(), InstructionJudge()]
