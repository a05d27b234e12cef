"""Ray's engine: each answer once and in order, whatever comes back from the machines."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from misstep.engines.base import AT_ONCE, Completion, Engine, Request, in_order
from misstep.engines.cached import MANY, Chosen
from misstep.engines.choose import choose
from misstep.engines.ray import COMPLETIONS, RayEngine, Share, Worker
from misstep.engines.ray import REQUESTS as REQUEST_LIST
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import EngineError, MissingExtra
from misstep.models.locate import EMBEDDED, locate
from misstep.records import Message

ROOT = Path(__file__).parents[2]
Part = tuple[int, list[Completion]]
REQUESTS = [
    Request(messages=(Message(role="user", content=f"Question {i}"),)) for i in range(10)
]


class Given(RayEngine):
    """Answers as machines do: out of order, and as the test spoils them."""

    def __init__(self, twice: bool = False, lost: bool = False, cut: bool = False) -> None:
        super().__init__(lambda: pytest.fail("not asked"), "name", Share(2, 1, 0))
        self.twice, self.lost, self.cut = twice, lost, cut

    def _answered(self, batches: Mapping[int, Sequence[Request]], batch: int) -> Iterator[Part]:
        parts = [(s, ScriptedEngine().generate(b)) for s, b in batches.items()][::-1]
        if self.twice:
            parts.insert(2, parts[0])
        if self.lost:
            del parts[1]
        for start, answers in parts:
            yield start, answers[1:] if self.cut else answers


def test_answers_are_in_order_and_each_comes_once() -> None:
    expected = ScriptedEngine().generate(REQUESTS)
    for engine in (Given(), Given(twice=True)):
        pairs = [pair for part in engine.stream(REQUESTS, 3) for pair in part]
        assert sorted(place for place, _ in pairs) == list(range(10))
        assert [answer for _, answer in sorted(pairs, key=lambda p: p[0])] == expected
        assert engine.generate(REQUESTS) == expected
    assert Given().generate([]) == []


@pytest.mark.parametrize(
    ("engine", "said"),
    [(Given(lost=True), "left 1 parts"), (Given(cut=True), "0 answers to 1 requests")],
)
def test_answers_that_are_missing_are_an_error(engine: Given, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        list(engine.stream(REQUESTS, 3))


def chosen(engine: Engine) -> Chosen:
    return Chosen(engine.identity, "the test's", lambda: engine)


def fails(request: Request) -> str:
    raise EngineError(f"stopped at {request.messages[0].content}.")


def answered_by(engine: Engine, identity: str) -> dict[str, Any]:
    worker = Worker(lambda: chosen(engine), identity)
    return worker({"start": [3], "batch": [4], "requests": [REQUEST_LIST.dump_json(REQUESTS)]})


def test_what_goes_wrong_on_a_machine_comes_back_as_words() -> None:
    name = ScriptedEngine().identity
    whole = answered_by(ScriptedEngine(), name)
    assert (whole["start"], whole["failure"]) == ([3], [""])
    assert COMPLETIONS.validate_json(whole["completions"][0]) == ScriptedEngine().generate(
        REQUESTS
    )
    assert answered_by(ScriptedEngine(fails), name)["failure"] == ["stopped at Question 0."]
    (said,) = answered_by(ScriptedEngine(), "other")["failure"]
    assert said.startswith(f"the machines of the cluster differ: expected other, found {name}.")


def test_workers_get_whole_paths_and_each_a_large_part_of_a_call(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def ask(choose: Any, _: Share) -> tuple[str, str]:
        given.extend(choose.args)
        return "name", "why"

    monkeypatch.setattr("misstep.engines.ray.share", lambda _: Share(64, 1, 1))
    monkeypatch.setattr("misstep.engines.ray.ask", ask)
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    found = choose("ray:transformers", locate("./model"), Path("adapter"))
    kind, model, adapter = given
    assert kind == "transformers"
    assert model.path == tiny_model.resolve()
    assert adapter == tmp_path / "adapter"
    assert found.at_once == 64 * MANY and found.alone
    monkeypatch.setattr("misstep.engines.ray.share", lambda _: Share(64, 8, 0))
    assert choose("ray:transformers", locate("./model")).at_once == 64 * AT_ONCE


def test_an_engine_on_a_gpu_gets_several_batches_together_and_in_the_same_batches() -> None:
    parts: list[int] = []

    class Kept(RayEngine):
        def _answered(
            self, given: Mapping[int, Sequence[Request]], batch: int
        ) -> Iterator[Part]:
            parts.extend(len(part) for part in given.values())
            for start, part in list(given.items()):
                yield start, [Completion(text=f"{start} {batch}", tokens=1)] * len(part)

    engine = Kept(lambda: pytest.fail("not here"), "name", Share(2, 1, 1))

    answers = in_order(engine.stream([Request(messages=())] * 1500, 100))
    assert parts == [800, 700]
    assert [answer.text for answer in answers] == ["0 100"] * 800 + ["800 100"] * 700


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_command_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'misstep\[ray\]'"):
        choose("ray", locate(EMBEDDED))


@pytest.mark.model
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: misstep[ray]")
def test_a_node_is_lost_and_no_record_with_it() -> None:
    script = ROOT / "benchmarks/ray_node_loss.py"
    shown = subprocess.run(
        [sys.executable, str(script), "--records", "500", "--batch", "16"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "Traceback" not in shown.stdout + shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    assert found["nodes_left"] == 1
    assert found["received"] == found["different"] == found["records"] == 500
    assert found["as_the_local_engine"]


@pytest.mark.model
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: misstep[ray]")
def test_the_fleet_answers_as_one_machine_does(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    model = locate(str(tiny_model))
    local, fleet = choose("transformers", model), choose("ray:transformers", model)
    assert fleet.identity == local.identity
    assert fleet.why.startswith("ray, ")
    with local.open() as engine:
        expected = [c for part in engine.stream(REQUESTS, 4) for c in part]
    with fleet.open() as engine:
        found = [c for part in engine.stream(REQUESTS, 4) for c in part]
    assert sorted(found) == sorted(expected)
