"""What a directory holds, and its page, its Markdown and its picture: one way in to all."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from misstep.errors import InputError
from misstep.report.check import write_check_report
from misstep.report.check_markdown import check_markdown
from misstep.report.compared import write_picture
from misstep.report.compared_page import write_comparison
from misstep.report.judges_markdown import cards_markdown, holds_cards
from misstep.report.markdown import comparison_markdown, run_markdown
from misstep.report.page import write_run_page
from misstep.report.reading import known_manifest, read_run
from misstep.report.study import write_study_picture, write_study_report
from misstep.report.study_markdown import study_markdown


class Writers(NamedTuple):
    """What can be made of a directory."""

    page: Callable[[Path], Path]
    markdown: Callable[[Path], str]
    picture: Callable[[Path], Path] = write_picture


def folder_kind(folder: Path) -> str:
    """Whether a directory is of a study, a check, a comparison or a run, or holds cards."""
    for kind in ("study", "check"):
        if (folder / f"{kind}.json").is_file():
            return kind
    manifest = known_manifest(folder)
    # A copy of a comparison's files has no cells beside them; one that has just begun has
    # nothing else.
    if "cells" in manifest or (folder / "cells").is_dir():
        return "comparison"
    return "cards" if holds_cards(folder) and not manifest else "run"


def page(folder: Path) -> Path:
    """Write what a directory holds as one HTML page, and return its path."""
    return WRITERS[folder_kind(folder)].page(folder)


def markdown(folder: Path) -> str:
    """The numbers that a directory holds, as a Markdown page."""
    return WRITERS[folder_kind(folder)].markdown(folder)


def picture(folder: Path) -> Path:
    """Write the picture of what a directory holds, and return its path."""
    return WRITERS[folder_kind(folder)].picture(folder)


def _run_page(folder: Path) -> Path:
    run = read_run(folder)
    for lacked in run.missing:
        print(lacked, file=sys.stderr)
    return write_run_page(folder, run)


def _no_page(folder: Path) -> Path:
    raise InputError(
        f"{folder}: expected a directory that has a page, found a trained judge or "
        "several, whose cards are Markdown only. Print them with --markdown."
    )


WRITERS = {
    "study": Writers(write_study_report, study_markdown, write_study_picture),
    "check": Writers(write_check_report, check_markdown),
    "comparison": Writers(write_comparison, comparison_markdown),
    "cards": Writers(_no_page, cards_markdown),
    "run": Writers(_run_page, run_markdown),
}
