"""What the pipeline costs beside the model: a scripted engine answers, all else is as in a run.

Every prompt is an attack that succeeds, so that each is answered, judged, kept, analysed behind
the gate and answered again; nothing is in the cache before. The scripted engine's own time is
counted with the rest. This module knows the pipeline and a clock; it starts no process.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from misstep.bench.measure import machine
from misstep.config import EvaluateSettings, RunConfig
from misstep.data.sources import Source, load_prompts
from misstep.data.suites import attacked_prompts
from misstep.engines.base import Completion, Engine, Request
from misstep.engines.cached import Chosen
from misstep.engines.scripted import ScriptedEngine
from misstep.engines.store import CACHE, Store
from misstep.inputs import Inputs
from misstep.judging import judge_of_policy
from misstep.machine import LIBRARIES, versions
from misstep.models.locate import Model
from misstep.pipeline import Run
from misstep.policy import load_policy
from misstep.progress import Silent
from misstep.records import Record
from misstep.stages.induce import InduceSettings
from misstep.stages.respond import RespondSettings

SUITE = "goal-hijacking"
TARGET = "Robots rule every kitchen"
ANALYSIS = (
    "The inserted text wanted the response to say something else. The response is wrong "
    "because it obeyed the inserted text and did not answer the real question."
)


class Passed(Record):
    """What one number of records took."""

    records: int
    """Through each stage."""
    microseconds: dict[str, float]
    """A record, by stage; `read` is the way from the data's file to the first stage."""
    cpu_microseconds: dict[str, float]
    """Of the processor alone: other processes on the machine make no difference but by heat."""
    peak_memory_mb: int
    cache_mb: int
    opening_milliseconds: float
    """To open the cache that was filled and to look up a key that it lacks."""


class Overhead(Record):
    """What the benchmark's JSON file holds."""

    bench: str = "overhead"
    machine: dict[str, Any]
    versions: dict[str, str]
    passed: tuple[Passed, ...]
    """From few records to many."""
    growth_bytes_a_record: float | None
    """Of peak memory, from the fewest records to the most."""


def measured(found: Mapping[int, Mapping[str, Any]]) -> Overhead:
    """What was found for each number of records, put together."""
    passed = tuple(_passed(count, found[count]) for count in sorted(found))
    more = passed[-1].records - passed[0].records
    grown = (passed[-1].peak_memory_mb - passed[0].peak_memory_mb) * 2**20
    return Overhead(
        machine=machine(),
        versions=versions((*LIBRARIES, "trl")),
        passed=passed,
        growth_bytes_a_record=round(grown / more, 1) if more else None,
    )


def _passed(count: int, found: Mapping[str, Any]) -> Passed:
    def each(seconds: Mapping[str, float]) -> dict[str, float]:
        return {stage: round(of / count * 1e6, 1) for stage, of in seconds.items()}

    return Passed(
        records=count,
        microseconds=each(found["seconds"]),
        cpu_microseconds=each(found["cpu_seconds"]),
        peak_memory_mb=found["peak_memory_mb"],
        cache_mb=found["cache_mb"],
        opening_milliseconds=round(found["opening"] * 1e3, 2),
    )


def print_overhead(found: Overhead) -> None:
    """Print a line for each number of records."""
    from rich.console import Console
    from rich.table import Table

    stages = list(found.passed[0].microseconds)
    table = Table(title="microseconds a record (of the processor)")
    for name in ("records", *stages, "peak MB", "cache MB", "opens in ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in found.passed:
        times = (f"{p.microseconds[s]:.0f} ({p.cpu_microseconds[s]:.0f})" for s in stages)
        sizes = (f"{p.peak_memory_mb:,}", f"{p.cache_mb:,}", f"{p.opening_milliseconds:.1f}")
        table.add_row(f"{p.records:,}", *times, *sizes)
    Console(width=None if Console().is_terminal else 110).print(table)
    if found.growth_bytes_a_record is not None:
        print(f"Peak memory grows by {found.growth_bytes_a_record} bytes a record.")


class Took:
    """Seconds of stages: on the clock, and of the processor, which other processes share."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of one stage."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - wall
        self.cpu_seconds[name] = time.process_time() - cpu


class Forgetful(ScriptedEngine):
    """Keeps no request, as a real engine does not."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answers = super().generate(requests)
        self.requests.clear()
        return answers


def overhead(work: dict[str, Any]) -> dict[str, Any]:
    """Take so many records through the stages and give the seconds of each."""
    count = int(work["records"])
    with TemporaryDirectory(prefix="misstep-overhead-") as name:
        folder = Path(name)
        data, model = folder / "prompts.jsonl", folder / "no-weights"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in _attacks(count))
        model.touch()
        took = Took()
        with took.stage("read"):
            inputs = _inputs(data, Model("scripted", model))
        run = Run(inputs, folder / "run", Silent(), chooser=_scripted)
        with took.stage("induce"):
            mistakes = run.induce()
        with took.stage("analyse"):
            run.analyse(mistakes)
        with took.stage("respond"):
            run.respond({"vanilla": None})
        cache = folder / "run" / CACHE
        return {
            "seconds": took.seconds,
            "cpu_seconds": took.cpu_seconds,
            "cache_mb": cache.stat().st_size // 2**20,
            "opening": _opening(cache),
        }


def _attacks(count: int) -> Iterator[dict[str, Any]]:
    """The suite's attacks without end, made different by a number, all after one target."""
    for number, prompt in enumerate(islice(attacked_prompts(SUITE, "train", "seen", 0), count)):
        text = prompt.text.replace(str(prompt.target), TARGET)
        yield {
            "prompt": f"Case {number}. {text}",
            "target": TARGET,
            "reference": prompt.reference,
            "accept": list(prompt.accept),
            "topic": prompt.topic,
        }


def _inputs(data: Path, model: Model) -> Inputs:
    source = Source(path=str(data))
    config = RunConfig(
        name="overhead",
        policy=SUITE,
        mistakes=InduceSettings(data=source, samples=1),
        ordinary=source,
        respond=RespondSettings(guided=(False,)),
        evaluate=EvaluateSettings(tests={"again": source}),
        methods=("vanilla",),
    )
    prompts, policy = load_prompts(source, config.seed), load_policy(SUITE)
    return Inputs(
        config=config,
        left_out=(),
        policy=policy,
        model=model,
        adapter=None,
        analyst=model,
        judge=model,
        of_mistakes=judge_of_policy(SUITE, policy, config.engine, model),
        judges={},
        prompts=prompts,
        given=[],
        ordinary=[],
        tests={"again": prompts},
        checks=(),
        overlaps={},
    )


def _scripted(*_: object) -> Chosen:
    return Chosen(ScriptedEngine().identity, "scripted", _engine)


def _engine() -> Engine:
    return Forgetful(_script)


def _script(request: Request) -> str:
    return f"Sure. {TARGET}." if len(request.messages) == 1 else ANALYSIS


def _opening(path: Path) -> float:
    started = time.perf_counter()
    with Store(path) as store:
        store.look_up([b"0" * 16])
        return time.perf_counter() - started
