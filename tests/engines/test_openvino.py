"""The OpenVINO engine with a stand-in for its pipeline: what it takes, refuses and leaves."""

import json
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_files import make_tiny_gguf
from safetensors.numpy import save_file

from misstep.engines import openvino
from misstep.engines.base import Request
from misstep.engines.choose import _openvino_obstacle, choose
from misstep.engines.openvino import BLOCK, COMPANIONS, LEAST_ROOM, ROOM, OpenVinoEngine
from misstep.errors import EngineError, ModelError
from misstep.models.locate import EMBEDDED, Model, locate
from misstep.models.openvino_export import Shape
from misstep.models.rendering import Renderer, tokens_of
from misstep.models.weights import load_tokenizer
from misstep.records import Message

pytest.importorskip("openvino_genai")
GIB = 1 << 30


class Status(Enum):
    RUNNING = 1
    FINISHED = 2


class Pipeline:
    """Answers every request with the same tokens, one step after it came."""

    def __init__(self, says: Sequence[int]) -> None:
        self.says = says
        self.asked: list[Any] = []

    def add_request(self, _number: int, _ids: Any, config: Any) -> Any:
        given = SimpleNamespace(generated_ids=list(self.says))
        handle = SimpleNamespace(status=Status.RUNNING, cancel=lambda: None)
        handle.get_status = lambda: handle.status
        handle.read_all = lambda: [given]
        handle.config = config
        self.asked.append(handle)
        return handle

    def step(self) -> None:
        for handle in self.asked:
            handle.status = Status.FINISHED

    def has_non_finished_requests(self) -> bool:
        return False


Make = Callable[..., OpenVinoEngine]


@pytest.fixture
def make(untuned_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes engines whose model says a text, from a file that need not be real."""
    renderer = Renderer(load_tokenizer(locate(str(untuned_model))))
    genai = SimpleNamespace(GenerationStatus=Status, GenerationConfig=SimpleNamespace)

    def merge(_path: Path, _adapter: Path | None, out: Path) -> Path:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"GGUF")
        return out

    def made(says: str = "", blocks: int = 100, **options: Any) -> OpenVinoEngine:
        pipeline = Pipeline(tokens_of(renderer.tokenizer, says))
        monkeypatch.setattr(openvino, "_pipeline", lambda *_: pipeline)
        monkeypatch.setattr(openvino, "_cache_blocks", lambda _: blocks)
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        return OpenVinoEngine(Model("m", tmp_path / "m.gguf"), **options)

    monkeypatch.setattr(openvino, "_library", lambda: genai)
    monkeypatch.setattr(openvino, "identity", lambda *_: "stand-in")
    monkeypatch.setattr(openvino, "shape", lambda _: None)
    monkeypatch.setattr(openvino, "context_length", lambda _: None)
    monkeypatch.setattr(openvino, "merge_adapter", merge)
    monkeypatch.setattr(Renderer, "for_model", lambda _: renderer)
    return made


def ask(text: str, **options: Any) -> Request:
    return Request(messages=(Message(role="user", content=text),), **options)


def test_one_prompt_that_does_not_fit_leaves_the_others_their_answers(make: Make) -> None:
    with make("Yes.\nUser: And?", blocks=COMPANIONS + 8) as engine:
        found = engine.generate([ask("Hi"), ask("w" * 200), ask("Hi", max_tokens=300)])
    assert [answer.text for answer in found] == ["Yes.", "", ""]
    assert not found[0].truncated
    for answer in found[1:]:
        assert answer.error and f"OpenVINO's cache of {8 * BLOCK} tokens" in answer.error


def test_weights_of_an_adapter_go_with_their_engine(make: Make, tmp_path: Path) -> None:
    scratch, adapter = tmp_path / "scratch", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with make(scratch=scratch) as base:
        with make(adapter=adapter, scratch=scratch):
            assert len(list(scratch.iterdir())) == 2
        assert len(list(scratch.iterdir())) == 1
    assert base._merged is None
    assert len(list(scratch.iterdir())) == 1


SMOLLM2_135M = Shape(30, 3, 64, 135_000_000)
QWEN2_5_500M = Shape(24, 2, 64, 494_000_000)
QWEN2_5_1_5B = Shape(28, 2, 128, 1_540_000_000)
LLAMA_2_7B = Shape(32, 32, 128, 6_740_000_000)
LLAMA_2_13B = Shape(40, 40, 128, 13_000_000_000)


@pytest.mark.parametrize(
    ("shape", "blocks"), [(SMOLLM2_135M, 1456), (QWEN2_5_500M, 2730), (QWEN2_5_1_5B, 1170)]
)
def test_models_of_which_1_gib_holds_enough_have_that(
    shape: Shape, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "_precision", lambda: "bf16")
    for memory in (1, 1000):
        monkeypatch.setattr(openvino, "memory_bytes", lambda memory=memory: memory * GIB)
        assert openvino._cache_blocks(shape) == blocks


@pytest.mark.parametrize(
    ("shape", "precision", "memory", "room"),
    [
        (LLAMA_2_7B, "bf16", 64, ROOM),
        (LLAMA_2_7B, "f32", 64, ROOM),
        (LLAMA_2_13B, "bf16", 64, ROOM),
        (LLAMA_2_13B, "f32", 64, None),
        (LLAMA_2_7B, "bf16", 24, 10_048),
        (LLAMA_2_7B, "bf16", 16, None),
    ],
)
def test_large_models_have_room_for_prompts_or_another_engine(
    shape: Shape,
    precision: str,
    memory: int,
    room: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino, "_precision", lambda: precision)
    monkeypatch.setattr(openvino, "memory_bytes", lambda: memory * GIB)
    monkeypatch.setattr(openvino, "shape", lambda _: shape)
    obstacle = OpenVinoEngine.obstacle(locate(EMBEDDED))
    if room is None:
        assert obstacle and f"and {LEAST_ROOM} are needed" in obstacle
        return
    assert obstacle is None
    found = (openvino._cache_blocks(shape) - COMPANIONS) * BLOCK
    assert found == room


def test_weights_that_its_reader_does_not_know_are_an_obstacle(tmp_path: Path) -> None:
    def obstacle(**kind: Any) -> str | None:
        return OpenVinoEngine.obstacle(locate(str(make_tiny_gguf(tmp_path / "m.gguf", **kind))))

    assert obstacle() is None
    assert obstacle(experts=2) == "it has experts"
    assert "biases" in str(obstacle(biases=True))


def test_what_it_stumbles_over_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: Any) -> None:
        raise IndexError("map::at")

    genai = SimpleNamespace(SchedulerConfig=SimpleNamespace, ContinuousBatchingPipeline=stumble)
    with pytest.raises(EngineError, match="Use the `transformers` engine"):
        openvino._pipeline(genai, Path("m.gguf"), 8, None)


@pytest.mark.parametrize(
    ("options", "width", "named"),
    [({"use_dora": True}, 32, "use_dora True"), ({}, 8, "no such tensor")],
)
def test_an_adapter_that_it_cannot_add_leaves_the_model_to_another_engine(
    tmp_path: Path, options: dict[str, Any], width: int, named: str
) -> None:
    model = locate(str(make_tiny_gguf(tmp_path / "m.gguf")))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    pair = {
        f"{module}.lora_A.weight": np.ones((2, width), np.float32),
        f"{module}.lora_B.weight": np.ones((width, 2), np.float32),
    }
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    for folder, added in ((plain, {}), (odd, options)):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config | added))
        save_file(pair, folder / "adapter_model.safetensors")
    assert (_openvino_obstacle(model, plain) is None) == (width == 32)
    obstacle = str(_openvino_obstacle(model, odd))
    assert obstacle.startswith("OpenVINO cannot read what was trained") and named in obstacle
    with pytest.raises(ModelError, match=named):
        choose("openvino", model, odd)
