"""Where data comes from: a shipped suite, a file or a Hugging Face data set; records come out.

A source is read row by row (misstep.data.tables), and its rows are understood by their columns
(misstep.data.columns). Knows no model and no policy.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Annotated, Any

from pydantic import Field, field_validator, model_serializer, model_validator

from misstep.data.columns import Labelled, instances_of, labelled_answers, prompt_of
from misstep.data.fields import Reading
from misstep.data.shelf import Names, Shelf
from misstep.data.suites import (
    Kinds,
    Part,
    Split,
    Topics,
    attacked_prompts,
    clean_prompts,
    names,
    suite_digest,
)
from misstep.data.tables import (
    Form,
    HubData,
    PlacedRow,
    check_hub_name,
    file_content,
    file_rows,
    hub_content,
    hub_rows,
    is_file_name,
)
from misstep.documents import suggestion
from misstep.errors import DataError, NoPrompts
from misstep.records import Mistake, MistakeSource, Prompt, digest, text_digest

ENCODING = "utf-8-sig"
Share = Annotated[float, Field(ge=0, le=1)]


class Source(Reading):
    """One place that data comes from: a shipped suite, a file, or a Hugging Face data set."""

    suite: str | None = None
    """A shipped suite, such as `goal-hijacking`."""
    part: Part = "attacks"
    """Of a suite: its tasks under attack, or clean."""
    kinds: Kinds = "all"
    """Of a suite: every kind of attack, those that training may see, or the others."""
    topics: Topics = "all"
    """Of a suite: tasks of every topic, of those that its train part has, or of the others."""
    split: str | None = None
    """Of a suite: train, dev or test. Of a Hugging Face data set: its split, or `train`."""
    path: str | None = None
    """A .jsonl, .json, .csv or .tsv file, each also as .gz, or a .parquet file; or the name of
    a Hugging Face data set."""
    subset: str | None = None
    """Of a Hugging Face data set that has several: which one."""
    revision: str | None = None
    """Of a Hugging Face data set: a branch, a tag or a commit."""
    header: bool = True
    """Of a CSV or TSV file: whether its first line names the columns; without it the columns
    are `column0`, `column1`, ..., and the first holds the prompts."""
    encoding: str = ENCODING
    """Of a text file, such as `gb18030`."""
    questions: tuple[Share, Share] | None = None
    """Of a file or data set: the questions whose place from 0 to 1, a hash of their text, is in
    this range, its end left out. Ranges that do not overlap have no question in common, in
    whatever files; `misstep judge train` with its default seed holds out the lowest ones."""
    answered: bool = False
    """Of prompts and mistakes in a file or data set: only those that have a good answer, so
    that every method has one to learn from; of mistakes, those whose prompt was answered well
    somewhere in the data. A suite's tasks all have one; data for judges are read whole."""
    n: Annotated[int, Field(ge=1)] | None = None
    """At most so many, drawn by the run's seed; all where it is left out."""

    @model_serializer(mode="wrap")
    def _without_absent_keys(
        self, write: Callable[["Source"], dict[str, Any]]
    ) -> dict[str, Any]:
        # A source is named by its keys: one that is not given does not change its name.
        none = dict.fromkeys(("subset", "revision", "labels"))
        added_later = {"topics": "all", "answered": False, **none}
        return {
            key: value
            for key, value in write(self).items()
            if key not in added_later or value != added_later[key]
        }

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError as fault:
            raise ValueError("expected an encoding, such as utf-8-sig or gb18030") from fault
        return encoding

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
        of_suite = (self.part, self.kinds, self.topics)
        if self.path is not None and of_suite != ("attacks", "all", "all"):
            raise ValueError("part, kinds and topics are of a suite, found beside a path")
        read = (self.fields, self.labels, self.target_pattern)
        if self.suite is not None and (
            any(read) or not self.header or self.encoding != ENCODING
        ):
            raise ValueError(
                "fields, labels, target_pattern, header and encoding are of a path, found "
                "beside a suite"
            )
        if (self.subset or self.revision) and (self.path is None or self.is_file):
            raise ValueError("subset and revision are of a Hugging Face data set")
        if self.split and self.is_file:
            raise ValueError(
                "split is of a suite or of a Hugging Face data set; a file is one whole: take "
                "parts of it by questions, such as [0.15, 1]"
            )
        if self.suite is not None and self.split not in ("train", "dev", "test"):
            raise ValueError("a suite needs split: train, dev or test")
        if self.suite is not None and self.split != "test" and self.topics == "unseen":
            raise ValueError("a suite has unseen topics in its test part alone")
        if self.suite is not None and (self.split, self.kinds) == ("train", "unseen"):
            raise ValueError("a suite has no unseen kinds in its train part")
        return self

    @property
    def is_file(self) -> bool:
        """Whether the path names a file by its suffix."""
        return self.path is not None and is_file_name(self.path)

    @property
    def hub(self) -> HubData:
        """The path as a Hugging Face data set."""
        return HubData(str(self.path), self.subset, self.split or "train", self.revision)


def check_source(source: Source) -> None:
    """Find what is wrong with a source before anything heavy starts.

    Raises:
        DataError: the file is absent, empty or unreadable in its first rows.
    """
    if source.suite is not None:
        return
    if not source.is_file:
        check_hub_name(str(source.path))
    elif next(iter(rows(source)), None) is None:
        raise DataError(f"{source.path}: expected rows of data, found none.")


def source_digest(source: Source) -> str:
    """Names a source by its content and by how it is read."""
    settings = source.model_dump(mode="json")
    if source.suite is not None:
        return digest([settings, suite_digest(source.suite)])
    content = file_content(str(source.path)) if source.is_file else hub_content(source.hub)
    return digest([settings, content])


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
        if source.answered and not prompt.reference:
            continue
        if wanted(source, prompt) and seen.add(_asked(prompt)):
            found.add(prompt)
    if not found:
        raise NoPrompts(
            f"{source.path}: expected prompts, found none among those that 'questions' and "
            "'answered' let through. Change these keys, or give other data."
        )
    return found.draw(source.n, seed)


def load_mistakes(source: Source, kind: MistakeSource, seed: int) -> Sequence[Mistake]:
    """The bad answers of labelled data or of users' reports; reports are unconfirmed.

    Rows that are labelled good are no mistakes; the first good answer to a prompt becomes the
    reference of the bad ones, unless it is that very answer. Where no row has a label, all
    count as bad.

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
            if source.answered and not mistake.prompt.reference:
                continue
            if seen.add(mistake.id):
                found.add(mistake)
    if not found:
        raise DataError(
            f"{source.path}: expected bad answers, found none in {answers} answers. "
            "Check the label column and 'fields'."
        )
    return found.draw(source.n, seed)


def _labelled(source: Source) -> Iterator[Labelled]:
    first: tuple[str, bool] | None = None
    for where, row in rows(source):
        for item in labelled_answers(source, row, where):
            first = first or (where, item.labelled)
            if item.labelled != first[1]:
                has, lacks = (where, first[0]) if item.labelled else (first[0], where)
                raise DataError(
                    f"{lacks}: expected a label, as {has} has one, found none. Label the row "
                    "or remove it."
                )
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
    return " ".join(prompt.conversation.split()).casefold()


def place_of(question: str, seed: int = 0) -> float:
    """A number from 0 on and below 1 that depends on the question and the seed alone.

    So a question has one place, in whatever data set and beside whatever others it stands.
    """
    return int(sha256(f"{seed}|{question}".encode()).hexdigest()[:8], 16) / 2**32


def _asked(prompt: Prompt) -> str:
    """Names a prompt by its words alone, whatever else is known of it."""
    return text_digest([[m.role, m.content] for m in prompt.messages])


def _mistake(item: Labelled, kind: MistakeSource, good: str | None) -> Mistake:
    other = None if good == item.response else good
    return Mistake(
        prompt=item.prompt.model_copy(update={"reference": item.prompt.reference or other}),
        response=item.response,
        source=kind,
        confirmed=kind != "reported",
    )


def _suite_prompts(source: Source, seed: int) -> Sequence[Prompt]:
    assert source.suite is not None
    split: Split = source.split  # type: ignore[assignment]  # checked by Source
    tasks = clean_prompts(source.suite, split, seed, source.topics)
    if source.part == "clean":
        return tasks[: source.n]
    stream = attacked_prompts(source.suite, split, source.kinds, seed, source.topics)
    wanted = source.n or len(tasks)
    return Shelf(Prompt, islice(stream, wanted))


def rows(source: Source) -> Iterator[PlacedRow]:
    """The rows of a file or data set, each with the place it stands at.

    Raises:
        DataError: the file is absent, or a line of it is broken.
    """
    if source.is_file:
        found = file_rows(str(source.path), Form(source.encoding, source.header))
    else:
        found = hub_rows(source.hub)
    each = ((where, one) for where, row in found for one in instances_of(source, row))
    return _mapped(source, each) if source.fields else each


def _mapped(source: Source, found: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
    """The rows; at their end a column that is mapped and that no row has is refused."""
    absent: dict[str, str] = dict(source.fields)
    columns: set[str] = set()
    for where, row in found:
        if absent:
            absent = {field: name for field, name in absent.items() if name not in row}
            columns |= row.keys()
        yield where, row
    for field, name in absent.items() if columns else ():
        raise DataError(
            f"{source.path}: fields: {field}: expected a column of the data, found '{name}', "
            f"which no row has.{suggestion(name, sorted(columns))}"
        )
