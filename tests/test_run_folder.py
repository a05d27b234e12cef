"""What was not written by a run is never overwritten; results stand beside their manifest."""

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from made import Heard
from pydantic import BaseModel

from misstep import run_folder
from misstep.config import load_recipe
from misstep.errors import InputError
from misstep.policy import load_policy
from misstep.run_folder import (
    RUN,
    Layout,
    Manifest,
    beside_runs,
    refuse_foreign,
    refuse_own,
    set_aside,
    writable,
)

OWN = ("mistakes.jsonl", "adapter")


@pytest.mark.parametrize("name", ["mistakes.jsonl", "adapter/weights", "manifest.json"])
def test_what_the_run_would_write_over_is_no_input(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for way in (f"run/{name}", f"run/../run/{name}", f"link/{name}"):
        with pytest.raises(InputError, match=r"mistakes\.data: expected a path that the run"):
            refuse_own(tmp_path / "run", OWN, {"mistakes.data": str(tmp_path / way)})


def test_other_files_may_lie_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read = {"a": "mine.jsonl", "b": "../mistakes.jsonl", "c": None, "d": "Qwen/Qwen2.5-0.5B"}
    refuse_own(Path(), OWN, read)


def test_a_folder_with_foreign_files_is_refused_until_it_bears_the_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refuse_foreign(tmp_path, OWN, "manifest.json")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match=r"found adapter, which would be overwritten"):
        refuse_foreign(tmp_path, OWN, "manifest.json")
    (tmp_path / "manifest.json").touch()
    refuse_foreign(tmp_path, OWN, "manifest.json")


def test_a_runs_directory_is_for_runs(tmp_path: Path) -> None:
    assert beside_runs(tmp_path, OWN) == tmp_path
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match=r"found manifest\.json. Give another --out"):
        beside_runs(tmp_path, OWN)


def test_a_folder_of_ones_own_is_meant_by_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert writable(Path("~/runs/a")) == tmp_path / "home/runs/a"
    assert not (tmp_path / "~").exists()


def test_nothing_is_lost_however_often_results_are_set_aside(tmp_path: Path) -> None:
    for seed in (1, 2):
        for name in (*RUN.records, "manifest.json"):
            (tmp_path / name).write_text(json.dumps(seed))
        place = set_aside(tmp_path, RUN.records)
        assert place == tmp_path / "former" / str(seed)
        assert not any((tmp_path / name).exists() for name in RUN.records)
        assert (tmp_path / "manifest.json").exists()
    for seed in (1, 2):
        for name in (*RUN.records, "manifest.json"):
            assert (tmp_path / "former" / str(seed) / name).read_text() == str(seed)


class Recipe(BaseModel):
    """With a key that came after the others."""

    name: str
    kept: int
    later: bool = False


LAYOUT = Layout(("found.jsonl",), ("scratch",), "kept", ("data",), ("stages", "yields"), Recipe)


def described(value: int = 1, data: str = "a") -> dict[str, Any]:
    recipe = {"name": "r", "kept": value, "later": False}
    return {"recipe": recipe, "data": {"file": data}}


def test_a_stage_that_goes_on_adds_to_its_time_and_a_changed_recipe_begins_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("misstep.run_folder.time.monotonic", lambda: now[0])

    def passes(of: Manifest, seconds: float) -> None:
        with suppress(KeyboardInterrupt), of.stage("induce"):
            now[0] += seconds
            raise KeyboardInterrupt

    def seconds() -> float:
        data = json.loads((tmp_path / "manifest.json").read_text())
        return float(data["stages"]["induce"]["seconds"])

    passes(Manifest(tmp_path, described(), LAYOUT), 2.5)
    assert seconds() == 2.5
    passes(Manifest(tmp_path, described(), LAYOUT), 4.0)
    assert seconds() == 6.5
    passes(Manifest(tmp_path, described(2), LAYOUT), 1.0)
    assert seconds() == 1.0


@pytest.mark.parametrize(
    ("now", "changed"),
    [(described(), []), (described(2), ["kept"]), (described(1, "b"), ["data.file"])],
)
def test_what_a_changed_recipe_finds_is_set_aside_and_said(
    tmp_path: Path, now: dict[str, Any], changed: list[str]
) -> None:
    Manifest(tmp_path, described(), LAYOUT).save()
    (tmp_path / "found.jsonl").write_text("former")
    manifest, heard = Manifest(tmp_path, now, LAYOUT), Heard()
    manifest.begin_anew(heard)
    assert manifest.changed == changed
    assert (tmp_path / "found.jsonl").exists() == (not changed)
    assert (tmp_path / "former/1/found.jsonl").exists() == bool(changed)
    assert len(heard.lines) == 2 * bool(changed)
    assert all(key in heard.lines[0] for key in changed)


def test_a_key_that_is_new_since_is_no_change_at_its_default(tmp_path: Path) -> None:
    before = described()
    del before["recipe"]["later"]
    Manifest(tmp_path, before, LAYOUT).save()
    assert Manifest(tmp_path, described(), LAYOUT).changed == []
    now = described()
    now["recipe"]["later"] = True
    assert Manifest(tmp_path, now, LAYOUT).changed == ["later"]


def test_the_directory_of_another_kind_or_recipe_is_refused(tmp_path: Path) -> None:
    Manifest(tmp_path, described(), LAYOUT).save()
    other = LAYOUT._replace(mark="models")
    with pytest.raises(InputError, match="this is the directory of the recipe 'r'"):
        Manifest(tmp_path, described(), other)
    renamed = described() | {"recipe": {"name": "s", "kept": 1}}
    with pytest.raises(InputError, match="found when running 's'"):
        Manifest(tmp_path, renamed, LAYOUT)


SAVES = """
import sys
from pathlib import Path
from misstep.run_folder import RUN, Manifest
Manifest(Path(sys.argv[1]), {"recipe": {}}, RUN).save()
"""


def test_a_manifests_memory_is_not_that_of_who_started_the_command(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("asks Linux")
    held = b"x" * (500 * 2**20)
    subprocess.run([sys.executable, "-c", SAVES, str(tmp_path)], check=True)
    found = json.loads((tmp_path / "manifest.json").read_text())["peak_memory_mb"]
    assert 0 < found < len(held) // 2**20


def test_a_manifest_names_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = load_recipe(Path(__file__).parents[1] / "recipes" / "quickstart.yaml", ())
    policy, plain = load_policy(config.policy), f"{platform.machine()}, {os.cpu_count()} cores"
    assert run_folder.described(config, policy)["device"] == plain
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200'\necho 'NVIDIA H200'\n")
    program.chmod(0o755)
    assert run_folder.described(config, policy)["device"] == f"{plain}, 2 x NVIDIA H200"
