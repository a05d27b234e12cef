"""The head of a GGUF file: architecture, metadata and the place of every tensor.

A few lines of `struct` instead of the `gguf` package's reader, which takes seconds for a
vocabulary because it keeps an array for every string. This module knows the file layout and no
model; it reads no weights. What tensors are called, it has from that package. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from misstep.errors import ModelError

if TYPE_CHECKING:
    from gguf import TensorNameMap

MAGIC = b"GGUF"
ALIGNMENT = 32

_FORMATS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {
    10: "Q",
    11: "q",
    12: "d",
}
STRING, _ARRAY = 8, 9
"""Type codes of metadata values: fixed sizes first, then the two that carry a length."""

Scalar = int | float | bool | str


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies, and how it is packed."""

    name: str
    shape: tuple[int, ...]
    """Fastest dimension first, as the file has it: (columns, rows) for a matrix."""
    type_code: int
    offset: int
    """From the start of the file."""


@dataclass(frozen=True)
class Header:
    """Everything that stands before the weights."""

    path: Path
    values: dict[str, Scalar]
    """Metadata that are single values; arrays, such as the vocabulary, are left out."""
    positions: dict[str, int]
    """Where in `metadata` the bytes of each single value begin."""
    metadata: bytes
    """All key-value pairs as they stand in the file, arrays included."""
    pairs: int
    tensors: tuple[TensorPlace, ...]

    @property
    def architecture(self) -> str:
        """The family that the file declares, such as `llama`."""
        return str(self.values.get("general.architecture", ""))

    def number(self, key: str) -> int:
        """A whole number below the architecture's own prefix, such as `block_count`.

        Raises:
            ModelError: the file does not say it.
        """
        name = f"{self.architecture}.{key}"
        if name not in self.values:
            raise ModelError(
                f"{self.path}: expected {name} in the file's metadata, found none. Use a file "
                "that llama.cpp has converted."
            )
        return int(self.values[name])


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> Header:
    """Read the head of a GGUF file; of an unchanged one once.

    Raises:
        ModelError: the file is no GGUF of version 2 or 3, or it ends too early.
    """
    known = path.stat()
    return _header(path, known.st_size, known.st_mtime_ns)


def tensor_names(header: Header) -> "TensorNameMap":
    """What a GGUF of the file's family calls the modules of transformers.

    Raises:
        ModelError: the package gguf does not know the family.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    family = header.architecture
    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == family), None)
    if arch is None:
        raise ModelError(
            f"{header.path}: its family is {family or 'unknown'}, whose tensors the package "
            f"gguf {version('gguf')} cannot name, so that no adapter can be matched to them. "
            "Install a newer one: pip install --upgrade gguf."
        )
    return get_tensor_name_map(arch, header.number("block_count"))


@lru_cache(4)
def _header(path: Path, _size: int, _changed: int) -> Header:
    # A run asks for it dozens of times, and a vocabulary takes a while to pass.
    try:
        with path.open("rb") as file:
            return _Reader(file).header()
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ModelError(
            f"{path}: expected a whole GGUF file, found a damaged head ({error}). "
            "Download it again."
        ) from error


class _Reader:
    """Walks through the head once, front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.values: dict[str, Scalar] = {}
        self.ends: dict[str, int] = {}

    def header(self) -> Header:
        magic, version, tensors, pairs = self.unpack("4sIQQ")
        if magic != MAGIC or version not in (2, 3):
            raise ModelError(
                f"{self.file.name}: expected a GGUF file of version 2 or 3, "
                f"found {magic!r} version {version}."
            )
        start = self.file.tell()
        for _ in range(pairs):
            self.pair()
        end = self.file.tell()
        places = [self.place() for _ in range(tensors)]
        base = self.aligned(self.file.tell())
        self.file.seek(start)
        return Header(
            path=Path(self.file.name),
            values=self.values,
            positions={key: at - start for key, at in self.ends.items()},
            metadata=self.file.read(end - start),
            pairs=pairs,
            tensors=tuple(TensorPlace(n, s, t, base + offset) for n, s, t, offset in places),
        )

    def aligned(self, position: int) -> int:
        step = int(self.values.get("general.alignment", ALIGNMENT))
        return position + -position % step

    def pair(self) -> None:
        key, (code,) = self.string(), self.unpack("I")
        if code == _ARRAY:
            self.skip_array()
            return
        self.ends[key] = self.file.tell()
        self.values[key] = self.string() if code == STRING else self.unpack(_FORMATS[code])[0]

    def skip_array(self) -> None:
        code, length = self.unpack("IQ")
        if code == _ARRAY:
            for _ in range(length):
                self.skip_array()
        elif code == STRING:
            for _ in range(length):
                self.file.seek(self.unpack("Q")[0], 1)
        else:
            self.file.seek(length * struct.calcsize("<" + _FORMATS[code]), 1)

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self.string(), self.unpack("I")
        shape = self.unpack(f"{dimensions}Q")
        code, offset = self.unpack("IQ")
        return name, shape, code, offset

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.file.read(length).decode()

    def unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + layout)
        return struct.unpack("<" + layout, self.file.read(size))
