"""A generative guard model, described as text: how it is asked, and what its labels mean.

A YAML file, shipped or the user's own, checked when it is loaded. The template is Jinja, as
chat templates are, and runs in their sandbox. Knows no model and loads none.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from misstep.documents import Document, Settings, load_document
from misstep.errors import PolicyError
from misstep.policy import Text

SHIPPED = Path(__file__).parent / "guards"


class Label(Settings):
    """One of a guard's answers."""

    texts: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Ways of writing it, each one token where the model writes it, a space before it where
    the model sets one; their probabilities are added."""
    counts: bool
    """Whether the metric counts an answer with this label."""


class Guard(Document):
    """How a generative guard model is asked, and what its labels mean."""

    metric: Literal["mistake_rate", "over_refusal"] = "mistake_rate"
    """What the labels that count are: mistakes, or refusals."""
    template: Text
    """Jinja over `messages`, the prompt's turns and the answer; as long as the model reads."""
    lines: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)
    """What the model itself writes before each of its labels. The last label is the score;
    those before it are filled in with the likeliest, as the model would."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    """All answers that the guard chooses from."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """From this probability on the verdict is 1."""

    @field_validator("template")
    @classmethod
    def _is_jinja(cls, template: str) -> str:
        from jinja2 import Environment, TemplateSyntaxError
        from jinja2.meta import find_undeclared_variables

        try:
            used = find_undeclared_variables(Environment().parse(template))
        except TemplateSyntaxError as fault:
            raise ValueError(f"no valid Jinja, line {fault.lineno}: {fault}") from fault
        if "messages" not in used:
            raise ValueError("expected a template over 'messages', found none in it")
        return template

    @model_validator(mode="after")
    def _tells_apart(self) -> "Guard":
        texts = [text for label in self.labels for text in label.texts]
        if len(set(texts)) < len(texts):
            raise ValueError("labels: expected each text once")
        if {label.counts for label in self.labels} != {True, False}:
            raise ValueError("labels: expected some that count and some that do not")
        return self


def load_guard(name: str) -> Guard:
    """A shipped guard by its name, or a user's own by its path.

    Raises:
        PolicyError: no such guard, or all that is wrong with it, a line each.
    """
    return load_document(Guard, name, SHIPPED, "guard", PolicyError)
