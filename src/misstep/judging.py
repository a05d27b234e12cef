"""From a judge's configuration to the judge: what it reads, checked first; then its engines.

A judge that asks a model and names none takes the model that it is given. This module knows
judges, engines and files; what is judged is not its business.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from misstep.engines.base import Engine
from misstep.engines.cached import Chosen
from misstep.engines.choose import Kind, choose, choose_labels
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import RecipeError
from misstep.guard import Guard, load_guard
from misstep.judge_config import JudgeConfig, load_judge
from misstep.judges.base import AnyJudge, Judge
from misstep.judges.choose import RULES, mistake_judge
from misstep.judges.classifier import ClassifierJudge
from misstep.judges.ensemble import EnsembleJudge
from misstep.judges.guard import GuardJudge
from misstep.judges.kept import KeptJudge
from misstep.judges.llm import GradeJudge, RubricPairJudge
from misstep.models.locate import Model, locate
from misstep.policy import Policy, load_policy
from misstep.records import VERDICTS, digest
from misstep.rubric import Rubric, load_rubric

OpenEngine = Callable[[Chosen], AbstractContextManager[Engine]]


class JudgeInputs(NamedTuple):
    """All that a judge is made of, read before any model loads."""

    title: str
    """The judge as the user named it."""
    config: JudgeConfig
    policy: Policy | None = None
    rubric: Rubric | None = None
    guard: Guard | None = None
    model: Model | None = None
    members: tuple["JudgeInputs", ...] = ()

    def with_models(self, change: Callable[[Model], Model]) -> "JudgeInputs":
        """The same judge with other models in the place of its own."""
        model = None if self.model is None else change(self.model)
        members = tuple(member.with_models(change) for member in self.members)
        return self._replace(model=model, members=members)

    def trained(self) -> list[Path]:
        """The folders of the trained judges in it."""
        own = [Path(self.config.classifier)] if self.config.classifier else []
        return own + [folder for member in self.members for folder in member.trained()]

    @property
    def digest(self) -> str:
        """Names it by content: its rule or weights, its texts, its model, its members."""
        texts = (self.config, self.policy, self.rubric, self.guard)
        return digest(
            [
                self.probe().name,
                [text and text.model_dump(mode="json") for text in texts],
                self.model and self.model.digest,
                [member.digest for member in self.members],
            ]
        )

    def probe(self) -> AnyJudge:
        """The judge without its model: it says what it can score, and by what metric."""
        return _built(self, lambda _: ScriptedEngine())


def judge_of_policy(
    name: str, policy: Policy, engine: Kind, model: Model | None
) -> JudgeInputs:
    """A policy's own judge; a rubric is put to the model, which the engine answers for."""
    config = JudgeConfig(policy=name, engine=engine)
    asked = None if policy.judge.rubric is None else model
    return JudgeInputs(f"policy:{name}", config, policy, model=asked)


def read_judge(
    name: str, model: str | None = None, otherwise: Model | None = None
) -> JudgeInputs:
    """Read and check what a judge depends on.

    Args:
        name: the judge as a command writes it.
        model: of the command line; it goes before the one that a judge's file names.
        otherwise: asked where neither names one.

    Raises:
        InputError: what is wrong with the judge, its texts or its model.
    """
    return _read(name, model, otherwise, ())


def _read(
    name: str, model: str | None, otherwise: Model | None, within: tuple[str, ...]
) -> JudgeInputs:
    """A judge, and those in it; `within` are the ensembles that it is a member of."""
    if name in within:
        raise RecipeError(
            f"judge {name}: expected an ensemble of other judges, found itself among its "
            f"members ({' > '.join((*within, name))}). Leave it out."
        )
    config = load_judge(name, model)
    policy = load_policy(config.policy) if config.policy else None
    guard = load_guard(config.guard) if config.guard else None
    found = JudgeInputs(
        title=name,
        config=config,
        policy=policy,
        rubric=load_rubric(config.rubric) if config.rubric else None,
        guard=guard,
        model=_model(name, config, policy, otherwise),
        members=tuple(
            _read(of, None, otherwise, (*within, name)) for of in config.ensemble or ()
        ),
    )
    if guard is not None and found.model is not None:
        choose_labels(found.model, guard)
    if found.members:
        _check_members(found)
    return found


def _model(
    name: str, config: JudgeConfig, policy: Policy | None, otherwise: Model | None
) -> Model | None:
    if policy is not None and policy.judge.rubric is None:
        if given := sorted(
            {"model", "engine", "votes", "max_tokens"} & config.model_fields_set
        ):
            raise RecipeError(
                f"judge {name}: expected no {' and no '.join(given)}, since its policy judges "
                "by a rule and asks no model. Leave it out."
            )
        return None
    if config.kind in ("rule", "classifier", "ensemble"):
        return None
    if config.model is not None:
        return locate(config.model)
    if otherwise is None:
        raise RecipeError(
            f"judge {name}: expected a model, since a {config.kind} is put to one; found none. "
            "Name one with --model MODEL, or by the key 'model' of a judge's file."
        )
    return otherwise


def _check_members(found: JudgeInputs) -> None:
    metrics = {member.title: member.probe().metric for member in found.members}
    if len(set(metrics.values())) > 1 or not set(metrics.values()) <= set(VERDICTS):
        told = ", ".join(f"{title}: {metric}" for title, metric in metrics.items())
        raise RecipeError(
            f"judge {found.title}: expected judges that give verdicts on one question "
            f"({', '.join(VERDICTS)}), found {told}."
        )


@contextmanager
def opened(
    found: JudgeInputs,
    engine: OpenEngine,
    kept: Path | None = None,
    scratch: Path | None = None,
) -> Iterator[AnyJudge]:
    """The judge with its engines, as long as it is needed.

    Args:
        found: the judge.
        engine: opens the engine of one that asks a model.
        kept: a store, in which the scores of trained judges are kept.
        scratch: a folder for weights that are made for serving.
    """
    with ExitStack() as stack:

        def asked(of: JudgeInputs) -> Engine:
            return stack.enter_context(engine(_chosen(of, scratch)))

        judge = _built(found, asked, kept)
        if isinstance(judge, Judge):
            stack.callback(judge.close)
        yield judge


def _chosen(found: JudgeInputs, scratch: Path | None) -> Chosen:
    assert found.model is not None
    if found.guard is not None:
        return choose_labels(found.model, found.guard)
    return choose(found.config.engine, found.model, None, scratch)


def _built(
    found: JudgeInputs, engine: Callable[[JudgeInputs], Engine], kept: Path | None = None
) -> AnyJudge:
    votes, most = found.config.votes, found.config.max_tokens
    if found.members:
        members = [_built(member, engine, kept) for member in found.members]
        single = [member for member in members if isinstance(member, Judge)]
        return EnsembleJudge(single, found.config.needs)
    if found.config.rule is not None:
        return RULES[found.config.rule]()
    if found.config.classifier is not None:
        trained = ClassifierJudge(Path(found.config.classifier))
        return KeptJudge(trained, kept) if kept else trained
    asked = engine(found) if found.model is not None else ScriptedEngine()
    if found.guard is not None:
        return GuardJudge(found.guard, asked)
    if found.rubric is not None:
        kind = RubricPairJudge if found.rubric.asks == "pair" else GradeJudge
        return kind(found.rubric, asked, votes=votes, max_tokens=most)
    assert found.policy is not None
    return mistake_judge(found.policy, asked, votes=votes, max_tokens=most)
