"""The one path from conversations to tokens, for training and for serving.

A training row is the serving prompt, then the completion, then the token that ends a turn; so
the two cannot drift apart. Text that spells a control token inside a message or a completion,
such as `<|im_end|>`, is rendered as plain text: who writes a prompt cannot end the turn or open
a system turn. This module knows tokenizers and chat templates; it knows no weights.

How control text is kept plain: a mark, one character that occurs nowhere in the conversation,
is put into each such spelling before the template runs; the rendered text is cut at the control
tokens that the template wrote; the mark is taken out again, and each piece is tokenised without
looking for control tokens. A conversation without such text is tokenised as transformers does.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from misstep.errors import DataError, ModelError
from misstep.models.chat_template import on_one_day
from misstep.models.locate import Model
from misstep.models.weights import configured_ends, load_tokenizer, vocabulary_size
from misstep.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FALLBACK_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: `User: ...`, `Assistant: ...`, one turn a line."""
NEXT_TURNS = ("\nUser:", "\nAssistant:")
"""How its turns begin after another one."""

PROBE = "misstep"
CLOSED = re.compile(r"<(\w*think\w*)>\s*</\1>")
"""An empty thought, which some templates write in prompts and others in answers."""
OPENED = re.compile(r"<(\w*think\w*)>\s*\Z")
ENDINGS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Models whose `eos` ends a turn were trained with one of these at the end of a document."""


@dataclass(frozen=True)
class Rendered:
    """A training row as tokens; loss falls on what follows the prompt."""

    ids: tuple[int, ...]
    prompt_length: int


class Renderer:
    """Turns conversations into tokens and tokens into text, with one model's tokenizer."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        ends: Collection[int] = (),
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        """Tokens that the model has embeddings for, where it says so."""
        self.has_template = tokenizer.chat_template is not None
        """Whether the model brings a chat template; if not, `FALLBACK_TEMPLATE` is used."""
        self.next_turns = () if self.has_template else NEXT_TURNS
        """Texts that end an answer too: a model that was never tuned to turns writes on, and
        asks itself the next question."""
        self._control: dict[str, int] = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        spellings = sorted(map(re.escape, self._control), key=len, reverse=True)
        # No model has an empty set of control tokens in practice; `(?!)` matches nothing.
        self._spelling = "|".join(spellings) or "(?!)"
        self._own = tokenizer.get_chat_template() if self.has_template else FALLBACK_TEMPLATE
        self._takes_system = self._keeps_system()
        self.end_of_turn = self._find_end_of_turn()
        """The token that closes an assistant turn: the last target of a training row."""
        known = self._find_stop_ids()
        control = set(self._control.values())
        self.further_stops = tuple(sorted(control.intersection(ends).difference(known)))
        """Those of the given `ends` that neither template nor tokenizer tells, as of a model
        that ends its turn by beginning the user's."""
        self.stop_ids = (*known, *self.further_stops)
        """Generation stops on any of these: the end of a turn, or of a document."""

    @classmethod
    def for_model(cls, model: Model) -> Self:
        """The renderer of a model; reads its tokenizer, not its weights.

        Raises:
            ModelError: the tokenizer cannot be loaded, or has no token that ends a turn.
        """
        return cls(load_tokenizer(model), configured_ends(model), vocabulary_size(model))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model answers.

        Raises:
            DataError: the model's template refuses this sequence of turns.
        """
        mark = self._unused_character(messages)
        text = self._template(self._marked(messages, mark), generate=True)
        if mark not in text:
            return self._opening() + tokens_of(self.tokenizer, text, plain=False)
        return self._opening() + list(self._pieces(text, mark))

    def filled(self, template: str, messages: Sequence[Message], tail: str = "") -> list[int]:
        """The tokens of a conversation put into another template than the model's own.

        Only the template's own control tokens are such, as in `prompt`. The tail follows as
        plain text, tokenised together with what stands before it.

        Raises:
            DataError: the template refuses this sequence of turns.
        """
        mark = self._unused_character(messages)
        # Jinja takes one line end off a template's end.
        text = self._template(self._marked(messages, mark), True, template + "\n")
        return list(self._pieces(text + tail, mark))

    def example(
        self, messages: Sequence[Message], completion: str, prefill: str = ""
    ) -> Rendered:
        """A training row: prompt, completion and the token that ends the turn.

        A prefill opens the answer and belongs to the prompt. It is tokenised apart from the
        completion, as the model meets it that has written the one and goes on with the other.

        Raises:
            DataError: the model's template refuses this sequence of turns.
        """
        prompt = self.prompt(messages) + tokens_of(self.tokenizer, prefill)
        ids = (*prompt, *tokens_of(self.tokenizer, completion), self.end_of_turn)
        return Rendered(ids, len(prompt))

    def refuse_hidden_answers(self) -> None:
        """Pass where an answer begins where the model is left by the prompt.

        Raises:
            ModelError: the template leaves a thought open, so that a row would be learned as
                one; or answers stand in a channel of their own, which rows would lack.
        """
        turns = [{"role": "user", "content": "?"}]
        asked = CLOSED.sub("", self._template(turns, generate=True))
        turns.append({"role": "assistant", "content": PROBE})
        answered = CLOSED.sub("", self._template(turns, generate=False)).partition(PROBE)[0]
        opened = OPENED.search(asked)
        asked, answered = ("".join(text.split()) for text in (asked, answered))
        between = answered.removeprefix(asked) if answered.startswith(asked) else ""
        if opened or between:
            what = f"leaves it in {opened[0]}" if opened else f"puts {between} before an answer"
            raise ModelError(
                f"model {self.tokenizer.name_or_path}: expected a chat template after which it "
                f"answers at once, found one that {what}: what is trained on would not "
                "be what it answers. Take a model that does not think aloud, or save it with a "
                "chat template that ends the thought (tokenizer.chat_template)."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, control tokens left out."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def next_turn(self, text: str) -> int | None:
        """Where the answer ends in a generated text and another turn begins, if one does."""
        places = [text.find(turn) for turn in self.next_turns]
        return min((place for place in places if place >= 0), default=None)

    @cached_property
    def pad(self) -> int:
        """The token that rows are filled up with.

        Not the one that ends a turn, which many models pad with, if there is another: scores
        are read at the last token that is no pad, and the end belongs to what is scored.
        """
        known = [self.tokenizer.pad_token_id, *sorted(self._control.values())]
        end, most = self.end_of_turn, self._vocabulary
        # Some tokenizers were given a token to pad with that their model knows nothing of.
        usable = (int(i) for i in known if i is not None and (most is None or i < most))
        return next((i for i in usable if i != end), end)

    def _opening(self) -> list[int]:
        """What the tokenizer itself puts first; a chat template writes its own."""
        if self.has_template:
            return []
        bos = self.tokenizer.bos_token_id
        first = list(self.tokenizer(PROBE)["input_ids"])[:1]
        return first if bos is not None and first == [bos] else []

    def _pieces(self, text: str, mark: str) -> Iterator[int]:
        """Tokens of a text whose marked spellings are plain and whose others are control."""
        for piece in re.split(f"({self._spelling})", text):
            if piece in self._control:
                yield self._control[piece]
            elif piece:
                yield from tokens_of(self.tokenizer, piece.replace(mark, ""))

    def _marked(self, messages: Sequence[Message], mark: str) -> list[dict[str, str]]:
        """Turns for the template, each spelling of a control token broken by the mark."""
        # The look-ahead finds overlapping spellings too; the mark follows the first character.
        start = re.compile(f"(?=(?:{self._spelling}))(.)", re.DOTALL)
        turns = [
            {"role": m.role, "content": start.sub(rf"\1{mark}", m.content)} for m in messages
        ]
        return turns if self._takes_system else fold_system(turns)

    def _unused_character(self, messages: Sequence[Message]) -> str:
        used = set().union(*(m.content for m in messages))
        return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)

    def _template(
        self, turns: list[dict[str, str]], generate: bool, template: str | None = None
    ) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=generate,
                # Thinking must be off in training and in serving, or neither matches the other.
                enable_thinking=False,
                # Nor may a prompt be other tokens tomorrow.
                chat_template=on_one_day(template or self._own),
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"the model's chat template refuses a conversation of turns {roles}: {error}"
            ) from error
        return str(text)

    def _keeps_system(self) -> bool:
        turns = [{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}]
        try:
            return PROBE in self._template(turns, generate=True)
        except DataError:
            return False

    def _find_end_of_turn(self) -> int:
        """The first control token after an assistant turn in the template, else eos."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        _, said, tail = self._template(turns, generate=False).rpartition(PROBE)
        if not said:
            raise ModelError(
                f"model {self.tokenizer.name_or_path}: expected a chat template that writes "
                "what is said, found one that leaves it out; it may read lists of parts only. "
                "Save the model with one that reads text (tokenizer.chat_template)."
            )
        found = re.search(self._spelling, tail)
        if found and found[0]:
            return self._control[found[0]]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"model {self.tokenizer.name_or_path}: expected a token that ends an answer, "
                "found neither one in its chat template nor an eos token in its tokenizer."
            )
        return int(self.tokenizer.eos_token_id)

    def _find_stop_ids(self) -> tuple[int, ...]:
        ends = [self.end_of_turn, self.tokenizer.eos_token_id]
        ends += [self._control[text] for text in ENDINGS if text in self._control]
        return tuple(dict.fromkeys(int(end) for end in ends if end is not None))


def named_stops(model: Model) -> str:
    """What an engine's identity says of `further_stops`: nothing where there are none."""
    stops = Renderer.for_model(model).further_stops
    return "".join(f":stop-{number}" for number in stops)


def tokens_of(tokenizer: "PreTrainedTokenizerBase", text: str, plain: bool = True) -> list[int]:
    """Tokens of a text; `plain` takes the spelling of a control token as mere text."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=plain,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def fold_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put system turns in front of the first user turn, for templates that know no system."""
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    rest = [dict(turn) for turn in turns if turn["role"] != "system"]
    if not system:
        return rest
    first = next((turn for turn in rest if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *rest]
    first["content"] = f"{system}\n\n{first['content']}"
    return rest
