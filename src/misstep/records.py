"""The records that stages hand to each other, and their files.

Every record is frozen and named by the hash of its content, so equal work has an equal name:
caching, resuming and removing duplicates need no code of their own. This module knows JSON
Lines; it knows no model, no policy and no judge.
"""

import gzip
import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TextIO, TypeVar
from uuid import uuid4

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from misstep.errors import DataError

Role = Literal["system", "user", "assistant"]
MistakeSource = Literal["origin", "reported", "induced"]


# Made once, since most of what is named is named through it.
ENCODER = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), check_circular=False
)


def digest(value: object) -> str:
    """16 hexadecimal digits that name a JSON-serialisable value by its content."""
    return sha256(ENCODER.encode(value).encode()).hexdigest()[:16]


def text_digest(value: object) -> str:
    """The same name in less time, of a value that holds texts, truths and whole numbers alone.

    A fraction such as 0.00001 is written otherwise by this library than by Python, and by each
    of its versions otherwise, so that its name would not last.
    """
    return sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class Record(BaseModel):
    """A frozen record; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @cached_property
    def id(self) -> str:
        """The record's name: a hash of its content."""
        return digest(self.model_dump(mode="json"))

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Self:
        """A copy with changed fields, and so with a name of its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("id", None)
        return copy


class TextRecord(Record):
    """A record of texts, of which there may be millions: named in less time.

    The arguments of an instruction are the only place for a fraction, and IFEval's have none.
    """

    @cached_property
    def id(self) -> str:
        """The record's name: a hash of its content."""
        return text_digest(self.model_dump(mode="json"))


# Seeds and file names follow a record's content: where one of these fields says nothing, the
# record is written and named as if the field did not exist.
KNOWN = Field(exclude_if=partial(operator.is_, None))
"""A field that is written only where it is known."""
SOME = Field(exclude_if=operator.not_)
"""A field that is written only where it is true, or holds something."""


class Message(TextRecord):
    """One turn of a conversation."""

    role: Role
    content: str


class Instruction(Record):
    """A checkable demand that a prompt makes of its answer, as IFEval writes it."""

    name: str
    """Such as `length_constraints:number_words`."""
    arguments: dict[str, Any] = {}


class Prompt(TextRecord):
    """What a model is asked, and what is known about a good or a bad answer to it."""

    messages: tuple[Message, ...]
    reference: str | None = None
    """A good answer, where one is known."""
    accept: tuple[str, ...] = ()
    """Keys, one of which a helpful answer contains; none stands in the prompt itself."""
    target: str | None = None
    """The text that an attack wants the model to say."""
    kind: str = "plain"
    """The kind of attack, or `plain`."""
    topic: str = ""
    unsafe: Annotated[bool | None, KNOWN] = None
    """Whether a good answer refuses; None where nobody has said so."""
    instructions: Annotated[tuple[Instruction, ...], SOME] = ()

    @classmethod
    def of(cls, text: str, **known: Any) -> Self:
        """A prompt of one user turn."""
        return cls(messages=(Message(role="user", content=text),), **known)

    @property
    def text(self) -> str:
        """The last user turn."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def conversation(self) -> str:
        """All turns without their roles; equal ones are one prompt."""
        return "\n\n".join(message.content for message in self.messages)

    @property
    def transcript(self) -> str:
        """All turns with their roles; a lone user turn stands for itself."""
        first = self.messages[0]
        if len(self.messages) == 1 and first.role == "user":
            return first.content
        return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in self.messages)


class Response(TextRecord):
    """A model's answer to a prompt."""

    prompt: Prompt
    text: str
    model: str = ""
    """The engine's identity: weights, adapter and backend."""
    guided: bool = False
    truncated: bool = False
    """Whether the answer stopped at the token limit."""
    error: Annotated[str | None, KNOWN] = None
    """Why there is no answer; the text is then empty."""


class Mistake(TextRecord):
    """A prompt with a bad answer to it."""

    prompt: Prompt
    response: str
    source: MistakeSource
    confirmed: bool = True
    """False for a user's report that no judge and no person has confirmed."""
    truncated: Annotated[bool, SOME] = False
    """Whether the response stopped at the token limit; no part of the mistake's name."""

    @cached_property
    def id(self) -> str:
        """The mistake's name: what was said to what, however it ended."""
        # Analyses are sampled by this name, and a limit draws by it.
        return text_digest(self.model_dump(mode="json", exclude={"truncated"}))


class Analysis(TextRecord):
    """An explanation of what is wrong with a mistake, and the gate's verdict on it."""

    mistake: Mistake
    text: str
    guided: bool
    source: str
    """`self`, or the name of the model that wrote it."""
    accepted: bool
    reasons: tuple[str, ...] = ()
    """Why the gate refused it; empty where it was accepted."""


class Praise(TextRecord):
    """An explanation of what is right about a good answer, and the gate's verdict on it."""

    prompt: Prompt
    """Its reference is the good answer."""
    text: str
    guided: bool
    source: str
    """`self`, or the name of the model that wrote it."""
    accepted: bool
    reasons: tuple[str, ...] = ()
    """Why the gate refused it; empty where it was accepted."""


class Revision(TextRecord):
    """A critique of a mistake, and a better response that the critique led to."""

    mistake: Mistake
    critique: str
    text: str


class Example(TextRecord):
    """One training row: loss falls on the completion and on nothing else."""

    messages: tuple[Message, ...]
    completion: str
    kind: str
    """What it teaches, such as `analysis`, `ordinary` or `good_answer`."""
    prefill: str = ""
    """How the answer begins before the completion; context, like the messages."""


class Pair(TextRecord):
    """One row of preference training: two completions of which the first is to be preferred."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str = "preference"


VERDICTS = ("mistake_rate", "helpfulness", "over_refusal", "unsafe_refusal", "refusal_rate")
"""Metrics that are shares of verdicts, also where a judge gives probabilities."""
VERDICT_FROM = 0.5
"""A score from here on is the verdict 1."""


def base_metric(metric: str) -> str:
    """A metric without the name of its judge, which only the second judge's has."""
    return metric.partition("@")[0]


class Score(Record):
    """A judge's number for one response, or the reason why there is none."""

    response_id: str
    metric: str
    value: float | None
    judge: str
    reason: str = ""
    cases: Annotated[int, Field(exclude_if=lambda cases: cases == 1)] = 1
    """How many cases the value is the share of, such as the instructions of one prompt."""
    votes: Annotated[tuple[float | None, ...], SOME] = ()
    """What each said where several were asked; None for one that said nothing."""

    @property
    def counted(self) -> float | None:
        """What a rate counts: a probability as the verdict that it comes to; else the value."""
        if self.value is None or base_metric(self.metric) not in VERDICTS:
            return self.value
        return float(self.value >= VERDICT_FROM)

    @property
    def scored(self) -> bool:
        """Whether the judge gave a number; an unscored response is neither good nor bad."""
        return self.value is not None


class Answer(Record):
    """One response of the evaluation and the setting that it was given in."""

    method: str
    guided: bool
    test_set: str
    seed: int
    response: Response


class Judgement(Record):
    """One score of the evaluation and the setting of the response that it is for."""

    method: str
    guided: bool
    test_set: str
    seed: int
    score: Score

    @classmethod
    def of(cls, answer: Answer, score: Score) -> Self:
        """A score in the setting of its answer."""
        return cls(
            method=answer.method,
            guided=answer.guided,
            test_set=answer.test_set,
            seed=answer.seed,
            score=score,
        )


R = TypeVar("R", bound=Record)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a killed process leaves the old one or the new one.

    Several processes may do so at once, as a report of a run that goes on; the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data in one step so that equal data are equal bytes; not a number is an error."""
    text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, kind: type[R]) -> R:
    """Read a file that is one record.

    Raises:
        DataError: the file is absent, is no JSON, or a field of it is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path."
        ) from error
    except ValidationError as error:
        raise DataError(f"{path}: " + "; ".join(describe(error))) from error


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write records one a line, in one step; for one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written for hours, it may be large when its process is killed: the next one overwrites it.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(record.model_dump_json() + "\n")
    temporary.replace(path)


def read_jsonl(path: Path, kind: type[R]) -> Iterator[R]:
    """Read records of one kind.

    Raises:
        DataError: the file is absent, or a line is no such record; names the line and field.
    """
    try:
        for number, line in _lines(path, "utf-8-sig"):
            yield _record(kind, line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error.reason}).") from error


def _record(kind: type[R], line: str, where: str) -> R:
    """Parse a line in one step; only one that is no such record is looked at closely."""
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        return parse_row(kind, _object(line, where), where)


class RecordFile(Generic[R]):
    """The records of one file, read anew whenever they are gone through; none is held."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        self.kind = kind

    def fill(self, records: Iterable[R]) -> Self:
        """Write the file, record by record as they come; its name appears with the last."""
        write_jsonl(self.path, records)
        return self

    def __iter__(self) -> Iterator[R]:
        return read_jsonl(self.path, self.kind)


def read_json_lines(
    path: Path, encoding: str = "utf-8-sig"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers; blank lines are skipped.

    Raises:
        DataError: the file is absent, or a line is no JSON object of whole characters.
    """
    for number, line in _lines(path, encoding):
        yield number, _object(line, f"{path}, line {number}")


def open_text(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    """Open a file of text, which gzip has packed where its name says so."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    return path.open(encoding=encoding, newline=newline)


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    try:
        file = open_text(path, encoding)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path."
        ) from error
    with file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: expected one JSON object a line, found text that is no JSON "
            f"({error.msg} at column {error.colno})."
        ) from error
    except ValueError as error:
        # Such as a number of thousands of digits.
        raise DataError(f"{where}: JSON that Python does not read ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    # Text that was decoded can hold half a character only by an escape.
    if "\\u" in line:
        refuse_half_characters(row, where)
    return row


def refuse_half_characters(row: Mapping[str, Any], where: str) -> None:
    """Refuse half of a character: JSON can spell it, but nothing can write or hash it.

    Raises:
        DataError: names the field.
    """
    for field, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DataError(
                f"{where}: field '{field}': expected whole characters, found a half: {half}."
            ) from error


def parse_row(kind: type[R], row: dict[str, Any], where: str) -> R:
    """Make a record of a row, or say which field is wrong.

    Raises:
        DataError: names every wrong field, with what was expected and what was found.
    """
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        raise DataError(f"{where}: " + "; ".join(describe(error))) from error


def describe(error: ValidationError) -> list[str]:
    """One phrase for each fault that pydantic found: field, expected, found."""
    phrases = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"]) or "the whole"
        found = repr(fault["input"])
        found = found if len(found) <= 60 else found[:57] + "..."
        what = fault["msg"][0].lower() + fault["msg"][1:]
        phrases.append(f"{field}: {what} (found {found})")
    return phrases
