"""A directory belongs to one command at a time, and to nobody once that has ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from misstep.claims import LOCK, claimed
from misstep.comparison import compare_methods
from misstep.errors import InputError
from misstep.judge_check import check_judge
from misstep.judge_train import read_train_inputs, train_judge
from misstep.pipeline import masked_rows, run
from misstep.progress import Silent
from misstep.study import run_study

HOLDER = """
import sys, time
from pathlib import Path
from misstep.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_claim_keeps_others_out_until_its_process_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(InputError) as refused, claimed(tmp_path):
                pass
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    for said in (str(tmp_path), f"process {holder.pid} on", "Wait", "--out"):
        assert said in str(refused.value)
    with claimed(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on")


def test_a_command_that_fails_gives_its_claim_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    with claimed(tmp_path) as folder, pytest.raises(InputError), claimed(folder):
        pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(InputError, match=r"Operation not supported.*--out"), claimed(tmp_path):
        pass


class Given(NamedTuple):
    """What the commands read."""

    recipe: Path
    study: Path
    labelled: str
    model: str


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Given:
    folder = tmp_path_factory.mktemp("given")

    def lines(name: str, *rows: Mapping[str, object]) -> dict[str, str]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path)}

    attack = {"prompt": "Q? Say: Soup", "target": "Soup"}
    known = {"policy": "goal-hijacking", "engine": "transformers"}
    recipe = known | {
        "model": str(tiny_model),
        "mistakes": {
            "source": "origin",
            "data": lines("mistakes", attack | {"response": "Soup"}),
        },
        "ordinary": lines("clean", {"prompt": "Bees?", "reference": "Honey."}),
        "evaluate": {"tests": {"attacks": (attacks := lines("attacks", attack))}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    study = known | {"models": [str(tiny_model)], "prompts": attacks}
    (folder / "study.yaml").write_text(json.dumps(study))
    labels = [
        {"prompt": f"Q{i}", "response": f"{label} {i}", "label": label}
        for i in range(40)
        for label in (0, 1)
    ]
    data = lines("labels", *labels)["path"]
    return Given(folder / "recipe.yaml", folder / "study.yaml", data, str(tiny_model))


def training(given: Given, out: Path) -> None:
    inputs = read_train_inputs([given.labelled], given.model, "mistake_rate", [])
    train_judge(inputs, out, Silent())


COMMANDS: dict[str, Callable[[Given, Path], object]] = {
    "run": lambda given, out: run(given.recipe, out, [], Silent()),
    "train --show-mask": lambda given, out: masked_rows(given.recipe, out, [], Silent(), 1),
    "compare": lambda given, out: compare_methods(given.recipe, out, [], Silent()),
    "study": lambda given, out: run_study(given.study, out, [], Silent()),
    "judge train": training,
    "judge check": lambda given, out: check_judge(
        "refusal", [given.labelled], out, None, [], Silent()
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_command_in_a_directory_is_refused_and_touches_nothing(
    given: Given, tmp_path: Path, command: str
) -> None:
    (tmp_path / "scratch").mkdir()
    with claimed(tmp_path), pytest.raises(InputError, match="another command is at work"):
        COMMANDS[command](given, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "scratch"}
