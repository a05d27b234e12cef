"""What a row of data means: columns in; a prompt, answers to it and their labels out.

The columns of common data sets are known, others are mapped by `fields`. A prompt or an answer
is text, or the turns of a conversation. Knows no file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from misstep.data.labels import (
    LABELS,
    MISSING,
    NO,
    Label,
    LabelWords,
    majority,
    nested,
    says_bad,
    word_of,
)
from misstep.data.tables import header_of
from misstep.documents import Settings, suggestion
from misstep.errors import DataError, EmptyCell
from misstep.records import Instruction, Message, Prompt, Role

Row = Mapping[str, Any]
Turns = tuple[Message, ...]

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
WORDS = {"response": "answer"}
"""Field names in the words of a reason."""
APART = "instruction"
"""The column whose prompt goes on in another one: Alpaca's in `input`, Dolly's in `context`."""

DIALOGUE = re.compile(r"\s*Human:")
"""How hh-rlhf's dialogues open, each of them one text."""

LAYOUT = {"prompt", "response", "reference", "label", "safe"}
"""The fields of which one that is mapped says that the rows are laid out otherwise."""

PKU = tuple({"response": f"response_{n}", "safe": f"is_response_{n}_safe"} for n in (0, 1))
"""PKU-SafeRLHF's columns: two answers to one prompt, each with its label."""
PKU_TOPIC = "{response}_harm_category"
"""The column that says what harm one of them does, which not all of its versions have."""
SAFE = {*COLUMNS["safe"], *(side["safe"] for side in PKU)}
"""Columns that call an answer good where they say yes."""
HARM = {*SAFE, "unsafe", "harmful", "is_bad"}
"""Columns whose labels speak of harm and of nothing else."""
SAFE_RLHF = {"question", "answer", "label"}
PYRIT = {"objective", "assistant_response", "human_score"}
"""PyRIT's columns: with `harm_category` the score is of harm, without it of refusals."""
XSTEST_PROMPTS = {"prompt", "type", "label", "focus"}
"""XSTest's columns; its `label` is of the prompt, safe or unsafe, and of no answer."""


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


class Answer(NamedTuple):
    """An answer and the conversation that it ends."""

    messages: Turns
    text: str


Asked = tuple[Turns, str | None]
"""What is asked, and the answer that it ends with."""


class Labelled(NamedTuple):
    """A prompt, an answer to it, and whether the answer counts as bad."""

    prompt: Prompt
    response: str
    bad: bool
    labelled: bool
    """Whether somebody said so; without any label it is bad."""


def instances_of(reading: Reading, row: Row) -> Iterator[dict[str, Any]]:
    """The row itself, or Self-Instruct's and Super-NaturalInstructions' `instances` of it.

    Each instance is a row of its own: an input and an output to the same instruction.
    """
    row = _plainly_named(reading, row)
    instances = row.get("instances") or ()
    nested = _is_list(instances) and all(isinstance(each, Mapping) for each in instances)
    if nested and APART in row and reading.as_published:
        yield from (_without_nan({**row, **each}) for each in instances)
    else:
        yield _without_nan(row)


def _plainly_named(reading: Reading, row: Row) -> Row:
    """The row with known names of columns as they are known, as `prompt` for `Prompt `.

    A name that is mapped stays, and so does one of which there is another spelling.
    """
    if KNOWN.issuperset(row):
        return row
    plain = {name: name.strip().casefold() for name in row}
    often = Counter(plain.values())
    mapped = set(reading.fields.values())
    return {
        plain[name]
        if plain[name] in KNOWN and often[plain[name]] == 1 and name not in mapped
        else name: value
        for name, value in row.items()
    }


def _without_nan(row: Row) -> dict[str, Any]:
    """The row with nothing where pandas has written NaN for it."""
    return {
        name: None if isinstance(value, float) and isnan(value) else value
        for name, value in row.items()
    }


def column_of(reading: Reading, row: Row, field: str) -> Any:
    """A field's value: by the recipe's mapping, else by the first column name that is known."""
    name = _name_of(reading, row, field)
    return None if name is None else row.get(name)


def _name_of(reading: Reading, row: Row, field: str) -> str | None:
    """The column that holds a field."""
    if field in reading.fields:
        return reading.fields[field]
    for name in COLUMNS[field]:
        if row.get(name) is not None:
            return name
    return None


def _refused(reading: Reading, row: Row, field: str, where: str) -> DataError:
    """What is wrong with a field that holds no text: it is absent, empty, or something else."""
    value, mapped = column_of(reading, row, field), reading.fields.get(field)
    names = COLUMNS[field] if mapped is None else (mapped,)
    if value is None and not set(names) & set(row):
        if field == "response" and mapped is None and row.get("messages"):
            return DataError(
                f"{where}: 'messages': expected turns that end with the assistant's, which is "
                "the answer, found the user's at the end. Add it, or name its column with "
                "fields: {response: COLUMN}."
            )
        known = "a column " + " or ".join(map(repr, names[:3]))
        expected = known if mapped is None else f"column '{mapped}'"
        return DataError(
            f"{header_of(where)}: field '{field}' is missing: expected {expected}, found "
            f"columns {', '.join(sorted(row))}. Map it with fields: {{{field}: COLUMN}}."
        )
    told = f"{where}: field '{field}': expected text or turns, found {value!r:.60}."
    empty = value is None or (isinstance(value, str) and not value.strip()) or value == []
    if empty:
        lacking = f"no {WORDS.get(field, field)}"
        return EmptyCell(f"{told} Fill the cell, or remove the row.", lacking)
    return DataError(f"{told} Map another column with fields: {{{field}: COLUMN}}.")


def _turns(value: Any, field: str, where: str) -> Turns:
    """The turns of a conversation in which somebody asks or answers."""
    turns = []
    for number, turn in enumerate(value, 1):
        try:
            turns.append(Message(role=turn["role"], content=turn["content"]))
        except (KeyError, TypeError, ValueError) as fault:
            raise DataError(
                f"{where}: '{field}': expected turns with a role ({', '.join(get_args(Role))}) "
                f"and text as content, found as turn {number}: {turn!r:.80}."
            ) from fault
    return tuple(turns)


def _read_turns(value: Any) -> Any:
    """The turns of which a cell is the text, as CSV has them; anything else as it is."""
    found = nested(value)
    turns = _is_list(found) and all(isinstance(turn, Mapping) for turn in found)
    return found if turns and all({"role", "content"} <= set(turn) for turn in found) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def _asked(reading: Reading, row: Row, where: str) -> Asked:
    """What the column of the prompt asks, if there is one, and the answer that it ends with."""
    chat = "prompt" not in reading.fields and row.get("messages") is not None
    field, value = "prompt", column_of(reading, row, "prompt")
    if chat:
        field, value = "messages", row["messages"]
    value = _read_turns(value)
    if chat or _is_list(value):
        turns = _turns(value, field, where)
        if not any(turn.role == "user" for turn in turns):
            raise DataError(f"{where}: '{field}': expected a user turn, found none.")
        answered = turns[-1].role == "assistant"
        return (turns[:-1], turns[-1].content) if answered else (turns, None)
    if isinstance(value, str) and value.strip():
        text = f"{value.strip()}\n\n{_context(reading, row, where)}".strip()
        return (Message(role="user", content=text),), None
    if value is None and field not in reading.fields:
        return (), None
    raise _refused(reading, row, field, where)


def _context(reading: Reading, row: Row, where: str) -> str:
    """What a prompt is about, where the row keeps it apart."""
    if "context" not in reading.fields and _name_of(reading, row, "prompt") != APART:
        return ""
    value = column_of(reading, row, "context")
    if value is not None and not isinstance(value, str):
        raise _refused(reading, row, "context", where)
    return (value or "").strip()


def _answer(
    reading: Reading, row: Row, field: str, where: str, before: Asked | None = None
) -> Answer | None:
    """An answer, if there is one; one that is turns brings its conversation with it.

    `before` is what the row asks, where that is known.
    """
    asked, own = before or _asked(reading, row, where)
    value = _read_turns(column_of(reading, row, field))
    if value is None and field == "response" and field not in reading.fields:
        value = own
    turns: Turns = ()
    if _is_list(value):
        turns, value = _ended(_turns(value, field, where), field, where)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _refused(reading, row, field, where)
    whole = bool(turns) and turns[0].role != "assistant"
    messages = turns if whole else (*asked, *turns)
    if not any(turn.role == "user" for turn in messages):
        if DIALOGUE.match(str(value)):
            raise DataError(
                f"{where}: field '{field}': expected an answer or turns, found a dialogue as "
                "one text ('Human: …'), which is not taken apart. Make turns of it: a list of "
                "objects with 'role' (user, assistant) and 'content'."
            )
        raise _refused(reading, row, "prompt", where)
    return Answer(messages, str(value).strip())


def _ended(turns: Turns, field: str, where: str) -> tuple[Turns, str]:
    """The turns before an answer, and the answer, which is the last."""
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: '{field}': expected turns that end with the assistant's, found the "
            f"{turns[-1].role}'s at the end."
        )
    return turns[:-1], turns[-1].content


def answer_of(reading: Reading, row: Row, field: str, where: str) -> Answer:
    """An answer that must be there, with the conversation that it ends.

    Raises:
        EmptyCell: its column is there and empty.
        DataError: there is none, or it is neither text nor turns.
    """
    found = _answer(reading, row, field, where)
    if found is None:
        raise _refused(reading, row, field, where)
    return found


def prompt_of(reading: Reading, row: Row, where: str) -> Prompt:
    """What a row asks, and what it knows about answers.

    Raises:
        DataError: names the row and the field.
    """
    good = next(_good_answers(reading, row, where), None)
    if good is not None:
        return _prompt(reading, row, where, good.messages, good.text)
    asked, _ = _asked(reading, row, where)
    if not asked and (bad := _answer(reading, row, "response", where)):
        asked = bad.messages
    if not asked:
        raise _refused(reading, row, "prompt", where)
    return _prompt(reading, row, where, asked, None)


def prompt_for(reading: Reading, row: Row, answer: Answer, where: str) -> Prompt:
    """What was asked for an answer of this row; another good answer to it is the reference.

    Raises:
        DataError: names the row and the field.
    """
    others = (
        good.text
        for good in _good_answers(reading, row, where)
        if good.messages == answer.messages and good.text.strip() != answer.text
    )
    return _prompt(reading, row, where, answer.messages, next(others, None))


def _prompt(
    reading: Reading, row: Row, where: str, messages: Turns, reference: str | None
) -> Prompt:
    return Prompt(
        messages=messages,
        reference=reference,
        target=_target(reading, row, messages),
        accept=_keys(column_of(reading, row, "accept")),
        kind=", ".join(names_of(column_of(reading, row, "kind"))) or "plain",
        topic=", ".join(names_of(column_of(reading, row, "topic"))),
        unsafe=_unsafe(reading, row, where),
        instructions=_instructions(row, where),
    )


def _good_answers(reading: Reading, row: Row, where: str) -> Iterator[Answer]:
    """The good answers of a row; one that was labelled bad is none, whatever its column."""
    of = sides(reading, row)
    if len(of) > 1:
        answers = ((side, _answer(side, row, "response", where)) for side in of)
        yield from (a for side, a in answers if a and not is_bad(side, row, where))
        return
    asked, own = before = _asked(reading, row, where)
    response = _answer(reading, row, "response", where, before)
    reference = _answer(reading, row, "reference", where, before)
    for good in (own and Answer(asked, own), reference):
        if not good:
            continue
        labelled = response is not None and good.text.strip() == response.text
        label = label_of(reading, row, where) if labelled else None
        if label is None or label.word not in label.bad:
            yield good


def names_of(value: Any) -> tuple[str, ...]:
    """The names that a cell holds; BeaverTails says of each category whether it applies."""
    value = nested(value)
    if not value:
        return ()
    if isinstance(value, Mapping):
        return tuple(str(name) for name, applies in value.items() if _applies(applies))
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def _applies(said: Any) -> bool:
    """Whether a category applies; false and no may be written as words."""
    return word_of(said) not in NO | MISSING


def _keys(value: Any) -> tuple[str, ...]:
    """The keys of a cell, which may be one, a list, or in CSV the text of a list."""
    if value is None or value == "":
        return ()
    found = nested(value)
    listed = found if isinstance(found, (list, tuple)) else [value]
    # A column of whole numbers is one of fractions where a cell of it is empty.
    return tuple(
        str(int(key)) if isinstance(key, float) and key.is_integer() else str(key)
        for key in listed
    )


def _target(reading: Reading, row: Row, messages: Turns) -> str | None:
    if reading.target_pattern is None:
        value = column_of(reading, row, "target")
        return str(value) if value else None
    text = Prompt(messages=messages).text
    match = re.search(reading.target_pattern, text, re.IGNORECASE | re.DOTALL)
    return (match.group(1) or "").strip(" \"'.") or None if match else None


def _unsafe(reading: Reading, row: Row, where: str) -> bool | None:
    """Whether the prompt itself is labelled unsafe, as XSTest's and WildGuard's prompts are."""
    value = column_of(reading, row, "prompt_label")
    if value is None and set(row) >= XSTEST_PROMPTS:
        value = row["label"]
    word = word_of("" if value is None else value)
    bad, good = LABELS["label"]
    if word in bad | good:
        return word in bad
    if word not in MISSING and "prompt_label" in reading.fields:
        raise DataError(
            f"{where}: field 'prompt_label': expected one of {', '.join(sorted(bad | good))}, "
            f"found {word!r:.40}. Leave the row or the mapping out."
        )
    return None


def _instructions(row: Row, where: str) -> tuple[Instruction, ...]:
    """IFEval's columns: the names of checkable instructions, and the arguments of each."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if names is None or arguments is None:
        return ()
    try:
        return tuple(
            # Parquet gives each instruction the arguments of all, those of others empty.
            Instruction(name=n, arguments={k: v for k, v in of.items() if v is not None})
            for n, of in zip(names, arguments, strict=True)
        )
    except (ValueError, TypeError, AttributeError) as fault:
        raise DataError(
            f"{where}: expected a list of names as 'instruction_id_list' and a list of as many "
            f"objects as 'kwargs' ({type(fault).__name__})."
        ) from fault


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


def labelled_answers(reading: Reading, row: Row, where: str) -> Iterator[Labelled]:
    """The answers of one row: one, or two where the row is a pair; its empty ones are left out.

    Raises:
        DataError: names the row and the field.
    """
    of = sides(reading, row)
    for side in of:
        try:
            answer = answer_of(side, row, "response", where)
        except EmptyCell:
            if len(of) == 1:
                raise
            continue
        prompt = prompt_for(reading, row, answer, where)
        said = label_of(side, row, where) is not None
        yield Labelled(prompt, answer.text, is_bad(side, row, where), said)


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
