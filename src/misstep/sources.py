"""Where data comes from: files, Hugging Face datasets, shipped suites; rows in, records out.

Reads JSON Lines, JSON, Parquet, CSV and Hugging Face datasets. The column names of common data
sets are known; others are mapped by a recipe's `fields`. Knows no model and no policy.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from misstep.errors import DataError
from misstep.records import (
    Instruction,
    Message,
    Mistake,
    MistakeSource,
    Prompt,
    digest,
    read_json_lines,
    refuse_half_characters,
)
from misstep.shelf import Names, Shelf
from misstep.suites import (
    Kinds,
    Part,
    Split,
    attacked_prompts,
    clean_prompts,
    names,
    suite_digest,
)

Row = tuple[str, dict[str, Any]]

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "objective"),
    "response": (
        *("response", "answer", "completion", "output", "rejected", "violating_answer"),
        "assistant_response",
    ),
    "reference": ("reference", "chosen", "safe_answer", "completion", "answer", "output"),
    "label": ("label", "is_bad", "unsafe", "harmful", "human_score"),
    "safe": ("is_safe", "safe"),
    "accept": ("accept",),
    "target": ("target",),
    "kind": ("kind", "attack", "category"),
    "topic": ("topic", "category"),
    "prompt_label": ("prompt_label", "prompt_harm_label"),
}
"""Our field names, each with the column names that are recognised unmapped, in this order."""

YES, NO = {"1", "true", "yes"}, {"0", "false", "no"}
BAD, GOOD = {"bad", "unsafe", "harmful"}, {"good", "safe", "harmless"}
LABELS = {"label": YES | BAD, "safe": NO | BAD}
"""What calls an answer bad; yes and no mean the opposite where the column says `safe`."""
PAIR = {n: (f"response_{n}", f"is_response_{n}_safe") for n in (0, 1)}
"""PKU-SafeRLHF's columns: two answers to one prompt, each with its label."""

XSTEST_PROMPTS = {"prompt", "type", "label", "focus"}
"""XSTest's columns; its `label` is of the prompt, safe or unsafe."""


Share = Annotated[float, Field(ge=0, le=1)]


class Source(BaseModel):
    """One place that data comes from: a shipped suite, a file, or a Hugging Face dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str | None = None
    """A shipped suite, such as `goal-hijacking`."""
    part: Part = "attacks"
    """Of a suite: its tasks under attack, or clean."""
    kinds: Kinds = "all"
    """Of a suite: every kind of attack, those that training may see, or the others."""
    split: str | None = None
    """Of a suite: train, dev or test. Of a Hugging Face dataset: its split."""
    path: str | None = None
    """A .jsonl, .json, .parquet or .csv file, or the name of a Hugging Face dataset."""
    fields: dict[str, str] = {}
    """Our field names, such as `prompt`, `response`, `reference` or `label`, mapped to the
    columns of the data; common names of columns need no mapping."""
    header: bool = True
    """Of a CSV file: whether its first line names the columns; without it the columns are
    `column0`, `column1`, ..."""
    encoding: str = "utf-8-sig"
    """Of a text file, such as `gb18030`."""
    target_pattern: str | None = None
    """A regular expression whose first group finds an attack's target text in the prompt."""
    questions: tuple[Share, Share] | None = None
    """Of a file or dataset: the questions whose place from 0 to 1, a hash of their text, is in
    this range, its end left out. Ranges that do not overlap have no question in common, in
    whatever files; `misstep judge train` holds out the lowest ones."""
    n: Annotated[int, Field(ge=1)] | None = None
    """At most so many, drawn by the run's seed; all where it is left out."""

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(fields) - set(COLUMNS))
        if unknown:
            raise ValueError(f"unknown field {unknown}; known are {', '.join(COLUMNS)}")
        return fields

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError as fault:
            raise ValueError("expected an encoding, such as utf-8-sig or gb18030") from fault
        return encoding

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

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.suite is None) == (self.path is None):
            raise ValueError("give either a suite or a path")
        if self.suite is not None and self.suite not in names():
            raise ValueError(f"no suite '{self.suite}'; shipped are {', '.join(names())}")
        if self.questions is not None and self.suite is not None:
            raise ValueError("questions are of a file or dataset; a suite has its splits")
        if self.questions is not None and self.questions[0] >= self.questions[1]:
            raise ValueError("questions: expected a range, such as [0.15, 1]")
        if self.suite is not None and self.split not in ("train", "dev", "test"):
            raise ValueError("a suite needs split: train, dev or test")
        if self.suite is not None and (self.split, self.kinds) == ("train", "unseen"):
            raise ValueError("a suite has no unseen kinds in its train part")
        return self

    @property
    def is_file(self) -> bool:
        """Whether the path names a file by its suffix."""
        return self.path is not None and Path(self.path).suffix in READERS


class Labelled(NamedTuple):
    """A prompt, an answer to it, and whether somebody called the answer bad."""

    prompt: Prompt
    response: str
    bad: bool


def check_source(source: Source) -> None:
    """Find what is wrong with a source before anything heavy starts.

    Raises:
        DataError: the file is absent, empty or unreadable in its first rows.
    """
    if source.suite is None and source.is_file and next(iter(rows(source)), None) is None:
        raise DataError(f"{source.path}: expected rows of data, found an empty file.")


def source_digest(source: Source) -> str:
    """Names a source by its content and by how it is read."""
    settings = source.model_dump(mode="json")
    if source.suite is not None:
        return digest([settings, suite_digest(source.suite)])
    if source.is_file:
        with Path(str(source.path)).open("rb") as file:
            return digest([settings, file_digest(file, "sha256").hexdigest()])
    return digest(settings)


def load_prompts(source: Source, seed: int) -> Sequence[Prompt]:
    """The prompts of a source, each once, in an order drawn by the seed.

    Raises:
        DataError: names file, line and field.
    """
    if source.suite is not None:
        return _suite_prompts(source, seed)
    seen, found = Names(), Shelf(Prompt)
    for where, row in rows(source):
        prompt = prompt_of(source, row, where)
        if wanted(source, prompt) and seen.add(_asked(prompt)):
            found.add(prompt)
    return found.draw(source.n, seed)


def load_mistakes(source: Source, kind: MistakeSource, seed: int) -> Sequence[Mistake]:
    """The bad answers of labelled data or of users' reports; reports are unconfirmed.

    Rows that are labelled good are no mistakes; the first good answer to a prompt becomes the
    reference of the bad ones. Rows without any label all count as bad.

    Raises:
        DataError: names file, line and field; or there is no bad answer in the data.
    """
    good, answers = Names(), 0
    for item in _labelled(source):
        answers += 1
        if not item.bad:
            good.add(_asked(item.prompt), item.response)
    seen, found = Names(), Shelf(Mistake)
    for item in _labelled(source):
        if item.bad:
            mistake = _mistake(item, kind, good.note(_asked(item.prompt)))
            if seen.add(mistake.id):
                found.add(mistake)
    if not found:
        raise DataError(
            f"{source.path}: expected bad answers, found none in {answers} answers. "
            "Check the label column and 'fields'."
        )
    return found.draw(source.n, seed)


def _labelled(source: Source) -> Iterator[Labelled]:
    for where, row in rows(source):
        for item in labelled_answers(source, row, where):
            if wanted(source, item.prompt):
                yield item


def wanted(source: Source, prompt: Prompt) -> bool:
    """Whether a prompt is among the questions that the source is about."""
    if source.questions is None:
        return True
    first, end = source.questions
    return first <= place_of(question_of(prompt)) < end


def question_of(prompt: Prompt) -> str:
    """What is asked, whatever its case and spacing: equal ones are one question."""
    whole = "\n\n".join(message.content for message in prompt.messages)
    return " ".join(whole.split()).casefold()


def place_of(question: str, seed: int = 0) -> float:
    """A number from 0 on and below 1 that depends on the question and the seed alone.

    So a question has one place, in whatever data set and beside whatever others it stands.
    """
    return int(sha256(f"{seed}|{question}".encode()).hexdigest()[:8], 16) / 2**32


def _asked(prompt: Prompt) -> str:
    """Names a prompt by its words alone, whatever else is known of it."""
    return digest([[m.role, m.content] for m in prompt.messages])


def _mistake(item: Labelled, kind: MistakeSource, good: str | None) -> Mistake:
    return Mistake(
        prompt=item.prompt.model_copy(update={"reference": item.prompt.reference or good}),
        response=item.response,
        source=kind,
        confirmed=kind != "reported",
    )


def _suite_prompts(source: Source, seed: int) -> Sequence[Prompt]:
    assert source.suite is not None
    split: Split = source.split  # type: ignore[assignment]  # checked by Source
    if source.part == "clean":
        return clean_prompts(source.suite, split, seed)[: source.n]
    wanted = source.n or len(clean_prompts(source.suite, split, seed))
    stream = attacked_prompts(source.suite, split, source.kinds, seed)
    return Shelf(Prompt, islice(stream, wanted))


def rows(source: Source) -> Iterator[Row]:
    """The rows of a file or dataset, each with the place it stands at.

    Raises:
        DataError: the file is absent, or a line of it is broken.
    """
    path = str(source.path)
    if source.is_file:
        if not Path(path).is_file():
            raise DataError(
                f"{path}: no such file. Check the path; it is read from where you are."
            )
        try:
            yield from READERS[Path(path).suffix](Path(path), source)
        except UnicodeDecodeError as fault:
            raise DataError(
                f"{path}: expected {source.encoding} text ({fault.reason}). Set 'encoding'."
            ) from fault
    else:
        yield from _hub_rows(path, source.split or "train")


def _jsonl(path: Path, source: Source) -> Iterator[Row]:
    for number, row in read_json_lines(path, source.encoding):
        yield f"{path}, line {number}", row


def _json(path: Path, source: Source) -> Iterator[Row]:
    try:
        data = json.loads(path.read_text(encoding=source.encoding))
    except json.JSONDecodeError as fault:
        raise DataError(f"{path}, line {fault.lineno}: no valid JSON ({fault.msg}).") from fault
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError(
            f"{path}: expected a list of objects. Use JSON Lines for anything else."
        )
    for number, row in enumerate(data, 1):
        refuse_half_characters(row, f"{path}, item {number}")
        yield f"{path}, item {number}", row


def _csv(path: Path, source: Source) -> Iterator[Row]:
    labels: list[str] = []
    for line, cells in _csv_rows(path, source):
        if not any(cells):
            continue
        if not labels:
            labels = cells if source.header else [f"column{i}" for i in range(len(cells))]
            if source.header:
                continue
        if len(cells) != len(labels):
            raise DataError(
                f"{path}, line {line}: expected {len(labels)} cells as in the first row, "
                f"found {len(cells)}. Quote cells that contain commas."
            )
        yield f"{path}, line {line}", dict(zip(labels, cells, strict=True))


def _csv_rows(path: Path, source: Source) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the line that it starts at."""
    with path.open(encoding=source.encoding, newline="") as file:
        comments = _comments(file) if source.header else 0
        reader = csv.reader(file, strict=True)
        line = 1 + comments
        try:
            for cells in reader:
                yield line, cells
                line = 1 + comments + reader.line_num
        except csv.Error as fault:
            raise DataError(
                f"{path}, line {line}: no valid CSV ({fault}). Check the quotes from there on."
            ) from fault


def _comments(file: TextIO) -> int:
    """Pass over the comment lines that PyRIT's files open with, and count them."""
    number = 0
    while True:
        start = file.tell()
        if not file.readline().startswith("#"):
            file.seek(start)
            return number
        number += 1


def _parquet(path: Path, _: Source) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as fault:
        raise DataError(f"{path}: expected a Parquet file ({fault}).") from fault
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as fault:
        raise DataError(
            f"{name}: neither a file (.jsonl, .json, .parquet, .csv) nor a Hugging Face "
            f"dataset that can be read here ({type(fault).__name__}: {fault})."
        ) from fault
    for number, row in enumerate(data, 1):
        yield f"{name}, {split}, row {number}", dict(row)


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _column(source: Source, row: Mapping[str, Any], field: str) -> Any:
    """A field's value: by the recipe's mapping, else by the first column name that is known."""
    if field in source.fields:
        return row.get(source.fields[field])
    if not source.header and field == "prompt":
        return row.get("column0")
    return next((row[name] for name in COLUMNS[field] if row.get(name) is not None), None)


def required(source: Source, row: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must hold text.

    Raises:
        DataError: it is absent, empty or no text.
    """
    value = _column(source, row, field)
    expected = (
        f"column '{source.fields[field]}'"
        if field in source.fields
        else (f"a column {' or '.join(repr(c) for c in COLUMNS[field][:3])}")
    )
    if value is None:
        raise DataError(
            f"{where}: field '{field}' is missing: expected {expected}, found columns "
            f"{', '.join(sorted(row))}. Map it with fields: {{{field}: COLUMN}}."
        )
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field '{field}': expected text, found {value!r:.60}.")
    return value.strip()


def _messages(source: Source, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    turns = row.get("messages")
    if turns is None or "prompt" in source.fields:
        return (Message(role="user", content=required(source, row, "prompt", where)),)
    try:
        found = tuple(Message(role=t["role"], content=t["content"]) for t in turns)
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(f"{where}: 'messages': expected role and content a turn.") from fault
    if not any(m.role == "user" for m in found):
        raise DataError(f"{where}: 'messages': expected a user turn, found none.")
    return found


def prompt_of(source: Source, row: Mapping[str, Any], where: str) -> Prompt:
    """What a row asks, and what it knows about answers.

    Raises:
        DataError: names the row and the field.
    """
    turns = _messages(source, row, where)
    known = Prompt(
        messages=turns[:-1] if turns[-1].role == "assistant" else turns,
        reference=_reference(source, row, turns, where),
        accept=tuple(str(key) for key in _listed(_column(source, row, "accept"))),
        kind=str(_column(source, row, "kind") or "plain"),
        topic=str(_column(source, row, "topic") or ""),
        unsafe=_unsafe(source, row, where),
        instructions=_instructions(row, where),
    )
    return known.model_copy(update={"target": _target(source, row, known.text)})


def _reference(
    source: Source, row: Mapping[str, Any], turns: tuple[Message, ...], where: str
) -> str | None:
    """A good answer. One that was labelled bad is none, whatever its column is called."""
    if _is_pair(source, row):
        return next((answer for answer, bad in _pair(row, where) if not bad), None)
    if turns[-1].role == "assistant":
        return turns[-1].content
    text = str(_column(source, row, "reference") or "").strip()
    if text == str(_column(source, row, "response") or "").strip():
        label = label_of(source, row, where)
        text = "" if label and label[0] in label[1] else text
    return text or None


def _unsafe(source: Source, row: Mapping[str, Any], where: str) -> bool | None:
    """Whether the prompt itself is labelled unsafe, as XSTest's and WildGuard's prompts are."""
    value = _column(source, row, "prompt_label")
    if value is None and set(row) >= XSTEST_PROMPTS:
        value = row["label"]
    if value is None or value == "":
        return None
    label = str(value).strip().lower()
    if label == "unharmful":
        return False
    return says_bad(label, YES | BAD, where, "prompt_label")


def _instructions(row: Mapping[str, Any], where: str) -> tuple[Instruction, ...]:
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


def _listed(value: Any) -> Iterable[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, (list, tuple)) else [value]


def _target(source: Source, row: Mapping[str, Any], text: str) -> str | None:
    if source.target_pattern is None:
        value = _column(source, row, "target")
        return str(value) if value else None
    match = re.search(source.target_pattern, text, re.IGNORECASE | re.DOTALL)
    return (match.group(1) or "").strip(" \"'.") or None if match else None


def labelled_answers(source: Source, row: Mapping[str, Any], where: str) -> Iterator[Labelled]:
    """The answers of one row: one, or two where the row is a pair.

    Raises:
        DataError: names the row and the field.
    """
    base = prompt_of(source, row, where)
    if _is_pair(source, row):
        for answer, bad in _pair(row, where):
            yield Labelled(base, answer, bad)
        return
    response = required(source, row, "response", where)
    reference = None if base.reference == response else base.reference
    known = base.model_copy(update={"reference": reference})
    yield Labelled(known, response, _is_bad(source, row, where))


def _is_pair(source: Source, row: Mapping[str, Any]) -> bool:
    return not source.fields and set(PAIR[0]) <= set(row)


def _pair(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, bool]]:
    """The two answers of a pair, and whether each is bad; an empty one is left out."""
    for columns in PAIR.values():
        for column in columns:
            if row.get(column) is None:
                raise DataError(f"{where}: field '{column}' is missing.")
        answer, label = (str(row[column]).strip() for column in columns)
        if answer:
            yield answer, says_bad(label.lower(), LABELS["safe"], where, columns[1])


def _is_bad(source: Source, row: Mapping[str, Any], where: str) -> bool:
    label = label_of(source, row, where)
    return True if label is None else says_bad(*label, where, "label")


def label_of(source: Source, row: Mapping[str, Any], where: str) -> tuple[str, set[str]] | None:
    """What a row is labelled, and which labels call it bad; a mapped column comes first.

    Without a label column there is no label; a label that was left out is a fault, since it
    says neither good nor bad.

    Raises:
        DataError: the label of this row was left out, or its mapped column is absent.
    """
    empty = None
    for field in [f for f in LABELS if f in source.fields] or LABELS:
        column = source.fields.get(field)
        if column is not None and column not in row:
            raise DataError(
                f"{where}: field '{field}' is missing: expected column '{column}', found "
                f"columns {', '.join(sorted(row))}."
            )
        value = _column(source, row, field)
        if value is not None:
            return str(value).strip().lower().removesuffix(".0"), LABELS[field]
        empty = next((c for c in (column, *COLUMNS[field]) if c in row), empty)
    if empty is not None:
        raise DataError(
            f"{where}: '{empty}': expected a label, found nothing. Label the row or remove it."
        )
    return None


def says_bad(label: str, bad: set[str], where: str, field: str) -> bool:
    """Whether a label calls an answer bad.

    Raises:
        DataError: it is no label that is known.
    """
    known = YES | NO | BAD | GOOD
    if label not in known:
        raise DataError(
            f"{where}: field '{field}': expected one of {', '.join(sorted(known))}, "
            f"found {label!r:.40}."
        )
    return label in bad
