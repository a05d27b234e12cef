"""The rating sheet as one web page that works offline: rate, then save a CSV.

It is the only page with a script, which keeps and saves the ratings; the page allows that
script by its hash and no other, so that no text of a model can run. Shows no setting's name.
"""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from misstep.evidence.ratings import QUESTIONS, Item
from misstep.records import digest
from misstep.report.template import HERE, write_page

WHOLE = 1_000_000
"""Characters of an answer that are shown: a rater has to read all of it."""


def write_sheet_page(path: Path, items: Sequence[Item], mistake: str) -> None:
    """Write the page; `mistake` says in words what counts as one."""
    script = (HERE / "sheet.js.j2").read_text(encoding="utf-8")
    content = {
        "items": items,
        "mistake": mistake,
        "questions": QUESTIONS,
        "whole": WHOLE,
        "name": digest([item.item for item in items]),
        "script": script,
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
    }
    write_page(path, "sheet.html.j2", content)
