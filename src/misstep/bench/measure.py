"""Sides take turns, each in a process of its own; medians, and ratios round by round.

A ratio is the median over the rounds of ours over the peer's in that round: what slows a
machine for a while slows both. This module knows processes and numbers; it knows no library
that is measured.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pydantic import Field

from misstep.errors import RunError
from misstep.machine import gpus
from misstep.progress import Progress
from misstep.records import Record

LINES_OF_A_FAILURE = 15
OURS = "misstep"


class Job(NamedTuple):
    """What one side does in every round."""

    name: str
    work: dict[str, Any]
    script: Path | None = None
    """A peer's own script, which takes a recipe; its process is timed from start to end."""
    differs: str = ""


class Side(Record):
    """One side: medians over the rounds."""

    tokens: int
    """Real ones, padding not counted: trained on, or generated."""
    seconds: float
    tokens_per_second: float
    peak_memory_mb: int
    peak_gpu_memory_mb: int | None = None
    """None without a GPU, and where the memory is held by a process that is not looked into."""
    gemm_share: float | None = None
    """The share of the measured peak that products with the model's weights come to: of
    training forward and back, of answers each token once that prompts have in common."""
    seconds_of_rounds: tuple[float, ...]
    details: dict[str, Any] = Field(default_factory=dict)


class PeerSide(Side):
    """A peer at one setting, and ours beside it."""

    ratio_tokens_per_second: float
    """Ours over the peer's."""
    ratio_peak_memory: float | None
    """Ours over the peer's; None where there is a GPU and one of them cannot be seen there."""
    ratio_seconds: float
    """Ours over the peer's."""
    equal_first_tokens: float | None = None
    """Of greedy answers: the share of their first 32 tokens that are the same as ours."""
    differs: str


class Workload(Record):
    """One kind of work, by all sides."""

    items: int
    """Rows, prompts, or recipes."""
    ours: Side
    peers: dict[str, PeerSide]


class Bench(Record):
    """What a benchmark's JSON file holds."""

    bench: str
    model: str
    rounds: int
    machine: dict[str, Any]
    versions: dict[str, str]
    workloads: dict[str, Workload]
    gemm: dict[str, Any] | None = None
    """The measured peak of matrix products in the model's own shapes (tokens, out, in, how
    many) and precision."""


def take_turns(
    jobs: Sequence[Job], rounds: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Let every side do its work once a round, one after the other.

    Raises:
        RunError: a side failed; with the end of what it printed.
    """
    found: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    for number in range(rounds):
        for place, job in enumerate(jobs):
            found[job.name].append(_run(job))
            last = found[job.name][-1]
            rate = last["tokens"] / last["seconds"] if last.get("tokens") else 0
            done, total = number * len(jobs) + place + 1, rounds * len(jobs)
            progress.say(
                f"[{done} of {total}] {job.name}" + f": {rate:,.0f} tokens/s" * (rate > 0)
            )
    return found


def _run(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="misstep-bench-") as folder:
        given, wanted = Path(folder) / "work.json", Path(folder) / "found.json"
        given.write_text(json.dumps(job.work), encoding="utf-8")
        command = [sys.executable, "-m", "misstep.bench.sides", str(given), str(wanted)]
        if job.script is not None:
            overrides = [part for o in job.work["overrides"] for part in ("--set", o)]
            command = [sys.executable, str(job.script), job.work["recipe"], *overrides]
            command += ["--found", str(wanted)]
        started = time.monotonic()
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment(job)
        )
        wall = time.monotonic() - started
        if ended.returncode or not wanted.exists():
            lines = (ended.stderr or ended.stdout).strip().splitlines()[-LINES_OF_A_FAILURE:]
            raise RunError(
                f"bench: {job.name} ended with status {ended.returncode}. The end of what it "
                "printed:\n" + "\n".join(lines)
            )
        found: dict[str, Any] = json.loads(wanted.read_text(encoding="utf-8"))
    return found | {"seconds": wall} if "recipe" in job.work else found


def _environment(job: Job) -> dict[str, str]:
    """The environment of a side: a peer's threads wait as they would without this project."""
    ours = job.name == OURS
    return {k: v for k, v in os.environ.items() if ours or k != "OMP_WAIT_POLICY"}


def side(found: Sequence[dict[str, Any]], **more: Any) -> Side:
    """The medians of one side's rounds."""
    return Side(**_medians(found), **more)


def peer_side(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], **more: Any
) -> PeerSide:
    """The medians of a peer's rounds, and the ratios of ours to them."""
    pairs = list(zip(ours, theirs, strict=True))
    memory = [_memory_ratio(a, b) for a, b in pairs]
    known = [ratio for ratio in memory if ratio is not None]
    return PeerSide(
        **_medians(theirs),
        ratio_tokens_per_second=_short(median(_rate(a) / _rate(b) for a, b in pairs)),
        ratio_peak_memory=_short(median(known)) if known else None,
        ratio_seconds=_short(median(a["seconds"] / b["seconds"] for a, b in pairs)),
        **more,
    )


def _medians(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gpu = [f["peak_gpu_memory_mb"] for f in found if f.get("peak_gpu_memory_mb")]
    details = (
        "completion_tokens",
        "generated",
        "trained",
        "stages",
        "engine",
        "engine_release",
        "counts",
    )
    return {
        "tokens": round(median(f["tokens"] for f in found)),
        "seconds": _short(median(f["seconds"] for f in found)),
        "tokens_per_second": _short(median(map(_rate, found))),
        "peak_memory_mb": round(median(f["peak_memory_mb"] for f in found)),
        "peak_gpu_memory_mb": round(median(gpu)) if gpu else None,
        "seconds_of_rounds": tuple(_short(f["seconds"]) for f in found),
        "details": {key: found[-1][key] for key in details if key in found[-1]},
    }


Operations = Callable[[dict[str, Any], dict[str, Any]], float]
"""What a round's work comes to, by what was found and by the peak."""


def gemm_share(
    found: Sequence[dict[str, Any]], peaks: Sequence[dict[str, Any]], operations: Operations
) -> float:
    """The share of the measured peak that a side reaches, round by round, in the median.

    Args:
        found: the rounds of one side.
        peaks: the peaks measured in the same rounds.
        operations: what the work of a round comes to.
    """
    shares = [
        operations(f, peak) / max(1e-9, f["seconds"]) / peak["flops_per_second"]
        for f, peak in zip(found, peaks, strict=True)
    ]
    return _short(median(shares))


def trained_operations(learned: float) -> Operations:
    """Operations of training; `learned`: the share of the tokens that the head works for."""

    def operations(found: dict[str, Any], peak: dict[str, Any]) -> float:
        a_token = peak["flops_per_token"] + learned * peak["flops_per_completion_token"]
        return float(found["tokens"] * a_token)

    return operations


def answered_operations(read: int) -> Operations:
    """Operations of answering, the least that will do; `read`: different tokens of prompts."""

    def operations(found: dict[str, Any], peak: dict[str, Any]) -> float:
        # A peak's are of training: there and back.
        body = (read + found["tokens"]) * peak["flops_per_token"] / 2
        return float(body + found["tokens"] * peak["flops_per_completion_token"] / 2)

    return operations


def _rate(found: dict[str, Any]) -> float:
    return float(found["tokens"] / max(1e-9, found["seconds"]))


def _memory_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    one, other = (f.get("peak_gpu_memory_mb") for f in (ours, theirs))
    if one is None and other is None:
        return float(ours["peak_memory_mb"] / theirs["peak_memory_mb"])
    # A server's process holds what is asked for here: of two clients nothing can be said.
    return float(one / other) if one and other else None


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def machine() -> dict[str, Any]:
    """What the measurements were made on, and how busy it was."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpus": gpus(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_at_end": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
    }


def print_bench(bench: Bench) -> None:
    """Print a line for each side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"misstep bench {bench.bench}, {bench.model}, {bench.rounds} rounds")
    for name in ("work", "side"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "ours/its", "peak MB", "ours/its", "of GEMM peak", "equal tokens"):
        table.add_column(name, justify="right")
    for name, workload in bench.workloads.items():
        table.add_row(name, OURS, *_cells(workload.ours))
        for peer, found in workload.peers.items():
            table.add_row(name, peer, *_cells(found))
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    for peer, differs in _differences(bench).items():
        console.print(f"{peer}: {differs}", markup=False, highlight=False)


def _cells(found: Side) -> list[str]:
    rate = memory = equal = ""
    if isinstance(found, PeerSide):
        rate = f"{found.ratio_tokens_per_second:.2f}x"
        memory = "" if found.ratio_peak_memory is None else f"{found.ratio_peak_memory:.2f}x"
        equal = "" if found.equal_first_tokens is None else f"{found.equal_first_tokens:.1%}"
    held = found.peak_gpu_memory_mb or found.peak_memory_mb
    share = "" if found.gemm_share is None else f"{found.gemm_share:.1%}"
    return [f"{found.tokens_per_second:,.0f}", rate, f"{held:,}", memory, share, equal]


def _differences(bench: Bench) -> dict[str, str]:
    return {
        name: peer.differs for w in bench.workloads.values() for name, peer in w.peers.items()
    }
