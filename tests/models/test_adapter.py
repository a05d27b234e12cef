"""A model with an adapter in it answers as the two together do."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from misstep.errors import ModelError
from misstep.models.adapter import check_adapter, check_addable, check_merge
from misstep.models.gguf_header import read_header, tensor_names
from misstep.models.locate import Model, locate
from misstep.models.merging import folded
from misstep.models.weights import load_weights


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


def saved(model: Model, config: Any, folder: Path) -> Path:
    from peft import get_peft_model

    get_peft_model(load_weights(model), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_matrices_cannot_be_changed_alone(
    tiny_model: Path, tmp_path: Path, module: str
) -> None:
    from peft import LoraConfig

    model = locate(str(tiny_model))
    config = LoraConfig(r=2, target_modules=["q_proj", module], task_type="CAUSAL_LM")
    adapter = saved(model, config, tmp_path / "adapter")
    # As it is, beside the model, it has its place.
    assert check_adapter(str(adapter), model) == adapter
    with pytest.raises(ModelError, match=f"by one matrix; found one that changes .*{module}"):
        check_addable(str(adapter), model)


def test_what_puts_tokens_before_a_prompt_cannot_be_added(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PrefixTuningConfig

    model = locate(str(tiny_model))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = saved(model, config, tmp_path / "adapter")
    assert check_adapter(str(adapter), model) == adapter
    with pytest.raises(ModelError, match="Put it under `others`"):
        check_addable(str(adapter), model)


def test_an_adapter_with_biases_of_its_own_has_its_place(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    model = locate(str(tiny_model))
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    adapter = saved(model, config, tmp_path / "adapter")
    assert any("lora_B" in name for name in load_weights(model, adapter).state_dict())
    # The model's own layers have none that they could be added to.
    with pytest.raises(ModelError, match="that PEFT cannot add"):
        folded(model, adapter, tmp_path / "base")


def test_matrices_that_gguf_keeps_in_another_order_are_refused(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from peft import LoraConfig

    writer = GGUFWriter(str(tmp_path / "bloom.gguf"), "bloom")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_qkv.weight", np.ones((96, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((128, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "bloom.gguf")

    def adapter_of(module: str, outputs: int) -> Path:
        folder = tmp_path / module
        LoraConfig(r=2, target_modules=[module]).save_pretrained(folder)
        name = f"base_model.model.transformer.h.0.{module}"
        pair = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(outputs, 2)}
        tensors = {f"{name}.{which}.weight": matrix for which, matrix in pair.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    assert check_merge(adapter_of("mlp.dense_h_to_4h", 128), header).names
    with pytest.raises(ModelError, match="in another order"):
        check_merge(adapter_of("self_attention.query_key_value", 96), header)


@pytest.mark.parametrize(
    ("family", "told"),
    [("newest", r"family is newest.* gguf \d"), ("llama", r"expected llama\.block_count")],
)
def test_a_gguf_whose_tensors_cannot_be_named_is_told_in_words(
    tmp_path: Path, family: str, told: str
) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "odd.gguf"
    writer = GGUFWriter(str(file), family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=rf"odd\.gguf: .*{told}"):
        tensor_names(read_header(file))
