"""Which columns of the data hold what: names that are known, and a reader's own mapping.

Knows no row and no file.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from misstep.data.labels import LabelWords
from misstep.documents import Settings, suggestion

Row = Mapping[str, Any]

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("prompt", "question", "instruction", "query", "input", "objective"),
        *("问题", "column0"),
    ),
    "context": ("context", "input"),
    "response": (
        *("response", "answer", "completion", "output", "rejected", "violating_answer"),
        *("assistant_response", "违规回答"),
    ),
    "reference": (
        *("reference", "chosen", "safe_answer", "completion", "answer", "output"),
        "安全有用回答",
    ),
    "label": ("label", "is_bad", "unsafe", "harmful", "human_score"),
    "safe": ("is_safe", "safe"),
    "accept": ("accept",),
    "target": ("target",),
    "kind": ("kind", "attack", "category"),
    "topic": ("topic", "category"),
    "prompt_label": ("prompt_label", "prompt_harm_label"),
}
"""Our field names, each with the column names that are recognised unmapped, in this order."""
KNOWN = {name for names in COLUMNS.values() for name in names}
"""The column names that are recognised in any case and between any spaces."""

LAYOUT = {"prompt", "response", "reference", "label", "safe"}
"""The fields of which one that is mapped says that the rows are laid out otherwise."""

PKU = tuple({"response": f"response_{n}", "safe": f"is_response_{n}_safe"} for n in (0, 1))
"""PKU-SafeRLHF's columns: two answers to one prompt, each with its label."""
SAFE = {*COLUMNS["safe"], *(side["safe"] for side in PKU)}
"""Columns that call an answer good where they say yes."""
HARM = {*SAFE, "unsafe", "harmful", "is_bad"}
"""Columns whose labels speak of harm and of nothing else."""


class Reading(Settings):
    """Which columns of the data mean what."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Our field names, such as `prompt`, `response`, `reference` or `label`, mapped to the
    columns of the data; common names of columns need no mapping."""
    labels: LabelWords | None = None
    """What the words of the label column mean, where they are none of the known ones."""
    target_pattern: str | None = None
    """A regular expression whose first group finds an attack's target text in the prompt."""

    @property
    def as_published(self) -> bool:
        """Whether known layouts are read as such: no field that they consist of is mapped."""
        return not LAYOUT & set(self.fields)

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(fields) - set(COLUMNS))
        if unknown:
            told = (
                f"unknown field '{name}'.{suggestion(name, [*COLUMNS])}" for name in unknown
            )
            raise ValueError(" ".join(told))
        for field, names, other, says in (
            ("label", SAFE, "safe", ("bad", "good")),
            ("safe", HARM - SAFE, "label", ("good", "bad")),
        ):
            column = fields.get(field)
            if column is not None and column.strip().casefold() in names:
                raise ValueError(
                    f"{field}: expected a column that says whether an answer is {says[0]}; "
                    f"{column} says whether it is {says[1]}. Map it as {other}: {column}"
                )
        return fields

    @field_validator("target_pattern")
    @classmethod
    def _finds_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as fault:
            raise ValueError(f"no valid regular expression: {fault}") from fault
        if not groups:
            raise ValueError("target_pattern needs a group ( ) around the target text")
        return pattern
