"""Pairs of answers of which the first helps more: rows of data in, pairs out.

Read are `chosen` and `rejected`, or what a source's `fields` map to `reference` and `response`,
and PKU-SafeRLHF's two responses with the number of the more helpful one. Knows no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from misstep.data.columns import Turns, answer_of, prompt_of
from misstep.data.shelf import Names, Shelf
from misstep.data.sources import Source, rows, wanted
from misstep.errors import DataError
from misstep.records import Pair, Prompt

KIND = "helpful"
BETTER = "better_response_id"
"""PKU-SafeRLHF's column: 0 or 1, the more helpful response, whether it is safe or not."""


def load_preferred(source: Source, seed: int) -> Sequence[Pair]:
    """The pairs of a source, each once, drawn by the seed.

    Raises:
        DataError: names file, line and field; or there is no pair in the data.
    """
    if source.suite is not None:
        raise DataError(f"suite {source.suite}: expected pairs of answers; a suite has none.")
    seen, found = Names(), Shelf(Pair)
    for where, row in rows(source):
        pair = _pair(source, row, where)
        prompt = Prompt(messages=pair.messages)
        if pair.chosen != pair.rejected and wanted(source, prompt) and seen.add(pair.id):
            found.add(pair)
    if not found:
        raise DataError(
            f"{source.path}: expected pairs of different answers, found none. Check 'fields'."
        )
    return found.draw(source.n, seed)


def _pair(source: Source, row: Mapping[str, Any], where: str) -> Pair:
    if BETTER in row and source.as_published:
        return _of(prompt_of(source, row, where).messages, *_pku(row, where))
    chosen = answer_of(source, row, "reference", where)
    rejected = answer_of(source, row, "response", where)
    if chosen.messages != rejected.messages:
        raise DataError(
            f"{where}: expected two answers to one conversation, found two conversations that "
            "differ before their last turns. Leave the row out."
        )
    return _of(chosen.messages, chosen.text, rejected.text)


def _of(messages: Turns, chosen: str, rejected: str) -> Pair:
    return Pair(messages=messages, chosen=chosen, rejected=rejected, kind=KIND)


def _pku(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The better answer and the other one."""
    better = str(row[BETTER])
    if better not in ("0", "1"):
        raise DataError(f"{where}: field '{BETTER}': expected 0 or 1, found {better!r:.60}.")
    both = []
    for column in (f"response_{better}", f"response_{1 - int(better)}"):
        if not str(row.get(column) or "").strip():
            raise DataError(f"{where}: field '{column}': expected text, found none.")
        both.append(str(row[column]).strip())
    return both[0], both[1]
