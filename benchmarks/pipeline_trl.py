"""A recipe's whole pipeline as a user writes it with TRL and transformers.

    python benchmarks/pipeline_trl.py RECIPE [--set KEY=VALUE ...] [--found FOUND.json]

`misstep bench pipeline` sets it beside `misstep run`. Data, wordings, the analysis gate, the
rule that judges and the composition of the rows are taken from misstep, since they are the work
and not the speed; all that the model does is done with `model.generate` (in the type that the
machine multiplies fastest, batches of 32 prompts of like length) and SFTTrainer (the same
weights, fp32 adapter, completion-only loss, rows grouped by length, no gradient checkpointing),
which are the best settings known for a CPU. It keeps nothing: no cache, no resume, no report.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from misstep.inputs import Inputs, read_inputs
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, RefusalJudge
from misstep.judges.seats import Seat
from misstep.machine import peak_memory_mb
from misstep.methods.base import Materials
from misstep.methods.registry import METHODS
from misstep.models.precision import fastest_dtype
from misstep.models.weights import load_tokenizer, load_weights
from misstep.records import Analysis, Example, Message, Mistake, Prompt, Response
from misstep.stages.analyse import gate
from misstep.stages.evaluate import said
from misstep.stages.induce import some_mistakes
from misstep.training.trl_rows import as_trl

BATCH = 32
ROWS_AT_ONCE = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Messages = Sequence[Message]


class Model:
    """The model with its tokenizer, and how many tokens it has written and learned."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.tokenizer = load_tokenizer(inputs.model)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.generated = self.trained = 0

    def load(self) -> Any:
        """The weights as they were; one copy at a time is in memory."""
        lm: Any = load_weights(self.inputs.model)
        return lm.to(fastest_dtype()).to(DEVICE)

    def answer(
        self, lm: Any, prompts: Sequence[Messages], max_tokens: int, temperature: float
    ) -> list[tuple[str, bool]]:
        """The text that follows each prompt, and whether it came to its end."""
        order = sorted(
            range(len(prompts)), key=lambda i: sum(len(m.content) for m in prompts[i])
        )
        answers: dict[int, tuple[str, bool]] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            outputs = self._batch(lm, [prompts[i] for i in batch], max_tokens, temperature)
            answers |= dict(zip(batch, outputs, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _batch(
        self, lm: Any, prompts: Sequence[Messages], max_tokens: int, temperature: float
    ) -> Iterator[tuple[str, bool]]:
        inputs = self.tokenizer.apply_chat_template(
            [[m.model_dump() for m in messages] for messages in prompts],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(DEVICE)
        dice = {"do_sample": True, "temperature": temperature} if temperature else {}
        with torch.inference_mode():
            output = lm.generate(
                **inputs,
                max_new_tokens=max_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **({"do_sample": False} | dice),
            )
        end, found = self.tokenizer.eos_token_id, []
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            done = end in tokens
            kept = tokens[: tokens.index(end) + 1] if done else tokens
            self.generated += len(kept)
            found.append((self.tokenizer.decode(kept, skip_special_tokens=True), done))
        return iter(found)

    def fine_tuned(self, lm: Any, rows: Sequence[Example]) -> Any:
        """The model with an adapter trained on the rows and merged."""
        settings = self.inputs.config.train
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=lm,
                args=SFTConfig(
                    output_dir=folder,
                    use_cpu=DEVICE == "cpu",
                    bf16=False,
                    num_train_epochs=settings.epochs,
                    per_device_train_batch_size=min(ROWS_AT_ONCE, settings.batch_size),
                    gradient_accumulation_steps=max(1, settings.batch_size // ROWS_AT_ONCE),
                    learning_rate=settings.learning_rate,
                    lr_scheduler_type=settings.scheduler,
                    warmup_steps=settings.warmup_ratio,
                    weight_decay=settings.weight_decay,
                    max_length=settings.max_length,
                    completion_only_loss=True,
                    gradient_checkpointing=False,
                    train_sampling_strategy="group_by_length",
                    seed=self.inputs.config.training_seed,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list([as_trl(row) for row in rows]),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.alpha,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
            tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
            self.trained += round(tokens * settings.epochs)
            trainer.train()
        return trainer.model.merge_and_unload().eval()


def induce(model: Model, lm: Any, inputs: Inputs) -> list[Mistake]:
    settings = inputs.config.mistakes
    assert settings is not None, "the recipe names no mistakes"
    asked = [prompt for prompt in inputs.prompts for _ in range(settings.samples)]
    messages = [prompt.messages for prompt in asked]
    answers = model.answer(lm, messages, settings.max_tokens, settings.temperature)
    responses = [
        Response(prompt=p, text=text) for p, (text, _) in zip(asked, answers, strict=True)
    ]
    kept: dict[str, list[Mistake]] = {}
    for response, score in zip(responses, ObedienceJudge().score(responses), strict=True):
        of = kept.setdefault(response.prompt.id, [])
        if score.value and len(of) < settings.per_prompt:
            text = response.text
            of.append(Mistake(prompt=response.prompt, response=text, source="induced"))
    found = [mistake for of in kept.values() for mistake in of]
    return list(some_mistakes(found, settings.limit or len(found), inputs.config.seed))


def analyse(
    model: Model, lm: Any, inputs: Inputs, mistakes: Sequence[Mistake]
) -> list[Analysis]:
    settings, policy = inputs.config.analysis, inputs.policy
    ask = policy.worked_request if settings.examples else policy.analysis_request
    accepted: list[Analysis] = []
    pending = list(mistakes)
    for _ in range(settings.n if settings.temperature else 1):
        messages = [ask(m.prompt.text, m.response, settings.guided) for m in pending]
        answers = model.answer(lm, messages, settings.max_tokens, settings.temperature)
        refused = []
        for mistake, (text, done) in zip(pending, answers, strict=True):
            good = not settings.gate or not gate(policy, mistake, text.strip())
            if not (good and done and text.strip()):
                refused.append(mistake)
                continue
            accepted.append(
                Analysis(
                    mistake=mistake,
                    text=text.strip(),
                    guided=settings.guided,
                    source="self",
                    accepted=True,
                )
            )
        pending = refused
        if not pending:
            break
    return accepted


def training_rows(
    inputs: Inputs, mistakes: Sequence[Mistake], analyses: Sequence[Analysis]
) -> dict[str, list[Example]]:
    asked = inputs.prompts or [mistake.prompt for mistake in mistakes]
    materials = Materials(
        policy=inputs.policy,
        mistakes=mistakes,
        analyses=analyses,
        revisions=[],
        ordinary=inputs.ordinary,
        answered=[prompt for prompt in asked if prompt.reference],
        mix=inputs.config.mix,
        seed=inputs.config.training_seed,
    )
    found: dict[str, list[Example]] = {}
    for name in inputs.config.methods:
        rows = METHODS[name].rows(materials)
        found[name] = [row for row in rows if isinstance(row, Example)]
        if len(found[name]) < len(rows) or METHODS[name].uses_revisions:
            raise SystemExit(f"this script fine-tunes on examples only, not {name}")
    return found


def respond(
    model: Model, lm: Any, inputs: Inputs, prompts: Sequence[Prompt], guided: bool
) -> list[Response]:
    settings, policy = inputs.config.respond, inputs.policy
    messages = [policy.turns(p, guided) for p in prompts]
    answers = model.answer(lm, messages, settings.max_tokens, settings.temperature)
    return [
        Response(prompt=p, text=text, guided=guided)
        for p, (text, _) in zip(prompts, answers, strict=True)
    ]


def rates(responses: Sequence[Response]) -> dict[str, float]:
    """The mean score of each judge that can say something about the prompts."""
    found = {}
    for judge in (ObedienceJudge(), HelpfulnessJudge(), RefusalJudge()):
        first = (scores[0].value for scores in said(Seat(judge), responses))
        scores = [value for value in first if value is not None]
        if scores:
            found[judge.metric] = round(sum(scores) / len(scores), 4)
    return found


def pipeline(inputs: Inputs) -> dict[str, Any]:
    if inputs.policy.judge.rule is None:
        raise SystemExit("this script judges by rule only")
    torch.manual_seed(inputs.config.seed)
    model = Model(inputs)
    lm = model.load()
    mistakes = inputs.given or induce(model, lm, inputs)
    analyses = analyse(model, lm, inputs, mistakes)
    results = {}
    for method, rows in training_rows(inputs, mistakes, analyses).items():
        lm = None
        lm = model.fine_tuned(model.load(), rows) if rows else model.load()
        for guided in inputs.config.respond.guided:
            for name, prompts in inputs.tests.items():
                responses = respond(model, lm, inputs, prompts, guided)
                results[f"{method}, guided {guided}, {name}"] = rates(responses)
    return {
        "tokens": model.generated + model.trained,
        "generated": model.generated,
        "trained": model.trained,
        "counts": {"mistakes": len(mistakes), "analyses": len(analyses), "results": results},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--found", type=Path)
    given = parser.parse_args()
    started = time.monotonic()
    found = pipeline(read_inputs(given.recipe, given.set))
    found |= {"seconds": time.monotonic() - started, "peak_memory_mb": peak_memory_mb()}
    text = json.dumps(found, indent=2)
    if given.found:
        given.found.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
