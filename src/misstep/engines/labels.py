"""Probabilities of a guard's labels, by transformers.

A request is a conversation that ends in the answer to be judged. It is put into the guard's own
template; the completion's text is a JSON list with the probability of each label, in the
guard's order: the softmax over the labels' tokens, added up over the ways of writing a label.
What other tokens the model would rather write is not asked. This module knows transformers; it
knows no other engine and no judge.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from misstep.engines.base import Completion, Engine, Request, failure
from misstep.errors import EngineError, ModelError
from misstep.guard import Guard
from misstep.models.locate import Model
from misstep.models.precision import device
from misstep.models.rendering import Renderer
from misstep.models.weights import (
    answering_dtype,
    context_length,
    free,
    halve,
    load_for_answers,
)
from misstep.records import Message, digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPTS_AT_ONCE = 8
PROBE = (Message(role="user", content="Hello."), Message(role="assistant", content="Hello!"))


class LabelEngine(Engine):
    """Answers with the labels' probabilities instead of text."""

    def __init__(self, model: Model, guard: Guard) -> None:
        import torch

        self.guard = guard
        self.renderer = Renderer.for_model(model)
        self.tokens = label_tokens(self.renderer, model, guard)
        self.identity = identity(model, guard)
        self._device = torch.device(device())
        self._model: PreTrainedModel | None = load_for_answers(model)
        self._longest = context_length(model) or sys.maxsize

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The probabilities for every request, in order."""
        # As long as a prompt can become: with all lines, and a label after each but the last.
        tail = max((of.texts[0] for of in self.guard.labels), key=len).join(self.guard.lines)
        lengths = [len(self._prompt(request, tail)) for request in requests]
        found = {
            place: failure(f"{length} tokens, and the guard reads {self._longest}")
            for place, length in enumerate(lengths)
            if length > self._longest
        }
        read = [place for place in range(len(requests)) if place not in found]
        order = sorted(read, key=lengths.__getitem__)
        for start in range(0, len(order), PROMPTS_AT_ONCE):
            places = order[start : start + PROMPTS_AT_ONCE]
            answers = self._halved([requests[place] for place in places])
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def close(self) -> None:
        """Give back the memory."""
        self._model = None
        free()

    def _prompt(self, request: Request, tail: str) -> list[int]:
        return self.renderer.filled(self.guard.template, request.messages, tail)

    def _halved(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers, fewer at once where a GPU has no memory for so many."""
        if (answers := self._tried(requests)) is not None:
            return answers
        half = halve(len(requests))
        return self._halved(requests[:half]) + self._halved(requests[half:])

    def _tried(self, requests: Sequence[Request]) -> list[Completion] | None:
        """Answers, or None where memory holds only fewer prompts."""
        import torch

        try:
            return self._answers(requests)
        except torch.OutOfMemoryError as error:
            if len(requests) > 1:
                return None
            raise EngineError(
                "a single prompt needs more memory than the GPU has left. Use a smaller guard, "
                "or see what else is on the GPU."
            ) from error
        except RuntimeError as error:
            raise EngineError(
                f"transformers stopped in {len(requests)} prompts: {error}"
            ) from error

    def _answers(self, requests: Sequence[Request]) -> list[Completion]:
        tails = [""] * len(requests)
        for line in self.guard.lines:
            prompts = [
                self._prompt(r, tail + line) for r, tail in zip(requests, tails, strict=True)
            ]
            shares = self._shares(prompts)
            tails = [
                tail
                + line
                + self.guard.labels[max(range(len(of)), key=of.__getitem__)].texts[0]
                for tail, of in zip(tails, shares, strict=True)
            ]
        n = len(self.guard.lines)
        return [Completion(text=json.dumps(of), tokens=n) for of in shares]

    def _shares(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """Of each prompt, the labels' shares of their tokens' probability."""
        import torch

        logits = self._next(prompts)
        flat = [token for tokens in self.tokens for token in tokens]
        within = logits[:, flat].float().softmax(-1)
        parts = torch.split(within, [len(tokens) for tokens in self.tokens], dim=-1)
        summed = torch.stack([part.sum(-1) for part in parts], dim=-1)
        shares: list[list[float]] = summed.tolist()
        return shares

    def _next(self, prompts: Sequence[list[int]]) -> "torch.Tensor":
        """The logits of the token that follows each prompt; shorter ones padded on the left."""
        import torch

        if self._model is None:
            raise EngineError("this engine is closed: open another one.")
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long, device=self._device)
        mask = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(prompt, device=self._device)
            mask[place, width - len(prompt) :] = 1
        model: Any = self._model
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def identity(model: Model, guard: Guard) -> str:
    """What an engine for this guard will be called; loads no weights."""
    import torch
    import transformers

    release = f"labels transformers {transformers.__version__} torch {torch.__version__}"
    precision = str(answering_dtype(model)).removeprefix("torch.")
    asked = digest([guard.digest, PROMPTS_AT_ONCE])
    return f"{release} {device()}:{model.digest}:{asked}:{precision}"


def check(model: Model, guard: Guard) -> None:
    """Refuse a model that cannot be this guard; reads its tokenizer, not its weights.

    Raises:
        ModelError: it is behind an endpoint, or a label is not one token for it.
    """
    if model.endpoint is not None:
        raise ModelError(
            f"guard {guard.name}: expected weights on this machine, since its score comes from "
            f"its labels' probabilities; found the endpoint {model.name}."
        )
    label_tokens(Renderer.for_model(model), model, guard)


def label_tokens(renderer: Renderer, model: Model, guard: Guard) -> list[list[int]]:
    """The token of each way of writing each label, where the model writes it.

    Raises:
        ModelError: one is not one token, or two are the same.
    """
    before = renderer.filled(guard.template, PROBE, guard.lines[-1])
    found = []
    for label in guard.labels:
        found.append([_token(renderer, model, guard, before, text) for text in label.texts])
    flat = [token for tokens in found for token in tokens]
    if len(set(flat)) < len(flat):
        raise ModelError(
            f"guard {guard.name}: expected texts of labels that are different tokens for "
            f"{model.name}, found two that are the same."
        )
    return found


def _token(renderer: Renderer, model: Model, guard: Guard, before: list[int], text: str) -> int:
    whole = renderer.filled(guard.template, PROBE, guard.lines[-1] + text)
    new = whole[len(before) :]
    if whole[: len(before)] != before or len(new) != 1:
        pieces = [renderer.decode([token]) for token in new]
        raise ModelError(
            f"guard {guard.name}: expected the label {text!r} to be one token for {model.name} "
            f"after {guard.lines[-1]!r}, found {pieces}. Name the first of them as the text in "
            "a copy of the guard's file, if no other label begins so; or look whether a space "
            "belongs before it."
        )
    return new[0]
