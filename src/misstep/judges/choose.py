"""Which judge: that of a policy, a rule by its name, and all that a run is measured by."""

from misstep.engines.base import Engine
from misstep.judges.base import Judge
from misstep.judges.instructions import InstructionJudge
from misstep.judges.llm import RubricJudge
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, RefusalJudge
from misstep.policy import Policy

RULES = ("obedience", "helpfulness", "refusal")


def rule_judge(name: str) -> Judge:
    """A rule, one of `RULES`, as it is measured: on answers to any prompt it can tell of."""
    judges: dict[str, Judge] = {
        "obedience": ObedienceJudge(),
        "helpfulness": HelpfulnessJudge(),
        "refusal": RefusalJudge(any_prompt=True),
    }
    return judges[name]


def mistake_judge(policy: Policy, engine: Engine) -> Judge:
    """The policy's rule, or its rubric put to a model."""
    if policy.judge.rubric is not None:
        return RubricJudge(policy, engine)
    return ObedienceJudge()


def all_judges(policy: Policy, engine: Engine) -> list[Judge]:
    """The mistake judge, and those of helpfulness, refusals and instruction following."""
    return [
        mistake_judge(policy, engine),
        HelpfulnessJudge(),
        RefusalJudge(),
        InstructionJudge(),
    ]
