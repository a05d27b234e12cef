"""A rubric: what a judging model is asked of an answer, or of two, beyond a policy's verdict.

Text, not code: a YAML file, shipped or the user's own, checked when it is loaded. One that
grades asks for `Verdict: N`, N from 1 to 10; one that compares for `Verdict: A`, `B` or `tie`.
Knows no model and no judge.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from misstep.documents import Document, load_document
from misstep.errors import PolicyError
from misstep.policy import Text, blanks

SHIPPED = Path(__file__).parent / "rubrics"
GRADED = {"prompt", "response"}
COMPARED = {"prompt", "first", "second"}


class Rubric(Document):
    """What a judging model is asked of an answer, or of two."""

    asks: Literal["grade", "pair"]
    """A grade from 1 to 10, or which of two answers is better."""
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z_]*$")]
    """What the mean grade is called in results, such as `helpfulness_score`; of pairs
    `win_rate`."""
    text: Text
    """The request, with the blanks {prompt} and {response}, or {prompt}, {first} and
    {second}."""

    @model_validator(mode="after")
    def _fits(self) -> "Rubric":
        pairs = self.asks == "pair"
        expected, found = COMPARED if pairs else GRADED, blanks(self.text)
        if found != expected:
            raise ValueError(
                f"text: expected the blanks {', '.join(sorted(expected))}, found "
                f"{', '.join(sorted(found)) or 'none'}"
            )
        if pairs != (self.metric == "win_rate") or not (
            pairs or self.metric.endswith("_score")
        ):
            raise ValueError(
                "metric: expected win_rate for pairs and a name that ends in _score for a "
                f"grade, found {self.metric}"
            )
        if "verdict: " not in self.text.casefold():
            raise ValueError(
                "text: must ask for the verdict as it is read, a last line such as "
                f"'Verdict: {'A' if pairs else 'N'}'"
            )
        if not pairs and re.search(r"verdict\W+\d", self.text, re.IGNORECASE):
            raise ValueError(
                "text: expected a letter in the place of the grade, found a number: a judge "
                "that repeats its request would give it"
            )
        return self


def load_rubric(name: str) -> Rubric:
    """A shipped rubric by its name, or a user's own by its path.

    Raises:
        PolicyError: no such rubric, or all that is wrong with it, a line each.
    """
    return load_document(Rubric, name, SHIPPED, "rubric", PolicyError)
