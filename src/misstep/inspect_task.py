"""Test sets of a recipe as an `inspect_ai` task, with the recipe's judges as its scorers.

`inspect eval misstep/recipe -T path=RECIPE --model MODEL` finds it through an entry point; only
inspect_ai imports this module. What misstep.inspect_log needs to make results of the log stands
in the metadata of the task and of each score.
"""

from collections.abc import Sequence
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
)
from inspect_ai.scorer import Score as InspectScore
from inspect_ai.scorer import Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from misstep.config import RunConfig, load_recipe
from misstep.documents import suggestion
from misstep.engines.base import Engine
from misstep.engines.choose import choose
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import RecipeError
from misstep.inspect_log import KEY, Asked, Judged
from misstep.judges.base import Judge
from misstep.judges.choose import cost_judges, mistake_judge
from misstep.methods.registry import METHODS
from misstep.models import locate
from misstep.pipeline import load_tests
from misstep.policy import Policy, load_policy
from misstep.records import Message, Prompt, Response
from misstep.stages.base import score_all

TURNS = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


@task  # type: ignore[untyped-decorator]
def recipe(
    path: str, test_set: str = "", guided: bool = False, method: str = "vanilla"
) -> Task:
    """Ask a recipe's test prompts, all of them or one set, and judge the answers.

    Args:
        path: the recipe.
        test_set: the name of one of its test sets; all where left out.
        guided: whether the policy's guide stands around the prompts.
        method: what the asked model was trained with; it is asked in that method's words and
            stands under its name in the results.
    """
    config = load_recipe(Path(path))
    policy = load_policy(config.policy)
    tests = load_tests(config)
    _check("test_set", test_set, ["", *tests])
    _check("method", method, list(METHODS))
    chosen = {name: of for name, of in tests.items() if test_set in ("", name)}
    prompts = [prompt for of in chosen.values() for prompt in of]
    judges = [j for j in _judges(config, policy) if any(map(j.applies, prompts))]
    asked = Asked(
        name=config.name,
        policy=policy.name,
        method=method,
        guided=guided,
        seed=config.training_seed,
        pools=config.evaluate.pools,
        judges={judge.metric: judge.name for judge in judges},
    )
    return Task(
        dataset=MemoryDataset(
            [
                _sample(policy, prompt, asked, f"{name}/{number}", name)
                for name, of in chosen.items()
                for number, prompt in enumerate(of, 1)
            ],
            name=test_set or config.name,
        ),
        solver=generate(),
        scorer=[_scorer(judge, policy, asked) for judge in judges],
        config=GenerateConfig(
            max_tokens=config.respond.max_tokens, temperature=config.respond.temperature
        ),
        metadata={KEY: asked.model_dump(mode="json")},
    )


def _check(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise RecipeError(
            f"{key}: expected one of {', '.join(filter(None, known))}, found {name!r}."
            f"{suggestion(name, list(known))}"
        )


def _judges(config: RunConfig, policy: Policy) -> list[Judge]:
    if config.judge_file is not None or config.evaluate.judges:
        raise RecipeError(
            "judge, evaluate.judges: expected the policy's own judge, since an inspect task "
            "opens no judge's file; found others. Measure with them by `misstep evaluate`."
        )
    engine = _judging(config) if policy.judge.rubric else ScriptedEngine()
    return [mistake_judge(policy, engine), *cost_judges()]


def _judging(config: RunConfig) -> Engine:
    """The engine that a rubric is put to; `self` is the recipe's model, not the asked one."""
    model = locate(config.model if config.judge == "self" else config.judge)
    return choose(config.engine, model).open()


def _sample(policy: Policy, prompt: Prompt, asked: Asked, name: str, test_set: str) -> Sample:
    turns = policy.guided_prompt(prompt) if asked.guided else prompt.messages
    turns = METHODS[asked.method].ask(policy, turns)
    return Sample(
        id=name,
        input=[_turn(message) for message in turns],
        target=prompt.reference or "",
        metadata={"test_set": test_set, "prompt": prompt.model_dump(mode="json")},
    )


def _turn(
    message: Message,
) -> ChatMessageSystem | ChatMessageUser | ChatMessageAssistant:
    return TURNS[message.role](content=message.content)


def _scorer(judge: Judge, policy: Policy, asked: Asked) -> Scorer:
    @scorer(metrics=[mean(), stderr()], name=judge.metric)  # type: ignore[untyped-decorator]
    def of_judge() -> Scorer:
        async def score(state: TaskState, target: Target) -> InspectScore:
            del target
            return _scored(judge, _response(policy, asked, state.metadata, state.output))

        return score

    return of_judge()


def _response(
    policy: Policy, asked: Asked, metadata: dict[str, object], output: ModelOutput
) -> Response:
    return Response(
        prompt=Prompt.model_validate(metadata["prompt"]),
        text="" if output.error else METHODS[asked.method].read(policy, output.completion),
        model=output.model,
        guided=asked.guided,
        truncated=output.stop_reason == "max_tokens",
        error=output.error,
    )


def _scored(judge: Judge, response: Response) -> InspectScore:
    """One number for inspect's own table; the log keeps all that the judge says."""
    (found,) = score_all(judge, [response])
    every = Judged(response=response, scores=(found, *judge.further(response, found)))
    metadata = {KEY: every.model_dump(mode="json")}
    if found.value is None:
        return InspectScore.unscored(explanation=found.reason, metadata=metadata)
    return InspectScore(
        value=found.value,
        answer=response.text,
        explanation=found.reason or None,
        metadata=metadata,
    )
