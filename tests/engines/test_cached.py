import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from misstep.engines import turns
from misstep.engines.base import Completion, Engine, Request
from misstep.engines.cached import CachedEngine, Chosen, Rest
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import EngineError, RunError
from misstep.records import Message


def ask(text: str, seed: int = 0) -> Request:
    return Request(messages=(Message(role="user", content=text),), temperature=1, seed=seed)


REQUESTS = [ask(f"question {i}") for i in range(10)]


class Batches(ScriptedEngine):
    """Remembers its batches, and fails at one of them."""

    def __init__(self, fail_at: int | None = None, name: str = "model") -> None:
        super().__init__(name=name)
        self.fail_at = fail_at
        self.batches: list[list[Request]] = []
        self.closed = False

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if len(self.batches) == self.fail_at:
            raise EngineError("out of memory")
        self.batches.append(list(requests))
        return super().generate(requests)

    def close(self) -> None:
        self.closed = True


def cache(path: Path, engine: Engine, batch: int = 4) -> CachedEngine:
    return CachedEngine(Chosen(engine.identity, "", lambda: engine), path, batch)


def never() -> Engine:
    raise AssertionError("the engine was opened although every answer was known")


def test_an_answer_is_paid_once_across_runs(tmp_path: Path) -> None:
    engine = Batches()
    with cache(tmp_path / "c.sqlite", engine) as first:
        answers = first.generate(REQUESTS)
        assert first.generate(REQUESTS) == answers
        assert first.paid == len(REQUESTS)
    with CachedEngine(Chosen(engine.identity, "", never), tmp_path / "c.sqlite") as second:
        assert second.generate(REQUESTS[::-1]) == answers[::-1]
        assert second.paid == 0
    assert answers == ScriptedEngine().generate(REQUESTS)


def test_the_engine_opens_at_the_first_miss(tmp_path: Path) -> None:
    with CachedEngine(Chosen("unused", "", never), tmp_path / "new" / "c.sqlite") as cached:
        assert cached.generate([]) == []


def test_runs_at_the_same_time_share_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with cache(path, Batches()) as one, cache(path, Batches()) as two:
        assert one.generate(REQUESTS[:5]) == two.generate(REQUESTS)[:5]
        one.generate(REQUESTS)
    assert (one.paid, two.paid) == (5, 5)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_after_a_failure_only_the_rest_is_paid_in_the_same_batches(
    tmp_path: Path, fail_at: int
) -> None:
    whole, failing, resumed = Batches(), Batches(fail_at), Batches()
    with cache(tmp_path / "whole.sqlite", whole) as cached:
        expected = cached.generate(REQUESTS)
    with cache(tmp_path / "c.sqlite", failing) as cached, pytest.raises(EngineError):
        cached.generate(REQUESTS)
    with cache(tmp_path / "c.sqlite", resumed) as cached:
        assert cached.generate(REQUESTS) == expected
        assert cached.paid == len(REQUESTS) - 4 * fail_at
    assert failing.batches + resumed.batches == whole.batches


def test_duplicates_are_paid_once_and_answered_each(tmp_path: Path) -> None:
    asked = [REQUESTS[0], REQUESTS[1], REQUESTS[0], REQUESTS[0]]
    with cache(tmp_path / "c.sqlite", engine := Batches()) as cached:
        answers = cached.generate(asked)
    assert engine.batches == [REQUESTS[:2]]
    assert answers == ScriptedEngine().generate(asked)


@pytest.mark.parametrize(
    "other",
    [
        ask("question 0", seed=1),
        ask("question 0 "),
        REQUESTS[0].model_copy(update={"temperature": 0.5}),
        REQUESTS[0].model_copy(update={"max_tokens": 7}),
        REQUESTS[0].model_copy(update={"top_p": 0.9}),
    ],
)
def test_another_request_is_another_answer(tmp_path: Path, other: Request) -> None:
    with cache(tmp_path / "c.sqlite", engine := Batches()) as cached:
        cached.generate([REQUESTS[0]])
        cached.generate([other])
    assert engine.requests == [REQUESTS[0], other]


def test_another_model_never_answers_from_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with cache(path, Batches(name="old")) as cached:
        cached.generate(REQUESTS)
    with cache(path, new := Batches(name="new")) as cached:
        cached.generate(REQUESTS)
    assert new.requests == REQUESTS


def test_an_engine_that_is_not_the_expected_one_answers_nothing(tmp_path: Path) -> None:
    wrong = Batches(name="changed")
    with CachedEngine(Chosen("expected", "", lambda: wrong), tmp_path / "c.sqlite") as cached:
        for _ in range(2):
            with pytest.raises(RunError, match="files changed"):
                cached.generate(REQUESTS)
        assert cached.paid == 0
    assert wrong.requests == []
    assert wrong.closed


def test_progress_counts_what_was_missing(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with cache(tmp_path / "c.sqlite", Batches()) as cached:
        cached.generate(REQUESTS[:2])
        cached.notify = lambda done, total: told.append((done, total))
        cached.generate(REQUESTS)
        cached.generate(REQUESTS)
    assert told == [(6, 10), (10, 10)]


def test_closing_closes_the_engine(tmp_path: Path) -> None:
    with cache(tmp_path / "c.sqlite", engine := Batches()) as cached:
        cached.generate(REQUESTS)
        assert not engine.closed
    assert engine.closed


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_text("something else, and long enough to be looked at" * 9)
    with pytest.raises(RunError, match=r"c\.sqlite: expected a cache"):
        cache(tmp_path / "c.sqlite", Batches())


@settings(max_examples=15, deadline=None)
@given(
    asked=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=4),
    batch=st.integers(1, 5),
)
def test_a_cache_changes_no_answer(
    tmp_path_factory: pytest.TempPathFactory, asked: list[list[int]], batch: int
) -> None:
    with cache(tmp_path_factory.mktemp("c") / "c.sqlite", engine := Batches(), batch) as cached:
        for numbers in asked:
            requests = [REQUESTS[i] for i in numbers]
            assert cached.generate(requests) == ScriptedEngine().generate(requests)
    assert len(engine.requests) == len({i for numbers in asked for i in numbers})
    assert all(len(found) <= batch for found in engine.batches)


SLOW_RUN = """
import sys, time
from pathlib import Path
from misstep.engines.base import Request
from misstep.engines.cached import CachedEngine, Chosen
from misstep.engines.scripted import ScriptedEngine, echo
from misstep.records import Message

def slow(request):
    time.sleep(0.005)
    return echo(request)

requests = [
    Request(messages=(Message(role="user", content=f"question {i}"),), temperature=1)
    for i in range(4000)
]
engine = ScriptedEngine(slow, "model")
cached = CachedEngine(Chosen(engine.identity, "", lambda: engine), Path(sys.argv[1]), batch=4)
cached.generate(requests)
"""


def stored(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as table:
        return int(table.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_a_killed_process_leaves_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(path)]) as process:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.02)
            try:
                if stored(path) >= 8:
                    break
            except sqlite3.OperationalError:
                continue
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = stored(path)
    assert kept >= 8
    assert kept % 4 == 0
    requests = [ask(f"question {i}") for i in range(kept + 6)]
    with cache(path, engine := Batches()) as cached:
        assert cached.generate(requests) == ScriptedEngine().generate(requests)
    assert engine.batches == [requests[kept : kept + 4], requests[kept + 4 :]]


class OnGpu:
    """Engines of which one fits onto the GPU."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "c.sqlite"
        self.loads: list[str] = []
        self.open: list[str] = []

    def cached(
        self,
        name: str,
        alone: bool = True,
        rest: Rest | None = None,
        elsewhere: bool = False,
    ) -> CachedEngine:
        gpu = self

        class Loaded(ScriptedEngine):
            def close(self) -> None:
                gpu.open.remove(name)

        def load() -> Engine:
            assert not (alone and self.open), f"{name} beside {self.open}"
            self.loads.append(name)
            self.open.append(name)
            return Loaded(name=name)

        identity = ScriptedEngine(name=name).identity
        chosen = Chosen(identity, "", load, alone=alone, elsewhere=elsewhere)
        return CachedEngine(chosen, self.path, rest=rest)


def test_engines_that_need_the_gpu_take_turns(tmp_path: Path) -> None:
    gpu = OnGpu(tmp_path)
    with gpu.cached("model") as model, gpu.cached("judge") as judge:
        model.generate(REQUESTS[:2])
        judge.generate(REQUESTS[:2])
        assert gpu.open == ["judge"]
        # What is known needs no engine, and moves none.
        model.generate(REQUESTS[:2])
        assert gpu.open == ["judge"]
        model.generate(REQUESTS[:3])
        assert gpu.open == ["model"]
    assert gpu.loads == ["model", "judge", "model"]
    assert not gpu.open


@pytest.mark.parametrize("alone", [True, False])
def test_a_judge_that_is_the_model_itself_loads_it_no_second_time(
    tmp_path: Path, alone: bool
) -> None:
    gpu, rest = OnGpu(tmp_path), Rest()
    with gpu.cached("model", alone, rest) as model:
        with gpu.cached("model", alone, rest) as judge:
            for number in range(3):
                model.generate([ask("a question", number)])
                judge.generate([ask("an answer", number)])
        model.generate([ask("a question", 3)])
    rest.give_up()
    assert gpu.loads == ["model"]
    assert not gpu.open


def test_engines_elsewhere_stay_open_side_by_side(tmp_path: Path) -> None:
    gpu = OnGpu(tmp_path)
    with gpu.cached("gpu") as local, gpu.cached("a", False) as a, gpu.cached("b", False) as b:
        for engine in (local, a, b):
            engine.generate(REQUESTS[:2])
        for engine in (a, b, local):
            engine.generate(REQUESTS[2:4])
        assert gpu.open == gpu.loads == ["gpu", "a", "b"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_that_asks_the_same_model_loads_it_no_second_time(
    tmp_path: Path, alone: bool
) -> None:
    gpu, rest = OnGpu(tmp_path), Rest()
    for stage in range(3):
        with gpu.cached("model", alone, rest) as model:
            model.generate([ask("a question", stage)])
    assert gpu.loads == gpu.open == ["model"]
    # Another one finds the memory free, and so does who asks for it.
    with gpu.cached("other", True, rest) as other:
        other.generate([ask("a question", 0)])
        assert gpu.open == ["other"]
    rest.give_up()
    assert not gpu.open
    with gpu.cached("other", alone, rest) as other:
        # What is known needs no engine, at rest or not.
        other.generate([ask("a question", 0)])
    assert gpu.loads == ["model", "other"]


def test_an_engine_at_rest_leaves_the_gpu_to_what_is_no_engine(tmp_path: Path) -> None:
    class Other:
        def give_up(self) -> None:
            """Nothing that a test looks at."""

    gpu, rest = OnGpu(tmp_path), Rest()
    with gpu.cached("model", True, rest) as model:
        model.generate(REQUESTS[:2])
    assert gpu.open == ["model"]
    turns.take(Other())
    assert not gpu.open
    with gpu.cached("model", True, rest) as model:
        model.generate(REQUESTS[2:4])
    assert gpu.loads == ["model", "model"]
    rest.give_up()


def test_the_client_of_an_endpoint_drives_no_model_out_of_its_rest(tmp_path: Path) -> None:
    gpu, rest = OnGpu(tmp_path), Rest()
    judging = gpu.cached("judge", False, rest, elsewhere=True)
    with judging as judge, gpu.cached("model", False, rest) as model:
        model.generate(REQUESTS[:2])
        judge.generate(REQUESTS[:2])
    assert gpu.open == ["model"]
    rest.give_up()


def test_an_engine_makes_room_for_what_is_no_engine(tmp_path: Path) -> None:
    class Other:
        def give_up(self) -> None:
            gpu.open.remove("other")

    gpu = OnGpu(tmp_path)
    with gpu.cached("model") as model:
        model.generate(REQUESTS[:2])
        turns.take(Other())
        assert not gpu.open
        gpu.open.append("other")
        model.generate(REQUESTS[2:4])
        assert gpu.open == ["model"]
