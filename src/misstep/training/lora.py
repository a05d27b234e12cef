"""What of a model is trained, and how the result is written.

This module knows PEFT and transformers' files; it knows no row and no training loop.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from misstep.models.weights import make_readable, no_progress_bars, save_tokenizer
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

    Of named `modules` on these alone.
    """
    chosen = {} if modules is None else {"target_modules": [*modules]}
    config = lora_config(lm, rank, alpha, task_type="CAUSAL_LM", **chosen)
    with drawn_by(seed):
        return with_peft(lm, config)


def lora_config(model: Any, rank: int, alpha: float, **options: Any) -> Any:
    """An adapter on every linear layer that is fit but the head, or on `target_modules`."""
    from peft import LoraConfig

    given = {"target_modules": "all-linear", "exclude_modules": sorted(unfit(model)) or None}
    return LoraConfig(r=rank, lora_alpha=alpha, **{**given, **options})


def unfit(model: Any) -> set[str]:
    """The last parts of the names of linear layers that PEFT cannot put an adapter on.

    Routers of Llama 4 and Phi-MoE give more than a product, and Mamba's kernels pass the
    layer by that leads out. No other layer of these models has such a name.
    """
    routers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")
    }
    return routers | ({"out_proj"} if model.config.model_type in MAMBA else set())


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Have what is drawn inside come of a seed, and leave what is drawn after it alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def with_peft(model: Any, config: Any) -> Any:
    """The model with PEFT's wrapper around it, and a new adapter."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks transformers for something by its former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


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
    make_readable(folder)


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
    save_tokenizer(tokenizer, folder)
    make_readable(folder)
