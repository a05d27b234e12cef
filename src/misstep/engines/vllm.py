"""vLLM: its own server in its own process, for as long as the engine is open.

Prompts go there as token ids, rendered here as for training, and answers come back as token ids
that are decoded here: the server's chat template, sampling defaults and stop tokens are not
used. An adapter is served beside the base weights, not merged, as in training; prompt
beginnings are kept in the server's cache. What one request gives may change in rounding with
what shares its batch. This module knows vLLM's command line and protocol (0.32.0's build for
processors was run, 0.33.0's sources were read).
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from misstep.engines.base import Completion, Request, completed
from misstep.engines.openai import Fault, OpenAIEngine
from misstep.engines.pace import Pace
from misstep.engines.server import PORT, Server
from misstep.errors import EngineError, MissingExtra, ModelError
from misstep.models.adapter import adapter_digest, config_of, is_full_fine_tune
from misstep.models.endpoint import Endpoint
from misstep.models.locate import Model, weight_files
from misstep.models.precision import weights_dtype
from misstep.models.rendering import Renderer, named_stops

BASE, TRAINED = "base", "trained"
"""What the server calls the model without and with the adapter."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM has room for in an adapter."""
PLAIN: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("use_dora", (None, False)),
    ("bias", (None, "none")),
    ("modules_to_save", (None, [])),
)
"""Options of an adapter, and the values beside which vLLM refuses it."""
UNDER_WAY = 256
"""Requests that the server is given; it queues and batches them itself."""

PROCESSORS = "cpu"
"""In the version of vLLM's build for processors."""
LAUNCHERS = re.compile(
    "((LOCAL|GROUP|ROLE)_.+|RANK|WORLD_SIZE|MASTER_.+|(TORCHELASTIC|ACCELERATE)_.+|VLLM_API_KEY)"
)
"""Variables of the child that are not its own: by those of `accelerate launch` it would take
itself for one of the processes that train, by the last it would ask for a key."""


class VllmEngine(OpenAIEngine):
    """Answers from a vLLM server that lives as long as the engine does."""

    def __init__(self, model: Model, adapter: Path | None = None, gpus: int = 1) -> None:
        named = identity(model, adapter, gpus)
        self.renderer = Renderer.for_model(model)
        self._rendering = threading.Lock()
        self._server = Server(command(program(), model, adapter, gpus), environment(os.environ))
        lora = adapter is not None and not is_full_fine_tune(adapter)
        endpoint = Endpoint(TRAINED if lora else BASE, f"{self._server.url}/v1")
        super().__init__(endpoint, pace=Pace(UNDER_WAY, UNDER_WAY), proxies=False)
        self.identity = named

    def close(self) -> None:
        """Stop the server."""
        super().close()
        self._server.close()

    def _send(self, request: Request) -> Completion | Fault:
        found = super()._send(request)
        if isinstance(found, Fault) and (death := self._server.death):
            return Fault(death, "hopeless")
        return found

    def _ask(self, request: Request) -> Completion | Fault:
        with self._rendering:  # A tokenizer serves one thread at a time.
            prompt = self.renderer.prompt(request.messages)
        raw = self._client.completions.with_raw_response.create(
            model=self.endpoint.model,
            prompt=prompt,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            # From the whole request: equal seeds must not give all prompts the same dice.
            seed=int(request.id[:8], 16),
            extra_body={
                "return_token_ids": True,
                "stop_token_ids": list(self.renderer.stop_ids),
                # The model's own list of ends; ours is the one above.
                "ignore_eos": True,
                "stop": list(self.renderer.next_turns),
                "include_stop_str_in_output": True,
            },
        )
        return self._read(raw.content)

    def _read(self, content: bytes) -> Completion | Fault:
        try:
            ids = _Answer.model_validate_json(content).choices[0].token_ids
        except ValidationError:
            return Fault(f"expected an answer with token ids, found {content[:80]!r}", "broken")
        with self._rendering:
            return completed(self.renderer, ids)


class _Choice(BaseModel):
    token_ids: list[int]


class _Answer(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


def obstacle(model: Model, adapter: Path | None) -> str | None:
    """Why vLLM cannot serve this model with this adapter, or None where it can."""
    if model.is_gguf:
        return "the model is a GGUF file"
    if adapter is None or is_full_fine_tune(adapter):
        return None
    config = config_of(adapter)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        return f"the adapter is no LoRA but of the type {kind}"
    if odd := [f"{key} {config[key]}" for key, plain in PLAIN if config.get(key) not in plain]:
        return f"the adapter has {' and '.join(odd)}, which vLLM does not know"
    if _rank(config) > RANKS[-1]:
        return f"the adapter's rank is {_rank(config)}, and vLLM's limit is {RANKS[-1]}"
    return None


def find_program() -> str | None:
    """Where the `vllm` command is: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")


def program() -> str:
    """The `vllm` command.

    Raises:
        MissingExtra: there is none.
    """
    found = find_program()
    if found is None:
        raise MissingExtra("vLLM", "vllm")
    return found


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables of the server: those given, without what is meant for this process."""
    kept = {name: value for name, value in given.items() if not LAUNCHERS.fullmatch(name)}
    # GiB. Read by vLLM's build for processors, which else claims nine tenths of the memory.
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    return kept | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def command(vllm: str, model: Model, adapter: Path | None, gpus: int) -> list[str]:
    """The command line of the server; the port is left open."""
    full = adapter is not None and is_full_fine_tune(adapter)
    weights = adapter if full else model.files
    line = [
        *(vllm, "serve", str(weights), "--tokenizer", str(model.files)),
        *("--host", "127.0.0.1", "--port", PORT, "--served-model-name", BASE),
        # Without it the model's own repetition penalty and top-k would apply.
        *("--generation-config", "vllm", "--enable-prefix-caching"),
        *("--dtype", _precision(), "--tensor-parallel-size", str(gpus)),
        # As much of the model's context as the memory holds: else too long a one ends it.
        *("--max-model-len", "auto"),
    ]
    if PROCESSORS in release(vllm):
        # There a seeded answer to a prompt that was computed in parts ends the server (0.32.0).
        line.append("--no-enable-chunked-prefill")
    if adapter is None or full:
        return line
    room = next(room for room in RANKS if room >= _rank(config_of(adapter)))
    lora = ["--enable-lora", "--max-lora-rank", str(room)]
    return [*line, *lora, "--lora-modules", f"{TRAINED}={adapter}"]


def _rank(config: Mapping[str, Any]) -> int:
    """The highest rank of an adapter's matrices."""
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def gpus_needed(model: Model) -> int:
    """The smallest power of two of GPUs of which the weights fill at most half."""
    import torch

    if not torch.cuda.is_available():
        return 1
    room = torch.cuda.get_device_properties(0).total_memory / 2
    size = sum(file.stat().st_size for file in weight_files(model.files))
    gpus = 1
    while gpus * room < size and 2 * gpus <= torch.cuda.device_count():
        gpus *= 2
    return gpus


def _precision() -> str:
    return str(weights_dtype()).removeprefix("torch.")


@lru_cache
def release(vllm: str) -> str:
    """The version that a `vllm` command says it is.

    Raises:
        EngineError: it does not run.
    """
    try:
        shown = subprocess.run(
            [vllm, "--version"], capture_output=True, text=True, timeout=300, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[-3:]
        raise EngineError(
            f"{vllm} --version: expected a version, found an error: {' / '.join(said)}. "
            "Install vLLM anew, or use the `transformers` engine."
        ) from error
    return (shown.stdout.strip().splitlines() or ["unknown"])[-1]


def identity(model: Model, adapter: Path | None, gpus: int) -> str:
    """What an engine for this model will be called; starts no server.

    Raises:
        MissingExtra: vLLM is not installed.
        ModelError: it cannot serve this model, or this adapter.
    """
    if reason := obstacle(model, adapter):
        raise ModelError(
            f"{adapter or f'model {model.name}'}: vLLM cannot serve it, because {reason}. Use "
            "the `transformers` engine"
            + (", or name a folder of safetensors or a Hub id." if model.is_gguf else ".")
        )
    trained = adapter_digest(adapter) if adapter else "base"
    split = f"tp{gpus}" if gpus > 1 else "one"
    computed = f"{_precision()}-{split}{named_stops(model)}"
    return f"vllm {release(program())}:{model.digest}:{trained}:{computed}"
