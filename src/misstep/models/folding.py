"""A model with an adapter made into one plain model, for a run that starts from both.

Everything after it knows models only: a run that trains on top of an adapter trains on its sum.
Knows files and PEFT; loads nothing that was folded before.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from misstep.errors import ModelError
from misstep.models.gguf_header import read_header
from misstep.models.gguf_merge import (
    TENSORS,
    WRAPPED,
    check_merge,
    lora_shapes,
    merge_adapter,
    tensors_by_module,
)
from misstep.models.locate import Model, locate
from misstep.models.weights import (
    adapter_digest,
    is_full_fine_tune,
    load_tokenizer,
    load_weights,
    no_progress_bars,
    share,
)
from misstep.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
PROMPTS = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
    "ADAPTION_PROMPT",
}
"""Kinds of PEFT that put learned tokens, or their keys and values, before a prompt."""


def check_adapter(adapter: str, model: Model) -> Path:
    """The folder of a PEFT adapter that fits a model; loads no weights.

    Raises:
        ModelError: it is no such folder, or it changes what the model has not got.
    """
    folder = Path(adapter).expanduser()
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise ModelError(
                f"adapter {adapter}: expected a PEFT folder with {name}, found none. Check the "
                "path; an adapter in another format must be saved by PEFT as safetensors."
            )
    if model.endpoint is None:
        _check_fit(folder, model)
    return folder


def check_addable(adapter: str, model: Model) -> Path:
    """The folder of a PEFT adapter that can be added into a model's weights; loads none.

    Raises:
        ModelError: it fits no such model, or its sum with it would be no such model.
    """
    folder = check_adapter(adapter, model)
    if model.endpoint is not None:
        return folder
    if model.is_gguf:
        check_merge(folder, read_header(model.files))
        return folder
    if puts_tokens_first(folder):
        raise ModelError(
            f"adapter {adapter}: expected one whose matrices are added to the model's weights, "
            "found one that puts tokens before a prompt. Put it under `others`, where it is "
            "tested as it is."
        )
    if tied := _changed(folder) & _tied(model):
        raise ModelError(
            f"adapter {adapter}: expected one that leaves the embeddings alone, since "
            f"{model.name} reads and writes by one matrix; found one that changes "
            f"{', '.join(sorted(tied))} alone. Untie them and save the sum by PEFT, and name "
            "that as the model."
        )
    return folder


def puts_tokens_first(adapter: Path) -> bool:
    """Whether an adapter changes what a model reads and not its weights."""
    return _config(adapter).get("peft_type") in PROMPTS


def _changed(adapter: Path) -> set[str]:
    """The modules that an adapter changes by matrices of its own."""
    from safetensors import safe_open

    with safe_open(adapter / TENSORS, framework="numpy") as tensors:
        keys = list(tensors.keys())
    parts = [key.removeprefix(WRAPPED).partition(".lora_") for key in keys]
    return {module for module, lora, _ in parts if lora}


def _tied(model: Model) -> set[str]:
    """The modules of embeddings and head where these are one matrix."""
    lm = _empty(model)
    if not lm.config.get_text_config().tie_word_embeddings:
        return set()
    both = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return {name for name, module in lm.named_modules() if any(module is of for of in both)}


def base_of(adapter: Path) -> str | None:
    """The model that an adapter says it was trained on."""
    base: str | None = _config(adapter).get("base_model_name_or_path")
    return base


def _config(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / CONFIG).read_text(encoding="utf-8")))


def _check_fit(adapter: Path, model: Model) -> None:
    try:
        config, changed = _config(adapter), lora_shapes(adapter)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"adapter {adapter}: expected a PEFT folder that can be read, found a damaged one "
            f"({error}). Download or copy it again, files of Git LFS too."
        ) from error
    if config.get("target_parameters"):
        # What is changed are parameters, as of experts, and no modules: PEFT tells, later.
        return
    there = module_shapes(model) if changed else {}
    base = config.get("base_model_name_or_path")
    for module, shape in changed.items():
        # Some kinds of layers keep their matrices the other way round.
        if sorted(shape) != sorted(there.get(module, ())):
            has = " x ".join(map(str, there.get(module, ()))) or "no such matrix"
            raise ModelError(
                f"adapter {adapter}: expected one that fits {model.name}, found one that "
                f"changes {module} ({' x '.join(map(str, shape))}), of which the model has "
                f"{has}. It says that it was trained on {base}: name that as the model."
            )


def module_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The matrices of a model by the names of their modules in transformers; loads none."""
    if model.is_gguf:
        return tensors_by_module(read_header(model.files))
    modules = _empty(model).named_modules()
    held = {name: getattr(module, "weight", None) for name, module in modules}
    return {name: tuple(weight.shape) for name, weight in held.items() if weight is not None}


def _empty(model: Model) -> Any:
    """A model of the same modules whose weights hold nothing."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with no_progress_bars(), init_empty_weights():
            config = AutoConfig.from_pretrained(model.files, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError(
            f"model {model.name}: transformers cannot build it: {error}"
        ) from error


def folded(model: Model, adapter: Path, folder: Path) -> Model:
    """The sum of a model and an adapter, written into a folder that content names.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    out = folder / digest([model.digest, adapter_digest(adapter)])
    if model.is_gguf:
        assert model.path is not None
        file = out / "model.gguf"
        return locate(str(file if file.is_file() else merge_adapter(model.path, adapter, file)))
    if not out.is_dir():
        save_whole(model, adapter, load_tokenizer(model), out)
    return locate(str(out))


def save_whole(
    model: Model, adapter: Path | None, tokenizer: "PreTrainedTokenizerBase", out: Path
) -> None:
    """Write a model as a folder of safetensors, with an adapter added into its weights."""
    weights: Any = load_weights(model, adapter)
    if adapter is not None and not is_full_fine_tune(adapter):
        try:
            weights = weights.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{adapter}: expected one that can be added into weights, found one that "
                f"PEFT cannot add: {error}"
            ) from error
    temporary = out.with_name(out.name + ".tmp")
    with no_progress_bars():
        weights.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    share(temporary)
    temporary.replace(out)
