"""The recipe of a study: a YAML file that becomes one frozen configuration.

Unknown keys are refused, and overrides are checked like the file, as in the recipe of a run.
Knows no model; nothing here loads or runs anything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from misstep.config import KeyName, read_recipe
from misstep.data.sources import Source
from misstep.documents import Seed, Settings, check, each_once
from misstep.engines.choose import Kind
from misstep.errors import RecipeError
from misstep.judge_config import names_judge
from misstep.stages.discriminate import DiscriminateSettings


class AnswerSettings(Settings):
    """How the prompts are answered; always both with the guide and without it."""

    max_tokens: Annotated[int, Field(ge=1)] = 64
    """The longest answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy decoding, so that a difference is the guide's and not the dice's."""


class StudyConfig(Settings):
    """One study: several models, a policy, and the prompts that they answer and analyse."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the study, in letters, digits, `.`, `_` and `-`."""
    policy: str
    """A shipped policy, or the path of a policy file."""
    models: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(each_once)]
    """Each `smollm2-135m`, a Hugging Face id, a folder of safetensors, a GGUF file, or
    `openai:MODEL@URL`."""
    adapters: dict[KeyName, str] = Field(default_factory=dict)
    """What the first of `models` was trained to be, by name: PEFT folders, such as those of a
    run under `adapters/`. Each is studied as the models are."""
    analysed: Literal["own", "first"] = "own"
    """Whose unguided answers are analysed: each model's `own`, as in the paper, or those of the
    `first` of `models`, by all of them, so that it shows which model tells mistakes better."""
    engine: Kind = "auto"
    """What answers, of models whose weights are here; `auto` takes the fastest that can."""
    judge: str | None = None
    """The model that a policy's rubric is put to, one for all answers; or a judge in the place
    of the policy's own, such as the folder of a trained one. A policy with a rule needs none.
    There is no `self`: a model that judges its own answers would be asked twice for one
    opinion."""
    seed: Seed = 0
    """The seed of the data's draw and of sampling."""
    prompts: Source
    """What every model answers, and then analyses its answers to."""
    respond: AnswerSettings = AnswerSettings()
    analyse: DiscriminateSettings = DiscriminateSettings()

    @property
    def judge_file(self) -> str | None:
        """The judge in the place of the policy's own, as the recipe writes it."""
        return self.judge if self.judge is not None and names_judge(self.judge) else None


def load_study_recipe(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's recipe and put the overrides (`key.inner=value`, YAML values) over it.

    Raises:
        RecipeError: a line for each fault: file, line, key, what was expected, what was found.
    """
    data, lines = read_recipe(path, overrides, "study")
    return check(StudyConfig, data, RecipeError, str(path), lines)
