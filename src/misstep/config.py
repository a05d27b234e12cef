"""A recipe: a YAML file that becomes one frozen configuration; unknown keys are refused.

Overrides from the command line (`--set train.epochs=2`) are checked like the file itself. Knows
no model; nothing here loads or runs anything.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from misstep.data.sources import Source
from misstep.documents import (
    KeyPath,
    Places,
    Seed,
    Settings,
    check,
    each_once,
    parsed,
    read_yaml,
    suggestion,
)
from misstep.engines.choose import Kind
from misstep.errors import RecipeError
from misstep.evidence.results import FOCUS
from misstep.judge_config import names_judge
from misstep.methods.base import MixSettings
from misstep.methods.registry import METHODS
from misstep.policy import is_policy
from misstep.records import digest
from misstep.stages.analyse import AnalyseSettings
from misstep.stages.good_answers import GoodAnswerSettings
from misstep.stages.induce import InduceSettings
from misstep.stages.reinforce import ReinforceSettings
from misstep.stages.respond import RespondSettings
from misstep.stages.revise import ReviseSettings
from misstep.stages.train_settings import TrainSettings

CONTROL = "ordinary"
"""The method that learns from ordinary pairs alone."""
MAIN_JOB = ("vanilla", CONTROL, "sft", FOCUS)
"""The model as it was, the method, and the two controls that its effect is read against."""

Command = Literal["run", "compare", "study"]
OWN_KEYS: dict[Command, tuple[str, ...]] = {
    "run": ("mistakes", "ordinary", "evaluate"),
    "compare": ("seeds", "sweep"),
    "study": ("models", "prompts"),
}
"""Keys by which a recipe is known for that of a command."""
OTHERS: dict[Command, tuple[Command, ...]] = {
    "run": ("compare", "study"),
    "compare": ("study",),
    "study": ("compare", "run"),
}
"""Whose keys are refused; a comparison's recipe is a run's with keys of its own."""

MethodName = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]
OwnName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Without a dot, so that `--set` and `sweep` reach it."""


DATA = (".csv", ".tsv", ".jsonl", ".parquet", ".gz")
NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
"""What of a file's name cannot stand in the name of its recipe."""


class EvaluateSettings(Settings):
    """What the models are tested on."""

    tests: Annotated[dict[str, Source], Field(min_length=1)]
    """Named sets of held-out prompts."""
    pools: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Names for several of the sets taken together."""
    reference_loss: tuple[str, ...] = ()
    """The sets on whose reference answers the loss of every model is measured, too."""
    judges: dict[OwnName, str] = Field(default_factory=dict)
    """Further judges by name, each written as `misstep judge check` takes it. One that names no
    model asks the run's judge. Of one metric, the second's is called `METRIC@NAME`."""
    judge_check: tuple[str, ...] = ()
    """A check.json of one of the run's judges, its folder, or a list of such; its rates are
    then shown corrected, too."""

    @field_validator("tests", mode="before")
    @classmethod
    def _sets_have_names(cls, given: Any) -> Any:
        if isinstance(given, dict) and {"path", "suite"} & set(given):
            raise ValueError(
                "expected test sets by name, such as { held-out: { path: … } }; found a set "
                "without one"
            )
        return given

    @field_validator("judge_check", mode="before")
    @classmethod
    def _one_check_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given or ()

    @model_validator(mode="after")
    def _losses_of_known_sets(self) -> "EvaluateSettings":
        unknown = sorted(set(self.reference_loss) - set(self.tests))
        if unknown:
            raise ValueError(
                f"reference_loss: expected test sets ({', '.join(self.tests)}), found "
                f"{', '.join(unknown)}"
            )
        return self

    @model_validator(mode="after")
    def _pools_exist(self) -> "EvaluateSettings":
        for pool, members in self.pools.items():
            unknown = sorted(set(members) - set(self.tests))
            if unknown or pool in self.tests:
                raise ValueError(
                    f"pool '{pool}' needs a new name and known test sets "
                    f"({', '.join(self.tests)}); unknown: {', '.join(unknown) or pool}"
                )
        return self


class RunConfig(Settings):
    """One run: a model, a policy, where its mistakes come from, and what is done about them."""

    name: OwnName
    """Names the run, in letters, digits, `.`, `_` and `-`."""
    policy: str
    """A shipped policy, or the path of a policy file."""
    model: str = "smollm2-135m"
    """`smollm2-135m`, a Hugging Face id, a folder of safetensors, a GGUF file, or a model that
    an OpenAI-compatible server answers for, `openai:MODEL@URL`, which cannot be trained."""
    adapter: str | None = None
    """A PEFT folder; the run starts from the model with this adapter in it."""
    engine: Kind = "auto"
    """What answers, of models whose weights are here; `auto` takes the fastest that can."""
    judge: str = "self"
    """The model that a policy's rubric is put to, named as `model` is; `self` is the model as
    it is. A policy with a rule needs none. Or a judge of mistakes, written as
    `misstep judge check` takes it, that takes the place of the policy's own."""
    seed: Seed = 0
    """The seed of the data's draws, of sampling and of training."""
    train_seed: Seed | None = None
    """The seed of the rows' draws and of training alone, so that several trainings share their
    mistakes and analyses; `seed` where left out."""
    data: str | None = None
    """Where every source reads that names neither a suite nor a path."""
    mistakes: InduceSettings | None = None
    """Where mistakes come from; needed where a method trains."""
    analysis: AnalyseSettings = AnalyseSettings()
    revision: ReviseSettings = ReviseSettings()
    """How mistakes are revised; read by methods that train on revisions."""
    good_answers: GoodAnswerSettings = GoodAnswerSettings()
    """Where good answers to the prompts of mistakes come from."""
    ordinary: Source | None = None
    """Ordinary prompts with good answers, of any instruction data; needed where a method mixes
    them in, as all do that train but for those on pairs."""
    mix: MixSettings = MixSettings()
    train: TrainSettings = TrainSettings()
    reinforce: ReinforceSettings = ReinforceSettings()
    """How a model is trained for a reward; read by `rlhf`."""
    helpful_pairs: Source | None = None
    """Read by `rlhf`: pairs on helpfulness alone. The reward model is then made of these, and a
    second one, of harmlessness, of the mistakes, as in Safe-RLHF."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """How often mistakes are induced, analysed and trained on; each further round takes the new
    model's mistakes."""
    methods: Annotated[
        tuple[MethodName, ...], Field(min_length=1), AfterValidator(each_once)
    ] = MAIN_JOB
    """What is trained, or left as it is, and tested."""
    others: dict[KeyName, str] = Field(default_factory=dict)
    """What was trained elsewhere, by name, to be tested beside the methods: PEFT folders on the
    recipe's model, or models, named as `model` is."""
    respond: RespondSettings = RespondSettings()
    evaluate: EvaluateSettings

    @model_validator(mode="before")
    @classmethod
    def _one_place(cls, given: Any) -> Any:
        """Give the sources without a place of their own the recipe's."""
        if isinstance(given, dict) and isinstance(place := given.get("data"), str):
            given = copy.deepcopy(given)
            evaluate, mistakes = given.get("evaluate"), given.get("mistakes")
            tests = evaluate.get("tests") if isinstance(evaluate, dict) else None
            found = [
                given.get("ordinary"),
                given.get("helpful_pairs"),
                mistakes.get("data") if isinstance(mistakes, dict) else None,
                *(tests.values() if isinstance(tests, dict) else ()),
            ]
            for source in found:
                if isinstance(source, dict) and not {"suite", "path"} & set(source):
                    source["path"] = place
        return given

    @field_validator("judge", mode="before")
    @classmethod
    def _judge_is_text(cls, judge: Any) -> Any:
        if isinstance(judge, dict):
            raise ValueError(
                "expected text: a model, or a judge as `misstep judge check` takes it, such as "
                "the path of a file. A rule, patterns or a rubric stand in the policy's file, "
                "under its key judge"
            )
        return judge

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            meant = suggestion(unknown[0], list(METHODS))
            raise ValueError(f"no method {', '.join(map(repr, unknown))}.{meant}")
        return methods

    @field_validator("others")
    @classmethod
    def _own_names(cls, others: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in others if name in METHODS]:
            raise ValueError(f"expected names of your own, found that of a method: {taken[0]}")
        return others

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> "RunConfig":
        if self.mistakes is None and self.trained:
            raise ValueError(
                "the key 'mistakes' is missing, which methods learn from. Give it, or leave "
                f"out the methods that train ({', '.join(self.trained)})"
            )
        mixing = [name for name in self.trained if METHODS[name].uses_ordinary]
        if self.rounds > 1:
            mixing.append(FOCUS)
        if self.ordinary is None and mixing and (self.mix.ordinary or CONTROL in mixing):
            raise ValueError(
                "the key 'ordinary' is missing: prompts with good answers and nothing wrong, "
                f"of any instruction data, which {', '.join(mixing)} mix in. Give it, or leave "
                "them out; mix.ordinary: 0 trains without"
            )
        return self

    @model_validator(mode="after")
    def _rounds_induce(self) -> "RunConfig":
        source = self.mistakes and self.mistakes.source
        if self.rounds > 1 and source != "induced":
            raise ValueError(
                "rounds: more than one needs mistakes.source: induced, since only a model that "
                f"is asked again shows what it still does wrong; found {source}"
            )
        return self

    @property
    def trained(self) -> list[str]:
        """The methods that train; without any, mistakes and analyses have no reader."""
        return [name for name in self.methods if METHODS[name].trains]

    @property
    def judge_file(self) -> str | None:
        """The judge in the place of the policy's own, as the recipe writes it."""
        return self.judge if names_judge(self.judge) else None

    @property
    def asked_by_judges(self) -> str:
        """The model that judges ask which name none; `self` is the recipe's."""
        asks_itself = self.judge == "self" or self.judge_file is not None
        return self.model if asks_itself else self.judge

    @property
    def training_seed(self) -> int:
        """The seed of the rows' draws and of training."""
        return self.seed if self.train_seed is None else self.train_seed

    def sources(self) -> dict[str, Source]:
        """Every place that the run reads data from, by its key.

        What only a training reads need not be there yet where nothing is trained.
        """
        tests = {f"evaluate.tests.{k}": v for k, v in self.evaluate.tests.items()}
        known = {
            "mistakes.data": None if self.mistakes is None else self.mistakes.data,
            "ordinary": self.ordinary if self.trained else None,
            "helpful_pairs": self.helpful_pairs if self.trained else None,
            **tests,
        }
        return {key: source for key, source in known.items() if source is not None}

    def hub_datasets(self) -> list[str]:
        """What is learned from and lies on the Hub."""
        learned = [s for key, s in self.sources().items() if not key.startswith("evaluate.")]
        return sorted({s.path for s in learned if s.path and not s.is_file})

    def paths(self) -> dict[str, str | None]:
        """What the run reads and a run may have written, by its key: data, model, adapter."""
        data = {key: source.path for key, source in self.sources().items()}
        others = {f"others.{name}": path for name, path in self.others.items()}
        return {**data, **others, "model": self.model, "adapter": self.adapter}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and put the overrides (`key.inner=value`, YAML values) over it.

    Raises:
        RecipeError: a line for each fault: file, line, key, what was expected, what was found.
    """
    data, lines = read_recipe(path, overrides, "run")
    return check(RunConfig, data, RecipeError, str(path), lines)


def read_recipe(
    path: Path, overrides: Sequence[str], command: Command
) -> tuple[dict[str, Any], Places]:
    """A recipe with its overrides as plain data, and where each of its keys was written.

    Raises:
        RecipeError: the file is no YAML, an override is none, or it is for another command.
    """
    if path.suffix.lower() in DATA:
        raise RecipeError(
            f"{path}: expected a recipe, a YAML file that names your data; found a file of "
            "data. Write one: docs/quickstart.md, Your own failures."
        )
    data, written = read_yaml(path, RecipeError)
    lines: Places = written
    if is_policy(data):
        raise RecipeError(
            f"{path}: expected a recipe, found a policy. Name it in a recipe: policy: {path}"
        )
    data.setdefault("name", _name_of(path.stem))
    for override in overrides:
        keys, value = parse_override(override)
        data = put(data, keys, value, f"--set {override}")
        lines = overridden(lines, keys, f"--set {override}")
    for other in OTHERS[command]:
        for key in OWN_KEYS[other]:
            if key in data:
                raise RecipeError(
                    f"{path}: expected a recipe for misstep {command}, found the key '{key}', "
                    f"by which it is one for another command: misstep {other} {path}"
                )
    return data, lines


def _name_of(stem: str) -> str:
    """A recipe's name from its file's; what must be left out of that leaves a digest of it."""
    plain = NO_NAME.sub("-", stem).strip("._-")
    return plain if plain == stem else f"{plain or 'recipe'}-{digest(stem)[:6]}"


def parse_override(override: str) -> tuple[KeyPath, Any]:
    """The keys and the value of KEY=VALUE.

    Raises:
        RecipeError: it is none, or the value is no YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as train.epochs=2.")
    try:
        return tuple(key.strip().split(".")), parsed(text)[0]
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise RecipeError(f"--set {override}: the value is no valid YAML.") from fault


def put(data: Mapping[str, Any], keys: KeyPath, value: Any, said: str) -> dict[str, Any]:
    """Data with a value under nested keys; `said` names it in errors.

    Made anew along the keys: another place may hold the same object, as an alias of YAML does.

    Raises:
        RecipeError: one of the keys has a plain value.
    """
    key, further = str(keys[0]), keys[1:]
    if further:
        # A section that is written without keys is an empty one.
        inner = {} if data.get(key) is None else data[key]
        if not isinstance(inner, dict):
            raise RecipeError(f"{said}: '{key}' has no keys below it.")
        value = put(inner, further, value, said)
    return {**data, key: value}


def overridden(lines: Places, keys: KeyPath, said: str) -> Places:
    """The lines without those of a key that got another value, and what gave it that."""
    kept = {path: line for path, line in lines.items() if path[: len(keys)] != keys}
    return kept | {keys: said}


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two recipes differ."""
    found = []
    for key in sorted({*old, *new}):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += changed_keys(before, after, f"{name}.")
        elif before != after:
            found.append(name)
    return found
