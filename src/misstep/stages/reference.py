"""The loss of a model on reference answers: a measure of general ability, without a judge.

Nats a token, of the answer's tokens and the end token alone, rendered and masked as a training
row is, after the conversation that the model is asked in: guided or not, in its method's words,
which may add to the answer itself (`Method.write`).
Losses are kept by content in one file, so that a second run measures nothing anew.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from misstep.models.adapter import adapter_digest
from misstep.models.locate import Model
from misstep.models.precision import device, micro_tokens
from misstep.models.rendering import Renderer
from misstep.models.weights import free, load_weights, within_context
from misstep.policy import Policy
from misstep.records import Answer, Example, Judgement, Score, digest, write_json
from misstep.stages.base import Ask
from misstep.training.rows import Row, render_rows

METRIC = "reference_loss"
Write = Callable[[str], str]
"""Makes of an answer what a model was trained to write."""


def reference_losses(
    answers: Sequence[Answer],
    policy: Policy,
    ask: Ask,
    write: Write,
    model: Model,
    adapter: Path | None,
    max_length: int,
    known: Path,
) -> list[Judgement]:
    """One model's loss on the reference of each prompt that it has answered."""
    renderer, max_length = Renderer.for_model(model), within_context(model, max_length)
    rows = [_row(renderer, answer, policy, ask, write, max_length) for answer in answers]
    weights = [model.digest, adapter_digest(adapter) if adapter else "base"]
    names = {row: digest([*weights, row.ids, row.prompt_length]) for row in rows if row}
    losses = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    if missing := [row for row, name in names.items() if name not in losses]:
        found = row_losses(model, adapter, missing)
        free()
        losses |= {names[row]: loss for row, loss in found.items()}
        write_json(known, losses)
    return [
        Judgement.of(answer, _score(answer, losses[names[row]] if row else None))
        for answer, row in zip(answers, rows, strict=True)
    ]


def row_losses(model: Model, adapter: Path | None, rows: Sequence[Row]) -> dict[Row, float]:
    """The mean loss of each row's completion tokens under the model with the adapter."""
    from peft import PeftModel

    from misstep.training.loss import CompletionLoss, measured, on_device, without_gradient
    from misstep.training.sharing import lanes_of

    loaded = load_weights(model, adapter)
    lm = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    loss = CompletionLoss(loaded, lm)
    loss.to(device())
    found: dict[Row, float] = {}

    def sums_of(group: Sequence[Row]) -> list[float]:
        sums: list[float] = loss.row_losses(**on_device(loss, group)).tolist()
        return sums

    with without_gradient(loss):
        for group, sums in measured(rows, micro_tokens(), sums_of, lanes_of(lm)):
            found |= {row: s / row.learned for row, s in zip(group, sums, strict=True)}
    return found


def _row(
    renderer: Renderer,
    answer: Answer,
    policy: Policy,
    ask: Ask,
    write: Write,
    max_length: int,
) -> Row | None:
    """The prompt as the model was asked it, and its reference; None where it has no place."""
    prompt = answer.response.prompt
    messages = ask(policy.turns(prompt, answer.guided))
    written = write(prompt.reference) if prompt.reference else ""
    example = Example(messages=messages, completion=written, kind="reference")
    found = render_rows(renderer, [example], max_length)
    return found.kept[0] if found.kept and not found.truncated else None


def _score(answer: Answer, loss: float | None) -> Score:
    absent = "no reference answer, or one that ends beyond train.max_length"
    return Score(
        response_id=answer.response.id,
        metric=METRIC,
        value=loss,
        judge="loss/1",
        reason=absent if loss is None else "",
    )
