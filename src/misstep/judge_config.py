"""Which judge is meant: one of the kinds below, by name, by folder, or as a YAML file.

Unknown keys are refused, as in a recipe. Knows no model; nothing here loads or runs anything.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from misstep.data.tables import as_path
from misstep.documents import Settings, check, read_yaml, suggestion
from misstep.engines.choose import Kind
from misstep.errors import RecipeError
from misstep.evidence.judge_card import CARD, is_trained_judge
from misstep.judges.choose import RULES
from misstep.judges.llm import MAX_TOKENS
from misstep.policy import is_policy

NAMED = ("policy", "rubric", "guard")
"""Kinds that a command may write as KIND:NAME."""
KINDS = ("rule", *NAMED, "classifier", "ensemble")
FORMS = (
    f"a rule ({', '.join(RULES)}), {', '.join(f'{kind}:NAME' for kind in NAMED)}, the folder "
    "of a trained judge (`misstep judge train DATA --out FOLDER`), or the path of a .yaml file"
)
"""How a judge is written, in words."""
ASKING = ("policy", "rubric")
"""Kinds whose model is asked for verdicts, and so can be asked several times."""


class JudgeConfig(Settings):
    """One judge, of one kind, with the model that it asks."""

    rule: Literal["obedience", "helpfulness", "refusal"] | None = None
    """A rule, which asks no model."""
    policy: str | None = None
    """A shipped policy, or the path of a policy file: whether an answer is a mistake."""
    rubric: str | None = None
    """A shipped rubric, or the path of a rubric file: a grade, or the better of two answers."""
    guard: str | None = None
    """A shipped guard, or the path of a guard file."""
    classifier: str | None = None
    """The folder that `misstep judge train` has written."""
    ensemble: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Several judges, each written as a command writes it."""
    needs: Literal["majority", "all", "mean"] = "majority"
    """How many of an ensemble must say the same, else an answer is unscored; or the mean of
    what all of them say, of judges that give probabilities."""
    model: str | None = None
    """`smollm2-135m`, a Hugging Face id, a folder of safetensors, a GGUF file, or
    `openai:MODEL@URL`, which is no guard's."""
    engine: Kind = "auto"
    """What answers, of a model whose weights are here; `auto` takes the fastest that can."""
    votes: Annotated[int, Field(ge=1)] = 1
    """How often a model is asked; verdicts need more than half of the votes."""
    max_tokens: Annotated[int, Field(ge=1)] = MAX_TOKENS
    """Of a model's answer; one that reasons first needs more."""

    @field_validator("classifier")
    @classmethod
    def _own_folder(cls, given: str | None) -> str | None:
        return str(as_path(given)) if given and given.startswith("~/") else given

    @model_validator(mode="after")
    def _one_kind(self) -> "JudgeConfig":
        found = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(found) != 1:
            raise ValueError(
                f"give one of {', '.join(KINDS)}; found {' and '.join(found) or 'none'}"
            )
        if self.classifier is not None and not is_trained_judge(self.classifier):
            raise ValueError(
                f"classifier: expected a folder with {CARD}, as `misstep judge train` writes "
                f"it, found none in {self.classifier}"
            )
        article = "an" if self.kind == "ensemble" else "a"
        if self.kind not in NAMED and self.model is not None:
            raise ValueError(f"{article} {self.kind} asks no model; leave the model out")
        if self.kind not in ASKING and self.engine != "auto":
            raise ValueError(f"engine is of {' and '.join(ASKING)}; leave it out")
        if self.kind not in ASKING and self.votes > 1:
            raise ValueError(f"votes are of {' and '.join(ASKING)}; leave them out")
        if self.kind not in ASKING and self.max_tokens != MAX_TOKENS:
            raise ValueError(f"max_tokens is of {' and '.join(ASKING)}; leave it out")
        if self.kind != "ensemble" and self.needs != "majority":
            raise ValueError("needs is of an ensemble; leave it out")
        return self

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def names_judge(name: str) -> bool:
    """Whether this is written as judges are; any other name may be a model's."""
    kind, colon, _ = name.partition(":")
    named = name in RULES or (bool(colon) and kind in NAMED)
    return named or name.endswith((".yaml", ".yml")) or _is_classifier(name)


def _is_classifier(name: str) -> bool:
    """Whether this is the folder of one; a training that was stopped has left no card there."""
    config = as_path(name) / "config.json"
    # A name may be too long for a file, as a whole rubric is, and a file may be no text.
    with suppress(OSError, ValueError):
        return is_trained_judge(name) or (
            config.is_file()
            and "ForSequenceClassification" in config.read_text(encoding="utf-8")
        )
    return False


def load_judge(name: str, model: str | None = None) -> JudgeConfig:
    """The judge of a command's argument; `model` is that of `--model`.

    Raises:
        RecipeError: no such judge, or all that is wrong with its file, a line each.
    """
    given = {} if model is None else {"model": model}
    kind, colon, of = name.partition(":")
    if colon and kind in NAMED:
        return check(JudgeConfig, {kind: of} | given, RecipeError, f"judge {name}")
    if name.endswith((".yaml", ".yml")):
        data, lines = read_yaml(Path(name), RecipeError)
        if is_policy(data):
            raise RecipeError(f"{name}: expected a judge, found a policy: write policy:{name}")
        return check(JudgeConfig, data | given, RecipeError, name, lines)
    if _is_classifier(name):
        return check(JudgeConfig, {"classifier": name} | given, RecipeError, f"judge {name}")
    if name not in RULES:
        raise RecipeError(f"judge '{name}': expected {FORMS}.{suggestion(name, list(RULES))}")
    return check(JudgeConfig, {"rule": name} | given, RecipeError, f"judge {name}")
