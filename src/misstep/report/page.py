"""The page: what a run left, put into report.html.j2, which escapes model text."""

from pathlib import Path
from typing import Any

import yaml

from misstep.data.held_out import told
from misstep.report.headline import findings, headline
from misstep.report.pictures import kinds_panel, losses, panels, squares
from misstep.report.reading import Run, read_run
from misstep.report.samples import pairs, some_analyses, verdict
from misstep.report.template import write_page
from misstep.report.view import View


def write_report(folder: Path) -> Path:
    """Write report.html into a run directory, from what stands there, and return its path.

    Raises:
        DataError: the folder holds no file of a run at all.
    """
    return write_run_page(folder, read_run(folder))


def write_run_page(folder: Path, run: Run) -> Path:
    """Write report.html of a run that was read from the folder, and return its path."""
    filters = {"verdict": verdict}
    return write_page(folder / "report.html", "report.html.j2", _content(run), filters)


def _content(run: Run) -> dict[str, Any]:
    view = View(run)
    return {
        "name": run.name,
        "missing": run.missing,
        "overlaps": list(told(run.manifest.overlaps)),
        "manifest": run.manifest,
        "view": view,
        "headline": headline(view),
        "findings": findings(view),
        "mistake_panels": panels(view, of_mistakes=True),
        "other_panels": panels(view, of_mistakes=False),
        "squares": squares(view),
        "kinds": kinds_panel(view, run.answers),
        "losses": losses(run.manifest.training),
        "pairs": pairs(view, run.answers),
        "analyses": some_analyses(run.analyses),
        "recipe": yaml.safe_dump(run.manifest.recipe, allow_unicode=True, sort_keys=False),
    }
