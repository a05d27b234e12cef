"""Settings as dots with whiskers over two rates; a picture of its own, or part of a page.

Places are percentages of the picture's sides; scatter.svg.j2 draws them. Knows no run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from misstep.evidence.results import Metric
from misstep.report.pictures import Scale, Ticks
from misstep.report.template import write_page

COLOURS = (
    *("#4c566a", "#9aa0ac", "#b58900", "#2a78b5", "#7a5195", "#bc5090"),
    *("#1b998b", "#8c6d46", "#d1495b", "#e4572e", "#2e8b57", "#5b6ee1"),
    *("#00b3d7", "#9bc400", "#111111", "#ff9f1c"),
)
"""Of the methods or models, in the order of the table; more than there are methods."""
RADIUS = 6.0
LEAST_HEIGHT = 460
LEGEND, LINE, LETTER = 730, 18, 7
"""Where the legend begins, the height of a line of it, and the width of a letter."""


class Point(NamedTuple):
    """A setting in the picture; places are percentages."""

    title: str
    colour: str
    guided: bool
    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    radius: float = RADIUS


class Scatter(NamedTuple):
    """Two rates, one from left to right and one from below."""

    across_title: str
    up_title: str
    across: Ticks
    up: Ticks
    points: Sequence[Point]
    note: str
    """What filled and hollow dots are, and their size."""
    chance: bool = False
    """Whether the line from below left to above right is drawn: equal rates."""


def point(
    title: str,
    colour: str,
    guided: bool,
    rates: tuple[Metric, Metric],
    axes: tuple[Scale, Scale],
) -> Point:
    """The place of two rates that have values."""
    (x, left, right), (y, low, high) = (
        [axis.at(v or 0.0) for v in (rate.value, rate.low, rate.high)]
        for rate, axis in zip(rates, axes, strict=True)
    )
    return Point(title, colour, guided, x, 100 - y, left, right, 100 - low, 100 - high)


def from_below(axis: Scale) -> Ticks:
    """An axis's ticks as places from above."""
    return [(100 - place, text) for place, text in axis.ticks]


def write_svg(found: Scatter, folder: Path) -> Path:
    """Write the picture as picture.svg, with its legend, and give its path."""
    height = max(LEAST_HEIGHT, LINE * len(found.points) + 50)
    longest = max(len(text) for text in (found.note, *(p.title for p in found.points)))
    width = LEGEND + 30 + LETTER * longest
    content = {
        "scatter": found,
        "height": height,
        "width": width,
        "legend": LEGEND,
        "line": LINE,
    }
    return write_page(folder / "picture.svg", "picture.svg.j2", content)
