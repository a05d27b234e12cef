"""People as judges: a blind sheet of paired answers, and what comes back of it.

The sheet shows a prompt and two answers, whose sides and order are drawn; the key, a file of
its own, says whose they are. A rated sheet is one rater's. Knows answers and ratings; no page
and no model.
"""

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from misstep.data.labelled import MISTAKES
from misstep.data.tables import LONGEST_CELL
from misstep.errors import DataError
from misstep.evidence.check_results import JudgedCase, Measured, measure
from misstep.evidence.results import Metric, Setting, rate_of
from misstep.records import Answer, Judgement, Record, Response, digest

SIDES = (1, 2)
BAD = tuple(f"mistake_{side}" for side in SIDES)
BETTER = "better"
QUESTIONS = {**dict.fromkeys(BAD, ("yes", "no")), BETTER: ("1", "2", "tie")}
"""The columns that a rater fills, and what may stand there; empty is no rating."""
FORMULA = re.compile(r"""((?:^|[,;|\t\r\n])[\s"]*)([=+@\-＝＋＠－])""")
"""How a cell begins that a spreadsheet would compute: also one that begins inside a text, since
a spreadsheet may part cells at other signs than the sheet does."""


class Item(Record):
    """One line of the sheet, unblinded: whose answer stands on which side."""

    item: str
    """Names the line and its texts; says nothing of whose they are."""
    test_set: str
    settings: tuple[str, str]
    """Of the first and of the second side."""
    responses: tuple[Response, Response]


class Key(Record):
    """key.json: what a sheet hides from its raters."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    seed: int
    a: str
    b: str
    items: tuple[Item, ...]


class Agreement(Record):
    """How far raters agree on one question."""

    alpha: float | None
    """Krippendorff's, nominal; None where no case has two ratings, or all are the same."""
    cases: int
    """Cases with two ratings or more."""


class Ratings(Record):
    """The whole of ratings.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    raters: dict[str, int]
    """The items that each has rated, in whole or in part."""
    items: int
    agreement: dict[str, Agreement]
    """On `mistake` and on `better`."""
    mistake_rate: dict[str, Metric]
    """By setting, of answers that most raters agree on; the others are `unscored`."""
    better: dict[str, Metric]
    """By setting and `tie`: the share of items in which most raters prefer it."""
    judge: str | None
    """The automatic judge of mistakes, where the run has its scores."""
    against_judge: Measured | None
    """That judge against the raters' majority."""


class Rated(NamedTuple):
    """A rater's answers: item and question to what was said."""

    rater: str
    said: dict[tuple[str, str], str]


def paired_items(
    answers: Sequence[Answer], a: Setting, b: Setting, n: int, seed: int
) -> list[Item]:
    """Prompts that both settings answered, at most so many, in an order and on sides drawn.

    An answer that never came is none.

    Raises:
        DataError: there is no such prompt.
    """
    found: dict[tuple[str, str], dict[Setting, Response]] = {}
    for answer in (answer for answer in answers if answer.response.error is None):
        of = found.setdefault((answer.test_set, answer.response.prompt.id), {})
        of.setdefault(Setting.of(answer), answer.response)
    both = {where: of for where, of in found.items() if a in of and b in of}
    if not both:
        known = sorted({Setting.of(answer).name for answer in answers})
        raise DataError(
            f"expected prompts that {a.name} and {b.name} both answered, found none; the "
            f"settings are {', '.join(known)}. Name two of them with --a and --b."
        )
    rng = random.Random(f"sheet {seed}")
    chosen = rng.sample(sorted(both), min(n, len(both)))
    return [_item(where, both[where], rng.sample([a, b], 2), seed) for where in chosen]


def _item(
    where: tuple[str, str], of: Mapping[Setting, Response], sides: Sequence[Setting], seed: int
) -> Item:
    first, second = sides
    # As a rater sees them: names of responses would let one find out whose they are.
    shown = [of[side].text for side in sides]
    return Item(
        # A spreadsheet would take ten hexadecimal digits for a number if it can.
        item="s" + digest([seed, *where, sorted(side.name for side in sides), shown])[:10],
        test_set=where[0],
        settings=(first.name, second.name),
        responses=(of[first], of[second]),
    )


def sheet_csv(items: Iterable[Item]) -> str:
    """The blind sheet as CSV; ratings go into its last columns."""
    out = StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["item", "prompt", "answer_1", "answer_2", *QUESTIONS])
    for item in items:
        texts = [item.responses[0].prompt.transcript, *(r.text for r in item.responses)]
        writer.writerow([item.item, *map(_inert, texts), *[""] * len(QUESTIONS)])
    return out.getvalue()


def _inert(text: str) -> str:
    """A text of which no spreadsheet takes a part for a formula."""
    return FORMULA.sub(r"\1'\2", text)


def read_sheet(path: Path, key: Key) -> Rated:
    """Read a rated sheet; the file's name is the rater's.

    Raises:
        DataError: it is no sheet of this key, or a rating is none of those that are asked for.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text ({error.reason}). Save the sheet as CSV in UTF-8."
        ) from error
    known, said, seen = {item.item for item in key.items}, {}, set()
    for where, row in _rated_rows(path, text):
        item = row["item"]
        if item not in known or item in seen:
            what = "an item twice" if item in seen else "one that the key does not have"
            raise DataError(
                f"{where}: expected items of this run's sheet, found {what}: {item!r:.20}. "
                "Rate a copy of the sheet.csv that lies beside the key, each line once."
            )
        seen.add(item)
        for question, answers in QUESTIONS.items():
            answer = row[question].casefold()
            if answer and answer not in answers:
                raise DataError(
                    f"{where}: '{question}': expected {', '.join(answers)} or nothing, "
                    f"found {answer!r:.20}."
                )
            if answer:
                said[item, question] = answer
    if not said:
        raise DataError(f"{path}: expected ratings, found none. Fill {', '.join(QUESTIONS)}.")
    return Rated(path.stem, said)


def _rated_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What stands in the columns that are read, by line; spreadsheets add empty lines."""
    # Spreadsheets of some countries write semicolons.
    separator = ";" if text.partition("\n")[0].count(";") > 1 else ","
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(StringIO(text), delimiter=separator, strict=True)
    columns = ("item", *QUESTIONS)
    try:
        if absent := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise DataError(
                f"{path}: expected the columns of the sheet, found none named "
                f"{', '.join(absent)}. Rate a copy of sheet.csv and keep its first line."
            )
        for row in reader:
            found = {name: (row[name] or "").strip() for name in columns}
            if any(found.values()):
                yield f"{path}, line {reader.line_num}", found
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: expected the cells of a CSV file, found one that "
            f"does not end as it began ({error}). See to the quotation marks there; no rating "
            "is taken from the file as it is."
        ) from error


def count_ratings(
    key: Key,
    rated: Sequence[Rated],
    labels: Mapping[tuple[str, int], bool],
    judgements: Sequence[Judgement],
) -> Ratings:
    """Agreement between raters, what most found, and how the automatic judge compares."""
    scores = {
        (Setting.of(j).name, j.test_set, j.score.response_id): j.score
        for j in judgements
        if j.score.metric == MISTAKES
    }
    judged = [
        JudgedCase(
            data="raters",
            where=item.item,
            response=response,
            label=label,
            value=score.value,
            reason=score.reason,
        )
        for item, side, response in _answers(key)
        if (label := labels.get((item.item, side))) is not None
        if (score := scores.get((item.settings[side - 1], item.test_set, response.id)))
    ]
    names = {score.judge for score in scores.values()}
    return Ratings(
        raters={r.rater: len({item for item, _ in r.said}) for r in rated},
        items=len(key.items),
        agreement=_agreement(key, rated),
        mistake_rate={name: _mistakes(key, labels, name) for name in (key.a, key.b)},
        better=_preferred(key, rated),
        judge=names.pop() if len(names) == 1 else None,
        against_judge=measure(judged) if judged else None,
    )


def majority_labels(key: Key, rated: Sequence[Rated]) -> dict[tuple[str, int], bool]:
    """Whether most raters call an answer a mistake, by item and side, where most agree."""
    found = {
        (item.item, side): _majority(_said(rated, item.item, BAD[side - 1]))
        for item, side, _ in _answers(key)
    }
    return {where: said == "yes" for where, said in found.items() if said is not None}


def _answers(key: Key) -> Iterable[tuple[Item, int, Response]]:
    for item in key.items:
        for side, response in zip(SIDES, item.responses, strict=True):
            yield item, side, response


def _said(rated: Sequence[Rated], item: str, question: str) -> list[str]:
    return [r.said[item, question] for r in rated if (item, question) in r.said]


def _majority(said: Sequence[str]) -> str | None:
    """What more than half of the raters say."""
    word, count = Counter(said).most_common(1)[0] if said else ("", 0)
    return word if 2 * count > len(said) else None


def _agreement(key: Key, rated: Sequence[Rated]) -> dict[str, Agreement]:
    from misstep.evidence.agreement import krippendorff_alpha

    units = {
        "mistake": [_said(rated, item.item, name) for item in key.items for name in BAD],
        BETTER: [_said(rated, item.item, BETTER) for item in key.items],
    }
    return {
        name: Agreement(alpha=krippendorff_alpha(of), cases=sum(len(said) > 1 for said in of))
        for name, of in units.items()
    }


def _mistakes(key: Key, labels: Mapping[tuple[str, int], bool], setting: str) -> Metric:
    given = [(i.item, side) for i, side, _ in _answers(key) if i.settings[side - 1] == setting]
    return rate_of(labels.get(where) for where in given)


def _preferred(key: Key, rated: Sequence[Rated]) -> dict[str, Metric]:
    names = []
    for item in key.items:
        said = _majority(_said(rated, item.item, BETTER))
        names.append(item.settings[int(said) - 1] if said in ("1", "2") else said)
    return {
        wanted: rate_of(None if name is None else name == wanted for name in names)
        for wanted in (key.a, key.b, "tie")
    }


def rated_rows(key: Key, labels: Mapping[tuple[str, int], bool]) -> str:
    """The answers with their majority labels as JSON Lines that `misstep judge check` reads."""
    rows = (
        {
            "messages": [message.model_dump() for message in response.prompt.messages],
            "response": response.text,
            "target": response.prompt.target,
            "topic": item.settings[side - 1],
            "label": int(labels[item.item, side]),
        }
        for item, side, response in _answers(key)
        if (item.item, side) in labels
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
