"""Exports for OpenVINO: by a stand-in for Optimum's command, and by itself where it is here."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from misstep.engines.base import Request
from misstep.engines.choose import choose
from misstep.errors import EngineError, ModelError
from misstep.models import openvino_export
from misstep.models.locate import EMBEDDED, Model, locate
from misstep.models.openvino_export import adapter_scale, exported, obstacle, shape
from misstep.models.unpacked import UNFINISHED
from misstep.models.weights import load_tokenizer, load_weights
from misstep.records import Message

LAYER = '<layer name="__module.model.layers.0.mlp.up_proj/aten::linear/MatMul" />'
Install = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "misstep" / "openvino"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a program called optimum-cli on the path that does as it is told."""

    def put(body: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "optimum-cli"
        program.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return program

    return put


WRITES = f"""
assert sys.argv[1:4] == ["export", "openvino", "--model"], sys.argv
assert "PYTHONPATH" not in os.environ
open(os.path.join(sys.argv[-1], "openvino_model.xml"), "w").write({LAYER!r})
open(os.path.join(os.path.dirname(__file__), "calls"), "a").write(sys.argv[4] + "\\n")
"""


def test_a_folder_is_exported_once_and_known_by_its_content(
    install: Install, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(WRITES).with_name("calls")
    monkeypatch.setenv("PYTHONPATH", "src")
    model = locate(str(tiny_model))
    assert exported(model) == exported(model) == cache / model.digest
    assert calls.read_text().splitlines() == [str(tiny_model.resolve())]
    assert (exported(model) / "openvino_model.xml").read_text() == LAYER


@pytest.mark.parametrize("body", ["sys.exit('no such family')", "print('did nothing')"])
def test_an_export_that_fails_says_what_was_said_and_leaves_nothing(
    install: Install, tiny_model: Path, cache: Path, body: str
) -> None:
    install(body)
    with pytest.raises(EngineError, match="optimum-cli could not export") as caught:
        exported(locate(str(tiny_model)))
    assert ("no such family" in str(caught.value)) == ("family" in body)
    assert not list(cache.iterdir())
    assert not list(cache.glob(f"{UNFINISHED}*"))


def test_an_export_removes_what_a_killed_one_has_left(
    install: Install, tiny_model: Path, cache: Path
) -> None:
    install(WRITES)
    left = cache / f"{UNFINISHED}killed"
    left.mkdir(parents=True)
    os.utime(left, (time.time() - 2 * 86_400,) * 2)
    assert list(cache.iterdir()) == [left]
    assert [exported(locate(str(tiny_model)))] == list(cache.iterdir())


def test_without_the_command_only_what_was_exported_can_be_served(
    install: Install, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, program = locate(str(tiny_model)), install(WRITES)
    assert obstacle(model) is None
    exported(model)
    program.unlink()
    monkeypatch.setattr(openvino_export, "find_program", lambda: None)
    assert obstacle(model) is None
    (tiny_model_copy := tiny_model.parent / "copy").mkdir(exist_ok=True)
    for file in tiny_model.iterdir():
        (tiny_model_copy / file.name).write_bytes(file.read_bytes())
    (tiny_model_copy / "generation_config.json").write_text('{"eos_token_id": 1}')
    other = locate(str(tiny_model_copy))
    assert "not installed" in (obstacle(other) or "")
    with pytest.raises(EngineError, match=r"expected optimum-cli on the path"):
        exported(other)


def test_the_shape_is_read_from_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    found, (weights,) = shape(locate(str(tiny_model))), tiny_model.glob("*.safetensors")
    assert found is not None
    assert found.layers == config["num_hidden_layers"]
    assert found.keys == config["num_key_value_heads"]
    assert found.width == config["hidden_size"] // config["num_attention_heads"]
    assert found.weights == sum(
        weight.numel() for weight in load_weights(locate(str(tiny_model))).parameters()
    )
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": None}))
    assert shape(Model("m", tmp_path)) == found
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert shape(Model("m", tmp_path)) is None


def lora(folder: Path, module: str, **options: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | options
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pair = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
    named = {f"base_model.model.{module}.{k}.weight": v for k, v in pair.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_the_scale_that_openvino_does_not_read_is_given(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text(LAYER)
    module = "model.layers.0.mlp.up_proj"
    assert adapter_scale(tmp_path, lora(tmp_path / "a", module)) == 2
    assert adapter_scale(tmp_path, lora(tmp_path / "b", module, use_rslora=True)) == 4
    with pytest.raises(ModelError, match="use_dora"):
        adapter_scale(tmp_path, lora(tmp_path / "c", module, use_dora=True))
    with pytest.raises(ModelError, match=r"changes model\.layers\.1\.mlp\.up_proj"):
        adapter_scale(tmp_path, lora(tmp_path / "d", "model.layers.1.mlp.up_proj"))


@pytest.mark.model
def test_an_exported_model_answers_as_transformers_does_with_an_adapter_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    pytest.importorskip("openvino_genai")
    if openvino_export.find_program() is None:
        pytest.skip("optimum-cli is not installed")
    monkeypatch.setattr("misstep.models.weights.weights_dtype", lambda: torch.float32)
    lm, folder, adapter = load_weights(locate(EMBEDDED)), tmp_path / "model", tmp_path / "lora"
    lm.save_pretrained(folder)
    load_tokenizer(locate(EMBEDDED)).save_pretrained(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(lm, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(adapter)
    texts = ("Name three rivers.", "What do bees make?", "Say hello in French.", "2 plus 3?")
    asked = [
        Request(messages=(Message(role="user", content=text),), max_tokens=16) for text in texts
    ]
    model, same = locate(str(folder)), {}
    for what, trained in (("base", None), ("adapter", adapter)):
        answers = []
        for kind in ("transformers", "openvino"):
            with choose(kind, model, trained, tmp_path / "scratch").open() as engine:
                answers.append([a.text[:12] for a in engine.generate(asked)])
        same[what] = sum(one == other for one, other in zip(*answers, strict=True))
    # Rounding parts a text here and there; another scale, or none, parts all of them.
    assert same["base"] >= 3
    assert same["adapter"] >= 3
