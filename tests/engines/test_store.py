import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from misstep.engines.base import Completion
from misstep.engines.store import ROWS_A_DELETION, Store, open_existing
from misstep.errors import DataError, RunError


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def answers(numbers: range, length: int = 1) -> dict[bytes, Completion]:
    return {
        key(n): Completion(text=f"{n} " * length, tokens=n, truncated=n % 2) for n in numbers
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


def test_what_is_kept_is_found_and_never_changed(path: Path) -> None:
    with Store(path) as store:
        store.keep("a", answers(range(1200)))
        store.keep("a", {key(3): Completion(text="other", tokens=1)})
    with Store(path) as store:
        assert store.look_up([key(n) for n in range(1300)]) == answers(range(1200))


def test_a_part_is_kept_whole_or_not_at_all(path: Path) -> None:
    strange: Any = object()
    broken = answers(range(9)) | {key(9): Completion.model_construct(text=strange, tokens=1)}
    with Store(path) as store:
        with pytest.raises(sqlite3.Error):
            store.keep("a", broken)
        assert store.look_up([key(n) for n in range(9)]) == {}
        store.keep("a", answers(range(2)))
        assert len(store.look_up([key(0), key(1)])) == 2


def test_prune_by_engine_and_what_is_left_is_said(path: Path) -> None:
    with Store(path) as store:
        store.keep("openvino old", answers(range(5)))
        store.keep("openvino new", answers(range(5, 12)))
        assert {h.identity: h.answers for h in store.holdings()} == {
            "openvino old": 5,
            "openvino new": 7,
        }
        assert store.prune(engine="old") == 5
        assert [h.identity for h in store.holdings()] == ["openvino new"]
        assert set(store.look_up([key(n) for n in range(12)])) == set(answers(range(5, 12)))


def test_prune_by_age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with Store(path) as store:
        monkeypatch.setattr("misstep.engines.store.time.time", lambda: now - 3 * 86_400)
        store.keep("a", answers(range(4)))
        monkeypatch.setattr("misstep.engines.store.time.time", lambda: now)
        store.keep("a", answers(range(4, 9)))
        assert store.prune(days=4) == 0
        assert store.prune(days=2, engine="b") == 0
        assert store.prune(days=2) == 4
        assert set(store.look_up([key(n) for n in range(9)])) == set(answers(range(4, 9)))


def test_prune_to_a_size_takes_the_oldest_and_shrinks_the_file(path: Path) -> None:
    many = 2 * ROWS_A_DELETION
    with Store(path) as store:
        store.keep("a", answers(range(many), 30))
    before = path.stat().st_size
    with Store(path) as store:
        removed = store.prune(megabytes=0.6 * before / 1e6)
        assert 0 < removed < many
        assert store.used_bytes() <= 0.6 * before
        left = store.look_up([key(n) for n in range(many)])
        assert set(left) == {key(n) for n in range(removed, many)}
    assert path.stat().st_size <= 0.7 * before


def test_a_run_reads_and_writes_while_answers_are_removed(path: Path) -> None:
    with Store(path) as run, Store(path) as other:
        run.keep("a", answers(range(100)))
        reading = run._table.execute("SELECT key FROM answers")
        assert reading.fetchone()
        assert other.prune(engine="a") == 100
        assert len(reading.fetchall()) == 99, "a reader goes on with what it began with"
        assert run.look_up([key(1)]) == {}
        run.keep("a", answers(range(3)))
        assert len(other.look_up([key(n) for n in range(3)])) == 3
        assert [h.answers for h in other.holdings()] == [3]


OPENING = """
import sys
from pathlib import Path
from misstep.engines.base import Completion
from misstep.engines.store import Store
number = int(sys.argv[2])
with Store(Path(sys.argv[1])) as store:
    for part in range(20):
        numbers = range(1000 * part + 8 * number, 1000 * part + 8 * number + 16)
        keys = [n.to_bytes(16, "big") for n in numbers]
        store.keep(str(number), {k: Completion(text="t", tokens=1) for k in keys})
"""


def test_processes_that_open_and_fill_one_store_at_once_lose_nothing(path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(path)]
    started = [subprocess.Popen([*command, str(n)]) for n in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    with Store(path) as store:
        keys = [key(1000 * part + n) for part in range(20) for n in range(32)]
        assert len(store.look_up(keys)) == len(keys)
        assert sum(h.answers for h in store.holdings()) == len(keys)


def test_a_log_that_breaks_off_anywhere_loses_its_end_alone(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        for part in range(6):
            store.keep("a", answers(range(10 * part, 10 * part + 10)))
        whole, log = path.read_bytes(), path.with_name("cache.sqlite-wal").read_bytes()
    found = []
    for cut in range(0, len(log), 997):
        torn = tmp_path / str(cut) / "cache.sqlite"
        torn.parent.mkdir()
        torn.write_bytes(whole)
        torn.with_name("cache.sqlite-wal").write_bytes(log[:cut])
        with Store(torn) as store:
            kept = store.look_up([key(n) for n in range(60)])
            assert kept == answers(range(len(kept))) and len(kept) % 10 == 0
            store.keep("a", answers(range(60)))
            assert len(store.look_up([key(n) for n in range(60)])) == 60
        found.append(len(kept))
    assert found == sorted(found) and set(found) >= {0, 10, 50}


def test_a_cache_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cache\.sqlite: expected a cache"):
        open_existing(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_database_is_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mine (a)")
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"found something else .*the table mine"):
        Store(path)
    for only_read in (False, True):
        with pytest.raises(DataError, match=r"found something else .*the table mine"):
            open_existing(path, only_read)
    assert path.read_bytes() == before


@pytest.mark.parametrize("only_read", [False, True])
def test_a_file_that_is_no_cache_is_wrong_input(tmp_path: Path, only_read: bool) -> None:
    table = tmp_path / "data.csv"
    table.write_text("prompt,response\n" * 100)
    with pytest.raises(DataError, match=r"data\.csv: expected a cache.*Name a run directory"):
        open_existing(table, only_read)
    assert [*tmp_path.iterdir()] == [table]


def test_an_empty_file_is_no_cache_to_read_and_one_to_fill(path: Path) -> None:
    path.touch()
    with pytest.raises(DataError, match="an empty database"):
        open_existing(path, only_read=True)
    with open_existing(path) as store:
        assert store.holdings() == []


def test_what_is_only_read_is_left_as_it_is(path: Path) -> None:
    with Store(path) as store:
        store.keep("a", answers(range(5)))
    before = path.read_bytes()
    with open_existing(path.parent, only_read=True) as store:
        assert [h.answers for h in store.holdings()] == [5]
        assert [*path.parent.iterdir()] == [path]
        with pytest.raises(RunError, match="readonly"):
            store.keep("a", answers(range(5, 9)))
    assert path.read_bytes() == before


def test_what_a_run_has_just_kept_is_read_beside_it(path: Path) -> None:
    with Store(path) as store:
        store.keep("a", answers(range(5)))
        with open_existing(path, only_read=True) as read:
            assert [h.answers for h in read.holdings()] == [5]


def test_a_full_disk_is_no_reason_to_throw_a_cache_away(path: Path) -> None:
    with Store(path) as store:
        store.keep("a", answers(range(5)))
        pages = store._pragma("page_count")
        store._table.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(RunError, match=r"read or written .*full.*answers in it are safe"):
            store.keep("a", answers(range(5, 5000)))
        assert len(store.look_up([key(n) for n in range(10)])) == 5


def test_a_page_that_was_damaged_is_met_with_advice(path: Path) -> None:
    with Store(path) as store:
        store.keep("a", answers(range(2000)))
        page, pages = store._pragma("page_size"), store._pragma("page_count")
    damaged = bytearray(path.read_bytes())
    for number in range(2, pages):
        damaged[number * page : number * page + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    with Store(path) as store:
        for use in (
            lambda: store.look_up([key(n) for n in range(2000)]),
            lambda: store.keep("a", answers(range(2000, 4000))),
            store.holdings,
        ):
            with pytest.raises(RunError, match=r"cache\.sqlite: .*Move the file away"):
                use()


def test_the_command_lists_and_removes(path: Path) -> None:
    with Store(path) as store:
        store.keep("old model", answers(range(5)))
        store.keep("new model", answers(range(5, 7)))

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "misstep.cli", "cache", *words]
        return subprocess.run(command, capture_output=True, text=True)

    assert "5  " in said("list", str(path.parent)).stdout
    assert said("prune", str(path.parent)).returncode == 2
    # A variable of the shell that is not set.
    assert said("prune", str(path), "--engine", "").returncode == 2
    assert said("prune", str(path), "--engine", "old").stdout == "5 answers removed\n"
    listed = said("list", str(path)).stdout
    assert "new model" in listed and "old model" not in listed
