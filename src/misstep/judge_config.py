"""Which judge a command is about: a rule, a policy's, a trained one, or a YAML file of one.

Unknown keys are refused, as in a recipe. Knows no model; nothing here loads or runs anything.
"""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from misstep.documents import check, read_yaml, suggestion
from misstep.errors import RecipeError
from misstep.judge_card import CARD, is_trained_judge
from misstep.judges.choose import RULES
from misstep.stages.base import Settings

OF_POLICY = "policy:"


class JudgeConfig(Settings):
    """One judge: a rule, a trained one, or a policy's with the model its rubric is put to."""

    rule: Literal["obedience", "helpfulness", "refusal"] | None = None
    policy: str | None = None
    """A shipped policy, or the path of a policy file."""
    classifier: str | None = None
    """The folder that `misstep judge train` has written."""
    model: str | None = None
    """`smollm2-135m`, a Hugging Face id, a folder of safetensors, or a GGUF file."""
    engine: Literal["auto", "openvino", "transformers"] = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "JudgeConfig":
        if sum(kind is not None for kind in (self.rule, self.policy, self.classifier)) != 1:
            raise ValueError("give either a rule, a policy or a classifier")
        if self.policy is None and self.model is not None:
            kind = "rule" if self.rule else "classifier"
            raise ValueError(f"a {kind} asks no model; leave the model out")
        if self.classifier is not None and not is_trained_judge(self.classifier):
            raise ValueError(
                f"classifier: expected a folder with {CARD}, as `misstep judge train` writes "
                f"it, found none in {self.classifier}"
            )
        return self


def load_judge(name: str, model: str | None) -> JudgeConfig:
    """The judge of a command's argument; `model` is that of `--model`.

    Raises:
        RecipeError: no such judge, or all that is wrong with its file, a line each.
    """
    given = {} if model is None else {"model": model}
    if name.endswith((".yaml", ".yml")):
        data, lines = read_yaml(Path(name), RecipeError)
        return check(JudgeConfig, data | given, RecipeError, name, lines)
    if name.startswith(OF_POLICY):
        policy = name.removeprefix(OF_POLICY)
        return check(JudgeConfig, {"policy": policy} | given, RecipeError, f"judge {name}")
    if is_trained_judge(name):
        return check(JudgeConfig, {"classifier": name} | given, RecipeError, f"judge {name}")
    if name not in RULES:
        raise RecipeError(
            f"judge '{name}': expected a rule ({', '.join(RULES)}), {OF_POLICY}NAME, the "
            "folder of a trained judge, or the path of a .yaml file."
            f"{suggestion(name, list(RULES))}"
        )
    return check(JudgeConfig, {"rule": name} | given, RecipeError, f"judge {name}")
