"""The two commands that make people judges: a rating sheet out of a run, and back again.

`sheet` writes sheet.csv and sheet.html, which are blind, and key.json, which is not, into the
run's folder `sheet`; `import` writes ratings.json and rated.jsonl beside them. What is counted
stands in misstep.evidence.ratings.
"""

from collections.abc import Sequence
from pathlib import Path

from misstep.errors import DataError
from misstep.evidence.ratings import (
    Key,
    Ratings,
    count_ratings,
    majority_labels,
    paired_items,
    rated_rows,
    read_sheet,
    sheet_csv,
)
from misstep.evidence.results import Setting
from misstep.records import Answer, Judgement, read_json, read_jsonl, write_json, write_text
from misstep.report.reading import read_manifest, run_policy
from misstep.report.sheet import write_sheet_page
from misstep.report.view import ends

FOLDER = "sheet"
BOM = "\ufeff"
"""A mark that tells spreadsheets that a file is UTF-8."""


def write_sheet(run: Path, a: str | None, b: str | None, n: int, seed: int) -> Path:
    """Write a blind sheet of two settings' answers, and its key; gives the sheet's folder.

    Raises:
        PolicyError: the run's policy cannot be read, whose words raters are told.
        DataError: the run has no answers, or not those of both settings; or there is a rated
            sheet already, whose key would be lost.
    """
    folder, mistake = run / FOLDER, run_policy(run).mistake
    if "models" in read_manifest(run)["recipe"]:
        raise DataError(
            f"{run}: expected the directory of a run, or of a comparison's cell, found that of "
            "a study, whose answers are no two settings of one model."
        )
    if (folder / "ratings.json").exists():
        raise DataError(
            f"{folder}: expected no ratings yet, found ratings.json, which belongs to the key "
            "that stands there. Move the folder away to make a new sheet."
        )
    answers = list(read_jsonl(run / "responses.jsonl", Answer))
    one, other = _settings(answers, a, b)
    try:
        items = paired_items(answers, one, other, n, seed)
    except DataError as error:
        raise DataError(f"{run / 'responses.jsonl'}: {error}") from error
    key = Key(seed=seed, a=one.name, b=other.name, items=tuple(items))
    _refuse_used(folder, key, sheet_csv(items))
    write_json(folder / "key.json", key.model_dump(mode="json", by_alias=True))
    write_text(folder / "sheet.csv", BOM + sheet_csv(items))
    write_sheet_page(folder / "sheet.html", items, mistake)
    return folder


def _refuse_used(folder: Path, key: Key, sheet: str) -> None:
    """Leave a sheet alone that somebody may be rating; the same one, empty, is no loss."""
    path = folder / "key.json"
    written = folder / "sheet.csv"
    if path.exists() and read_json(path, Key) != key:
        why = "key.json of another sheet, whose ratings could no longer be read"
    elif written.exists() and written.read_bytes() != f"{BOM}{sheet}".encode():
        why = "sheet.csv with something written into it"
    else:
        return
    raise DataError(f"{folder}: expected no sheet in use, found {why}. Move the folder away.")


def _settings(
    answers: Sequence[Answer], a: str | None, b: str | None
) -> tuple[Setting, Setting]:
    """The two that are compared: before and after, where the command names none."""
    before, after = ends(dict.fromkeys(map(Setting.of, answers)))
    found = [
        named if name is None else Setting.parse(name)
        for name, named in ((a, before), (b, after))
    ]
    chosen = [setting for setting in found if setting is not None]
    if len(chosen) < 2 or chosen[0] == chosen[1]:
        raise DataError(
            "expected two settings to compare, found "
            f"{' and '.join(s.name for s in chosen) or 'none'}. Name them with --a and --b, "
            "such as --a vanilla/unguided."
        )
    return chosen[0], chosen[1]


def _key(path: Path) -> Key:
    if not path.is_file():
        raise DataError(
            f"{path}: expected the key of a sheet, found none. Make a sheet first with "
            "`misstep judge sheet`."
        )
    return read_json(path, Key)


def import_sheets(run: Path, sheets: Sequence[Path]) -> tuple[Path, Ratings]:
    """Read rated sheets back; gives ratings.json's path and what stands in it.

    Raises:
        DataError: names sheet, line and column; or two sheets have one rater's name.
    """
    folder = run / FOLDER
    key = _key(folder / "key.json")
    rated = [read_sheet(path, key) for path in sheets]
    names = [r.rater for r in rated]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"expected sheets with names of their own, which are the raters' names; found "
            f"{', '.join(twice)} twice. Rename one."
        )
    scores = run / "scores.jsonl"
    judgements = list(read_jsonl(scores, Judgement)) if scores.is_file() else []
    labels = majority_labels(key, rated)
    ratings = count_ratings(key, rated, labels, judgements)
    write_json(folder / "ratings.json", ratings.model_dump(mode="json", by_alias=True))
    write_text(folder / "rated.jsonl", rated_rows(key, labels))
    return folder / "ratings.json", ratings
