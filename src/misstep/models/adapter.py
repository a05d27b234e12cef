"""What a PEFT folder holds, and which models it fits; loads no weights.

This module knows PEFT's files and the modules of models, in safetensors and in GGUF; it adds
nothing to anything.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from misstep.errors import ModelError
from misstep.models.gguf_header import Header, read_header, tensor_names
from misstep.models.locate import FILES, Model, checked_folder, folder_digest

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."
"""How PEFT begins the names of a model's modules."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""How it ends those of the two matrices of a module."""
PROMPTS = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
    "ADAPTION_PROMPT",
}
"""Kinds of PEFT that put learned tokens, or their keys and values, before a prompt."""
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "runtime_config", "task_type", "megatron_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
    *("ensure_weight_tying", "eva_config", "fan_in_fan_out", "init_lora_weights"),
    *("lora_alpha", "lora_dropout", "qalora_group_size", "r", "use_rslora"),
}
"""Options of an adapter that say where it came from, which modules it has (its tensors say that
too), or how it was trained. Any other option may change what has to be added."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways of drawing an adapter that start from the base weights as they are; PiSSA, OLoRA, CorDA
and LoftQ change them."""
REORDERED = {
    "bloom": ("attn_qkv",),
    "qwen35": ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"),
    "qwen35moe": ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"),
}
"""Matrices whose rows or columns llama.cpp keeps in an order of its own, by architecture."""


def is_full_fine_tune(adapter: Path) -> bool:
    """Whether the folder of a trained model holds all its weights and not an adapter.

    Raises:
        ModelError: it holds neither.
    """
    if (adapter / CONFIG).is_file():
        if (adapter / TENSORS).is_file():
            return False
        raise ModelError(
            f"{adapter}: expected {TENSORS}, found none. Pickled adapters are "
            "not loaded, since they can execute code: save it with safe_serialization=True."
        )
    checked_folder(adapter)
    return True


def adapter_digest(folder: Path) -> str:
    """16 hexadecimal digits that name an adapter, or a full fine-tune, by its content."""
    return folder_digest(folder, (CONFIG, *FILES))


class Adapted(NamedTuple):
    """A model as it is asked: with an adapter on it, or as it is."""

    model: Model
    adapter: Path | None = None

    @property
    def digest(self) -> str:
        """Names what was added by its content, or the model where nothing was."""
        return adapter_digest(self.adapter) if self.adapter else self.model.digest


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


def config_of(adapter: Path) -> dict[str, Any]:
    """How an adapter was made, as PEFT writes it."""
    return dict(json.loads((adapter / CONFIG).read_text(encoding="utf-8")))


def names_of(adapter: Path) -> list[str]:
    """The names of an adapter's tensors."""
    from safetensors import safe_open

    with safe_open(adapter / TENSORS, framework="numpy") as tensors:
        return list(tensors.keys())


def base_of(adapter: Path) -> str | None:
    """The model that an adapter says it was trained on."""
    base: str | None = config_of(adapter).get("base_model_name_or_path")
    return base


def puts_tokens_first(adapter: Path) -> bool:
    """Whether an adapter changes what a model reads and not its weights."""
    return config_of(adapter).get("peft_type") in PROMPTS


def lora_shapes(adapter: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the modules that LoRA matrices of an adapter change."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    with safe_open(adapter / TENSORS, framework="numpy") as tensors:
        keys = set(tensors.keys())
        for down in sorted(key for key in keys if key.endswith(DOWN)):
            if (up := down.removesuffix(DOWN) + UP) in keys:
                inputs, outputs = tensors.get_slice(down), tensors.get_slice(up)
                found[module_of(down)] = (inputs.get_shape()[1], outputs.get_shape()[0])
    return found


class Lora(NamedTuple):
    """What plain LoRA adds to a model."""

    scale: float
    """What the product of two matrices is multiplied by."""
    shapes: dict[str, tuple[int, int]]
    """Inputs and outputs of the modules that it changes."""


def plain_lora(adapter: Path) -> Lora:
    """What an adapter adds that is a pair of matrices for each module, and nothing else.

    Raises:
        ModelError: the adapter is no plain LoRA.
    """
    _refuse_unmergeable(adapter, config := config_of(adapter))
    shapes = lora_shapes(adapter)
    if odd := sorted(name for name in names_of(adapter) if module_of(name) not in shapes):
        raise ModelError(
            f"{adapter}: expected pairs of lora_A and lora_B, found {odd[0]} "
            f"({len(odd)} such tensors), which cannot be merged into weights here. "
            "Serve it with the `transformers` engine."
        )
    rank = config["r"]
    by = math.sqrt(rank) if config.get("use_rslora") else rank
    return Lora(float(config["lora_alpha"] / by), shapes)


def module_of(name: str) -> str:
    """The module of the model that a matrix of LoRA belongs to."""
    return name.removeprefix(WRAPPED).removesuffix(DOWN).removesuffix(UP)


def _refuse_unmergeable(adapter: Path, config: Mapping[str, Any]) -> None:
    """Refuse every option that is not at its default, unless it is known to be harmless."""
    from peft import LoraConfig

    kind = config.get("peft_type")
    plain = LoraConfig().to_dict()
    found = [f"peft_type {kind}"] if kind != "LORA" else []
    found += [
        f"{key} {value}"
        for key, value in config.items()
        if key not in HARMLESS and (value or None) != (plain.get(key) or None)
    ]
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        found.append(f"init_lora_weights {config['init_lora_weights']}")
    if found:
        raise ModelError(
            f"{adapter}: expected a plain LoRA adapter, found {', '.join(found)}, which cannot "
            "be merged into weights here. Serve it with the `transformers` engine."
        )


class Merge(NamedTuple):
    """How an adapter is added to a GGUF file."""

    scale: float
    names: dict[str, str]
    """The GGUF tensor of every module that it changes."""


def check_merge(adapter: Path, header: Header) -> Merge:
    """How an adapter can be added to a GGUF file.

    Raises:
        ModelError: the adapter is no plain LoRA, or a target has no tensor in this file.
    """
    scale, modules = plain_lora(adapter)
    found, known = {place.name: place.shape for place in header.tensors}, tensor_names(header)
    names: dict[str, str] = {}
    for module, shape in modules.items():
        named = known.get_name(module)
        names[module] = name = f"{named}.weight" if named else ""
        if (there := found.get(name)) != shape:
            raise ModelError(
                f"{adapter}: the adapter changes {module} ({shape[1]} x {shape[0]}), for which "
                f"the GGUF has no such tensor (found {there}). Serve it with the "
                "`transformers` engine, or train it on this model."
            )
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf in REORDERED.get(header.architecture, ()):
            raise ModelError(
                f"{adapter}: the adapter changes {module}, which a GGUF of the family "
                f"{header.architecture} keeps in another order, so that it cannot be added to "
                "it here. Serve it with the `transformers` engine."
            )
    return Merge(scale, names)


def _check_fit(adapter: Path, model: Model) -> None:
    try:
        config, changed = config_of(adapter), lora_shapes(adapter)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"adapter {adapter}: expected a PEFT folder that can be read, found a damaged one "
            f"({error}). Download or copy it again, files of Git LFS too."
        ) from error
    if config.get("target_parameters"):
        # What is changed are parameters, as of experts, and no modules: PEFT tells, later.
        return
    there = module_shapes(model) if changed else {}
    for module, shape in changed.items():
        # Some kinds of layers keep their matrices the other way round.
        if sorted(shape) != sorted(there.get(module, ())):
            has = " x ".join(map(str, there.get(module, ()))) or "no such matrix"
            raise ModelError(
                f"adapter {adapter}: expected one that fits {model.name}, found one that "
                f"changes {module} ({' x '.join(map(str, shape))}), of which the model has "
                f"{has}. It says that it was trained on {base_of(adapter)}: name that as the "
                "model."
            )


def module_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The matrices of a model by the names of their modules in transformers; loads none."""
    if model.is_gguf:
        header = read_header(model.files)
        shapes = {place.name.removesuffix(".weight"): place.shape for place in header.tensors}
        known = tensor_names(header).mapping.items()
        return {module: shapes[name] for module, (_, name) in known if name in shapes}
    modules = _empty(model).named_modules()
    held = {name: getattr(module, "weight", None) for name, module in modules}
    return {name: tuple(weight.shape) for name, weight in held.items() if weight is not None}


def _changed(adapter: Path) -> set[str]:
    """The modules that an adapter changes by matrices of its own."""
    parts = [key.removeprefix(WRAPPED).partition(".lora_") for key in names_of(adapter)]
    return {module for module, lora, _ in parts if lora}


def _tied(model: Model) -> set[str]:
    """The modules of embeddings and head where these are one matrix."""
    lm = _empty(model)
    if not lm.config.get_text_config().tie_word_embeddings:
        return set()
    both = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return {name for name, module in lm.named_modules() if any(module is of for of in both)}


def _empty(model: Model) -> Any:
    """A model of the same modules whose weights hold nothing."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with init_empty_weights():
            config = AutoConfig.from_pretrained(model.files, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError(
            f"model {model.name}: transformers cannot build it: {error}"
        ) from error
