"""The judges of a policy: its own for mistakes, and those for what the cure may cost."""

from misstep.engines.base import Engine
from misstep.judges.base import Judge
from misstep.judges.llm import RubricJudge
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, RefusalJudge
from misstep.policy import Policy


def mistake_judge(policy: Policy, engine: Engine) -> Judge:
    """The policy's rule, or its rubric put to a model."""
    if policy.judge.rubric is not None:
        return RubricJudge(policy, engine)
    return ObedienceJudge()


def all_judges(policy: Policy, engine: Engine) -> list[Judge]:
    """The mistake judge, and those of helpfulness and over-refusal."""
    return [mistake_judge(policy, engine), HelpfulnessJudge(), RefusalJudge()]
