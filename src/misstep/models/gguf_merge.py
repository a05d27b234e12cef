"""Write a GGUF file as F16, with a LoRA adapter added into its weights.

OpenVINO ignores adapters on a model that was read from a GGUF, so the adapter has to be in the
weights; the base model is written the same way, so that both answer in the same precision. The
sum is formed in fp32, one tensor at a time. Metadata, and with it tokenizer and chat template,
is copied byte for byte, but for a template that is to stand in the other's place. An adapter
that holds anything which cannot be added is refused.
This module knows LoRA and the file layout; it knows no backend.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from misstep.errors import EngineError, ModelError
from misstep.models.gguf_header import (
    ALIGNMENT,
    MAGIC,
    STRING,
    Header,
    TensorPlace,
    read_header,
)

if TYPE_CHECKING:
    import numpy as np
    from gguf import TensorNameMap
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

F32, F16 = 0, 1
TEMPLATE = "tokenizer.chat_template"
TENSORS = "adapter_model.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
WRAPPED = "base_model.model."
"""How PEFT begins the names of a model's modules, and ends those of its matrices."""
LARGEST_F16 = 65504.0

# Options of an adapter that say where it came from, which modules it has (its tensors say that
# too), or how it was trained. Any other option may change what has to be added.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "runtime_config", "task_type", "megatron_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
    *("ensure_weight_tying", "eva_config", "fan_in_fan_out", "init_lora_weights"),
    *("lora_alpha", "lora_dropout", "qalora_group_size", "r", "use_rslora"),
}

REORDERED = {
    "bloom": ("attn_qkv",),
    "qwen35": ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"),
    "qwen35moe": ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"),
}
"""Matrices whose rows or columns llama.cpp keeps in an order of its own, by architecture."""

# These start from the base weights as they are; PiSSA, OLoRA, CorDA and LoftQ change them.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Delta:
    """What LoRA adds to one matrix: `scale * up @ down`."""

    down: "Matrix"
    up: "Matrix"
    scale: float

    def matrix(self) -> "Matrix":
        """The product, one row for each output of the module."""
        import numpy as np

        return (self.up @ self.down) * np.float32(self.scale)


def merge_adapter(
    model: Path, adapter: Path | None, out: Path, template: str | None = None
) -> Path:
    """Write `model` to `out` with F16 matrices, an adapter's deltas added.

    Args:
        model: a GGUF file.
        adapter: a folder that PEFT has written.
        out: the file to write.
        template: the chat template of the new file, where it is not to be the model's.

    Raises:
        ModelError: the adapter holds something that cannot be added to this file.
        EngineError: a weight does not fit into F16.
    """
    header = read_header(model)
    deltas = read_deltas(adapter, header) if adapter else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("wb") as file:
        _write_head(file, header, template)
        for place in header.tensors:
            file.write(_tensor_bytes(model, place, deltas.get(place.name), header))
            file.write(bytes(-file.tell() % ALIGNMENT))
    return temporary.replace(out)


def _write_head(file: BinaryIO, header: Header, template: str | None) -> None:
    added = template is not None and TEMPLATE not in header.positions
    file.write(struct.pack("<4sIQQ", MAGIC, 3, len(header.tensors), header.pairs + added))
    file.write(_metadata(header, template))
    offset = 0
    for place in header.tensors:
        file.write(_string(place.name))
        file.write(struct.pack(f"<I{len(place.shape)}Q", len(place.shape), *place.shape))
        file.write(struct.pack("<IQ", _new_type(place), offset))
        size = math.prod(place.shape) * (4 if _new_type(place) == F32 else 2)
        offset += size + -size % ALIGNMENT
    file.write(bytes(-file.tell() % ALIGNMENT))


def _metadata(header: Header, template: str | None) -> bytes:
    """The metadata: what describes how tensors are stored is changed, and the template."""
    metadata = bytearray(header.metadata)
    for key, value in (("general.file_type", F16), ("general.alignment", ALIGNMENT)):
        if key in header.positions:
            struct.pack_into("<I", metadata, header.positions[key], value)
    if template is None:
        return bytes(metadata)
    if TEMPLATE not in header.positions:
        return (
            bytes(metadata) + _string(TEMPLATE) + struct.pack("<I", STRING) + _string(template)
        )
    start = header.positions[TEMPLATE]
    (length,) = struct.unpack_from("<Q", metadata, start)
    metadata[start : start + 8 + length] = _string(template)
    return bytes(metadata)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _new_type(place: TensorPlace) -> int:
    return F16 if len(place.shape) > 1 else F32


def _tensor_bytes(
    model: Path, place: TensorPlace, delta: Delta | None, header: Header
) -> bytes:
    import numpy as np

    weights = dequantised(model, place)
    if delta:
        weights = weights + stored_order(delta.matrix(), place.name, header)
    if _new_type(place) == F32:
        return weights.astype(np.float32).tobytes()
    if float(np.abs(weights).max()) > LARGEST_F16:
        raise EngineError(
            f"{model}: the weights of {place.name} exceed what F16 can hold. "
            "Serve this model with `transformers`."
        )
    return weights.astype(np.float16).tobytes()


def dequantised(model: Path, place: TensorPlace) -> "Matrix":
    """One tensor of the file in fp32, one row for each output."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(place.type_code)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = place.shape[0] // per_block * block_bytes
    rows = math.prod(place.shape[1:])
    packed: NDArray[Any] = np.memmap(model, np.uint8, "r", place.offset, (rows, columns))
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        # `dequantize` expects these two in their own type, and all others as bytes.
        packed = packed.view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    weights: Matrix = dequantize(packed, kind).reshape(place.shape[::-1])
    return weights


def stored_order(rows: "Matrix", name: str, header: Header) -> "Matrix":
    """Rows of a matrix in the order in which the file keeps them.

    For the llama architecture GGUF interleaves the two halves of each head of q and k, as the
    original checkpoints did; transformers keeps them one after the other.
    """
    counts = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    key = counts.get(name.removesuffix(".weight").rpartition(".")[2])
    if header.architecture != "llama" or key is None:
        return rows
    halves = rows.reshape(header.number(key), 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def read_deltas(adapter: Path, header: Header) -> dict[str, Delta]:
    """What an adapter adds, by the name of the GGUF tensor that it is added to.

    Raises:
        ModelError: the adapter is no plain LoRA, or a target has no tensor in this file.
    """
    import torch
    from safetensors import safe_open

    scale, names = _scale(adapter), check_merge(adapter, header)
    with safe_open(adapter / TENSORS, framework="pt") as tensors:

        def matrix(key: str) -> "Matrix":
            found: Matrix = tensors.get_tensor(key).to(torch.float32).numpy()
            return found

        return {
            names[module]: Delta(matrix(down), matrix(up), scale)
            for module, (down, up) in _pairs(adapter).items()
        }


def check_merge(adapter: Path, header: Header) -> dict[str, str]:
    """The GGUF tensor of every module that an adapter changes; loads no weights.

    Raises:
        ModelError: the adapter is no plain LoRA, or a target has no tensor in this file.
    """
    _, modules = plain_lora(adapter)
    found = {place.name: place.shape for place in header.tensors}
    names = {module: _tensor_name(module, header) for module in modules}
    for module, shape in modules.items():
        if (there := found.get(names[module])) != shape:
            raise ModelError(
                f"{adapter}: the adapter changes {module} ({shape[1]} x {shape[0]}), for which "
                f"the GGUF has no such tensor (found {there}). Serve it with the "
                "`transformers` engine, or train it on this model."
            )
        leaf = names[module].removesuffix(".weight").rpartition(".")[2]
        if leaf in REORDERED.get(header.architecture, ()):
            raise ModelError(
                f"{adapter}: the adapter changes {module}, which a GGUF of the family "
                f"{header.architecture} keeps in another order, so that it cannot be added to "
                "it here. Serve it with the `transformers` engine."
            )
    return names


def plain_lora(adapter: Path) -> tuple[float, dict[str, tuple[int, int]]]:
    """What the product of an adapter's matrices is multiplied by, and what it changes.

    The modules come with their inputs and outputs.

    Raises:
        ModelError: the adapter is no plain LoRA.
    """
    scale, modules = _scale(adapter), set(_pairs(adapter))
    return scale, {name: of for name, of in lora_shapes(adapter).items() if name in modules}


def lora_shapes(adapter: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the modules that LoRA matrices of an adapter change."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    with safe_open(adapter / TENSORS, framework="numpy") as tensors:
        keys = set(tensors.keys())
        for down in sorted(key for key in keys if key.endswith(DOWN)):
            name = down.removesuffix(DOWN)
            if (up := name + UP) in keys:
                inputs, outputs = tensors.get_slice(down), tensors.get_slice(up)
                module = name.removeprefix(WRAPPED)
                found[module] = (inputs.get_shape()[1], outputs.get_shape()[0])
    return found


def tensors_by_module(header: Header) -> dict[str, tuple[int, ...]]:
    """The matrices of a GGUF file, by the names of their modules in transformers."""
    names = _name_map(header).mapping
    shapes = {place.name.removesuffix(".weight"): place.shape for place in header.tensors}
    return {module: shapes[name] for module, (_, name) in names.items() if name in shapes}


def _scale(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_unmergeable(adapter, config)
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


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


def _pairs(adapter: Path) -> dict[str, tuple[str, str]]:
    """Each module that the adapter changes, with the names of its two matrices."""
    from safetensors import safe_open

    with safe_open(adapter / TENSORS, framework="numpy") as tensors:
        keys = set(tensors.keys())
    modules = {key.removesuffix(DOWN) for key in keys if key.endswith(DOWN)}
    known = {module + end for module in modules for end in (DOWN, UP)}
    if odd := sorted(known.symmetric_difference(keys)):
        raise ModelError(
            f"{adapter}: expected pairs of lora_A and lora_B, found {odd[0]} "
            f"({len(odd)} such tensors), which cannot be merged into weights here. "
            "Serve it with the `transformers` engine."
        )
    return {
        module.removeprefix(WRAPPED): (module + DOWN, module + UP) for module in sorted(modules)
    }


def _tensor_name(module: str, header: Header) -> str:
    """The GGUF's name for a module of transformers; empty where it has none."""
    name = _name_map(header).get_name(module)
    return f"{name}.weight" if name else ""


def _name_map(header: Header) -> "TensorNameMap":
    from gguf import MODEL_ARCH_NAMES

    family = header.architecture
    if family not in MODEL_ARCH_NAMES.values():
        raise ModelError(
            f"{header.path}: its family is {family or 'unknown'}, whose tensors the package "
            f"gguf {version('gguf')} cannot name, so that no adapter can be matched to them. "
            "Install a newer one: pip install --upgrade gguf."
        )
    return _names(family, header.number("block_count"))


@lru_cache(maxsize=1)
def _names(family: str, blocks: int) -> "TensorNameMap":
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == family)
    return get_tensor_name_map(arch, blocks)
