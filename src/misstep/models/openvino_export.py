"""What OpenVINO reads: some GGUF files, and exports, made once for this user.

For folders of safetensors there is Optimum Intel's `optimum-cli`, in an environment of its own,
since it takes other versions of transformers than this package does. An adapter is no part of
an export: OpenVINO adds it to the weights while it loads. This module knows the command, files
and LoRA; it knows no pipeline.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from misstep.errors import EngineError, ModelError
from misstep.models.adapter import plain_lora
from misstep.models.gguf_header import Header, read_header
from misstep.models.locate import Model
from misstep.models.unpacked import cache_folder, whole
from misstep.models.weights import count_weights, text_config

PROGRAM = "optimum-cli"
INSTALL = f"{PROGRAM}, which exports it, is not installed (docs/engines.md)"
FAMILIES = ("llama", "qwen2", "qwen3")
"""Of GGUF files that it reads."""
PACKINGS = frozenset((0, 1, 2, 3, 6, 7, 8, *range(10, 24), 29, 30))
"""Codes of the packed types that can be dequantised: F32, F16, Q4_0 to Q8_0, K, IQ and BF16."""
TASK = "text-generation-with-past"
MODEL = "openvino_model.xml"
LAST_LINES = 8
MODULE = re.compile(r'name="__module\.([\w.]+)/')
"""What a layer of an exported model is named by: the module that it was traced from."""


class Shape(NamedTuple):
    """What the size of weights and cache follows from."""

    layers: int
    keys: int
    """Heads of keys, and of values, in a layer."""
    width: int
    """Of a head."""
    weights: int
    """Their number."""


def find_program() -> str | None:
    """Where `optimum-cli` is: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name(PROGRAM)
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(PROGRAM)


def obstacle(model: Model) -> str | None:
    """Why OpenVINO cannot read a model, as far as can be told before; or None."""
    if model.endpoint is not None:
        return "its weights are not here"
    if model.is_gguf:
        return _gguf_obstacle(read_header(model.files))
    if not _place(model).is_dir() and find_program() is None:
        return f"it is no GGUF file, and {INSTALL}"
    return None if shape(model) else "its config.json does not say how large its cache is"


def _gguf_obstacle(header: Header) -> str | None:
    """Why OpenVINO's own reader does not take a GGUF file, or None."""
    if header.architecture not in FAMILIES:
        return f"its family is {header.architecture or 'unknown'}, not {', '.join(FAMILIES)}"
    scaling = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(t.name.startswith("rope_freqs") for t in header.tensors):
        return "its positions are scaled, which OpenVINO ignores"
    if header.values.get(f"{header.architecture}.expert_count"):
        return "it has experts"
    if header.architecture != "qwen2" and any(t.name.endswith(".bias") for t in header.tensors):
        return "it has biases, which OpenVINO knows of qwen2 only"
    if odd := {t.type_code for t in header.tensors} - PACKINGS:
        return f"some weights are packed as type {min(odd)}"
    return None


def shape(model: Model) -> Shape | None:
    """The model's shape by its files; None where attention is not of the usual kind."""
    if model.is_gguf:
        return _gguf_shape(read_header(model.files), count_weights(model))
    config = text_config(model)
    heads, keys = (config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    width = config.get("head_dim") or (heads and config.get("hidden_size", 0) // heads)
    layers = config.get("num_hidden_layers")
    if not (heads and width and layers):
        return None
    return Shape(layers, keys or heads, width, count_weights(model))


def _gguf_shape(header: Header, weights: int) -> Shape:
    heads = header.number("attention.head_count")
    width = header.values.get(f"{header.architecture}.attention.key_length")
    return Shape(
        layers=header.number("block_count"),
        keys=int(header.values.get(f"{header.architecture}.attention.head_count_kv", heads)),
        width=int(width) if width else header.number("embedding_length") // heads,
        weights=weights,
    )


def exported(model: Model) -> Path:
    """The folder of a model's export, made where it is not there.

    Raises:
        EngineError: the command is not there, or it failed; with what it said last.
    """
    files, folder = model.files, _place(model)
    if folder.is_dir():
        return folder
    program = find_program()
    if program is None:
        raise EngineError(f"{files}: expected {PROGRAM} on the path, found none: {INSTALL}.")
    # It is a Python of its own: what this one adds to its path is not for it.
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    with whole(folder) as temporary:
        # Weights as GGUF files are served, too: in F16.
        how = ["--task", TASK, "--weight-format", "fp16", str(temporary)]
        command = [program, "export", "openvino", "--model", str(files.resolve()), *how]
        done = subprocess.run(
            command, env=own, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not (temporary / MODEL).is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise EngineError(
                f"{PROGRAM} could not export {files} (status {done.returncode}). It said last:"
                "\n"
                + "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
                + "\nUse the `transformers` engine (engine: transformers)."
            )
    return folder


def adapter_scale(folder: Path, adapter: Path) -> float:
    """By what OpenVINO is to multiply an adapter's product, which it does not read itself.

    Raises:
        ModelError: the adapter is no plain LoRA, or changes what the export has no layer for,
            which OpenVINO would leave out without a word.
    """
    scale, changed = plain_lora(adapter)
    named = set(MODULE.findall((folder / MODEL).read_text(encoding="utf-8")))
    if missing := sorted(set(changed) - named):
        raise ModelError(
            f"{adapter}: the adapter changes {missing[0]} ({len(missing)} such modules), for "
            "which the exported model has no layer of that name. Serve it with the "
            "`transformers` engine."
        )
    return scale


def _place(model: Model) -> Path:
    return cache_folder("openvino") / model.digest
