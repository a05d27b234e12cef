"""A judge that is a trained classifier: its score is the calibrated probability of yes.

It reads the answer and what was asked, as tokens that no text can turn into instructions: it
follows none. Of mistakes, a long answer is read in parts and the worst one counts, since what
is wrong may stand anywhere. Whether an answer refuses stands in its beginning: there a long one
is cut, and the score says so. An answer that is empty, or of which the tokenizer makes nothing,
on which the model fails, or for which it gives no finite number, is unscored.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from misstep.data.labelled import MISTAKES
from misstep.engines import turns
from misstep.errors import DataError, EngineError
from misstep.evidence.judge_card import CARD, READS, read_card
from misstep.judges.base import EMPTY, Judge
from misstep.models.locate import (
    FILES,
    folder_digest,
    is_encoder,
    locate_any,
)
from misstep.models.reading import Reader, Texts
from misstep.models.weights import free
from misstep.records import Response, Score, digest

if TYPE_CHECKING:
    from misstep.training.scoring import Scorer

PROBABILITY = "mistake_probability"
"""What a rate counts as a verdict, as it is: small changes show in its mean."""
CERTAIN = 12.0
"""Log-odds beyond which none are believed."""
MICRO_TOKENS = 4096
"""Padded tokens that are scored at once."""


class ClassifierJudge(Judge):
    """The judge in a folder that `misstep judge train` has written; loads when it scores."""

    def __init__(self, folder: Path) -> None:
        card = read_card(folder)
        self.folder, self.card = folder, card
        self.metric, self.name = card.metric, card.judge
        if name_of(folder, card.temperature, card.shift, card.max_tokens) != self.name:
            raise DataError(
                f"{folder / CARD}: expected the card of the files beside it, found that of "
                f"others ({self.name}). Train the judge again."
            )
        model = locate_any(str(folder))
        if card.reads < READS and not is_encoder(model):
            raise DataError(
                f"{folder / CARD}: expected a judge that reads as today's do, found one of an "
                "earlier version, which read question and answer as one text; a text could end "
                "the one and begin the other. Train the judge again."
            )
        self._reader = Reader.for_model(model)
        self._scorer: Scorer | None = None

    def score(self, responses: Sequence[Response]) -> list[Score]:
        parts = [
            parts_of(self._reader, r, self.card.max_tokens, self.metric)
            if self._reader.reads(r.text)
            else []
            for r in responses
        ]
        rows = [part.ids for of in parts for part in of]
        odds = iter(odds_of(self._loaded(), rows) if rows else [])
        return [
            self._read(response, [next(odds) for _ in of], of)
            for response, of in zip(responses, parts, strict=True)
        ]

    def further(self, response: Response, score: Score) -> list[Score]:
        found = super().further(response, score)
        if self.metric == MISTAKES:
            found.append(score.model_copy(update={"metric": PROBABILITY}))
        return found

    def close(self) -> None:
        """Give back the memory of the weights; they load again when there is more to score."""
        if self._scorer is not None:
            self._scorer = None
            free()

    def give_up(self) -> None:
        """Make room on the GPU for another."""
        self.close()

    def _loaded(self) -> "Scorer":
        import torch

        if torch.cuda.is_available():
            turns.take(self)
        if self._scorer is None:
            try:
                self._scorer = classifier_scorer(self.folder, self._reader)
            except RuntimeError as error:
                raise EngineError(
                    f"judge {self.folder}: its weights do not load: {error}. Where memory is "
                    "short, see what else is on the machine or its GPU, or train a judge of "
                    "fewer layers; then run the same command again."
                ) from error
        return self._scorer

    def _read(
        self, response: Response, odds: Sequence[float | RuntimeError], parts: Sequence[Texts]
    ) -> Score:
        if not parts:
            return self.unscored(response, EMPTY)
        given = list[float]()
        for value in odds:
            if isinstance(value, RuntimeError):
                return self.unscored(response, f"the judge failed: {value}")
            if not math.isfinite(value):
                return self.unscored(response, f"the judge gave no number: {value}")
            given.append(value)
        calibrated = (max(given) - self.card.shift) / self.card.temperature
        return self.scored(response, probability(calibrated), self._how_read(parts))

    def _how_read(self, parts: Sequence[Texts]) -> str:
        """What of the prompt and the answer was read, where it is not all in one."""
        in_parts = f"read in {len(parts)} parts" if len(parts) > 1 else ""
        most = self.card.max_tokens
        cut = f"cut to {most} tokens" if any(part.cut for part in parts) else ""
        return "; ".join(filter(None, (in_parts, cut)))


def parts_of(reader: Reader, response: Response, most: int, metric: str) -> list[Texts]:
    """The rows that a judge of this metric reads an answer in; their highest odds count."""
    given = (response.prompt.conversation, response.text, most)
    return reader.read_whole(*given) if metric == MISTAKES else [reader.read(*given)]


def odds_of(scorer: "Scorer", rows: Sequence[Sequence[int]]) -> list[float | RuntimeError]:
    """The log-odds of each row; where they fail together, of each that does not alone."""
    try:
        return [*scorer(rows)]
    except RuntimeError as error:
        if len(rows) == 1:
            return [error]
        return [odds for row in rows for odds in odds_of(scorer, [row])]


def name_of(folder: Path, temperature: float, shift: float, max_tokens: int) -> str:
    """What a judge is called, by all that its scores depend on."""
    return (
        f"classifier:{digest([folder_digest(folder, FILES), temperature, shift, max_tokens])}"
    )


def classifier_scorer(folder: Path, reader: Reader) -> "Scorer":
    """What gives log-odds, not calibrated yet, to tokens."""
    from misstep.training.classifier import load_classifier
    from misstep.training.scoring import Scorer

    return Scorer(load_classifier(folder), reader.pad, MICRO_TOKENS)


def probability(odds: float) -> float:
    """Of log-odds; never quite 0 or 1, since no judge is certain."""
    return 1 / (1 + math.exp(-max(-CERTAIN, min(CERTAIN, odds))))
