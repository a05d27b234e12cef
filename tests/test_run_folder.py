"""What was not written by a run is never overwritten; results stand beside their manifest."""

import json
from pathlib import Path

import pytest

from misstep.errors import InputError
from misstep.run_folder import (
    RECORDS,
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
        for name in (*RECORDS, "manifest.json"):
            (tmp_path / name).write_text(json.dumps(seed))
        place = set_aside(tmp_path)
        assert place == tmp_path / "former" / str(seed)
        assert not any((tmp_path / name).exists() for name in RECORDS)
        assert (tmp_path / "manifest.json").exists()
    for seed in (1, 2):
        for name in (*RECORDS, "manifest.json"):
            assert (tmp_path / "former" / str(seed) / name).read_text() == str(seed)
