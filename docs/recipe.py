"""Writes docs/recipe.md: every key of recipes, judges and policies, as the source has them.

What a key means is the docstring below its field, so nothing is said twice; titles and short
examples lie in recipe.yaml. Run it as `make reference`.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from misstep.comparison import ComparedSettings
from misstep.config import MethodName, RunConfig
from misstep.data.sources import Source
from misstep.documents import model_in
from misstep.engines.choose import KINDS, Kind
from misstep.guard import Guard
from misstep.judge_config import JudgeConfig
from misstep.judge_train import JudgeTraining
from misstep.policy import (
    DERIVED,
    HintTemplate,
    PairTemplate,
    Pattern,
    Policy,
    PromptTemplate,
)
from misstep.rubric import Rubric
from misstep.study_config import StudyConfig

HERE = Path(__file__)
ESCAPED = r"\|"
HEAD = """\
# Every key

Rendered from the source by `make reference`; a test holds this page equal to it. The files are
YAML. A key that is not on this page is refused before any model loads, with its line and the
key that was probably meant. `--set KEY=VALUE` puts a value over a recipe's, with dots between
nested keys: `--set train.epochs=2`. Where the default is *required* there is none; `null` says
that nothing is set, and `--set KEY=null` unsets such a key."""

PARTS = (
    RunConfig,
    Source,
    ComparedSettings,
    StudyConfig,
    JudgeConfig,
    JudgeTraining,
    Policy,
    Rubric,
    Guard,
)
"""Whole files, and what stands in many places of them."""
FROM_THE_FILE = ((RunConfig, "name"), (StudyConfig, "name"))
"""What a recipe may leave out, since the file's name stands in for it."""
TEXTS: dict[str, dict[str, str]] = yaml.safe_load(HERE.with_suffix(".yaml").read_text("utf-8"))
"""By a model's name: `title` and `where` of a part, the example of it or of a section."""

ALIASES = (
    (Source, "a [source](#sources-of-data)"),
    (Kind, KINDS),
    (MethodName, "the name of a [method](methods/README.md)"),
    (Pattern, "a regular expression"),
    (PromptTemplate, "text with the blank {prompt}"),
    (HintTemplate, "text with the blanks {prompt} and {hint}"),
    (PairTemplate, "text with the blanks {prompt} and {response}"),
)
"""Types that are said by what they are for."""
PLAIN = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Any: "any value",
}
BOUNDS = {Ge: "{0.ge} or more", Gt: "above {0.gt}", Le: "{0.le} at most", Lt: "below {0.lt}"}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for part in PARTS for line in _part(part)), ""])


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each of a model's fields, its bases' too, in one line."""
    bases = model.mro()[: model.mro().index(BaseModel)]
    trees = [ast.parse(inspect.getsource(base)).body[0] for base in bases]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for tree in trees
        if isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _part(model: type[BaseModel]) -> Iterator[str]:
    texts = TEXTS[model.__name__]
    yield f"\n## {texts['title']}\n"
    yield f"{model.__doc__} {texts['where']}"
    yield from _section(model, "")


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A model's example and its keys, then the same of the sections in it."""
    yield from _example(model, prefix)
    yield "\n| key | value | default | |\n| --- | --- | --- | --- |"
    types, meant, inner = get_type_hints(model, include_extras=True), docstrings(model), {}
    for name, field in model.model_fields.items():
        said = meant.get(name, "")
        section = model_in(field.annotation)
        if section is None or section is Source:
            value = _words(types[name])
        else:
            several = "[]" if get_origin(field.annotation) is tuple else ""
            inner[f"{prefix}{name}{several}."] = section
            value = f"the keys `{prefix}{name}{several}.…`"
            said = said or str(section.__doc__)
        default = "the file's" if (model, name) in FROM_THE_FILE else _default(field)
        cells = (f"`{prefix}{name}`", value, default, said)
        yield f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"
    for deeper, section in inner.items():
        yield f"\n### `{deeper.removesuffix('.')}`\n\n{section.__doc__}"
        yield from _section(section, deeper)


def _example(model: type[BaseModel], prefix: str) -> Iterator[str]:
    example = TEXTS.get(model.__name__, {}).get("example", "").rstrip()
    if example:
        within = f"{prefix.removesuffix('.')}:\n{indent(example, '  ')}" if prefix else example
        yield f"\n```yaml\n{within}\n```"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        extra = field.json_schema_extra
        of = extra.get("made of") if isinstance(extra, dict) else None
        return f"made of `{of}`" if of else "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    # JSON first, since YAML knows no tuples.
    plain = yaml.safe_dump([json.loads(json.dumps(value))], default_flow_style=True, width=999)
    return f"`{plain.strip()[1:-1]}`"


def _words(of: Any) -> str:
    """A type in plain words."""
    for alias, said in ALIASES:
        if of in (alias, Annotated[alias, DERIVED]):
            return said
    origin, parts = get_origin(of), get_args(of)
    if origin is Annotated:
        return _bounded(parts[0], [b for m in of.__metadata__ for b in _bounds(m)])
    if origin is Literal:
        return _one_of([f"`{part}`" for part in parts])
    if origin in (Union, UnionType):
        return _one_of([_words(part) for part in parts if part is not NoneType])
    if origin is dict:
        return f"names, each with: {_words(parts[1])}"
    if origin is tuple:
        return _list(parts, "")
    return PLAIN[of]


def _bounded(of: Any, bounds: list[Any]) -> str:
    if get_origin(of) is tuple:
        least = [
            f" of {bound.min_length} or more" for bound in bounds if isinstance(bound, MinLen)
        ]
        return _list(get_args(of), "".join(least))
    said = [BOUNDS[type(bound)].format(bound) for bound in bounds if type(bound) in BOUNDS]
    return ", ".join([_words(of), *said])


def _bounds(metadata: Any) -> list[Any]:
    return metadata.metadata if isinstance(metadata, FieldInfo) else []


def _list(parts: tuple[Any, ...], size: str) -> str:
    size = size if parts[-1] is ... else f" of {len(parts)}"
    return f"list{size}, each: {_words(parts[0])}"


def _one_of(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    HERE.with_suffix(".md").write_text(page(), encoding="utf-8")
