"""Test sets of a recipe as an `inspect_ai` task, with the recipe's judges as its scorers.

`inspect eval misstep/recipe -T path=RECIPE --model MODEL` finds it through an entry point; only
inspect_ai imports this module. What misstep.inspect_log needs to make results of the log stands
in the metadata of the task and of each score.
"""

import atexit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
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
from misstep.errors import RecipeError
from misstep.evidence.check_results import Check
from misstep.inputs import (
    load_tests,
    locate_judging,
    read_judge_check,
    read_judge_of_mistakes,
)
from misstep.inspect_log import KEY, Asked, Judged
from misstep.judges.base import Judge
from misstep.judges.choose import cost_judges
from misstep.judges.seats import Seat, seated
from misstep.judging import JudgeInputs, opened, read_judge
from misstep.methods.registry import METHODS
from misstep.policy import Policy, load_policy
from misstep.records import Prompt, Response
from misstep.stages.evaluate import corrections, said

Tests = Mapping[str, Sequence[Prompt]]
"""By the names of their sets."""
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
        guided: whether the policy's guide stands around the prompts; always, where the method
            is guidance itself.
        method: what the asked model was trained with; it is asked in that method's words and
            stands under its name in the results.
    """
    config = load_recipe(Path(path))
    policy = load_policy(config.policy)
    tests = load_tests(config)
    _check("test_set", test_set, ["", *tests])
    _check("method", method, list(METHODS))
    guided |= METHODS[method].guided == (True,)
    chosen = {name: of for name, of in tests.items() if test_set in ("", name)}
    seats, checks = _measures(config, policy, chosen)
    asked = Asked(
        name=config.name,
        policy=policy.name,
        policy_digest=policy.digest,
        method=method,
        guided=guided,
        seed=config.training_seed,
        pools=config.evaluate.pools,
        judges={seat.metric: seat.judge.name for seat, _ in seats},
        checks=checks,
    )
    return Task(
        dataset=MemoryDataset(
            list(_samples(policy, chosen, asked)), name=test_set or config.name
        ),
        solver=generate(),
        scorer=[_scorer(seat, names, policy, asked) for seat, names in seats],
        config=GenerateConfig(
            max_tokens=config.respond.max_tokens + METHODS[method].spare_tokens,
            temperature=config.respond.temperature,
        ),
        metadata={KEY: asked.model_dump(mode="json", by_alias=True)},
    )


def _check(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise RecipeError(
            f"{key}: expected one of {', '.join(filter(None, known))}, found {name!r}."
            f"{suggestion(name, list(known))}"
        )


def _measures(
    config: RunConfig, policy: Policy, tests: Tests
) -> tuple[list[tuple[Seat, list[str]]], tuple[Check, ...]]:
    """The judges, each with the test sets that it is asked about, and the checks of these.

    As in a run: all answers of a test set, or none where no prompt is for the judge.
    """
    every = _seats(config, policy)
    checks = tuple(map(read_judge_check, config.evaluate.judge_check))
    corrections(checks, {seat.metric: seat.judge.name for seat in every})
    sets = [[name for name, of in tests.items() if any(map(s.applies, of))] for s in every]
    seats = [(seat, names) for seat, names in zip(every, sets, strict=True) if names]
    known = {seat.judge.name for seat, _ in seats}
    return seats, tuple(check for check in checks if check.judge in known)


def _seats(config: RunConfig, policy: Policy) -> list[Seat]:
    """The recipe's judges, but those that compare two answers: a task has one to each prompt.

    Their models stay open as long as the process, which is inspect's.
    """
    further, needs_no_model = config.evaluate.judges, policy.judge.rubric is None
    rule_alone = needs_no_model and config.judge_file is None and not further
    model = None if rule_alone else locate_judging(config)
    first = read_judge_of_mistakes(config, policy, model)
    read = {name: read_judge(judge, otherwise=model) for name, judge in further.items()}
    stack = ExitStack()
    atexit.register(stack.close)

    def judge_of(found: JudgeInputs) -> Judge | None:
        judge = stack.enter_context(opened(found, lambda chosen: chosen.open()))
        return judge if isinstance(judge, Judge) else None

    single = {name: judge for name, found in read.items() if (judge := judge_of(found))}
    return seated([*filter(None, [judge_of(first)]), *cost_judges()], single)


def _samples(policy: Policy, tests: Tests, asked: Asked) -> Iterator[Sample]:
    for name, prompts in tests.items():
        for number, prompt in enumerate(prompts, 1):
            turns = METHODS[asked.method].ask(policy, policy.turns(prompt, asked.guided))
            yield Sample(
                id=f"{name}/{number}",
                input=[TURNS[turn.role](content=turn.content) for turn in turns],
                target=prompt.reference or "",
                metadata={"test_set": name, "prompt": prompt.model_dump(mode="json")},
            )


def _scorer(seat: Seat, sets: Sequence[str], policy: Policy, asked: Asked) -> Scorer:
    @scorer(metrics=[mean(), stderr()], name=seat.metric)  # type: ignore[untyped-decorator]
    def of_judge() -> Scorer:
        async def score(state: TaskState, target: Target) -> InspectScore:
            del target
            if state.metadata["test_set"] not in sets:
                return InspectScore.unscored(explanation="no prompt of the set is for it")
            return _scored(seat, _response(policy, asked, state.metadata, state.output))

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


def _scored(seat: Seat, response: Response) -> InspectScore:
    """One number for inspect's own table; the log keeps all that the judge says."""
    (scores,) = said(seat, [response])
    found = scores[0]
    metadata = {KEY: Judged(response=response, scores=tuple(scores)).model_dump(mode="json")}
    if found.counted is None:
        return InspectScore.unscored(explanation=found.reason, metadata=metadata)
    if found.metric != seat.metric:
        because = f"counts as {found.metric}"
        return InspectScore.unscored(explanation=because, metadata=metadata)
    return InspectScore(
        value=found.counted,
        answer=response.text,
        explanation=found.reason or None,
        metadata=metadata,
    )
