"""What is learned of a training row, shown: the mask as a reader can check it.

The text comes from the very tokens that are trained on. This module knows rows and a terminal;
it loads no weights.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from misstep.models.locate import Model
from misstep.models.rendering import Renderer
from misstep.models.weights import within_context
from misstep.records import Example
from misstep.training.rows import render_rows

if TYPE_CHECKING:
    from rich.console import Console


class Segment(NamedTuple):
    """A piece of a row's text, and whether loss falls on it."""

    text: str
    learned: bool


class MaskedRow(NamedTuple):
    """One training row as text, control tokens included."""

    kind: str
    segments: tuple[Segment, ...]


def show_mask(
    model: Model, examples: Sequence[Example], count: int, max_length: int
) -> list[MaskedRow]:
    """The first rows of every kind, kinds taking turns, at most `count` in all."""
    renderer, max_length = Renderer.for_model(model), within_context(model, max_length)
    shown = []
    for example in _turns(examples)[:count]:
        for row in render_rows(renderer, [example], max_length).kept:
            pieces = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
            texts = [renderer.tokenizer.decode(list(ids)) for ids in pieces]
            segments = Segment(str(texts[0]), False), Segment(str(texts[1]), True)
            shown.append(MaskedRow(row.kind, segments))
    return shown


def _turns(examples: Sequence[Example]) -> list[Example]:
    met: Counter[str] = Counter()
    ranked = []
    for example in examples:
        ranked.append((met[example.kind], example))
        met[example.kind] += 1
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])]


def print_mask(rows: Sequence[MaskedRow], console: "Console | None" = None) -> None:
    """Print rows, what is learned in bold green and between `>>>` and `<<<`.

    Brackets in a row's text are text: nothing in it is read as markup.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for number, row in enumerate(rows, 1):
        text = Text(f"--- row {number}, {row.kind} ---\n", style="dim")
        for segment in row.segments:
            shown = f">>>{segment.text}<<<" if segment.learned else segment.text
            text.append(shown, style="not dim bold green" if segment.learned else "not dim")
        console.print(text, soft_wrap=True, highlight=False, emoji=False)
