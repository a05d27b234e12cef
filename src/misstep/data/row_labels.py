"""The labels of a row: what its columns say of each of its answers.

Words and votes are read by misstep.data.labels. Knows no prompt and no file.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from misstep.data.fields import COLUMNS, HARM, PKU, Reading, Row
from misstep.data.labels import LABELS, MISSING, Label, majority, says_bad
from misstep.data.tables import header_of
from misstep.errors import DataError, EmptyCell

PKU_TOPIC = "{response}_harm_category"
"""PKU-SafeRLHF's column that says what harm an answer does; not all of its versions have it."""
SAFE_RLHF = {"question", "answer", "label"}
PYRIT = {"objective", "assistant_response", "human_score"}
"""PyRIT's columns: with `harm_category` the score is of harm, without it of refusals."""
XSTEST_PROMPTS = {"prompt", "type", "label", "focus"}
"""XSTest's columns; its `label` is of the prompt, safe or unsafe, and of no answer."""


def sides(reading: Reading, row: Row) -> Sequence[Reading]:
    """How a row is read for each of its answers: once, or twice where it is PKU-SafeRLHF's."""
    if not reading.as_published or not set(PKU[0].values()) <= set(row):
        return (reading,)
    found = []
    for side in PKU:
        topic = PKU_TOPIC.format(**side)
        about = {"topic": topic} if topic in row else {}
        found.append(reading.model_copy(update={"fields": about | reading.fields | side}))
    return found


def label_of(
    reading: Reading, row: Row, where: str, meant: tuple[set[str], set[str]] | None = None
) -> Label | None:
    """What a row's answer is labelled; a mapped column comes first, and no column is no label.

    `meant` are the words by which votes say yes and no, where it is not bad and good.

    Raises:
        EmptyCell: the label was left out, or is votes without a majority, and so says neither
            good nor bad.
        DataError: the mapped column is absent, the label can be read in two ways, or another
            column says the opposite.
    """
    columns = list(_label_columns(reading, row, where))
    found = [label for of in columns if (label := _label(reading, row, *of, where, meant))]
    if found:
        _refuse_desirable(reading, row, found[0], where)
        _refuse_contradiction(found, where)
        return found[0]
    if columns:
        _, empty = columns[0]
        told = f"{where}: '{empty}': expected a label, found {row[empty]!r:.40}."
        raise EmptyCell(f"{told} Label the row or remove it.", "no label")
    return None


def _label_columns(reading: Reading, row: Row, where: str) -> Iterator[tuple[str, str]]:
    """The fields and columns that label an answer: mapped ones, or all that are known."""
    if not set(LABELS) & set(reading.fields):
        of_prompt = {"label"} if set(row) >= XSTEST_PROMPTS else set()
        for field in LABELS:
            yield from ((field, c) for c in COLUMNS[field] if c in row and c not in of_prompt)
        return
    for field in LABELS:
        mapped = reading.fields.get(field)
        if mapped is not None and mapped not in row:
            raise DataError(
                f"{header_of(where)}: field '{field}' is missing: expected column '{mapped}', "
                f"found columns {', '.join(sorted(row))}."
            )
        if mapped is not None:
            yield field, mapped


def _label(
    reading: Reading,
    row: Row,
    field: str,
    column: str,
    where: str,
    meant: tuple[set[str], set[str]] | None,
) -> Label | None:
    """What a column says of an answer, if anything."""
    mapped = reading.labels is not None
    bad, good = both = reading.labels.meant if reading.labels else LABELS[field]
    votes = both if mapped or meant is None else meant
    word = majority(row[column], MISSING - bad - good, votes, f"{where}: '{column}'")
    return None if word is None else Label(word, column, bad, good, mapped)


def _refuse_contradiction(labels: Sequence[Label], where: str) -> None:
    """Refuse an answer that one column calls bad and one of harm calls good, or the reverse."""
    first, *others = labels
    for other in others if first.word in first.bad | first.good else ():
        opposite = other.good if first.word in first.bad else other.bad
        if other.column in HARM and other.word in opposite:
            raise DataError(
                f"{where}: expected labels that agree, found '{first.column}': {first.word} "
                f"beside '{other.column}': {other.word}, of which one calls the answer bad and "
                "one good. Correct the row, or map the column that counts with fields: "
                "{label: COLUMN} where 1 is bad, {safe: COLUMN} where 1 is good."
            )


def refuse_prompt_label(row: Row, where: str) -> None:
    """Refuse an answer without a label where the row has one that is of the prompt.

    Raises:
        DataError: the row has XSTest's columns.
    """
    if set(row) >= XSTEST_PROMPTS:
        raise DataError(
            f"{where}: expected to know which answers are bad; XSTest's 'label' says it of the "
            "prompt, and no other column of the answer. Map the answers' own with "
            "--field label=COLUMN (in a recipe fields: {label: COLUMN}), or leave 'label' out "
            "of the file."
        )


def _refuse_desirable(reading: Reading, row: Row, label: Label, where: str) -> None:
    unmapped = not label.mapped and not set(LABELS) & set(reading.fields)
    true_or_false = label.column == "label" and label.word in ("true", "false")
    if unmapped and true_or_false and "completion" in row:
        raise DataError(
            f"{where}: 'label': expected to know what true means beside a 'completion': to TRL "
            "that the answer is good, here that it is bad. Say which it is: fields: {safe: "
            "label} where true is good, {label: label} where true is bad."
        )


def labels_say(
    reading: Reading, row: Row
) -> tuple[Literal["harm", "refusal"], list[str]] | None:
    """What the labels of a known set are of, and the columns that tell; none where mapped."""
    columns = set(row)
    if "label" in reading.fields:
        return None
    if "safe" in reading.fields:
        return "harm", [reading.fields["safe"]]
    if HARM & columns:
        return "harm", sorted(HARM & columns)
    if columns >= PYRIT:
        return ("harm" if "harm_category" in columns else "refusal"), sorted(PYRIT)
    return ("harm", sorted(SAFE_RLHF)) if columns >= SAFE_RLHF else None


def is_bad(reading: Reading, row: Row, where: str) -> bool:
    """Whether a row's answer is a mistake; without any label it is.

    Raises:
        DataError: the label is none that is known, was left out, or says something else.
    """
    label = label_of(reading, row, where)
    said = labels_say(reading, row)
    if said and said[0] == "refusal":
        raise DataError(
            f"{where}: expected labels that say whether the answer is bad, found PyRIT's that "
            "say whether it refuses (there is no 'harm_category'). Give other data, or map the "
            "column with fields: {label: COLUMN}."
        )
    if label is None:
        refuse_prompt_label(row, where)
        return True
    return says_bad(label, where)
