"""transformers: answers from any causal model that it loads, on a GPU or a CPU.

Prompts are batched by length; the beginning that all of a batch share is computed once, and
what follows it is padded on the left. Each sampled row draws its own noise from a generator
seeded by its request, and takes the token with the largest noisy logit (Gumbel's trick), so
that a row's dice do not depend on its neighbours. What can still differ with the batch is the
rounding of matrix products: on one machine the same batch gives the same texts, and another
batch gives them as far as floating point allows. This module knows transformers; it knows no
other engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.engines.base import (
    CONTEXT,
    Completion,
    Engine,
    Request,
    completed,
    too_long,
)
from misstep.errors import EngineError
from misstep.models.adapter import adapter_digest
from misstep.models.locate import Model
from misstep.models.precision import device
from misstep.models.rendering import Renderer, named_stops, shared_prefix
from misstep.models.weights import (
    answering_dtype,
    attends_plainly,
    context_length,
    free,
    halve,
    load_for_answers,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_TOKENS = 16_384
LATELY = 16
"""Tokens: no fewer than the bytes of what begins a turn."""
LEAST_SHARED = 32
"""Tokens; to compute fewer for every row costs less than a step of their own."""


@dataclass(frozen=True)
class Row:
    """One request and the tokens of its prompt."""

    place: int
    request: Request
    prompt: list[int]

    @property
    def length(self) -> int:
        """The most tokens that the row may come to."""
        return len(self.prompt) + self.request.max_tokens


class TransformersEngine(Engine):
    """Answers with `generate`, in batches of at most `BATCH_TOKENS` tokens with padding."""

    def __init__(self, model: Model, adapter: Path | None = None) -> None:
        import torch

        self.renderer = Renderer.for_model(model)
        self._device = torch.device(device())
        self._model: PreTrainedModel | None = load_for_answers(model, adapter)
        forget_habits(self._model)
        self._batch_tokens = BATCH_TOKENS
        self._longest = context_length(model)
        self.identity = identity(model, adapter)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer every request, in order; see the module's text for what is promised."""
        rows = [Row(i, r, self.renderer.prompt(r.messages)) for i, r in enumerate(requests)]
        answers: dict[int, Completion] = {}
        for row in rows:
            if refused := too_long(len(row.prompt), row.request, self._longest, CONTEXT):
                answers[row.place] = refused
        rows = [row for row in rows if row.place not in answers]
        waiting = batches(rows, self._batch_tokens)
        while batch := next(waiting, None):
            outputs = self._tried(batch)
            if outputs is None:
                self._batch_tokens = halve(len(batch) * batch[0].length)
                left = [row for row in rows if row.place not in answers]
                waiting = batches(left, self._batch_tokens)
                continue
            answers |= {
                r.place: completed(self.renderer, ids)
                for r, ids in zip(batch, outputs, strict=True)
            }
        return [answers[place] for place in range(len(requests))]

    def _tried(self, batch: Sequence[Row]) -> list[list[int]] | None:
        """What follows each prompt, or None where memory holds only a smaller batch."""
        import torch

        try:
            return self._continue(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) > 1:
                return None
            raise EngineError(
                f"request {batch[0].place + 1}: its prompt ({len(batch[0].prompt)} tokens) and "
                f"its answer ({batch[0].request.max_tokens} at most) need more memory than the "
                "GPU has left. Shorten it, lower max_tokens, or see what else is on the GPU."
            ) from error
        except RuntimeError as error:
            raise EngineError(
                f"transformers stopped in a batch of {len(batch)} prompts: {error}"
            ) from error

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free()

    def _continue(self, batch: Sequence[Row]) -> list[list[int]]:
        """The tokens that follow each prompt, up to and with the first that ends an answer."""
        import torch

        if self._model is None:
            raise EngineError("this engine is closed: open another one.")
        width = max(len(row.prompt) for row in batch)
        shared = shared_beginning([row.prompt for row in batch])
        if len(batch) == 1 or shared < LEAST_SHARED or not keeps_all_positions(self._model):
            shared = 0
        ids = torch.full((len(batch), width), self.renderer.stop_ids[0], device=self._device)
        mask = torch.zeros_like(ids)
        # The padding stands between what is shared and what follows.
        ids[:, :shared] = torch.tensor(batch[0].prompt[:shared], device=self._device)
        mask[:, :shared] = 1
        for i, row in enumerate(batch):
            rest = torch.tensor(row.prompt[shared:], device=self._device)
            ids[i, width - len(rest) :] = rest
            mask[i, width - len(rest) :] = 1
        with torch.inference_mode():
            generate: Any = self._model.generate
            output = generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self._computed(ids[:1, :shared], len(batch)),
                **self._settings(batch, width),
            )
        return [
            self._cut(row, tail) for row, tail in zip(batch, output[:, width:], strict=True)
        ]

    def _computed(self, beginning: "torch.Tensor", rows: int) -> Any:
        """The cache of a beginning, for so many rows; None where there is nothing in it."""
        if not beginning.shape[1]:
            return None
        from transformers import DynamicCache

        model: Any = self._model
        cache = DynamicCache(config=model.config)
        # The head's product over the vocabulary is for one token, and thrown away.
        model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        return cache

    def _settings(self, batch: Sequence[Row], width: int) -> dict[str, Any]:
        """Plain decoding."""
        from transformers import GenerationConfig

        stops = self.renderer.stop_ids
        config = GenerationConfig(
            max_new_tokens=max(row.request.max_tokens for row in batch),
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
        dice = Dice([row.request for row in batch], self._device)
        limits = [width + row.request.max_tokens for row in batch]
        ends: list[Any] = [partial(reached, limits)]
        if self.renderer.next_turns:
            ends.append(partial(turned, self.renderer, width))
        return {
            "generation_config": config,
            "logits_processor": [dice] if dice.rolls else [],
            "stopping_criteria": ends,
        }

    def _cut(self, row: Row, tail: "torch.Tensor") -> list[int]:
        """What follows a row's own end is padding."""
        tokens: list[int] = tail.tolist()[: row.request.max_tokens]
        ends = (i for i, token in enumerate(tokens, 1) if token in self.renderer.stop_ids)
        return tokens[: next(ends, len(tokens))]


def forget_habits(model: "PreTrainedModel") -> None:
    """Take away what a model's own file asks of `generate`, such as penalties and bans.

    `generate` would take from there whatever the settings that it is given leave open.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    # PEFT asks the one or the other, by what the adapter's file says that it is for.
    for asked in (model, model.get_base_model() if isinstance(model, PeftModel) else model):
        asked.generation_config = GenerationConfig()


def identity(model: Model, adapter: Path | None) -> str:
    """What an engine for this model will be called; loads no weights."""
    trained = adapter_digest(adapter) if adapter else "base"
    precision = str(answering_dtype(model)).removeprefix("torch.")
    release = f"transformers {version('transformers')} torch {version('torch')}"
    stops = named_stops(model)
    return f"{release} {device()}:{model.digest}:{trained}:{precision}{stops}"


class Dice:
    """Noise for the rows that sample; `generate` then takes the largest noisy logit.

    The largest of logits plus Gumbel noise is distributed as a sample from their softmax.
    """

    def __init__(self, requests: Sequence[Request], device: "torch.device") -> None:
        import torch

        self.rolls = [
            # From the whole request: equal seeds must not give all prompts the same dice.
            (i, r, torch.Generator(device).manual_seed(int(r.id, 16) >> 1))
            for i, r in enumerate(requests)
            if r.temperature > 0
        ]

    def __call__(self, _ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        noisy = scores.float()
        for i, request, generator in self.rolls:
            logits = nucleus(noisy[i] / request.temperature, request.top_p)
            # Exponential draws by division: the smallest of draw / probability is a sample too,
            # and minus its logarithm is the noisy logit.
            draws = torch.empty_like(logits).exponential_(generator=generator)
            noisy[i] = logits - draws.log()
        return noisy


def nucleus(logits: "torch.Tensor", top_p: float) -> "torch.Tensor":
    """Logits with all but the fewest tokens of joint probability `top_p` ruled out."""
    if top_p >= 1:
        return logits
    ordered, places = logits.softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return logits.index_fill(0, places[beyond], float("-inf"))


def reached(
    limits: Sequence[int], ids: "torch.Tensor", _scores: Any, **_: Any
) -> "torch.Tensor":
    """Which rows have come to their own `max_tokens`."""
    import torch

    return torch.tensor(limits, device=ids.device) <= ids.shape[1]


def turned(
    renderer: Renderer, width: int, ids: "torch.Tensor", _scores: Any, **_: Any
) -> "torch.Tensor":
    """Which rows have just begun a turn that is not theirs."""
    import torch

    lately = ids[:, max(width, ids.shape[1] - LATELY) :].tolist()
    over = [renderer.next_turn(renderer.decode(row)) is not None for row in lately]
    return torch.tensor(over, device=ids.device)


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """How many tokens all begin with; each keeps one at least to itself."""
    # What the first and the last in order share, all between them share.
    first, last = min(prompts), max(prompts)
    return min(min(map(len, prompts)) - 1, shared_prefix(first, last))


def keeps_all_positions(model: "PreTrainedModel") -> bool:
    """Whether a model's cache is one key and value for each token, and nothing else."""
    # A model that sees, too, keeps what it says of its text in a configuration of its own.
    config = model.config.get_text_config(decoder=True)
    return attends_plainly(config) and model._supports_sdpa


def batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, longest first: a lack of memory shows at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        longest = (batch or [row])[0].length
        if batch and longest * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
