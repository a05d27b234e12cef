"""A model with an adapter in it answers as the two together do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from misstep.errors import ModelError
from misstep.models.folding import check_adapter, folded
from misstep.models.weights import load_weights, locate


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        load_weights(locate(str(tiny_model))),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_folded_model_computes_what_both_compute(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    import torch

    base = locate(str(tiny_model))
    whole = folded(base, check_adapter(str(adapter), base), tmp_path / "base")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        found = load_weights(whole)(ids).logits.float()
        both = load_weights(base, adapter)(ids).logits.float()
        alone = load_weights(base)(ids).logits.float()
    assert (found - both).abs().mean() < 0.1 * (alone - both).abs().mean()
    assert whole.digest != base.digest
    assert folded(base, adapter, tmp_path / "base").digest == whole.digest


def test_a_folder_without_an_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a PEFT folder with adapter_config\.json"):
        check_adapter(str(tmp_path), locate(str(tiny_model)))


def renamed(adapter: Path, change: Callable[[str], str], out: Path) -> Path:
    """The adapter with its matrices under other names."""
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({change(k): v for k, v in tensors.items()}, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("layers.", "layers.7"),
        lambda key: key.replace("model.layers", "model.language_model.layers"),
    ],
)
def test_an_adapter_without_a_place_in_the_model_is_refused_early_and_late(
    tiny_model: Path, adapter: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    model, odd = locate(str(tiny_model)), renamed(adapter, change, tmp_path / "odd")
    with pytest.raises(ModelError, match=r"of which the model has no such matrix"):
        check_adapter(str(odd), model)
    with pytest.raises(ModelError, match=r"of its matrices.* have no place"):
        load_weights(model, odd)


def test_an_adapter_of_another_width_is_refused_with_its_base(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    model = locate(str(tiny_model))
    tensors = load_file(adapter / "adapter_model.safetensors")
    wide = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wide, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj \(128 x 32\).*has 32 x 64.*trained on"):
        check_adapter(str(adapter), model)
    with pytest.raises(ModelError) as late:
        load_weights(model, adapter)
    assert len(str(late.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_told_in_words(tiny_model: Path, adapter: Path, name: str) -> None:
    (adapter / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="found a damaged one"):
        check_adapter(str(adapter), locate(str(tiny_model)))
