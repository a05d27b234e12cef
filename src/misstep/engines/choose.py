"""Which engine answers for a model: the caller's choice, or the fastest that can read it.

This module knows the names of the engines and what each needs; it loads none until asked to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from misstep.endpoint import Endpoint
from misstep.engines.base import Engine
from misstep.errors import InputError
from misstep.guard import Guard
from misstep.models import Model, is_full_fine_tune

Kind = Literal["auto", "openvino", "transformers"]


class Chosen(NamedTuple):
    """An engine that is not loaded yet."""

    identity: str
    """What the engine will be called, so that a cache can be asked before it is loaded."""
    why: str
    """One line: which engine, and for what reason."""
    open: Callable[[], Engine]


def choose(
    kind: str, model: Model, adapter: Path | None = None, scratch: Path | None = None
) -> Chosen:
    """Choose the engine that was asked for; `auto` takes OpenVINO where it can serve the model.

    A model behind an endpoint is answered for by its endpoint, whatever was asked for: the
    choice is about models whose weights are here.

    Args:
        kind: auto, openvino or transformers.
        model: the weights.
        adapter: a PEFT folder or a full fine-tune.
        scratch: a folder for merged weights; the engine's own temporary one where left out.

    Raises:
        InputError: there is no such engine, it is not installed, or it cannot read the model.
    """
    if kind not in ("auto", "openvino", "transformers"):
        raise InputError(
            f"engine {kind}: expected auto, openvino or transformers, found {kind!r}."
        )
    if model.endpoint is not None:
        return _endpoint(model.endpoint)
    obstacle = _obstacle(model, adapter) if kind == "auto" else None
    if kind == "openvino" or (kind == "auto" and obstacle is None):
        from misstep.engines import openvino

        why = "this is a CPU and the model is a GGUF that it reads"
        return Chosen(
            openvino.identity(model, adapter),
            f"openvino, because {_why(kind, why)}",
            lambda: openvino.OpenVinoEngine(model, adapter, scratch),
        )
    from misstep.engines import transformers

    return Chosen(
        transformers.identity(model, adapter),
        f"transformers, because {_why(kind, obstacle or '')}",
        lambda: transformers.TransformersEngine(model, adapter),
    )


def choose_labels(model: Model, guard: Guard) -> Chosen:
    """What gives the probabilities of a guard's labels: transformers, for any model.

    Raises:
        ModelError: the model is behind an endpoint, or its tokenizer does not fit the labels.
    """
    from misstep.engines import labels

    labels.check(model, guard)
    return Chosen(
        labels.identity(model, guard),
        "transformers, because a guard is read by its labels' probabilities",
        lambda: labels.LabelEngine(model, guard),
    )


def _endpoint(endpoint: Endpoint) -> Chosen:
    from misstep.engines import openai

    return Chosen(
        openai.identity(endpoint),
        f"openai, because {endpoint.model} is behind {endpoint.url}",
        lambda: openai.OpenAIEngine(endpoint),
    )


def _why(kind: str, reason: str) -> str:
    return reason if kind == "auto" else "the recipe asks for it"


def _obstacle(model: Model, adapter: Path | None) -> str | None:
    """Why OpenVINO is not the choice here, or None."""
    from importlib.util import find_spec

    import torch

    from misstep.engines.openvino import OpenVinoEngine

    if torch.cuda.is_available():
        return "there is a GPU"
    if find_spec("openvino_genai") is None:
        return "OpenVINO GenAI is not installed"
    if adapter is not None and is_full_fine_tune(adapter):
        return "the trained model is a full fine-tune, which OpenVINO does not read"
    if reason := OpenVinoEngine.reads(model):
        return f"OpenVINO cannot read the model: {reason}"
    return None
