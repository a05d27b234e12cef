"""The words of labels: what calls an answer bad, and what good, however it is written.

Knows no row; whether a label is of harm, of a refusal or of help is not known here.
"""

import ast
import json
import re
from collections import Counter
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from misstep.documents import Settings
from misstep.errors import DataError, EmptyCell

YES, NO = {"1", "true", "yes", "y"}, {"0", "false", "no", "n"}
BAD = {"bad", "unsafe", "not safe", "harmful", "toxic", "malicious", "jailbroken"}
GOOD = {
    *("good", "safe", "harmless", "unharmful", "benign"),
    *("nontoxic", "nonmalicious", "not jailbroken"),
    *(f"{no} {word}" for no in ("not", "non") for word in ("harmful", "toxic", "malicious")),
}
"""Words of a label, as `word_of` writes them."""
MISSING = {"", "nan", "n/a", "na", "null", "none"}
"""How a label is written that was left out."""
REFUSES, COMPLIES = {"refusal", "refused"}, {"compliance", "complied"}
"""What an answer does, in WildGuard's words and others'; it says nothing of mistakes."""
LABELS = {"label": (YES | BAD, NO | GOOD), "safe": (NO | BAD, YES | GOOD)}
"""What calls an answer bad, and what good; yes and no mean the opposite under `safe`."""


def word_of(value: Any) -> str:
    """A word of a label, however it is written: `Non-Toxic` is `non toxic`, `1.00` is `1`."""
    word = re.sub(r"(?<=[a-z])[-_\s]+(?=[a-z])", " ", str(value).strip().lower())
    return re.sub(r"^(\d+)\.0+$", r"\1", word)


Words = Annotated[tuple[str | int | float | bool, ...], Field(min_length=1)]


class LabelWords(Settings):
    """Words or grades of the data's labels, in any case; given, no others are known."""

    bad: Words
    """What calls an answer bad; of refusals, a refusal."""
    good: Words
    """What calls it good."""

    @model_validator(mode="after")
    def _parted(self) -> "LabelWords":
        if both := set.intersection(*self.meant):
            words = ", ".join(map(repr, sorted(both)))
            raise ValueError(f"expected each word once, found {words} as bad and good")
        return self

    @property
    def meant(self) -> tuple[set[str], set[str]]:
        """The words that say bad and those that say good, as `word_of` writes them."""
        return _meant(self.bad), _meant(self.good)


def _meant(words: tuple[str | float | bool, ...]) -> set[str]:
    """Each word; YAML reads yes and no, where no quotes stand round them, as true and false."""
    found = {word_of(word) for word in words}
    for truth, known in ((True, YES - {"1"}), (False, NO - {"0"})):
        if any(word is truth for word in words):
            found |= known
    return found


class Label(NamedTuple):
    """What somebody said of an answer."""

    word: str
    column: str
    bad: set[str]
    """The words by which this column calls an answer bad."""
    good: set[str]
    mapped: bool
    """Whether the recipe says what the words mean."""


def majority(
    value: Any, missing: set[str], meant: tuple[set[str], set[str]], place: str
) -> str | None:
    """The word of a label; None where there is none.

    Of votes it is what more than half mean, in the word that most of these use: `meant` are
    the words of either side, and any other stands for itself.
    """
    found = nested(value)
    votes = found if isinstance(found, (list, tuple)) else [value]
    words = [word for v in votes if v is not None and (word := word_of(v)) not in missing]
    if not words:
        return None
    for same in (*meant, *({word} for word in words)):
        agreed = [word for word in words if word in same]
        if 2 * len(agreed) > len(words):
            return Counter(agreed).most_common(1)[0][0]
    raise EmptyCell(
        f"{place}: expected votes more than half of which say the same, found "
        f"{value!r:.60}. Label the row or remove it.",
        "no majority of votes",
    )


def nested(value: Any) -> Any:
    """A list or mapping; CSV has none but as their text, JSON's or what pandas writes."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                found = read(value)
                # A set has another order in every process.
                return sorted(found, key=str) if isinstance(found, set) else found
    return value


def says_bad(label: Label, where: str) -> bool:
    """Whether a label calls an answer bad.

    Raises:
        DataError: it is no label that is known.
    """
    if label.word not in label.bad | label.good:
        raise unknown_word(label, label.bad | label.good, where)
    return label.word in label.bad


def unknown_word(label: Label, known: set[str], where: str) -> DataError:
    """What is wrong with a label that is none of these words."""
    return DataError(
        f"{where}: field '{label.column}': expected one of {', '.join(sorted(known))}, found "
        f"{label.word!r:.40}. Say in the recipe, or in a YAML file that names the data, what "
        "the words mean: labels: {bad: [WORD], good: [WORD]}."
    )
