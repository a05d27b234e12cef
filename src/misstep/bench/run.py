"""The benchmarks: which work, which sides, and what becomes of their numbers.

Everything that a benchmark needs is checked before the first side starts.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from misstep.bench import rows
from misstep.bench.measure import (
    OURS,
    Bench,
    Job,
    Operations,
    Workload,
    answered_operations,
    gemm_share,
    machine,
    peer_side,
    side,
    take_turns,
    trained_operations,
)
from misstep.bench.overhead import Overhead, measured
from misstep.bench.peers import GENERATION, TRAINING, Peer, installed_servers
from misstep.errors import InputError
from misstep.inputs import read_inputs
from misstep.machine import LIBRARIES, versions
from misstep.models.locate import Model, locate
from misstep.models.rendering import Renderer, shared_prefix
from misstep.models.weights import load_tokenizer
from misstep.progress import Progress
from misstep.records import Example, Message
from misstep.stages.reward import require_trl

FIRST_TOKENS = 32
GEMM = "GEMM peak"
T = TypeVar("T")
Rounds = Mapping[str, Sequence[dict[str, Any]]]


TRAINED = {"analysis": rows.analysis_rows, "mixed": rows.mixed_rows}
"""Rows that teach analyses alone, and rows as the main method mixes them."""
ANSWERED = {"analysis": rows.analysis_prompts, "attacks": rows.attack_prompts}
"""Long prompts that share their beginning, and short ones that share nothing."""


def bench_train(
    model_name: str, count: int, kinds: Sequence[str], rounds: int, progress: Progress
) -> Bench:
    """Train beside TRL's SFTTrainer.

    Raises:
        InputError: the model cannot be trained on, TRL is not installed, or there is no such
            kind of work.
        RunError: a side failed.
    """
    require_trl()
    makers, model = _chosen(TRAINED, kinds), _here(model_name)
    tasks = {name: _training(rows_of(count)) for name, rows_of in makers.items()}
    return _side_by_side("train", model, TRAINING, tasks, rounds, progress)


class Task(NamedTuple):
    """One kind of work, as every side gets it."""

    work: dict[str, Any]
    items: int
    said: str
    operations: Callable[[Mapping[str, Any]], Operations]
    """What it comes to, by what our side has found."""


def _training(examples: Sequence[Example]) -> Task:
    work = {"rows": [row.model_dump(mode="json") for row in examples]}
    return Task(
        work,
        len(examples),
        f"{len(examples)} rows",
        # The peers' rows are ours, so the same share of their tokens is learned.
        lambda ours: trained_operations(ours["completion_tokens"] / ours["tokens"]),
    )


def _side_by_side(
    bench: str,
    model: Model,
    peers: Sequence[Peer],
    tasks: Mapping[str, Task],
    rounds: int,
    progress: Progress,
) -> Bench:
    workloads, peaks = {}, []
    for name, task in tasks.items():
        progress.say(f"{name}: {task.said}")
        work = task.work | {"model": model.name}
        jobs = [Job(OURS, work | {"side": f"{bench}_ours"})]
        for peer in peers:
            theirs = work | {"side": peer.side, "settings": peer.settings}
            jobs.append(Job(peer.name, theirs, differs=peer.differs))
        jobs.append(Job(GEMM, {"model": model.name, "side": "gemm"}))
        found = take_turns(jobs, rounds, progress)
        peaks += found[GEMM]
        workloads[name] = _workload(found, peers, model, task)
    highest = max(peaks, key=lambda peak: float(peak["flops_per_second"]))
    return _bench(bench, model.name, rounds, workloads, gemm=highest)


def _workload(found: Rounds, peers: Sequence[Peer], model: Model, task: Task) -> Workload:
    ours, peaks = found[OURS], found[GEMM]
    operations, texts = task.operations(ours[0]), ours[0].get("texts")
    sides = {}
    for peer in peers:
        theirs = found[peer.name]
        more: dict[str, Any] = {"gemm_share": gemm_share(theirs, peaks, operations)}
        if texts is not None:
            more["equal_first_tokens"] = equal_first_tokens(model, texts, theirs[0]["texts"])
        sides[peer.name] = peer_side(ours, theirs, differs=peer.differs, **more)
    share = gemm_share(ours, peaks, operations)
    return Workload(items=task.items, ours=side(ours, gemm_share=share), peers=sides)


def bench_generate(
    model_name: str,
    count: int,
    max_tokens: int,
    kinds: Sequence[str],
    rounds: int,
    progress: Progress,
) -> Bench:
    """Answer prompts beside `model.generate` and the servers that are installed.

    Raises:
        InputError: the model's weights are not here, or there is no such kind of work.
        RunError: a side failed.
    """
    makers, model = _chosen(ANSWERED, kinds), _here(model_name)
    peers = [*GENERATION, *(installed_servers(model) if find_spec("openai") else [])]
    tasks = {
        name: _answering(model, prompts_of(count), max_tokens)
        for name, prompts_of in makers.items()
    }
    return _side_by_side("generate", model, peers, tasks, rounds, progress)


def _answering(model: Model, prompts: Sequence[Sequence[Message]], max_tokens: int) -> Task:
    asked = [[m.model_dump(mode="json") for m in messages] for messages in prompts]
    return Task(
        {"prompts": asked, "max_tokens": max_tokens},
        len(prompts),
        f"{len(prompts)} prompts, {max_tokens} new tokens each at most",
        lambda _: answered_operations(different_tokens(model, prompts)),
    )


def different_tokens(model: Model, prompts: Sequence[Sequence[Message]]) -> int:
    """Tokens of prompts, those of a beginning that several share counted once."""
    renderer = Renderer.for_model(model)
    rendered = sorted(renderer.prompt(messages) for messages in prompts)
    return sum(map(len, rendered)) - sum(starmap(shared_prefix, pairwise(rendered)))


def equal_first_tokens(model: Model, ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The share of the first tokens of two lists of texts that come before they part."""
    tokenizer = load_tokenizer(model)
    equal = total = 0
    for one, other in zip(ours, theirs, strict=True):
        first, second = (
            tokenizer.encode(text, add_special_tokens=False)[:FIRST_TOKENS]
            for text in (one, other)
        )
        equal += shared_prefix(first, second)
        total += max(len(first), len(second))
    return round(equal / total, 4) if total else 1.0


def bench_pipeline(
    recipe: Path, overrides: list[str], script: Path, rounds: int, progress: Progress
) -> Bench:
    """Run a whole recipe beside a peer's script for the same work.

    Raises:
        InputError: the recipe, its data or its model are wrong, or there is no such script.
        RunError: a side failed.
    """
    require_trl()
    if not script.is_file():
        raise InputError(
            f"{script}: expected the peer's script, found no file. It is part of the source, "
            "as benchmarks/pipeline_trl.py: name it with --script."
        )
    inputs = read_inputs(recipe, overrides)
    _here(inputs.config.model)
    work = {"recipe": str(recipe), "overrides": overrides, "side": "pipeline_ours"}
    differs = "TRL's SFTTrainer and model.generate for all work of the model; see the script"
    peer = Job(script.stem, work, script, differs)
    found = take_turns([Job(OURS, work), peer], rounds, progress)
    workload = Workload(
        items=1,
        ours=side(found[OURS]),
        peers={peer.name: peer_side(found[OURS], found[peer.name], differs=differs)},
    )
    return _bench("pipeline", inputs.model.name, rounds, {inputs.config.name: workload})


def bench_overhead(counts: Sequence[int], progress: Progress) -> Overhead:
    """Take records through induce, analyse and respond with a scripted engine.

    Raises:
        RunError: a side failed.
    """
    found = {}
    for count in sorted(set(counts)):
        job = Job(f"{count} records", {"side": "overhead_ours", "records": count})
        found[count] = take_turns([job], 1, progress)[job.name][0]
    return measured(found)


def _chosen(makers: Mapping[str, T], kinds: Sequence[str]) -> dict[str, T]:
    if unknown := sorted(set(kinds) - set(makers)):
        raise InputError(
            f"--work {', '.join(unknown)}: expected some of {', '.join(makers)}, or nothing "
            "for all of them."
        )
    return {name: maker for name, maker in makers.items() if not kinds or name in kinds}


def _here(name: str) -> Model:
    model = locate(name)
    if model.endpoint is not None:
        raise InputError(
            f"model {name}: expected weights on this machine, since both sides are to use the "
            "same; found an endpoint. Name a model's folder, GGUF file or Hub id."
        )
    return model


def _bench(
    bench: str, model: str, rounds: int, workloads: dict[str, Workload], **more: Any
) -> Bench:
    return Bench(
        bench=bench,
        model=model,
        rounds=rounds,
        machine=machine(),
        versions=versions((*LIBRARIES, "trl")),
        workloads=workloads,
        **more,
    )
