"""One side of a benchmark in a process of its own: work in a file, measurements in a file.

    python -m misstep.bench.sides WORK.json FOUND.json

Loading is not timed, nor is a first short prompt; what is timed is training's steps, or the
answers to all prompts. Each side gives its tokens, its seconds and what the process held in
memory at most. This module knows our side and its peers; it knows no round and no ratio.
"""

import gc
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.bench.overhead import overhead
from misstep.bench.peers import ROWS_A_STEP
from misstep.errors import RunError
from misstep.machine import peak_memory_mb
from misstep.models.locate import locate
from misstep.models.precision import device, fastest_dtype, micro_tokens
from misstep.models.weights import load_tokenizer, load_weights
from misstep.records import Example, Message
from misstep.training.trl_rows import as_trl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from misstep.engines.base import Request

Work = dict[str, Any]
"""`side`, `model`, `settings`, and `rows` or `prompts` with `max_tokens`."""
Found = dict[str, Any]
"""`tokens`, `seconds`, `peak_memory_mb`, and `texts` where there are some."""
WARM_UP = "Hi"
GEMM_SECONDS = 0.3
"""So long at least is each shape of matrices measured."""


def train_ours(work: Work) -> Found:
    """Our trainer, at its defaults, for one epoch."""
    from misstep.stages.train import train
    from misstep.stages.train_settings import TrainSettings

    settings = TrainSettings(epochs=1, batch_size=ROWS_A_STEP, max_dropped=1.0)
    with tempfile.TemporaryDirectory() as folder:
        report = train(locate(work["model"]), _rows(work), settings, 0, Path(folder))
    seconds = report.tokens / report.tokens_per_second
    return _found(report.tokens, seconds, completion_tokens=report.completion_tokens)


def train_trl(work: Work) -> Found:
    """TRL's SFTTrainer with a LoRA adapter of our rank, for one epoch."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from misstep.stages.train_settings import TrainSettings

    ours, given = TrainSettings(), work["settings"]
    model = locate(work["model"])
    lm: Any = load_weights(model)
    on_gpu = torch.cuda.is_available()
    place: dict[str, Any] = {} if on_gpu else {"use_cpu": True, "bf16": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=lm.float() if given["weights"] == "float32" else lm.to(fastest_dtype()),
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=given["batch"],
                gradient_accumulation_steps=ROWS_A_STEP // given["batch"],
                learning_rate=ours.learning_rate,
                max_length=ours.max_length,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **place,
                **given["options"],
            ),
            train_dataset=Dataset.from_list([as_trl(row) for row in _rows(work)]),
            processing_class=load_tokenizer(model),
            peft_config=LoraConfig(
                r=ours.rank,
                lora_alpha=ours.alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
        started = time.monotonic()
        trainer.train()
        return _found(tokens, time.monotonic() - started)


def generate_ours(work: Work) -> Found:
    """The engine that a run would choose by itself."""
    from misstep.engines.choose import choose

    chosen = choose("auto", locate(work["model"]))
    with chosen.open() as engine:
        engine.generate(_requests([(Message(role="user", content=WARM_UP),)], 4))
        requests = _requests(_prompts(work), work["max_tokens"])
        started = time.monotonic()
        answers = engine.generate(requests)
        seconds = time.monotonic() - started
        return _found(
            sum(answer.tokens for answer in answers),
            seconds,
            texts=[answer.text for answer in answers],
            engine=chosen.why,
            # An identity begins with the name and the version, vLLM's own among them.
            engine_release=chosen.identity.partition(":")[0],
        )


def generate_transformers(work: Work) -> Found:
    """`model.generate` in batches, greedy, in the type that this machine multiplies fastest."""

    model = locate(work["model"])
    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm: Any = load_weights(model).to(fastest_dtype())
    lm = lm.to(device())
    prompts, settings = _prompts(work), work["settings"]
    _continue(lm, tokenizer, [(Message(role="user", content=WARM_UP),)], 4)
    order = list(range(len(prompts)))
    started = time.monotonic()
    if settings["by_length"]:
        order.sort(key=lambda i: sum(len(message.content) for message in prompts[i]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), settings["batch"]):
        batch = order[start : start + settings["batch"]]
        outputs = _continue(lm, tokenizer, [prompts[i] for i in batch], work["max_tokens"])
        answers |= dict(zip(batch, outputs, strict=True))
    seconds = time.monotonic() - started
    tokens = [answers[i] for i in range(len(prompts))]
    return _found(
        sum(map(len, tokens)),
        seconds,
        texts=tokenizer.batch_decode(tokens, skip_special_tokens=True),
    )


def _continue(
    lm: "PreTrainedModel",
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_tokens: int,
) -> list[list[int]]:
    """The new tokens of each prompt, the first end token included."""
    inputs = tokenizer.apply_chat_template(
        [[message.model_dump() for message in messages] for messages in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(lm.device)
    generate: Any = lm.generate
    output = generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    tails = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(tail, tokenizer.eos_token_id) for tail in tails]


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def generate_served(work: Work) -> Found:
    """A server in its own process, asked over HTTP."""
    from misstep.engines.openai import OpenAIEngine
    from misstep.engines.pace import Pace
    from misstep.engines.server import PORT, Server
    from misstep.engines.vllm import UNDER_WAY
    from misstep.models.endpoint import Endpoint

    settings, files = work["settings"], str(locate(work["model"]).files)
    blanks = {"program": settings["program"], "files": files, "port": PORT}
    line = [part.format(**blanks) for part in shlex.split(settings["command"])]
    with closing(Server(line, dict(os.environ))) as server:
        # As many as there are at once, as in our vLLM engine: a server queues by itself.
        pace = Pace(UNDER_WAY, UNDER_WAY)
        endpoint = Endpoint("bench", f"{server.url}/v1")
        with OpenAIEngine(endpoint, pace=pace, proxies=False) as engine:
            engine.generate(_requests([(Message(role="user", content=WARM_UP),)], 4))
            requests = _requests(_prompts(work), work["max_tokens"])
            started = time.monotonic()
            answers = engine.generate(requests)
            seconds = time.monotonic() - started
        if failed := [answer.error for answer in answers if answer.error]:
            raise RunError(f"the server left {len(failed)} prompts unanswered: {failed[0]}")
        tokens, texts = sum(a.tokens for a in answers), [a.text for a in answers]
        _, *processes = family(str(server.pid))
        held = sum(map(peak_memory_mb, processes))
        return _found(tokens, seconds, texts=texts) | {"peak_memory_mb": held}


def gemm(work: Work) -> Found:
    """The machine's peak in matrix products of the model's own shapes, in its precision.

    Counted for a token of training are the products with frozen matrices alone, forward and
    back to the input, half of it for one that is read or written in answering; adapters,
    attention and all else come for free, so that the share is understated.
    """
    from torch import nn

    lm: Any = load_weights(locate(work["model"]))
    head = lm.get_output_embeddings()
    layers = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers)
    rows, operations, seconds = micro_tokens(), 0, 0.0
    for (outputs, inputs), count in shapes.items():
        operations += 4 * rows * outputs * inputs * count
        seconds += count * _product_seconds(rows, outputs, inputs)
    return {
        "flops_per_second": operations / seconds,
        "flops_per_token": operations / rows,
        "flops_per_completion_token": 4.0 * head.weight.numel(),
        "precision": str(fastest_dtype()).removeprefix("torch."),
        "shapes": [[rows, *shape, count] for shape, count in sorted(shapes.items())],
    }


def _product_seconds(rows: int, outputs: int, inputs: int) -> float:
    """The shortest time of x @ w.T and of the gradient of x, one after the other."""
    import torch

    x, y, w = (
        torch.randn(shape, device=device()).to(fastest_dtype())
        for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    wait: Callable[[], object] = (
        torch.cuda.synchronize if device() == "cuda" else (lambda: None)
    )
    best, spent, tries = float("inf"), 0.0, 0
    while spent < GEMM_SECONDS or tries < 3:
        started = time.perf_counter()
        x @ w.t()
        y @ w
        wait()
        taken = time.perf_counter() - started
        best, spent, tries = min(best, taken), spent + taken, tries + 1
    return best


def pipeline_ours(work: Work) -> Found:
    """A whole run in a fresh directory."""
    import sqlite3

    from misstep.engines.store import CACHE
    from misstep.pipeline import run
    from misstep.progress import Silent

    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        run(Path(work["recipe"]), Path(folder), work["overrides"], Silent())
        seconds = time.monotonic() - started
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        query = "SELECT sum(tokens) FROM answers"
        with sqlite3.connect(Path(folder) / CACHE) as table:
            ((generated,),) = table.execute(query)
    epochs = manifest["recipe"]["train"]["epochs"]
    trained = sum(round(m["tokens"] * epochs) for m in manifest["training"].values())
    stages = {name: stage["seconds"] for name, stage in manifest["stages"].items()}
    return _found(
        generated + trained, seconds, generated=generated, trained=trained, stages=stages
    )


def overhead_ours(work: Work) -> Found:
    """The stages with a scripted engine; tokens are nobody's here."""
    gc.set_threshold(100_000)  # As the command does at its start.
    found = overhead(work)
    return found | {"peak_memory_mb": peak_memory_mb()}


def _rows(work: Work) -> list[Example]:
    return [Example.model_validate(row) for row in work["rows"]]


def _prompts(work: Work) -> list[list[Message]]:
    return [[Message.model_validate(m) for m in messages] for messages in work["prompts"]]


def _requests(prompts: Sequence[Sequence[Message]], max_tokens: int) -> "list[Request]":
    from misstep.engines.base import Request

    return [Request(messages=tuple(messages), max_tokens=max_tokens) for messages in prompts]


def _found(tokens: int, seconds: float, **more: Any) -> Found:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_mb": peak_memory_mb(),
        "peak_gpu_memory_mb": _peak_gpu_memory_mb(),
        **more,
    }


def family(process: str) -> Iterator[str]:
    """A process and all that it started and that are still there, as far as Linux tells."""
    yield process
    for file in Path("/proc").glob(f"{process}/task/*/children"):
        for child in file.read_text().split():
            yield from family(child)


def _peak_gpu_memory_mb() -> int | None:
    """What this process has held; 0 where a GPU is another one's, None where there is none."""
    import torch

    return torch.cuda.max_memory_reserved() // 2**20 if torch.cuda.is_available() else None


def main(given: Path, wanted: Path) -> None:
    """Do the work of one file and write what was found into another."""
    work = json.loads(given.read_text(encoding="utf-8"))
    found = SIDES[work["side"]](work)
    wanted.write_text(json.dumps(found), encoding="utf-8")


SIDES: dict[str, Callable[[Work], Found]] = {
    side.__name__: side
    for side in (
        train_ours,
        train_trl,
        generate_ours,
        generate_transformers,
        generate_served,
        gemm,
        pipeline_ours,
        overhead_ours,
    )
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
