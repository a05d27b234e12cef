"""What a run reads: recipe, policy, data, models and judges, all of it checked before any work.

What is wrong ends here, with the key that it stands under, before any model loads. Knows what
the stages need; runs none of them and writes nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from misstep.config import RunConfig, load_recipe
from misstep.data.fields import COLUMNS
from misstep.data.held_out import Overlaps, overlaps, told
from misstep.data.labelled import MISTAKES
from misstep.data.preferred import load_preferred
from misstep.data.sources import Source, check_source, load_mistakes, load_prompts, rows
from misstep.engines.choose import choose
from misstep.errors import DataError, InputError, ModelError, NoPrompts, RecipeError
from misstep.evidence.check_results import Check, correction, read_check
from misstep.evidence.judge_card import seen_questions, was_seen
from misstep.judge_config import FORMS
from misstep.judges.base import AnyJudge, Judge, PairJudge
from misstep.judges.choose import cost_judges
from misstep.judges.instructions import check_instructions
from misstep.judges.seats import seated
from misstep.judging import JudgeInputs, judge_of_policy, read_judge
from misstep.methods.registry import METHODS
from misstep.models.adapter import (
    Adapted,
    base_of,
    check_adapter,
    check_addable,
    puts_tokens_first,
)
from misstep.models.endpoint import PREFIX
from misstep.models.locate import Model, locate
from misstep.policy import Policy, load_policy
from misstep.records import Mistake, Pair, Prompt
from misstep.stages.reward import require_trl
from misstep.stages.train_settings import check_trackers
from misstep.training import processes

ANSWERED = {"response", "reference", "label", "safe"}
"""Fields of which one that is mapped says where the good answer is."""


class Inputs(NamedTuple):
    """All that a run reads, checked before any model loads."""

    config: RunConfig
    left_out: tuple[str, ...]
    """Methods of the default that the data have no good answers for."""
    policy: Policy
    model: Model
    """As the recipe names it; the run adds the recipe's adapter to it."""
    adapter: Path | None
    analyst: Model
    judge: Model
    """What judges are put to that name no model."""
    of_mistakes: JudgeInputs
    judges: dict[str, JudgeInputs]
    """Further ones, by name."""
    prompts: Sequence[Prompt]
    """Of induced mistakes: what the model is asked."""
    given: Sequence[Mistake]
    """Of labelled data and reports: the mistakes themselves."""
    ordinary: list[Prompt]
    tests: dict[str, Sequence[Prompt]]
    checks: tuple[Check, ...]
    """Of the run's judges, where the recipe names some."""
    overlaps: Overlaps
    """Of the tests with what is learned from."""
    helpful: Sequence[Pair] = ()
    """On helpfulness alone, for RLHF; without them mistakes and good answers are its pairs."""
    others: Mapping[str, Adapted] = MappingProxyType({})
    """To be tested beside the methods, by name."""


def read_inputs(recipe: Path, overrides: list[str], tested: bool = True) -> Inputs:
    """Read and check everything that a run depends on.

    Raises:
        InputError: what is wrong with the recipe, the policy, the data or the model.
    """
    return check_inputs(load_recipe(recipe, overrides), tested)


def check_inputs(config: RunConfig, tested: bool = True) -> Inputs:
    """Read and check all that a configuration names.

    Args:
        config: the recipe.
        tested: whether anything is tested; else what is trained elsewhere need not be there
            yet, as before its rows are written.

    Raises:
        InputError: what is wrong with the policy, the data or the model.
    """
    policy = load_policy(config.policy)
    _check_methods(config)
    _check_trainable(config)
    sources = config.sources()
    for key, source in sources.items():
        with under(key):
            check_source(source)
    model = locate(config.model)
    judge = locate_judging(config)
    seed, (prompts, given) = config.seed, _cases(config)
    methods = _possible(config, _asked(prompts, given))
    tests, ordinary = load_tests(config), _ordinary(sources.get("ordinary"), seed)
    with under("helpful_pairs"):
        pairs = sources.get("helpful_pairs")
        helpful = load_preferred(pairs, seed) if pairs else ()
    learned = {
        "mistakes.data": _asked(prompts, given),
        "ordinary": ordinary,
        "helpful_pairs": (Prompt(messages=pair.messages) for pair in helpful),
    }
    of_mistakes, judges = _judges(config, policy, judge, _asked(prompts, given), tests)
    analyst = model if config.analysis.engine == "self" else locate(config.analysis.engine)
    _check_engine(config, [model, analyst] if config.trained else [model])
    return Inputs(
        config=config.model_copy(update={"methods": methods}),
        left_out=tuple(name for name in config.methods if name not in methods),
        policy=policy,
        model=model,
        adapter=check_addable(config.adapter, model) if config.adapter else None,
        analyst=analyst,
        judge=judge,
        of_mistakes=of_mistakes,
        judges=judges,
        prompts=prompts,
        given=given,
        ordinary=ordinary,
        tests=tests,
        checks=tuple(map(read_judge_check, config.evaluate.judge_check)),
        helpful=helpful,
        others=_others(config, model, tested),
        overlaps=overlaps(tests, learned) if config.trained else {},
    )


def _judges(
    config: RunConfig,
    policy: Policy,
    model: Model,
    asked: Iterable[Prompt],
    tests: Mapping[str, Sequence[Prompt]],
) -> tuple[JudgeInputs, dict[str, JudgeInputs]]:
    """The judge of mistakes and the further ones, once they can tell of what they are given."""
    named = config.evaluate.judges.items()
    of_mistakes = read_judge_of_mistakes(config, policy, model)
    further = {name: read_judge(of, otherwise=model) for name, of in named}
    first = of_mistakes.probe()
    assert isinstance(first, Judge)
    if _judges_what_is_learned(config):
        check_judgeable("mistakes.data", asked, first)
    _check_measurable(config, tests, first, {k: of.probe() for k, of in further.items()})
    return of_mistakes, further


@contextmanager
def under(key: str) -> Iterator[None]:
    """Say of what is wrong with data by which key of the recipe they are read."""
    try:
        yield
    except NoPrompts as fault:
        raise NoPrompts(f"{key}: {fault}") from fault
    except DataError as fault:
        raise DataError(f"{key}: {fault}") from fault


def _judges_what_is_learned(config: RunConfig) -> bool:
    """Whether the judge of mistakes is asked before anything is trained."""
    if not config.trained or config.mistakes is None:
        return False
    return config.mistakes.source != "origin" or config.good_answers.source == "self"


def _cases(config: RunConfig) -> tuple[Sequence[Prompt], Sequence[Mistake]]:
    """What mistakes are to be induced on, and those that are given."""
    of, seed = config.mistakes, config.seed
    if of is None:
        return [], []
    with under("mistakes.data"):
        if of.source == "induced":
            return load_prompts(of.data, seed), []
        return [], load_mistakes(of.data, of.source, seed)


def _asked(prompts: Sequence[Prompt], given: Sequence[Mistake]) -> Iterable[Prompt]:
    """The prompts of mistakes, one by one: there may be more than memory holds."""
    return prompts or (mistake.prompt for mistake in given)


def locate_judging(config: RunConfig) -> Model:
    """The model that judges of a run ask which name none.

    Raises:
        InputError: there is no such model, and the recipe names no judge in its place either.
    """
    try:
        return locate(config.asked_by_judges)
    except ModelError as error:
        if config.judge != config.asked_by_judges or config.judge.startswith(PREFIX):
            raise
        raise RecipeError(
            f"judge: {config.judge}: expected {FORMS}; or a model. As a model: {error}"
        ) from error


def read_judge_of_mistakes(
    config: RunConfig, policy: Policy, otherwise: Model | None
) -> JudgeInputs:
    """The judge that the recipe names, or else the policy's own.

    Raises:
        InputError: what is wrong with it, or it is none of mistakes.
    """
    if config.judge_file is None:
        return judge_of_policy(config.policy, policy, config.engine, otherwise)
    return judge_of_mistakes(config.judge_file, otherwise)


def judge_of_mistakes(name: str, otherwise: Model | None = None) -> JudgeInputs:
    """The judge of this name, which must be one of mistakes; `otherwise` as in `read_judge`.

    Raises:
        InputError: what is wrong with it, or it is one of something else.
    """
    found = read_judge(name, otherwise=otherwise)
    if (metric := found.probe().metric) != MISTAKES:
        raise RecipeError(
            f"judge: {name}: expected a judge of mistakes ({MISTAKES}), found one of {metric}. "
            "The recipe of a run has a place for it under evaluate.judges."
        )
    return found


def check_judgeable(key: str, prompts: Iterable[Prompt], judge: AnyJudge) -> None:
    """Pass where the judge can tell of one prompt at least whether an answer is a mistake.

    Raises:
        DataError: what the prompts lack, and the key that names their source.
    """
    assert isinstance(judge, Judge)
    if not any(map(judge.applies, prompts)):
        raise DataError(
            f"{key}: expected attacks with their target texts (column 'target'), which the "
            f"judge {judge.name} looks for; found none. Map the column with {key}.fields: "
            f"{{target: COLUMN}}, or find them in the prompts with {key}.target_pattern."
        )


def load_tests(config: RunConfig) -> dict[str, Sequence[Prompt]]:
    """The test sets of a recipe, once all is there that their judges need.

    Raises:
        InputError: the data are wrong, or what a judge needs is not installed.
    """
    found = {}
    for name, source in config.evaluate.tests.items():
        with under(f"evaluate.tests.{name}"):
            found[name] = load_prompts(source, config.seed)
    check_instructions(prompt for prompts in found.values() for prompt in prompts)
    for name in config.evaluate.reference_loss:
        if not any(prompt.reference for prompt in found[name]):
            raise RecipeError(
                f"evaluate.reference_loss: expected reference answers in '{name}', found "
                f"none. Map their column with evaluate.tests.{name}.fields: "
                "{reference: COLUMN}, or leave the set out."
            )
    return found


def _check_measurable(
    config: RunConfig,
    tests: Mapping[str, Sequence[Prompt]],
    first: Judge,
    further: Mapping[str, AnyJudge],
) -> None:
    """Pass where a judge of the run, or the loss, measures something of each test set."""
    for name, judge in further.items():
        if isinstance(judge, PairJudge):
            _check_base(config, name)
            return
    seats = seated([first, *cost_judges()], further)
    for name, prompts in tests.items():
        measured = any(seat.measures(prompt) for prompt in prompts for seat in seats)
        if not measured and name not in config.evaluate.reference_loss:
            raise DataError(
                f"evaluate.tests.{name}: expected prompts that a judge of the run can tell "
                f"something of: attacks with their target texts (column 'target') for "
                f"{first.name}, or tasks with the keys of a good answer (column 'accept'); "
                f"found neither. Map the column with evaluate.tests.{name}.fields, or name a "
                "judge that needs none (judge, evaluate.judges)."
            )


def _check_base(config: RunConfig, judge: str) -> None:
    """Pass where there is something that a judge of pairs sets answers against."""
    if "vanilla" not in config.methods or False not in config.respond.guided:
        raise RecipeError(
            f"evaluate.judges.{judge}: expected the untrained model's unguided answers, which "
            "a judge of pairs sets the others against; found none. Put vanilla into methods "
            "and false into respond.guided."
        )


def read_judge_check(path: str) -> Check:
    """A check that rates can be corrected by, so that no run ends without a rate.

    Raises:
        DataError: it is none.
    """
    place = Path(path).expanduser()
    with under("evaluate.judge_check"):
        check = read_check(place / "check.json" if place.is_dir() else place)
    try:
        correction(check)
    except DataError as error:
        raise DataError(f"evaluate.judge_check: {path}: {error}") from error
    return check


def _possible(config: RunConfig, asked: Iterable[Prompt]) -> tuple[str, ...]:
    """The recipe's methods, without those of the default that the data have nothing for."""
    needing = [name for name in config.methods if METHODS[name].needs_good_answers]
    own = config.good_answers.source == "self"
    if not needing or own or any(prompt.reference for prompt in asked):
        return config.methods
    if "methods" in config.model_fields_set:
        raise RecipeError(
            f"methods: {', '.join(needing)}: expected good answers to the prompts of the "
            "mistakes, found none. Map their column with mistakes.data.fields: "
            "{reference: COLUMN}, let the model write some that the judge accepts "
            "(good_answers.source: self), or leave these methods out."
        )
    return tuple(name for name in config.methods if name not in needing)


def _check_methods(config: RunConfig) -> None:
    """Refuse methods that the adapter or the processes cannot serve."""
    on_pairs = [name for name in config.methods if METHODS[name].on_pairs]
    if on_pairs and config.train.adapter == "full":
        raise RecipeError(
            f"train.adapter: expected lora for {on_pairs[0]}, which trains on pairs, found "
            "full. The reference that it compares with is the model without its adapter."
        )
    if config.trained:
        check_trackers(config.train)
    if any(METHODS[name].trainer == "reinforce" for name in config.methods):
        require_trl()
        if processes.count() > 1:
            raise RecipeError(
                "methods: expected methods that several processes can train, found one that "
                "trains for a reward. Leave it out under `accelerate launch`; train it with "
                "plain `misstep train`."
            )


def _check_trainable(config: RunConfig) -> None:
    """A model behind an endpoint answers, judges and analyses; nothing can be trained on it."""
    if not config.model.startswith(PREFIX):
        return
    if config.evaluate.reference_loss:
        raise RecipeError(
            f"evaluate.reference_loss: the weights of {config.model} are not here, so that no "
            "loss can be measured. Leave the key out."
        )
    if config.trained:
        able = ", ".join(name for name, method in METHODS.items() if not method.trains)
        raise RecipeError(
            f"methods: expected methods that train nothing ({able}), since the weights of "
            f"{config.model} are not here; found {', '.join(config.trained)}. Leave "
            "these out, or name a model's folder, GGUF file or Hub id as model."
        )
    if config.adapter:
        raise RecipeError(
            f"adapter: expected none for {config.model}, whose weights are not here; found "
            f"{config.adapter}. Let the server load it, under a name of its own."
        )


def _check_engine(config: RunConfig, models: Sequence[Model]) -> None:
    """Pass where the engine that the recipe asks for is here and reads the models.

    A cluster's machines say so themselves, once they are asked; `auto` takes what can.
    """
    if config.engine != "auto" and not config.engine.startswith("ray"):
        for model in models:
            choose(config.engine, model)


def _others(config: RunConfig, base: Model, tested: bool) -> dict[str, Adapted]:
    """What was trained elsewhere; where nothing is tested, as far as it is there."""
    found = {}
    for name, path in config.others.items():
        try:
            found[name] = _other(config, path, base)
        except InputError as error:
            if tested:
                raise RecipeError(f"others.{name}: {error}") from error
    return found


def _other(config: RunConfig, path: str, base: Model) -> Adapted:
    """A PEFT folder is an adapter on the recipe's model, anything else a model of its own."""
    if (Path(path).expanduser() / "adapter_config.json").is_file():
        if config.adapter:
            raise RecipeError(
                f"expected a model, found the adapter {path} beside the recipe's own, of which "
                "nobody knows whether it goes on top. Merge it by PEFT and name the sum."
            )
        model, adapter = base, check_adapter(path, base)
        if config.evaluate.reference_loss and puts_tokens_first(adapter):
            raise RecipeError(
                f"no loss can be measured of {path}, which puts tokens before a prompt: set "
                "evaluate.reference_loss to []."
            )
    else:
        model, adapter = _located(path), None
    if model.endpoint is not None and (adapter or config.evaluate.reference_loss):
        lacking = "no adapter can be put on it" if adapter else "no loss can be measured"
        raise RecipeError(f"the weights of {model.name} are not here, so that {lacking}.")
    if not config.engine.startswith("ray"):
        # What cannot be served is known before hours of training.
        choose(config.engine, model, adapter)
    return Adapted(model, adapter)


def _located(path: str) -> Model:
    try:
        return locate(path)
    except InputError as error:
        raise RecipeError(
            f"{error} Of an adapter name the folder that holds its adapter_config.json."
        ) from error


def _ordinary(given: Source | None, seed: int) -> list[Prompt]:
    if given is None:
        return []
    source = _of_pairs(given).model_copy(update={"answered": True})
    try:
        with under("ordinary"):
            return list(load_prompts(source, seed))
    except NoPrompts as fault:
        raise RecipeError(
            f"ordinary: {source.path or source.suite}: expected prompts with reference "
            f"answers, found none{_columns(source)}. Map the column with fields: {{reference: "
            "COLUMN}, such as {reference: response}, or change what `questions` lets through."
        ) from fault


def _of_pairs(source: Source) -> Source:
    """Among pairs of prompts and answers a `response` without a label is the good answer."""
    first = next(iter(rows(source)), None) if source.is_file else None
    others = {name for field in ("reference", "label", "safe") for name in COLUMNS[field]}
    if first is None or ANSWERED & set(source.fields) or others & set(first[1]):
        return source
    fields = {**source.fields, "reference": "response"}
    return source.model_copy(update={"fields": fields}) if "response" in first[1] else source


def _columns(source: Source) -> str:
    """What a file's first row has, in words."""
    first = next(iter(rows(source)), None) if source.is_file else None
    return f" in columns {', '.join(sorted(first[1]))}" if first else ""


def warnings(inputs: Inputs) -> Iterator[str]:
    """What makes the results of a run less than they look, as far as its inputs tell."""
    if inputs.left_out:
        yield (
            f"Left out: {', '.join(inputs.left_out)}, which learns from good answers to the "
            "prompts of mistakes; the data have none. The model can write some that the judge "
            "accepts: good_answers.source=self."
        )
    yield from _seen_by_judges(inputs)
    for name, (tested_on, adapter) in inputs.others.items():
        said = base_of(adapter) if adapter else None
        # A GGUF file is trained on as a copy that is named by its digest.
        known = (tested_on.published, str(tested_on.path), tested_on.digest)
        if said and not any(name in said for name in known):
            yield (
                f"others.{name} says that it was trained on {said}; it is tested on "
                f"{tested_on.published}."
            )
    yield from (f"Not held out: {phrase}." for phrase in told(inputs.overlaps))


def _seen_by_judges(inputs: Inputs) -> Iterator[str]:
    """Which test sets hold questions that a trained judge of the run has seen, and how many."""
    judges = (inputs.of_mistakes, *inputs.judges.values())
    for folder in dict.fromkeys(folder for judge in judges for folder in judge.trained()):
        seen = seen_questions(folder)
        for name, prompts in inputs.tests.items():
            if known := sum(was_seen(prompt, seen) for prompt in prompts):
                yield (
                    f"The judge {folder} was trained or tuned on {known} of the {len(prompts)} "
                    f"questions of '{name}'; its measured errors do not hold for them. Of a "
                    "judge that was trained with the default seed, `questions` leaves them out."
                )
