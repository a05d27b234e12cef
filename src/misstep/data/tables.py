"""Tables of data, row by row: JSON Lines, JSON, CSV, TSV, Parquet and Hugging Face data sets.

Each row comes with the place where it stands. What its columns mean is not known here.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from functools import cache
from glob import escape
from gzip import BadGzipFile
from hashlib import file_digest, sha256
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from misstep.errors import DataError
from misstep.records import open_text, read_json_lines, refuse_half_characters

LONGEST_CELL = 2**31 - 1
"""Characters. The csv library refuses cells above 131,072 else, and takes no more than this."""

LONGEST_NAME = 255
"""Bytes that a file's name may have."""
ZIP = b"PK\x03\x04"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SEPARATOR = re.compile(r'"?sep=.?"?\s*$', re.IGNORECASE)
"""The line by which Excel is told what parts the cells."""


class Place(str):
    """Where a row stands, in words, of a table whose columns are named elsewhere."""

    __slots__ = ("header",)

    header: str
    """Where its columns are named."""


def header_of(where: str) -> str:
    """Where the columns of a row are named: of most files at the row itself."""
    return where.header if isinstance(where, Place) else where


PlacedRow = tuple[str, dict[str, Any]]
"""Where a row stands, in words, and its columns."""


class Form(NamedTuple):
    """How the text of a file is to be read."""

    encoding: str = "utf-8-sig"
    header: bool = True
    """Of CSV and TSV: whether the first line names the columns; else they are `column0`, …"""


class HubData(NamedTuple):
    """A data set of the Hugging Face Hub, as `load_dataset` takes it."""

    name: str
    subset: str | None
    split: str
    revision: str | None


def as_path(name: str) -> Path:
    """The path that is meant; `~/` is the user's own folder."""
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def is_file_name(name: str) -> bool:
    """Whether the name ends as those of files that are read."""
    return _suffix(name) is not None


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)


def file_rows(name: str, form: Form) -> Iterator[PlacedRow]:
    """The rows of a file.

    Raises:
        DataError: the file is absent, or a line of it is broken.
    """
    path = as_path(name)
    if path.is_dir():
        raise DataError(f"{name}: expected a file, found a folder. Name a file in it.")
    if not path.is_file():
        raise DataError(f"{name}: no such file. Check the path; it is read from where you are.")
    try:
        _refuse_spreadsheet(path)
        yield from READERS[str(_suffix(name))](path, form)
    except UnicodeError as fault:
        raise _not_in(form.encoding, path) from fault
    except (BadGzipFile, EOFError, zlib.error) as fault:
        raise DataError(f"{name}: expected a file that gzip has packed ({fault}).") from fault
    except OSError as fault:
        raise DataError(f"{name}: cannot be read ({fault}). Check the file.") from fault
    except RecursionError as fault:
        raise DataError(
            f"{name}: expected rows, found values in values without end."
        ) from fault


def _open_bytes(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _refuse_spreadsheet(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            raise DataError(
                f"{path}: expected a file {READ}, found a zip archive, which a spreadsheet "
                "(.xlsx) is under any name. Save it as CSV in UTF-8."
            )


def _not_in(encoding: str, path: Path) -> DataError:
    """Names the first line that is not in the encoding: faults count from a decoder's chunk."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, found = 1, "a character cut off"
    with _open_bytes(path) as file:
        marked = file.read(2) in UTF_16
        file.seek(0)
        try:
            for part in file:
                line += decoder.decode(part).count("\n")
        except UnicodeDecodeError as fault:
            found = f"the byte 0x{fault.object[fault.start]:02x}"
        except UnicodeError as fault:
            found = str(fault)
    likely = "utf-16, as its first bytes say" if marked else "often cp1252 where Excel wrote it"
    return DataError(
        f"{path}, line {line}: expected {encoding} text, found {found}. Set 'encoding' to the "
        f"file's own, {likely}; or save it as UTF-8."
    )


def file_stem(name: str) -> str:
    """What a file is called, without its suffix."""
    return Path(name).name[: -len(str(_suffix(name)))]


def file_content(name: str) -> str:
    """Names a file by its bytes."""
    with as_path(name).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _jsonl(path: Path, form: Form) -> Iterator[PlacedRow]:
    for number, row in read_json_lines(path, form.encoding):
        yield f"{path}, line {number}", row


def _json(path: Path, form: Form) -> Iterator[PlacedRow]:
    with open_text(path, form.encoding) as file:
        text = file.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as fault:
        lines = " It looks like JSON Lines: call it .jsonl."
        raise DataError(
            f"{path}, line {fault.lineno}: no valid JSON ({fault.msg})."
            f"{lines if fault.msg == 'Extra data' else ''}"
        ) from fault
    except ValueError as fault:
        raise DataError(f"{path}: JSON that Python does not read ({fault}).") from fault
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError(
            f"{path}: expected a list of objects. Use JSON Lines for anything else."
        )
    for number, row in enumerate(data, 1):
        refuse_half_characters(row, f"{path}, item {number}")
        yield f"{path}, item {number}", row


def _csv(path: Path, form: Form) -> Iterator[PlacedRow]:
    labels: list[str] = []
    header = str(path)
    for line, cells in _csv_rows(path, form):
        if not any(cells):
            continue
        if not labels:
            if len(cells) == 1 and form.header:
                _refuse_parted_otherwise(cells[0], f"{path}, line {line}")
            labels = [f"column{i}" for i in range(len(cells))]
            if form.header:
                labels, header = [name.strip() for name in cells], f"{path}, line {line}"
                _refuse_equal_names(labels, header)
                continue
        if len(cells) != len(labels):
            raise DataError(
                f"{path}, line {line}: expected {len(labels)} cells as in the first row, "
                f"found {len(cells)}. Quote cells that contain commas."
            )
        place = Place(f"{path}, line {line}")
        place.header = header
        yield place, dict(zip(labels, cells, strict=True))


def _refuse_equal_names(labels: list[str], place: str) -> None:
    """Which of two columns is meant by their name nobody can tell."""
    twice = sorted({repr(name) for name in labels if name and labels.count(name) > 1})
    if twice:
        raise DataError(
            f"{place}: expected another name for each column, found {', '.join(twice)} more "
            "than once. Rename one, or remove it."
        )


def _refuse_parted_otherwise(header: str, place: str) -> None:
    """Spreadsheets in many languages part cells by semicolons, and call it CSV."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in header:
            raise DataError(
                f"{place}: expected names of columns with commas between them, found {name}. "
                "Save it with commas, or with tabs as .tsv."
            )


def _csv_rows(path: Path, form: Form) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV or TSV file, each with the line that it starts at."""
    csv.field_size_limit(LONGEST_CELL)
    with open_text(path, form.encoding, newline="") as file:
        mark = "\t" if ".tsv" in str(_suffix(path.name)) else ","
        comments = _comments(file, mark) if form.header else 0
        reader = csv.reader(file, delimiter=mark, strict=True)
        line = 1 + comments
        try:
            for cells in reader:
                yield line, cells
                line = 1 + comments + reader.line_num
        except csv.Error as fault:
            raise DataError(
                f"{path}, line {line}: no valid CSV ({fault}). Check the quotes from there on."
            ) from fault


def _comments(file: TextIO, mark: str) -> int:
    """Pass over the lines above the header, and count them.

    PyRIT's files open with comments, and some for Excel with `sep=,`. A header may itself
    begin with `#`, as the name of a column of numbers.
    """
    number = 0
    while True:
        start = file.tell()
        line = file.readline()
        first, *others = line.strip().split(mark)
        is_header = re.fullmatch(r"#\w*", first) and others and all(others)
        if not SEPARATOR.match(line) and (is_header or not line.startswith("#")):
            file.seek(start)
            return number
        number += 1


def _parquet(path: Path, _: Form) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as fault:
        raise DataError(f"{path}: expected a Parquet file ({fault}).") from fault
    number = 0
    for batch in file.iter_batches():
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as fault:
            raise DataError(
                f"{path}: expected text in UTF-8, as Parquet's always is, found the byte "
                f"0x{fault.object[fault.start]:02x}. Write the file anew, with that text read "
                "in its own encoding."
            ) from fault
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row


TEXTS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
READERS = {
    **TEXTS,
    **{f"{suffix}.gz": reader for suffix, reader in TEXTS.items()},
    ".parquet": _parquet,
}
READ = f"{', '.join(TEXTS)} (each also with .gz) or .parquet"
"""The names of files that are read, in words."""
SPREADSHEETS = (".xls", ".xlsx", ".ods")
OTHERS = (*SPREADSHEETS, ".txt", ".md", ".xml", ".yaml", ".yml", ".arrow", ".zip", ".gz")
"""How names of files end that are not read, and no name of a data set."""


def check_hub_name(name: str) -> None:
    """Refuse what is meant as a path, without asking the Hub for it.

    Raises:
        DataError: it is there, or looks like a path.
    """
    expected = f"{name}: expected a file {READ}, or the name of a Hugging Face data set;"
    if len(name.encode()) > LONGEST_NAME:
        raise DataError(f"{expected} found {len(name)} characters, which name neither.")
    if as_path(name).exists():
        kind = "a folder" if as_path(name).is_dir() else "another file"
        if name.lower().endswith(SPREADSHEETS):
            raise DataError(f"{expected} found a spreadsheet. Save it as CSV in UTF-8.")
        raise DataError(f"{expected} found {kind}. Give one of these.")
    path = as_path(name)
    beside = path.parent.glob(f"{escape(path.name)}.*")
    if meant := sorted(file.name for file in beside if is_file_name(file.name)):
        raise DataError(f"{expected} found {', '.join(meant)}. Give the whole name of a file.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(OTHERS):
        raise DataError(f"{expected} found a path where nothing is. Check it.")


@cache
def load_hub(data: HubData) -> Any:
    """The data set, loaded once in a process.

    Raises:
        DataError: there is none of this name, or it cannot be read here.
    """
    check_hub_name(data.name)
    from datasets import load_dataset

    try:
        return load_dataset(data.name, data.subset, split=data.split, revision=data.revision)
    except Exception as fault:
        raise DataError(
            f"{data.name}: neither a file {READ} nor a Hugging Face data set that can be read "
            f"here ({type(fault).__name__}: {fault}). Its subset, split and revision are keys "
            "of the source."
        ) from fault


def hub_rows(data: HubData) -> Iterator[PlacedRow]:
    """The rows of a data set of the Hub.

    Raises:
        DataError: as `load_hub`.
    """
    part = ", ".join(of for of in (data.name, data.subset, data.split) if of)
    for number, row in enumerate(load_hub(data), 1):
        yield f"{part}, row {number}", dict(row)


@cache
def hub_content(data: HubData) -> str:
    """Names a data set of the Hub by its rows, which its name alone does not.

    Raises:
        DataError: as `load_hub`.
    """
    found = sha256()
    for _, row in hub_rows(data):
        # What is no JSON, as a date, stands there as its text.
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()
