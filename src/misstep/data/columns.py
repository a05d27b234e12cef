"""What a row of data means: columns in; a prompt, answers to it and their labels out.

A prompt or an answer is text, or the turns of a conversation. Knows no file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any, NamedTuple, get_args

from misstep.data.fields import COLUMNS, KNOWN, Reading, Row
from misstep.data.labels import LABELS, MISSING, NO, nested, word_of
from misstep.data.row_labels import XSTEST_PROMPTS, is_bad, label_of, sides
from misstep.data.tables import header_of
from misstep.errors import DataError, EmptyCell
from misstep.records import Instruction, Message, Prompt, Role

Turns = tuple[Message, ...]

WORDS = {"response": "answer"}
"""Field names in the words of a reason."""
APART = "instruction"
"""The column whose prompt goes on in another one: Alpaca's in `input`, Dolly's in `context`."""

DIALOGUE = re.compile(r"\s*Human:")
"""How hh-rlhf's dialogues open, each of them one text."""


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
