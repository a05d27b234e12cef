"""How a page is made of a template: text of models is escaped, a missing value is an error.

This module knows the templates' folder and how words and numbers are shown; it knows no run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from misstep.errors import InputError
from misstep.records import write_text
from misstep.report import words

HERE = Path(__file__).parent
FILTERS: dict[str, Callable[..., Any]] = {
    "method": words.method_title,
    "setting": words.setting_title,
    "direction": words.direction,
    "note": words.note,
    "capitalised": words.capitalised,
    "rate": words.rate,
    "metric": words.metric_title,
    "gap": words.gap,
    "points": words.points,
    "p": words.p_text,
    "count": words.count,
    "sample_size": words.sample_size,
    "duration": words.duration,
    "model_text": words.model_text,
    "most_frequent": words.most_frequent,
    "what_stage_makes": words.what_stage_makes,
}


def write_page(
    path: Path,
    template: str,
    content: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> Path:
    """Fill a template of this package into a file and give the file's path.

    Raises:
        InputError: the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | dict(filters or {})
    page = environment.get_template(template).render(content)
    try:
        write_text(path, page)
    except OSError as fault:
        raise InputError(
            f"{path}: the page cannot be written ({fault.strerror}). See to the rights "
            "and the space there."
        ) from fault
    return path
