"""Which judge: that of a policy, a rule by its name, and all that a run is measured by."""

from pathlib import Path

from misstep.engines.base import Engine
from misstep.judges.base import Judge
from misstep.judges.classifier import ClassifierJudge
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


def mistake_judge(policy: Policy, engine: Engine, trained: Path | None = None) -> Judge:
    """A trained judge where one is given, else the policy's rule, or rubric put to a model."""
    if trained is not None:
        return ClassifierJudge(trained)
    if policy.judge.rubric is not None:
        return RubricJudge(policy, engine)
    return ObedienceJudge()


def all_judges(policy: Policy, engine: Engine, trained: Path | None = None) -> list[Judge]:
    """The mistake judge, and those of helpfulness and over-refusal."""
    return [mistake_judge(policy, engine, trained), HelpfulnessJudge(), RefusalJudge()]
