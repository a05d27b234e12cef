"""YAML documents checked against a schema, with messages that name file, line and key.

Knows YAML and pydantic; knows nothing of what a recipe or a policy means.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from misstep.errors import InputError
from misstep.records import digest

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str | int, ...]
Places = Mapping[KeyPath, int | str]
"""Of each key the line of the document, or what else put its value there."""

WORDS = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "literal_error": "expected {expected}",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "too_short": "expected at least {min_length} of them",
    "dict_type": "expected keys with values",
    "model_type": "expected keys with values",
    "finite_number": "expected a finite number",
    "greater_than": "expected more than {gt:.10g}",
    "greater_than_equal": "expected {ge:.10g} or more",
    "less_than": "expected less than {lt:.10g}",
    "less_than_equal": "expected {le:.10g} or less",
    "string_pattern_mismatch": "expected text that matches {pattern}",
}
"""For kinds of faults that pydantic names in Python's words."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A recipe's seed; NumPy, which a training sets, takes no larger one."""
STRANGE = 3
"""So many keys that are nothing like the known ones, and half of all, make another kind."""
UNQUOTED = (
    "expected text, found what YAML reads as a number, a date, or true or false "
    "(yes, no, on, off, too): put it in quotes"
)
"""For text that was meant and not quoted, as a verdict's word `yes`."""


class Settings(BaseModel):
    """A part of a document: frozen, unknown keys and numbers without an end refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Settings):
    """A whole document that is known by a name."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """In small letters, digits and `-`."""

    @property
    def digest(self) -> str:
        """Names the document by its content."""
        return digest(self.model_dump(mode="json"))


def each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    """Values of a recipe, of which none stands there twice.

    Raises:
        ValueError: names those that do.
    """
    twice = dict.fromkeys(str(value) for value in values if values.count(value) > 1)
    if twice:
        raise ValueError(f"expected each once; twice or more: {', '.join(twice)}")
    return values


def read_yaml(path: Path, error: type[InputError]) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A YAML mapping and the line of each of its keys.

    Raises:
        InputError: (the given class) no such file, broken YAML, or no mapping.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as fault:
        where = "" if path.is_absolute() else f", which is read from {Path.cwd()}"
        raise error(
            f"{path}: cannot be read ({fault.strerror}). Check the path{where}."
        ) from fault
    except UnicodeDecodeError as fault:
        raise error(
            f"{path}: expected UTF-8 text ({fault.reason}). Save it as UTF-8."
        ) from fault
    try:
        data, places = parsed(text)
    except yaml.YAMLError as fault:
        raise error(f"{path}: no valid YAML. {_where(fault)}") from fault
    except RecursionError as fault:
        raise error(
            f"{path}: expected keys with values, found a value without an end: an alias "
            "(*name) inside of its own anchor (&name), or too many brackets. Write it out."
        ) from fault
    except ValueError as fault:
        # What looks like a date and is none.
        raise error(f"{path}: no valid YAML ({fault}). Put what is text in quotes.") from fault
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise error(f"{path}: expected keys with values, found {found}.")
    return data, _each_key_once(path, places, error)


def _each_key_once(
    path: Path, places: Iterable[tuple[KeyPath, int]], error: type[InputError]
) -> dict[KeyPath, int]:
    """The line of each key; YAML itself takes the last of equal ones and says nothing."""
    lines: dict[KeyPath, int] = {}
    for keys, line in places:
        if keys in lines:
            name = ".".join(map(str, keys))
            raise error(
                f"{path}, line {line}: the key '{name}' stands on line {lines[keys]} already. "
                "Keep one of the two."
            )
        lines[keys] = line
    return lines


def parsed(text: str) -> tuple[Any, list[tuple[KeyPath, int]]]:
    """YAML's data, and the line of each key.

    Raises:
        YAMLError: it is no YAML.
        ValueError: what looks like a date is none.
        RecursionError: a value has no end.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return yaml.safe_load(text), list(_lines(node, ()))


def check(
    schema: type[M],
    data: Mapping[str, Any],
    error: type[InputError],
    source: str,
    lines: Places | None = None,
) -> M:
    """Validate data against a schema, or name all that is wrong with it at once.

    Raises:
        InputError: (the given class) one line for each fault: file, line, key, expected, found.
    """
    _refuse_another_kind(schema, data, error, source)
    try:
        return schema.model_validate(data)
    except ValidationError as fault:
        faults = fault.errors(include_url=False)
        broken = {f["loc"][:-1] for f in faults if f["loc"]}
        phrases = [
            _phrase(f, schema, data, source, lines or {})
            for f in faults
            # Of a list with broken members pydantic counts the others alone.
            if f["type"] != "too_short" or f["loc"] not in broken
        ]
        raise error("\n".join(phrases)) from fault


def _refuse_another_kind(
    schema: type[BaseModel], data: Mapping[str, Any], error: type[InputError], source: str
) -> None:
    """Say of a file of another kind that it is one, and not what is wrong with each key."""
    known = list(schema.model_fields)
    strange = [
        str(key) for key in data if not difflib.get_close_matches(str(key), known, cutoff=0.75)
    ]
    if len(strange) >= STRANGE and 2 * len(strange) >= len(data):
        raise error(
            f"{source}: expected keys such as {', '.join(known[:5])}; found mostly others: "
            f"{', '.join(strange[:5])}. It looks like another kind of file."
        )


def _phrase(
    fault: Any, schema: type[BaseModel], data: Mapping[str, Any], source: str, lines: Places
) -> str:
    keys = tuple(fault["loc"])
    known = _given(data, keys)
    place, name = _place(known, source, lines), ".".join(map(str, known))
    if fault["type"] == "extra_forbidden":
        meant = suggestion(str(keys[-1]), _fields(schema, keys[:-1]))
        return f"{place}: unknown key '{name}'.{meant}"
    if fault["type"] == "missing":
        return f"{place}: the key '{'.'.join(map(str, keys))}' is missing."
    words = WORDS.get(fault["type"])
    if fault["type"] == "string_type" and isinstance(fault["input"], (bool, int, float, date)):
        words = UNQUOTED
    plain = words.format(**fault.get("ctx", {})) if words else fault["msg"]
    message = plain.removeprefix("Value error, ")
    if not known:
        return f"{place}: {message}."
    found = repr(fault["input"])
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{place}: '{name}': {message} (found {found})."


def _place(keys: KeyPath, source: str, lines: Places) -> str:
    """Where a value was written: the line of its key, and what put it or a part of it there."""
    of = {key: said for key, said in lines.items() if keys and key[: len(keys)] == keys}
    inside = ", ".join(dict.fromkeys(said for said in of.values() if isinstance(said, str)))
    if isinstance(line := lines.get(keys), int):
        return f"{inside} over {source}, line {line}" if inside else f"{source}, line {line}"
    around = [lines.get(keys[:depth]) for depth in range(len(keys), 0, -1)]
    return next((said for said in around if isinstance(said, str)), inside or source)


def _given(data: Any, keys: KeyPath) -> KeyPath:
    """The keys as far as the data has them: pydantic adds names of its own at the end."""
    for depth, key in enumerate(keys):
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return keys[:depth]
    return keys


def load_document(
    schema: type[M], name: str, folder: Path, what: str, error: type[InputError]
) -> M:
    """A document of a folder of shipped ones by its name, or a user's own by its path.

    Raises:
        InputError: (the given class) no such document, or all that is wrong with it.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in known:
        path = folder / f"{name}.yaml"
    else:
        raise error(
            f"{what} '{name}': expected a shipped {what} ({', '.join(known)}) or the path of a "
            f".yaml file.{suggestion(name, known)}"
        )
    data, lines = read_yaml(path, error)
    return check(schema, data, error, str(path), lines)


def suggestion(word: str, known: list[str]) -> str:
    """A did-you-mean, or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known here: {', '.join(sorted(known))}." if known else ""


def _fields(schema: type[BaseModel], keys: KeyPath) -> list[str]:
    """The field names that stand below a key path of a schema; empty where it has none."""
    for key in keys:
        if not isinstance(key, str) or key not in schema.model_fields:
            continue
        inner = model_in(schema.model_fields[key].annotation)
        if inner is None:
            return []
        schema = inner
    return list(schema.model_fields)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in a field's annotation, however deep; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _lines(node: yaml.Node | None, keys: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark.line + 1
            yield from _lines(value, (*keys, index))


def _where(fault: yaml.YAMLError) -> str:
    if isinstance(fault, yaml.MarkedYAMLError) and fault.problem_mark:
        mark = fault.problem_mark
        return f"Line {mark.line + 1}, column {mark.column + 1}: {fault.problem}."
    return str(fault)
