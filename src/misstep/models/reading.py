"""How a judge reads what was asked and what was answered: as tokens of one model.

A language model reads two texts that each end with the token that ends a turn; an encoder reads
them between its own separators. What spells a control token in either is plain text, so nothing
that is judged can end the text that it stands in. What is too long for one row can be read in
several. This module knows tokenizers; it knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from misstep.errors import ModelError
from misstep.models.locate import Model, is_encoder
from misstep.models.rendering import PROBE, Renderer, tokens_of
from misstep.models.weights import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OVERLAP = 4
"""Of a row's part of an answer, one in so many tokens stands in the next row too."""


class Texts(NamedTuple):
    """A prompt and an answer, or a part of it, as tokens; and whether something is left out."""

    ids: tuple[int, ...]
    cut: bool


@dataclass(frozen=True)
class Reader:
    """Turns a prompt and an answer into the tokens of one row."""

    tokenizer: "PreTrainedTokenizerBase"
    pad: int
    """The token that rows are filled up with."""
    around: tuple[Sequence[int], Sequence[int], Sequence[int]]
    """The control tokens before, between and after the two."""

    @classmethod
    def for_model(cls, model: Model) -> Self:
        """The reader of a language model or an encoder; reads its tokenizer, not its weights.

        Raises:
            ModelError: the tokenizer cannot be loaded, or does not say where a text ends.
        """
        if is_encoder(model):
            tokenizer = load_tokenizer(model)
            pad = tokenizer.pad_token_id
            return cls(tokenizer, 0 if pad is None else pad, _separators(tokenizer))
        renderer = Renderer.for_model(model)
        first, end = renderer.tokenizer.bos_token_id, (renderer.end_of_turn,)
        return cls(
            renderer.tokenizer, renderer.pad, (() if first is None else (first,), end, end)
        )

    def read(self, prompt: str, answer: str, most: int) -> Texts:
        """The tokens of a prompt and an answer, at most so many.

        A long answer loses its end. A prompt keeps its beginning, at least half of all tokens
        if it is as long.
        """
        first = self.read_whole(prompt, answer, most)
        return first[0]._replace(cut=first[0].cut or len(first) > 1)

    def read_whole(self, prompt: str, answer: str, most: int) -> list[Texts]:
        """The same, and rows for the rest of an answer that is too long for one.

        Each row begins with the prompt, and with the end of what the row before it has of the
        answer: a quarter of its part of it. What may be cut is the prompt.
        """
        before, between, after = self.around
        asked, answered = (tokens_of(self.tokenizer, text) for text in (prompt, answer))
        room = most - len(before) - len(between) - len(after)
        kept = asked[: max(room - len(answered), room // 2)]
        size = room - len(kept)
        last = max(0, len(answered) - size)
        starts = [*range(0, last, size - size // OVERLAP), last]
        return [
            Texts(
                (*before, *kept, *between, *answered[start : start + size], *after),
                len(kept) < len(asked),
            )
            for start in starts
        ]

    def reads(self, answer: str) -> bool:
        """Whether there is anything to read: some tokenizers drop signs that show nothing."""
        return bool(answer.strip()) and bool(tokens_of(self.tokenizer, answer))

    @property
    def longest(self) -> int:
        """The most tokens that the model reads, as far as its tokenizer says so."""
        return int(self.tokenizer.model_max_length)


def _separators(
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[int], list[int], list[int]]:
    """What a tokenizer itself puts before, between and after a pair of texts."""
    alone = tokens_of(tokenizer, PROBE)
    pair = list(tokenizer(PROBE, PROBE)["input_ids"])
    size = len(alone)
    places = [i for i in range(len(pair) - size + 1) if pair[i : i + size] == alone]
    if len(places) != 2:
        raise ModelError(
            f"model {tokenizer.name_or_path}: expected a tokenizer that reads a pair of texts "
            f"as the texts between its own separators, found {pair} for two of {alone}. Use "
            "another encoder, or a language model."
        )
    first, second = places
    return pair[:first], pair[first + size : second], pair[second + size :]
