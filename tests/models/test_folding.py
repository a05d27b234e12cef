"""A model with an adapter in it answers as the two together do."""

from pathlib import Path

import pytest

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
    whole = folded(base, check_adapter(str(adapter)), tmp_path / "base")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        found = load_weights(whole)(ids).logits.float()
        both = load_weights(base, adapter)(ids).logits.float()
        alone = load_weights(base)(ids).logits.float()
    assert (found - both).abs().mean() < 0.1 * (alone - both).abs().mean()
    assert whole.digest != base.digest
    assert folded(base, adapter, tmp_path / "base").digest == whole.digest


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a PEFT folder with adapter_config\.json"):
        check_adapter(str(tmp_path))
