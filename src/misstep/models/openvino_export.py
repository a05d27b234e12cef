"""Models in OpenVINO's own format: made by Optimum Intel's command, once for this user.

OpenVINO GenAI reads some GGUF files itself; for folders of safetensors there is `optimum-cli`,
in an environment of its own, since it takes other versions of transformers than this package
does. An adapter is no part of an export: OpenVINO adds it to the weights while it loads. This
module knows the command, folders and LoRA; it knows no pipeline.
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
from misstep.models.locate import Model
from misstep.models.unpacked import cache_folder, whole
from misstep.models.weights import count_weights, text_config

PROGRAM = "optimum-cli"
INSTALL = f"{PROGRAM}, which exports it, is not installed (docs/engines.md)"
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
    """Why a model cannot be served from an export, as far as can be told before; or None."""
    if model.is_gguf:
        return "it is a GGUF file"
    if not _place(model).is_dir() and find_program() is None:
        return f"it is no GGUF file, and {INSTALL}"
    return None if shape(model) else "its config.json does not say how large its cache is"


def shape(model: Model) -> Shape | None:
    """The model's shape by its configuration; None where attention is not of the usual kind."""
    config = text_config(model)
    heads, keys = (config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    width = config.get("head_dim") or (heads and config.get("hidden_size", 0) // heads)
    layers = config.get("num_hidden_layers")
    if not (heads and width and layers):
        return None
    return Shape(layers, keys or heads, width, count_weights(model))


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
