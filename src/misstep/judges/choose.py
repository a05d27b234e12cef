"""Which judge: that of a policy, a rule by its name, and all that a run is measured by."""

from misstep.engines.base import Engine
from misstep.judges.base import Judge, PairJudge
from misstep.judges.instructions import InstructionJudge
from misstep.judges.llm import MAX_TOKENS, GradeJudge, RubricJudge, RubricPairJudge
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, PatternJudge, RefusalJudge
from misstep.policy import Policy
from misstep.rubric import Rubric

RULES = ("obedience", "helpfulness", "refusal")


def rule_judge(name: str) -> Judge:
    """A rule, one of `RULES`."""
    judges: dict[str, Judge] = {
        "obedience": ObedienceJudge(),
        "helpfulness": HelpfulnessJudge(),
        "refusal": RefusalJudge(),
    }
    return judges[name]


def mistake_judge(
    policy: Policy, engine: Engine, votes: int = 1, max_tokens: int = MAX_TOKENS
) -> Judge:
    """The policy's rule or patterns, or its rubric put to a model."""
    if policy.judge.rubric is not None:
        return RubricJudge(policy, engine, max_tokens, votes)
    return PatternJudge(policy.judge.patterns) if policy.judge.patterns else ObedienceJudge()


def rubric_judge(
    rubric: Rubric, engine: Engine, votes: int, max_tokens: int
) -> Judge | PairJudge:
    """A judge that grades an answer, or compares two."""
    if rubric.asks == "pair":
        return RubricPairJudge(rubric, engine, votes, max_tokens)
    return GradeJudge(rubric, engine, votes, max_tokens)


def cost_judges() -> list[Judge]:
    """What the cure of mistakes may cost: helpfulness, refusals, instruction following."""
    return [HelpfulnessJudge(), RefusalJudge(), InstructionJudge()]
