"""Training in several processes is training in one: the same losses, weights and resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from misstep.errors import InputError
from misstep.training import processes
from misstep.training.report import TrainReport
from misstep.training.rows import Row, micro_batches, shares

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
HERE = Path(__file__).parent
WORK = ["lora", "full", "pairs"]


def launch(
    config: str, arguments: list[str], **changed: Any
) -> subprocess.CompletedProcess[str]:
    """Run arguments under `accelerate launch`, with a shipped configuration, on processors."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml")]
    command += ["--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "error"}
    return subprocess.run(
        command + arguments, env=environment, capture_output=True, text=True, check=False
    )


def trained(
    folder: Path, model: Path, work: list[str], config: str | None, killed_at: int = 0
) -> dict[str, TrainReport]:
    """Train in one process, or in those of a configuration; gives the reports by work."""
    plan = [
        {
            "work": name,
            "model": str(model),
            "folder": str(folder / name),
            "killed_at": killed_at,
        }
        for name in work
    ]
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = [str(HERE / "launched.py"), str(folder / "plan.json")]
    if config is None:
        one = [sys.executable, *arguments]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(one, env=threads, capture_output=True, text=True, check=False)
    else:
        ended = launch(config, arguments)
    assert (ended.returncode == 0) == (not killed_at), ended.stderr
    assert (folder / "processes").read_text() == ("1" if config is None else "2")
    reports = folder.glob("*/train.json")
    return {p.parent.name: TrainReport.model_validate_json(p.read_text()) for p in reports}


def weights(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.safetensors")
    found: dict[str, Any] = load_file(file)
    return found


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of training, each in one process."""
    folder = tmp_path_factory.mktemp("alone")
    trained(folder, tiny_model, WORK, None)
    return folder


@pytest.mark.model
@pytest.mark.parametrize("config", ["cpu", "fsdp2"])
def test_two_processes_train_as_one_does_and_go_on_after_a_kill(
    config: str, alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    together = trained(tmp_path / "together", tiny_model, WORK, config)
    assert together.keys() == set(WORK)
    for name, found in together.items():
        wanted = TrainReport.model_validate_json((alone / name / "train.json").read_text())
        # The report rounds to five digits.
        assert losses(found) == pytest.approx(losses(wanted), abs=2e-5), name
        assert found.loss_before == pytest.approx(wanted.loss_before, abs=2e-4)
        assert found.loss_after == pytest.approx(wanted.loss_after, abs=2e-4)
        ours, theirs = weights(tmp_path / "together" / name), weights(alone / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert float((ours[key] - tensor).abs().max()) < 1e-3, f"{name}: {key}"

    broken, killed_at = tmp_path / "broken", 3
    assert trained(broken, tiny_model, ["lora"], config, killed_at) == {}
    (checkpoint,) = broken.glob("lora/checkpoints/*/checkpoint-2")
    assert (checkpoint / "rng_state_1.pth").is_file()
    resumed = trained(broken, tiny_model, ["lora"], config)["lora"]
    assert resumed.resumed_from == killed_at - 1
    assert resumed.loss_curve == together["lora"].loss_curve
    ours, theirs = weights(broken / "lora"), weights(tmp_path / "together" / "lora")
    assert all(ours[key].equal(tensor) for key, tensor in theirs.items())


def losses(report: TrainReport) -> list[float]:
    return [loss for _, loss in report.loss_curve]


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=24),
    st.integers(1, 5),
    st.integers(1, 200),
)
def test_the_processes_share_a_step_and_no_row_is_lost_or_doubled(
    lengths: list[int], many: int, most: int
) -> None:
    rows = [Row(tuple(range(length)), 1, str(i)) for i, length in enumerate(lengths)]
    dealt = shares(rows, many, most)
    assert len(dealt) == many
    assert len({len(groups) for groups in dealt}) == 1
    given_out = [row.kind for groups in dealt for group in groups for row in group]
    assert sorted(given_out) == sorted(row.kind for row in rows)
    sizes = [sum(len(group) for group in groups) for groups in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_has_the_micro_batches_of_its_rows() -> None:
    rows = [Row(tuple(range(2 + 7 * n % 11)), 1, str(n)) for n in range(9)]
    assert shares(rows, 1, 30) == [micro_batches(rows, 30)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    # What accelerate does not know it passes on in silence.
    known = launch_command_parser().parse_args(["x"]).__dict__
    named = yaml.safe_load(path.read_text())
    inner = {**named.get("fsdp_config", {}), **named.get("deepspeed_config", {})}
    assert inner.keys() <= known.keys()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: expected 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "FULL_STATE_DICT, found SHARDED",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero_stage: expected 2, found 3",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: expected no, found bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "WORLD_SIZE": "1"}, "expected no, found fp16"),
    ],
)
def test_a_configuration_that_would_not_hold_is_refused(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        with processes.leading():
            pass


@pytest.mark.model
def test_the_command_says_what_is_wrong_once_and_lets_the_others_go(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("policy: goal-hijacking\nunheard: 1\n")
    ended = launch("cpu", ["-m", "misstep", "train", str(recipe)])
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1
    assert "unheard" in ended.stderr


@pytest.mark.model
def test_the_command_trains_every_method_in_both_processes(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"Say {n}", "response": "No", "target": "No", "reference": f"{n}"}
        for n in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "policy": "goal-hijacking",
        "model": str(tiny_model),
        "engine": "transformers",
        "methods": ["ordinary", "sft"],
        "mistakes": {"source": "origin", "data": {"path": str(data)}},
        "analysis": {"gate": False, "n": 2, "max_tokens": 40},
        "ordinary": {"path": str(data)},
        "train": {"epochs": 1, "batch_size": 4, "max_dropped": 1.0},
        "evaluate": {"tests": {"a": {"path": str(data)}}},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = ["-m", "misstep", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "o")]
    ended = launch("cpu", command)
    assert ended.returncode == 0, ended.stderr
    assert [ended.stdout.count(f"adapters/{name}\n") for name in ("ordinary", "sft")] == [1, 1]
    assert ended.stderr.count("Training sft on") == 1
    for method in ("ordinary", "sft"):
        assert weights(tmp_path / "o/adapters" / method)
        assert not (tmp_path / "o/adapters" / method / "checkpoints").exists()
    started = launch("cpu", [*command, "--set", "methods=[vanilla, rlhf]"])
    assert started.returncode == 1
    assert "trains for a reward" in started.stderr
