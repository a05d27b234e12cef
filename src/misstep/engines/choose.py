"""Which engine answers for a model: the caller's choice, or the fastest that can read it.

This module knows the names of the engines and what each needs; it loads none until asked to.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from misstep.engines.base import AT_ONCE
from misstep.engines.cached import MANY, Chosen
from misstep.errors import InputError, ModelError
from misstep.guard import Guard
from misstep.models.endpoint import Endpoint
from misstep.models.locate import Model
from misstep.models.precision import device

LOCAL = r"(auto|openvino|transformers|vllm(:[1-9][0-9]*)?)"
KIND = f"{LOCAL}|ray(:{LOCAL})?"
KINDS = "auto, openvino, transformers, vllm, vllm:GPUS, ray or ray:ENGINE"


def known(kind: str) -> str:
    """The name of an engine, as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if not re.fullmatch(KIND, kind):
        raise ValueError(f"expected {KINDS}")
    return kind


Kind = Annotated[str, AfterValidator(known)]
"""In a recipe: a local engine, or one in every machine of a Ray cluster."""


def choose(
    kind: str, model: Model, adapter: Path | None = None, scratch: Path | None = None
) -> Chosen:
    """Choose the engine that was asked for; `auto` takes the fastest that can serve the model.

    A model behind an endpoint is answered for by its endpoint, whatever was asked for: the
    choice is about models whose weights are here.

    Args:
        kind: a local engine, or `ray` and the one inside; see `KINDS`.
        model: the weights.
        adapter: a PEFT folder or a full fine-tune.
        scratch: a folder for merged weights; the engine's own temporary one where left out.

    Raises:
        InputError: there is no such engine, it is not installed, or it cannot read the model.
    """
    try:
        known(kind)
    except ValueError as error:
        raise InputError(f"engine {kind}: {error}.") from error
    if model.endpoint is not None:
        return _endpoint(model.endpoint)
    name, _, inner = kind.partition(":")
    if name == "ray":
        return _on_ray(inner or "auto", model, adapter)
    reason = "the recipe asks for it"
    if name == "auto":
        name, reason = _fastest(model, adapter)
    if name == "vllm":
        return _vllm(model, adapter, int(inner) if inner else None, reason)
    if name == "openvino":
        return _openvino(model, adapter, scratch, reason)
    return _transformers(model, adapter, reason)


def choose_labels(model: Model, guard: Guard) -> Chosen:
    """What gives the probabilities of a guard's labels: transformers, for any model.

    Raises:
        ModelError: the model is behind an endpoint, or its tokenizer does not fit the labels.
    """
    from misstep.engines import labels

    labels.check(model, guard)
    found = Chosen(
        labels.identity(model, guard),
        "transformers, because a guard is read by its labels' probabilities",
        lambda: labels.LabelEngine(model, guard),
    )
    return found.on_gpu() if device() == "cuda" else found


def _openvino(model: Model, adapter: Path | None, scratch: Path | None, reason: str) -> Chosen:
    from misstep.engines import openvino

    return Chosen(
        openvino.identity(model, adapter),
        f"openvino, because {reason}",
        lambda: openvino.OpenVinoEngine(model, adapter, scratch),
    )


def _transformers(model: Model, adapter: Path | None, reason: str) -> Chosen:
    from misstep.engines import transformers

    found = Chosen(
        transformers.identity(model, adapter),
        f"transformers, because {reason}",
        lambda: transformers.TransformersEngine(model, adapter),
    )
    return found.on_gpu() if device() == "cuda" else found


def _vllm(model: Model, adapter: Path | None, gpus: int | None, reason: str) -> Chosen:
    from misstep.engines import vllm

    identity = vllm.identity(model, adapter, split := gpus or vllm.gpus_needed(model))
    over = f" over {split} GPUs" if split > 1 else ""
    return Chosen(
        identity,
        f"vllm{over}, because {reason}",
        lambda: vllm.VllmEngine(model, adapter, split),
    ).on_gpu()


def _on_ray(inner: str, model: Model, adapter: Path | None) -> Chosen:
    """The engine that a machine of the cluster chooses, on as many as there are.

    Workers have another working directory, so paths go to them whole.
    """
    from misstep.engines import ray

    adapter = adapter and adapter.resolve()
    model = replace(model, path=model.path and model.path.resolve())

    name, _, gpus = inner.partition(":")
    share = ray.share(int(gpus or 1))
    # A machine gives its engine as many GPUs as Ray lends it, and no more.
    local = partial(choose, f"{name}:{gpus or 1}" if name == "vllm" else name, model, adapter)
    identity, why = ray.ask(local, share)
    return Chosen(
        identity,
        f"ray, {share.actors} times {why}",
        lambda: ray.RayEngine(local, identity, share),
        # So that each engine has as much of a call as a single one would: it starts with it.
        at_once=(MANY if share.gpus else AT_ONCE) * share.actors,
        # This machine's GPUs may be of the cluster.
        alone=share.gpus > 0,
    )


def _endpoint(endpoint: Endpoint) -> Chosen:
    from misstep.engines import openai

    return Chosen(
        openai.identity(endpoint),
        f"openai, because {endpoint.model} is behind {endpoint.url}",
        lambda: openai.OpenAIEngine(endpoint),
        at_once=MANY,
        elsewhere=openai.OpenAIEngine.elsewhere,
    )


def _fastest(model: Model, adapter: Path | None) -> tuple[str, str]:
    """The engine to take where none is asked for, and the reason."""
    if device() == "cpu":
        obstacle = _openvino_obstacle(model, adapter)
        if obstacle is None and model.is_gguf:
            return "openvino", "this is a CPU and the model is a GGUF that it reads"
        if obstacle is None:
            return "openvino", "this is a CPU, and optimum-cli exports the model for it, once"
        return "transformers", obstacle
    from misstep.engines import vllm

    if vllm.find_program() is None:
        return "transformers", "there is a GPU, and vLLM is not installed"
    if reason := vllm.obstacle(model, adapter):
        return "transformers", f"there is a GPU, but vLLM cannot serve this: {reason}"
    return "vllm", "there is a GPU and vLLM is installed"


def _openvino_obstacle(model: Model, adapter: Path | None) -> str | None:
    """Why OpenVINO is not the choice on this CPU, or None."""
    from importlib.util import find_spec

    from misstep.engines.openvino import OpenVinoEngine, check_adapter

    if find_spec("openvino_genai") is None:
        return "OpenVINO GenAI is not installed"
    if reason := OpenVinoEngine.obstacle(model):
        return f"OpenVINO cannot read the model: {reason}"
    try:
        if adapter is not None:
            check_adapter(model, adapter)
    except ModelError as error:
        return f"OpenVINO cannot read what was trained: {error}"
    return None
