"""Copies of GGUF files: made once, equal to what was packed, and never half there."""

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from misstep.models.locate import locate
from misstep.models.unpacked import UNFINISHED, cache_folder, unpacked, unpacked_tokenizer
from misstep.models.weights import _from_pretrained, load_weights


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.bfloat16
    )
    return read


def forbidden() -> PreTrainedModel:
    raise AssertionError("the packed file was read again")


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def test_a_copy_is_made_once_and_equal(model: PreTrainedModel) -> None:
    folder = unpacked("abc", torch.bfloat16, lambda: model)
    assert isinstance(folder, Path)
    assert unpacked("abc", torch.bfloat16, forbidden) == folder
    assert equal(_from_pretrained(folder), model)


def test_other_content_and_another_type_are_other_copies(model: PreTrainedModel) -> None:
    first = unpacked("abc", torch.bfloat16, lambda: model)
    assert unpacked("abd", torch.bfloat16, lambda: model) != first
    assert unpacked("abc", torch.float32, lambda: model) != first


def test_without_a_place_to_write_the_model_itself_is_given(
    model: PreTrainedModel, own_cache: Path
) -> None:
    own_cache.write_text("a file where the folder should be")
    assert unpacked("abc", torch.bfloat16, lambda: model) is model


def test_a_copy_that_would_fill_the_disk_is_not_made(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("misstep.models.unpacked.SHARE_OF_DISK", 0)
    assert unpacked("abc", torch.bfloat16, lambda: model) is model


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_what_breaks_off_leaves_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def full_disk(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    assert unpacked("abc", torch.bfloat16, lambda: model) is model
    assert not list(cache_folder("unpacked").iterdir())


def test_what_a_killed_process_left_is_removed_and_what_one_writes_now_is_not(
    model: PreTrainedModel,
) -> None:
    old, new = (cache_folder("unpacked") / f"{UNFINISHED}{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    days_ago = time.time() - 2 * 86_400
    os.utime(old, (days_ago, days_ago))
    unpacked("abc", torch.bfloat16, lambda: model)
    assert not old.exists()
    assert new.exists()


def test_a_copy_that_another_process_made_meanwhile_is_used(model: PreTrainedModel) -> None:
    def slowly() -> PreTrainedModel:
        unpacked("abc", torch.bfloat16, lambda: model)
        return model

    folder = unpacked("abc", torch.bfloat16, slowly)
    assert isinstance(folder, Path)
    assert list(cache_folder("unpacked").iterdir()) == [folder]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    read: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return read


def no_tokenizer() -> PreTrainedTokenizerBase:
    raise AssertionError("the packed file was read again")


def test_a_tokenizer_is_read_once_and_says_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    first = unpacked_tokenizer("abc", lambda: tokenizer)
    again = unpacked_tokenizer("abc", no_tokenizer)
    turns = [{"role": "user", "content": "Caf\u00e9 or Cafe\u0301?\n 7,500 <|im_end|>"}]
    for read in (first, again):
        assert read.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert read.eos_token_id == tokenizer.eos_token_id
        assert read.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)


def test_a_tokenizer_whose_copy_would_be_another_has_none(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tokenizer.save_pretrained

    def without_template(folder: Path) -> None:
        saved(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")

    monkeypatch.setattr(tokenizer, "save_pretrained", without_template)
    assert unpacked_tokenizer("abc", lambda: tokenizer) is tokenizer
    assert not list(cache_folder("unpacked").iterdir())


def test_without_a_place_to_write_the_tokenizer_itself_is_given(
    tokenizer: PreTrainedTokenizerBase, own_cache: Path
) -> None:
    own_cache.write_text("a file where the folder should be")
    assert unpacked_tokenizer("abc", lambda: tokenizer) is tokenizer


@pytest.mark.model
def test_the_embedded_tokenizer_loads_as_it_was_packed() -> None:
    model = locate("smollm2-135m")
    packed = AutoTokenizer.from_pretrained(model.files.parent, gguf_file=model.files.name)
    found = unpacked_tokenizer("abc", lambda: packed)
    assert found is not packed
    assert found.backend_tokenizer.to_str() == packed.backend_tokenizer.to_str()
    assert found.chat_template == packed.chat_template


@pytest.mark.model
def test_the_embedded_model_loads_as_it_was_packed() -> None:
    from transformers import GgufConfig

    model = locate("smollm2-135m")
    packed = {
        "gguf_file": model.files.name,
        "quantization_config": GgufConfig(dequantize=True),
    }
    read = _from_pretrained(model.files.parent, packed)
    first, second = load_weights(model), load_weights(model)
    assert equal(first, read)
    assert equal(second, read)
    assert list(cache_folder("unpacked").iterdir())
    # Saving notes where it was, and the class's name.
    noted = {"_name_or_path": "", "architectures": []}
    ours, theirs = (loaded.config.to_dict() | noted for loaded in (second, read))
    assert ours == theirs
