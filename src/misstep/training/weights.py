"""What of a model is trained, and how the result is written.

This module knows PEFT and transformers' files; it knows no row and no training loop.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from misstep.models.weights import no_progress_bars, share
from misstep.training.loss import CompletionLoss

MAMBA = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
"""Kinds of model of which PEFT refuses `out_proj`."""


def with_adapter(lm: Any, rank: int, alpha: float, seed: int) -> CompletionLoss:
    """The loss on completions of a model with a LoRA adapter."""
    return CompletionLoss(adapted(lm, rank, alpha, seed), lm)


def adapted(
    lm: Any, rank: int, alpha: float, seed: int, modules: Sequence[str] | None = None
) -> Any:
    """The model with a LoRA adapter in fp32 on every linear layer but the head.

    Of named `modules` on these alone. What `unfit` names learns nothing, either.
    """
    left = sorted(unfit(lm)) or None
    chosen = {} if modules is None else {"target_modules": [*modules]}
    config = lora_config(rank, alpha, task_type="CAUSAL_LM", exclude_modules=left, **chosen)
    return with_peft(lm, config, seed)


def unfit(lm: Any) -> set[str]:
    """Names of linear layers that PEFT cannot put an adapter on, in no other layer's use.

    Routers of Llama 4 and Phi-MoE give more than a product, and Mamba's kernels pass the
    layer by that leads out.
    """
    routers = {
        name.rpartition(".")[2]
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")
    }
    return routers | ({"out_proj"} if lm.config.model_type in MAMBA else set())


def with_peft(model: Any, config: Any, seed: int) -> Any:
    """The model with PEFT's wrapper around it, the adapter drawn by the seed."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # PEFT asks transformers for something by its former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def lora_config(rank: int, alpha: float, **options: Any) -> Any:
    """An adapter on every linear layer but the head, or on `target_modules`."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, **{"target_modules": "all-linear", **options})


def with_all_weights(lm: Any) -> CompletionLoss:
    """The model with all its weights in fp32: steps are too small for bf16 to hold."""
    lm.float().requires_grad_(True)
    return CompletionLoss(lm, lm)


def save_adapter(
    adapted: Any, base: str, folder: Path, weights: dict[str, Any] | None = None
) -> None:
    """Write the adapter as PEFT reads it; `base` is the name of the model that it fits.

    `weights` are the adapter's, where the model holds only parts of them.
    """
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    # A set, whose order changes from process to process; equal adapters have equal files.
    config.target_modules = sorted(config.target_modules)
    # The adapter holds no embeddings; the default would ask the Hub whether it should.
    adapted.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    share(folder)


def save_all_weights(
    lm: Any, weights: Mapping[str, Any], dtype: Any, tokenizer: Any, folder: Path
) -> None:
    """Write the whole model, in the type that it was loaded in, as transformers reads it."""
    # Tensors that are one, as a tied head, must stay one.
    typed = {id(tensor): tensor.to(dtype) for tensor in weights.values()}
    # What was read from GGUF is plain by now, and must not be read as packed again.
    lm.config.__dict__.pop("quantization_config", None)
    lm.hf_quantizer = None
    with no_progress_bars():
        lm.save_pretrained(
            folder, state_dict={name: typed[id(tensor)] for name, tensor in weights.items()}
        )
    # It names the type that was trained in.
    lm.config.dtype = dtype
    lm.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share(folder)
