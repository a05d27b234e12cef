"""Answers that people have labelled: what judges are measured on.

Reads what misstep.data.sources reads, and three layouts more: XSTest's completions (complied,
refused, or in part), LLMBar's pairs (which of two answers is better) and JADE's (a bad answer
and a good one). A judge of pairs is measured on pairs: LLMBar's, or a chosen and a rejected
answer; one that grades on these, or on single answers that are called good or bad. A label is
what the judge should say: 1 where its metric counts the answer, as a mistake, a refusal or a
helpful answer. Rows that say nothing of that are left out and counted. Knows no judge.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from misstep.data.columns import answer_of, names_of, prompt_for, prompt_of
from misstep.data.fields import COLUMNS, Reading, Row
from misstep.data.labels import (
    COMPLIES,
    LABELS,
    MISSING,
    NO,
    REFUSES,
    YES,
    Label,
    says_bad,
    unknown_word,
    word_of,
)
from misstep.data.row_labels import label_of, labels_say, refuse_prompt_label, sides
from misstep.data.sources import Source, place_of, rows, source_digest, wanted
from misstep.data.tables import PlacedRow, file_stem, header_of
from misstep.errors import DataError, EmptyCell
from misstep.records import VERDICTS, Prompt, Response, digest

MISTAKES, REFUSALS, HELPFULNESS = "mistake_rate", "over_refusal", "helpfulness"
WINS = "win_rate"
"""The metric of judges of pairs."""
XSTEST = {"prompt", "completion", "type", "final_label"}
LLMBAR = {"output_1", "output_2", "label"}
JADE = (("violating_answer", "safe_answer"), ("违规回答", "安全有用回答"))
"""JADE's columns, in two languages: the bad answer to a prompt and the good one."""
PREFERRED = {"reference": "chosen", "response": "rejected"}
"""Our fields of a pair, and their columns where they are not mapped."""
CATEGORIES = ("topic", "category", "harm_category", "kind", "attack")
"""Columns that say what a case is about; a mapped `topic` comes first."""
PARTIAL, REFUSED = "3_partial_refusal", "2_full_refusal"
XSTEST_LABELS = ("1_full_compliance", REFUSED, PARTIAL)
UNSAFE_TYPES = "contrast_"
"""How the types of XSTest's unsafe prompts begin."""
ASKED = {
    MISTAKES: "whether the answer is a mistake",
    REFUSALS: "whether the answer refuses",
    HELPFULNESS: "whether the answer helps",
}
WORDS = {
    HELPFULNESS: ({"good", "helpful"}, {"bad", "unhelpful", "not helpful"}),
    REFUSALS: (REFUSES, COMPLIES),
}
"""Words of a label that say yes and no, by the metric that they are labels for."""
GRADES_OF_HARM = "harmless_score"
"""The grade that labels of harm measure; labels of good answers measure the others."""
SAID = {MISTAKES: "harm", REFUSALS: "refusal"}
"""What the labels of known sets are of, by the metric that they are labels for."""


class Case(NamedTuple):
    """One labelled answer, or two of which the label says whether the first is better."""

    where: str
    response: Response
    label: bool
    categories: tuple[str, ...]
    other: Response | None = None


class LeftOut(NamedTuple):
    """A row that has no label of this kind."""

    because: str


class DataSet(NamedTuple):
    """The labelled answers of one source."""

    name: str
    digest: str
    cases: list[Case]
    left_out: dict[str, int]
    """Rows that could not be used, by the reason."""
    pairs: bool
    """Whether each case holds two answers."""
    decoys: bool = False
    """Whether text stands beside the answers that nobody has labelled; see data/decoys.py."""


Part = Literal["train", "dev", "held_out"]
Found = Iterator[Case | LeftOut]


def read_labelled(source: Source, metric: str) -> DataSet:
    """All the cases of a source for judges of this metric, whatever its `n`.

    Raises:
        DataError: names file, line and field; or there is nothing that could be judged.
    """
    name = str(source.path)
    whole = _whole_rows(source)
    found = [item for where, row in whole for item in _cases(source, row, metric, where)]
    left_out = Counter(item.because for item in found if isinstance(item, LeftOut))
    cases = [item for item in found if isinstance(item, Case)]
    cases = [case for case in cases if wanted(source, case.response.prompt)]
    if not cases:
        why = "; ".join(f"{number} left out: {reason}" for reason, number in left_out.items())
        raise DataError(
            f"{name}: expected labelled answers, found none ({why or 'the file is empty'})."
        )
    pairs = {case.other is not None for case in cases}
    if len(pairs) > 1:
        raise DataError(f"{name}: expected answers or pairs of answers, found both.")
    short = file_stem(name) if source.is_file else name
    return DataSet(short, source_digest(source), cases, dict(left_out), pairs.pop())


def _whole_rows(source: Source) -> Iterator[PlacedRow]:
    """The rows, each with all columns of the data: what one lacks is an empty cell.

    So JSON is read as Parquet, which has no absent keys. The names of all columns are known
    only at the end, so the data are gone through once for these alone.
    """
    columns: dict[str, Any] = {}
    for _, row in rows(source):
        columns |= dict.fromkeys(row)
    for where, row in rows(source):
        yield where, columns | row


def drawn(data: DataSet, n: int | None) -> DataSet:
    """The set with at most so many cases, the same ones each time, in their order."""
    if n is None or n >= len(data.cases):
        return data
    chosen = random.Random("labelled").sample(range(len(data.cases)), n)
    return data._replace(cases=[data.cases[place] for place in sorted(chosen)])


def _cases(source: Source, row: Row, metric: str, where: str) -> Found:
    columns = set(row) if source.as_published else set()
    if columns >= LLMBAR:
        yield _llmbar(source, row, metric, where)
        return
    if metric == WINS or (metric not in VERDICTS and _holds_pair(source, row)):
        yield _preferred(source, row, metric, where)
        return
    metric = labels_for(metric)
    jade = next((both for both in JADE if set(both) <= columns), None)
    if columns >= XSTEST:
        yield from _xstest(source, row, metric, where)
    elif jade:
        yield from _jade(source, row, jade, metric, where)
    else:
        yield from _plain(source, row, metric, where)


def labels_for(metric: str) -> str:
    """By the labels of which metric single answers measure a judge of this one."""
    if metric in VERDICTS:
        return metric
    return MISTAKES if metric == GRADES_OF_HARM else HELPFULNESS


def _plain(source: Source, row: Row, metric: str, where: str) -> Found:
    if said := labels_say(source, row):
        _check_said(said[0], metric, f"columns ({', '.join(said[1])})", where)
    for side in sides(source, row):
        try:
            label = label_of(side, row, where, _words_of(metric))
            if label is None:
                refuse_prompt_label(row, where)
                raise DataError(
                    f"{header_of(where)}: expected a column with labels "
                    f"({', '.join(COLUMNS['label'])} or is_safe), found "
                    f"{', '.join(sorted(row))}. Map it with --field label=COLUMN."
                )
            answer = answer_of(side, row, "response", where)
        except EmptyCell as nothing:
            yield LeftOut(nothing.what)
        else:
            prompt = prompt_for(side, row, answer, where)
            says = _says(label, metric, where)
            yield Case(where, _response(prompt, answer.text), says, _about(side, row))


def _check_said(said: str, metric: str, found: str, where: str) -> None:
    """Refuse the labels of a known set where they say something else than is asked."""
    if SAID.get(metric) != said:
        asked = ASKED[MISTAKES if said == SAID[MISTAKES] else REFUSALS]
        raise DataError(
            f"{where}: expected labels that say {ASKED[metric]}, found {found} that say "
            f"{asked}. Give other data, or map one with --field label=COLUMN."
        )


def _says(label: Label, metric: str, where: str) -> bool:
    """Whether a label says yes: by a word of the metric's own, or by yes itself."""
    if metric == MISTAKES or label.mapped:
        return says_bad(label, where) != (metric == HELPFULNESS)
    yes, no = _words_of(metric) or (YES, NO)
    if label.word not in yes | no:
        raise unknown_word(label, yes | no, where)
    return label.word in yes


def _words_of(metric: str) -> tuple[set[str], set[str]] | None:
    """The words that say yes and no of a metric, but of mistakes: a column has its own."""
    yes, no = WORDS.get(metric, (set[str](), set[str]()))
    return None if metric == MISTAKES else (YES | yes, NO | no)


def _jade(source: Source, row: Row, columns: tuple[str, str], metric: str, where: str) -> Found:
    """Two answers, the bad one first."""
    _check_said(SAID[MISTAKES], metric, f"columns ({', '.join(columns)})", where)
    for column in columns:
        side = source.model_copy(update={"fields": source.fields | {"response": column}})
        try:
            answer = answer_of(side, row, "response", where)
        except EmptyCell as nothing:
            yield LeftOut(nothing.what)
        else:
            prompt = prompt_for(side, row, answer, where)
            bad = column == columns[0]
            yield Case(where, _response(prompt, answer.text), bad, _about(source, row))


def _xstest(source: Source, row: Row, metric: str, where: str) -> Found:
    """A refusal where people saw one; harm where an unsafe prompt was complied with."""
    label = str(row["final_label"]).strip()
    if _is_missing(row["final_label"]):
        yield LeftOut("no label")
        return
    if label not in XSTEST_LABELS:
        raise DataError(
            f"{where}: 'final_label': expected one of {', '.join(XSTEST_LABELS)}, "
            f"found {label!r:.40}."
        )
    kind = str(row["type"])
    if metric not in (REFUSALS, MISTAKES):
        raise DataError(
            f"{where}: expected labels that say {ASKED[metric]}, found XSTest's, "
            "which say whether it refuses. Give other data."
        )
    if label == PARTIAL:
        yield LeftOut("a refusal in part")
    elif metric == MISTAKES and not kind.startswith(UNSAFE_TYPES):
        yield LeftOut("a safe prompt, of which XSTest says nothing about harm")
    elif not str(row["completion"] or "").strip():
        yield LeftOut("no answer")
    elif prompt := _prompt(source, row, where):
        response = _response(prompt, str(row["completion"]).strip())
        refused = label == REFUSED
        yield Case(
            where, response, refused == (metric == REFUSALS), _about(source, row, ("type",))
        )
    else:
        yield LeftOut("no prompt")


def _is_missing(label: Any) -> bool:
    return label is None or word_of(label) in MISSING


def _prompt(source: Source, row: Row, where: str) -> Prompt | None:
    with suppress(EmptyCell):
        return prompt_of(source, row, where)
    return None


def _llmbar(source: Source, row: Row, metric: str, where: str) -> Case | LeftOut:
    """The label names the answer that people prefer; it says nothing of harm or refusals."""
    if metric in SAID:
        raise DataError(
            f"{where}: expected labels that say {ASKED[metric]}, found LLMBar's, which say "
            "which of two answers is better. Give other data."
        )
    if _is_missing(row["label"]):
        return LeftOut("no label")
    label = word_of(row["label"])
    if label not in ("1", "2"):
        raise DataError(f"{where}: 'label': expected 1 or 2, found {label!r:.40}.")
    if not all(str(row[f"output_{n}"] or "").strip() for n in (1, 2)):
        return LeftOut("no answer")
    if (prompt := _prompt(source, row, where)) is None:
        return LeftOut("no prompt")
    one, other = (_response(prompt, str(row[f"output_{n}"] or "").strip()) for n in (1, 2))
    return Case(where, one, label == "1", _about(source, row), other)


def _holds_pair(source: Source, row: Row) -> bool:
    """Whether a row has both answers, under the names that they are given or mapped to.

    One whose label is mapped is a single answer: a reference beside it is no second one.
    """
    named = PREFERRED | source.fields
    return not set(LABELS) & set(named) and {named[field] for field in PREFERRED} <= set(row)


def _preferred(source: Source, row: Row, metric: str, where: str) -> Case | LeftOut:
    """The better answer and the other one; a hash of both says which of them stands first."""
    side = source.model_copy(update={"fields": PREFERRED | source.fields})
    fields = [side.fields[field] for field in PREFERRED]
    if not set(fields) <= set(row):
        raise DataError(
            f"{header_of(where)}: expected pairs of answers, since the judge's {metric} is no "
            f"verdict on a single one: columns {' and '.join(fields)}, the better one and "
            f"the other one; or LLMBar's ({', '.join(sorted(LLMBAR))}). Found "
            f"{', '.join(sorted(row))}. Map the better one with reference=COLUMN and "
            "the other with response=COLUMN."
        )
    try:
        better, worse = (answer_of(side, row, field, where) for field in PREFERRED)
    except EmptyCell as nothing:
        return LeftOut(nothing.what)
    if better.messages != worse.messages:
        return LeftOut("answers to two conversations")
    if better.text == worse.text:
        return LeftOut("equal answers")
    prompt = prompt_for(side, row, better, where)
    both = [_response(prompt, answer.text) for answer in (better, worse)]
    first = int(digest([better.text, worse.text]), 16) % 2 == 0
    one, other = both if first else reversed(both)
    return Case(where, one, first, _about(source, row), other)


def _response(prompt: Prompt, text: str) -> Response:
    """The answer to what a judge may know of a prompt; its reference is no part of that."""
    known = Prompt(messages=prompt.messages, accept=prompt.accept, target=prompt.target)
    return Response(prompt=known, text=text)


def _about(reading: Reading, row: Row, known: Sequence[str] = CATEGORIES) -> tuple[str, ...]:
    """The categories of a row."""
    mapped = [reading.fields["topic"]] if "topic" in reading.fields else []
    return names_of(next((row[name] for name in (*mapped, *known) if row.get(name)), None))


def part_of(question: str, held_out: float, dev: float, seed: int) -> Part:
    """The part of a split by question, in whatever data set the question stands."""
    place = place_of(question, seed)
    return "held_out" if place < held_out else "dev" if place < held_out + dev else "train"
