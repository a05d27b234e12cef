"""Benchmarks run on a tiny model and say what they promise; no test looks at a time."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from misstep.bench import rows
from misstep.bench.measure import (
    Job,
    answered_operations,
    gemm_share,
    machine,
    peer_side,
    take_turns,
    trained_operations,
)
from misstep.bench.overhead import overhead
from misstep.bench.peers import installed_servers
from misstep.bench.run import (
    bench_generate,
    bench_train,
    different_tokens,
    equal_first_tokens,
)
from misstep.bench.sides import family, gemm
from misstep.errors import InputError, RunError
from misstep.machine import gpus, peak_memory_mb
from misstep.models.locate import locate
from misstep.models.rendering import Renderer
from misstep.progress import Silent
from misstep.records import Analysis, Example, Message, read_jsonl

ROOT = Path(__file__).parents[2]
SIDE = {"tokens", "seconds", "tokens_per_second", "peak_memory_mb", "seconds_of_rounds"}
RATIOS = {"ratio_tokens_per_second", "ratio_peak_memory", "ratio_seconds", "differs"}


def command(tmp_path: Path, *words: str, path: str = "") -> dict[str, Any]:
    """Run `misstep bench` and read what it wrote."""
    out = tmp_path / "bench.json"
    start = [sys.executable, "-m", "misstep.cli", "bench", *words, "--out", str(out)]
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(start, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["schema"] == 1 and found["machine"]["cores"]
    assert all(peer in done.stdout for w in found["workloads"].values() for peer in w["peers"])
    return found


def check(workload: dict[str, Any], peers: set[str]) -> None:
    assert set(workload["ours"]) >= SIDE
    assert set(workload["peers"]) == peers
    for peer in workload["peers"].values():
        assert set(peer) >= SIDE | RATIOS
        rate = workload["ours"]["tokens_per_second"] / peer["tokens_per_second"]
        assert peer["ratio_tokens_per_second"] == pytest.approx(rate, rel=0.01)


@pytest.mark.model
def test_train_runs_beside_both_settings_of_its_peer(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    options = ("--rows", "3", "--rounds", "1", "--work", "mixed")
    found = command(tmp_path, "train", "--model", str(tiny_model), *options)
    assert list(found["workloads"]) == ["mixed"]
    workload = found["workloads"]["mixed"]
    check(workload, {"trl-documented", "trl-best"})
    sides = [workload["ours"], *workload["peers"].values()]
    assert all(0 < side["gemm_share"] < 1 for side in sides)
    assert found["gemm"]["flops_per_second"] > 0
    # A token more a row at most: all train on the same rows.
    counts = [side["tokens"] for side in sides]
    assert max(counts) - min(counts) <= 3


@pytest.mark.model
def test_generate_runs_beside_generate_and_a_server(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        f"sys.path[:0] = {[str(ROOT / 'tests'), *sys.path]!r}\n"
        "from served import serve\n"
        "with serve(port=int(sys.argv[sys.argv.index('--port') + 1])):\n    time.sleep(600)\n"
    )
    program.chmod(0o755)
    found = command(
        tmp_path,
        *("generate", "--model", str(tiny_model), "--prompts", "2", "--max-tokens", "3"),
        *("--rounds", "1", "--work", "attacks"),
        path=str(tmp_path),
    )
    workload = found["workloads"]["attacks"]
    check(workload, {"transformers-documented", "transformers-best", "vllm"})
    sides = [workload["ours"], *workload["peers"].values()]
    assert all(side["gemm_share"] > 0 for side in sides)
    same = {name: peer["equal_first_tokens"] for name, peer in workload["peers"].items()}
    # The server that stands in for vLLM repeats the prompt.
    assert same["transformers-best"] == 1.0 and same["vllm"] < 1


@pytest.mark.model
def test_the_peer_does_the_pipelines_work(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "data.jsonl"
    asked = [{"prompt": f"Say {i}", "response": "no", "target": "no"} for i in range(3)]
    data.write_text("".join(json.dumps(row | {"reference": "yes"}) + "\n" for row in asked))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        json.dumps(
            {
                "policy": "goal-hijacking",
                "model": str(tiny_model),
                "mistakes": {"source": "origin", "data": {"path": str(data)}},
                "analysis": {"gate": False, "max_tokens": 300, "temperature": 2.0},
                "ordinary": {"path": str(data)},
                "methods": ["vanilla", "ordinary", "sft"],
                "train": {"epochs": 1, "batch_size": 2},
                "respond": {"max_tokens": 4},
                "evaluate": {"tests": {"attacks": {"path": str(data)}}},
            }
        )
    )
    found = command(tmp_path, "pipeline", str(recipe))
    workload = found["workloads"]["tiny"]
    check(workload, {"pipeline_trl"})
    ours, theirs = workload["ours"]["details"], workload["peers"]["pipeline_trl"]["details"]
    assert ours["generated"] and ours["trained"] and theirs["generated"] and theirs["trained"]
    settings = {name.split(",")[0] for name in theirs["counts"]["results"]}
    assert settings == {"vanilla", "ordinary", "sft"}


def measured(
    tokens: int, seconds: float, memory: int, gpu: int | None = None
) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_mb": memory,
        "peak_gpu_memory_mb": gpu,
    }


def test_ratios_are_of_the_same_round() -> None:
    # The machine is slower in each round; ours is twice as fast in every one of them.
    ours = [measured(100, s, 50) for s in (1, 2, 4)]
    theirs = [measured(100, 2 * s, 100) for s in (1, 2, 4)]
    found = peer_side(ours, theirs, differs="")
    assert found.ratio_tokens_per_second == 2.0
    assert found.ratio_seconds == found.ratio_peak_memory == 0.5
    assert found.tokens_per_second == 25 and found.seconds_of_rounds == (2, 4, 8)


def test_memory_is_compared_where_both_hold_it() -> None:
    on_gpu, elsewhere = [measured(1, 1, 50, 10)], [measured(1, 1, 100)]
    assert peer_side(on_gpu, elsewhere, differs="").ratio_peak_memory is None
    # Two servers on a GPU: each side's own process holds nothing there.
    servers = [measured(1, 1, 50, 0)], [measured(1, 1, 100, 0)]
    unseen = peer_side(*servers, differs="")
    assert unseen.ratio_peak_memory is None and unseen.peak_gpu_memory_mb is None
    both = [measured(1, 1, 100, 40)]
    assert peer_side(on_gpu, both, differs="").ratio_peak_memory == 0.25


def test_the_gpus_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200'\necho 'NVIDIA H200'\n")
    program.chmod(0o755)
    assert machine()["gpus"] == ["NVIDIA H200", "NVIDIA H200"]


def test_the_share_of_the_peak_counts_the_head_where_it_works() -> None:
    peak = {
        "flops_per_second": 1000.0,
        "flops_per_token": 4.0,
        "flops_per_completion_token": 8.0,
    }
    # 50 tokens a second, half of them learned: 50 * (4 + 8 / 2) of 1000.
    assert gemm_share([measured(100, 2, 1)], [peak], trained_operations(0.5)) == 0.4
    # 100 tokens written after 60 that were read, one way: 160 * 2 + 100 * 4 in 2 seconds.
    assert gemm_share([measured(100, 2, 1)], [peak], answered_operations(60)) == 0.36
    rounds = [measured(100, seconds, 1) for seconds in (1, 2, 4)]
    peaks = [peak | {"flops_per_second": rate} for rate in (2000.0, 1000.0, 100.0)]
    assert gemm_share(rounds, peaks, trained_operations(0.5)) == 0.4


def test_tokens_that_prompts_share_are_read_once(tiny_model: Path) -> None:
    model = locate(str(tiny_model))
    prompts = [[Message(role="user", content=text)] for text in ("abcd", "abXY", "q", "abcd")]
    rendered = [Renderer.for_model(model).prompt(messages) for messages in prompts]
    beginnings = {tuple(ids[: end + 1]) for ids in rendered for end in range(len(ids))}
    assert different_tokens(model, prompts) == len(beginnings) < sum(map(len, rendered))


def test_the_peak_is_measured_at_the_models_own_shapes(tiny_model: Path) -> None:
    found = gemm({"model": str(tiny_model)})
    # Two layers: q and o 32x32, k and v 16x32, gate and up 64x32, down 32x64.
    shapes = {(out, of): count for _, out, of, count in found["shapes"]}
    assert shapes == {(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}
    assert found["flops_per_token"] == 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert found["flops_per_completion_token"] == 4 * 259 * 32


def test_equal_tokens_are_counted_until_the_texts_part(tiny_model: Path) -> None:
    model = locate(str(tiny_model))
    assert equal_first_tokens(model, ["abcd"], ["abcd"]) == 1.0
    assert equal_first_tokens(model, ["abcd", "xy"], ["abXd", "xy"]) == round(4 / 6, 4)
    assert equal_first_tokens(model, ["ab"], ["abcd"]) == 0.5
    assert equal_first_tokens(model, ["a" * 32 + "b"], ["a" * 32 + "c"]) == 1.0


def test_the_work_is_the_pipelines_own() -> None:
    assert {row.kind for row in rows.analysis_rows(5)} == {"analysis"}
    mixed = rows.mixed_rows(30)
    assert [
        sum(r.kind == k for r in mixed) for k in ("analysis", "good_answer", "ordinary")
    ] == [
        10,
        10,
        10,
    ]
    assert all(isinstance(row, Example) for row in mixed)
    first, *others = rows.analysis_prompts(4)
    assert all(other[:-1] == first[:-1] and other[-1] != first[-1] for other in others)
    assert len({prompt[0].content[:20] for prompt in rows.attack_prompts(4)}) == 4
    assert rows.mixed_rows(30) == mixed


def test_a_side_that_fails_is_named_with_what_it_said() -> None:
    job = Job("ours", {"side": "train_ours", "model": "no-such-model", "rows": []})
    with pytest.raises(RunError, match=r"bench: ours ended with status 1(.|\n)*no-such-model"):
        take_turns([job], 1, Silent())


def test_wrong_input_ends_a_benchmark_before_it_begins(tiny_model: Path) -> None:
    pytest.importorskip("trl")
    with pytest.raises(InputError, match="expected some of analysis, mixed"):
        bench_train(str(tiny_model), 1, ["attacks"], 1, Silent())
    with pytest.raises(InputError, match="expected some of analysis, attacks"):
        bench_generate(str(tiny_model), 1, 1, ["mixed"], 1, Silent())


def test_servers_are_taken_only_for_what_they_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "llama-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [peer.name for peer in installed_servers(locate(str(tiny_model)))] == ["vllm"]
    monkeypatch.setenv("PATH", "")
    assert installed_servers(locate(str(tiny_model))) == []


def test_the_memory_is_this_programs_own() -> None:
    code = "from misstep.machine import peak_memory_mb; print(peak_memory_mb())"
    held = b"x" * (300 * 2**20)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    if Path("/proc/self/status").exists():
        assert int(shown.stdout) < len(held) / 2**20 < peak_memory_mb()


def test_a_servers_children_belong_to_it() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("asks Linux")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        until = time.monotonic() + 60
        while len(found := list(family(str(parent.pid)))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert found[0] == str(parent.pid) and len(found) == 2
        assert parent.stdin
        parent.stdin.write(b"\n")


def test_overhead_takes_every_record_through_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    start = [sys.executable, "-m", "misstep.cli", "bench", "overhead", "--out", str(out)]
    start += ["--records", "9", "--records", "30"]
    done = subprocess.run(start, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [p["records"] for p in found["passed"]] == [9, 30]
    for passed in found["passed"]:
        assert list(passed["microseconds"]) == sorted(["read", "induce", "analyse", "respond"])
        assert all(us > 0 for us in passed["microseconds"].values())
    assert "growth_bytes_a_record" in found and found["machine"]["cores"]


def test_no_record_of_the_overhead_goes_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "misstep.bench.overhead.TemporaryDirectory", lambda **_: nullcontext(tmp_path)
    )
    overhead({"records": 40})
    for name in ("mistakes", "analyses", "responses"):
        assert len((tmp_path / f"run/{name}.jsonl").read_text().splitlines()) == 40, name
    analyses = list(read_jsonl(tmp_path / "run/analyses.jsonl", Analysis))
    assert all(a.accepted for a in analyses)


def test_who_has_ended_holds_no_memory() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("asks Linux")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert peak_memory_mb(str(ended.pid)) == 0
