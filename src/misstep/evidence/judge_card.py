"""What is known of a trained judge: the content of card.json beside its weights.

From what it was trained, how the questions were parted, and how far it agrees with people on
each data set that it was checked on, always without the questions that it has seen. Knows
files; knows no model.
"""

from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Literal

from pydantic import Field

from misstep.data.labelled import DataSet
from misstep.data.sources import question_of
from misstep.data.tables import as_path
from misstep.errors import DataError
from misstep.evidence.check_results import CalibrationBin, Check, DataCheck
from misstep.evidence.results import Metric
from misstep.records import Prompt, Record, digest, read_json, write_json, write_text

CARD = "card.json"
READS = 2
"""How today's judges read; 1 was a question and an answer as one text, of a language model."""
SEEN = "seen.txt"
"""Names of the questions that the judge was trained or tuned on, one a line."""


class Parts(Record):
    """How many answers, or questions, are in each part."""

    train: int
    """Trained on."""
    dev: int
    """Decided when to stop, and the temperature."""
    held_out: int
    """Not seen."""


class Source(Record):
    """A data set that the judge comes from."""

    name: str
    digest: str
    answers: Parts
    questions: Parts
    left_out: dict[str, int]
    """Rows without a label of this kind, by the reason."""
    repeated: int | None = None
    """Held-out answers whose text stands under a question of the training part, of any data
    set; None on cards from before this was counted."""


class Training(Record):
    """How the judge was made."""

    model: str
    digest: str
    """Of the model's files."""
    settings: dict[str, float | int]
    data: tuple[Source, ...]
    dev_loss: tuple[tuple[float, float], ...]
    """Epochs, and the loss on the dev part there; the best one was kept."""
    cut: int
    """Training texts that were too long to be read whole."""
    seconds: float
    tokens_per_second: float
    device: str
    versions: dict[str, str]


class Tested(Record):
    """The judge on the unseen questions of one data set."""

    digest: str
    n: int
    """Cases with a score."""
    unscored: int
    left_out: dict[str, int]
    """Cases that were not judged, by the reason."""
    accuracy: Metric | None = None
    balanced_accuracy: Metric | None = None
    auc: Metric | None = None
    kappa: Metric | None = None
    calibration_error: Metric | None = None
    false_safe: Metric | None = None
    false_unsafe: Metric | None = None
    calibration: tuple[CalibrationBin, ...]

    @classmethod
    def of(cls, found: DataCheck) -> "Tested":
        """What a check found on one data set."""
        whole = found.whole
        return cls(
            digest=found.digest,
            n=whole.n,
            unscored=whole.unscored,
            left_out=found.left_out,
            calibration=found.calibration,
            **whole.metrics,
        )


class JudgeCard(Record):
    """The whole of card.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    judge: str
    """As its scores name it: by all that they depend on."""
    metric: str
    reads: int = 1
    """How the judge reads; see `READS`."""
    max_tokens: int
    """Of prompt and answer together, in one row."""
    temperature: float
    shift: float
    """Of the log-odds: the shift is taken off, the rest divided by the temperature. Both were
    fitted on the dev part."""
    training: Training
    data: dict[str, Tested]
    """By data set."""


def is_trained_judge(name: str) -> bool:
    """Whether this is the folder of a trained judge."""
    return (as_path(name) / CARD).is_file()


def read_card(folder: Path) -> JudgeCard:
    """Read the card of a trained judge.

    Raises:
        DataError: it is absent, or a field of it is wrong.
    """
    return read_json(folder / CARD, JudgeCard)


def write_card(folder: Path, card: JudgeCard) -> None:
    """Write a card so that equal cards are equal bytes."""
    write_json(folder / CARD, card.model_dump(mode="json", by_alias=True, exclude_none=True))


def enter_check(folder: Path, check: Check, given: Sequence[str]) -> None:
    """Put what a check found on single answers into the card; the same data are replaced.

    Args:
        folder: the judge's.
        check: of the judge.
        given: the data sets as they were given, in order; so is called one whose name is that
            of other data on the card.
    """
    card = read_card(folder)
    tested = dict(card.data)
    for data, path in zip(check.data, given, strict=True):
        if not data.pairs:
            old = card.data.get(data.name)
            name = data.name if old is None or old.digest == data.digest else path
            tested[name] = Tested.of(data)
    write_card(folder, card.model_copy(update={"data": tested}))


def write_seen(folder: Path, questions: Set[str]) -> None:
    """Write by which names the questions are known that the judge has seen."""
    write_text(folder / SEEN, "".join(f"{name}\n" for name in sorted(map(digest, questions))))


def seen_questions(folder: Path) -> set[str]:
    """The names of the questions that the judge was trained or tuned on.

    Raises:
        DataError: the list is absent.
    """
    try:
        return set((folder / SEEN).read_text(encoding="utf-8").split())
    except OSError as error:
        raise DataError(
            f"{folder / SEEN}: cannot be read ({error.strerror}). It says which questions the "
            "judge has seen; train the judge again."
        ) from error


def was_seen(prompt: Prompt, seen: Set[str]) -> bool:
    """Whether the question of a prompt is among those that a judge has seen."""
    return digest(question_of(prompt)) in seen


def unseen(data: DataSet, folder: Path) -> DataSet:
    """A data set without the questions that the judge was trained or tuned on.

    Raises:
        DataError: there is no other question in it, or the list is absent.
    """
    seen = seen_questions(folder)
    kept = [case for case in data.cases if not was_seen(case.response.prompt, seen)]
    if not kept:
        raise DataError(
            f"{data.name}: expected questions that the judge was not trained on, found none in "
            f"{len(data.cases)} cases. Give other data."
        )
    # Several judges of one ensemble may each have seen others.
    left_out = Counter(data.left_out)
    left_out["a question that the judge was trained on"] += len(data.cases) - len(kept)
    return data._replace(cases=kept, left_out=dict(+left_out))
