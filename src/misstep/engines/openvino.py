"""OpenVINO GenAI: fast answers on a CPU, from a GGUF file or an export of a folder.

The base model and a trained one answer through the same numbers: both are served in F16, from
a GGUF, plain or with the adapter merged into it, or from one export, to whose weights OpenVINO
adds the adapter while it loads. Conversations go in as tokens and come out as tokens, so that
rendering is the same as in training. This module knows OpenVINO's pipeline; it knows no other
engine.

The same request gives the same text whatever else is in the batch and whatever the cache of
prompt beginnings holds, on the same machine and version. Left alone, OpenVINO rounds by what
shares a step, since matrices of one row and attention of one token take paths of their own. So:
- a companion, whose answer is thrown away, keeps every step at two rows or more;
- requests are admitted here, one step's worth at a time, so that no prompt is computed in parts
  and none is thrown out of a full cache and computed again in another way;
- a prompt of which the cache may leave one token to compute is rehearsed, so that it always
  does.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from misstep.engines.base import (
    CONTEXT,
    Completion,
    Engine,
    Request,
    completed,
    too_long,
)
from misstep.errors import EngineError, MissingExtra, ModelError
from misstep.models.adapter import (
    TENSORS,
    adapter_digest,
    check_merge,
    is_full_fine_tune,
    plain_lora,
)
from misstep.models.gguf_header import read_header
from misstep.models.gguf_merge import merge_adapter
from misstep.models.locate import Model
from misstep.models.openvino_export import Shape, adapter_scale, exported, obstacle, shape
from misstep.models.precision import bf16_is_slow, memory_bytes
from misstep.models.rendering import Renderer, named_stops, shared_prefix
from misstep.models.weights import context_length

BLOCK = 32
"""Tokens in one block of OpenVINO's cache on a CPU."""
CACHE_BYTES = 1 << 30
ROOM = 16_384
"""Tokens of requests that the cache is to hold even where they take more than that."""
LEAST_ROOM = 4_096
"""Tokens; where memory has not got so many, long prompts would not be answered."""
ROWS = 128
"""Prompts that are answered at once."""
STEP_TOKENS = 1024
"""New prompt tokens in one step; one longer prompt goes alone."""
COMPANION_TOKENS = 512
COMPANIONS = 2 * (COMPANION_TOKENS // BLOCK + 1)
"""Blocks: a companion's own, twice, as an old one may not be gone when the next one comes."""


@dataclass
class Job:
    """One prompt on its way through the pipeline."""

    place: int
    """Where its answer belongs."""
    prompt: list[int]
    max_tokens: int
    config: Any
    fresh: int
    """Tokens that the prompt does not share with the one before it."""
    rehearsal: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of the cache that it may fill, shared ones counted too."""
        return blocks_of(len(self.prompt) + self.max_tokens)


class OpenVinoEngine(Engine):
    """Answers on the CPU with continuous batching and a cache of shared prompt beginnings."""

    def __init__(
        self, model: Model, adapter: Path | None = None, scratch: Path | None = None
    ) -> None:
        genai = _library()
        self.identity = identity(model, adapter)
        self.renderer = Renderer.for_model(model)
        self._temporary = None if scratch else TemporaryDirectory(prefix="misstep-")
        folder = Path(self._temporary.name) if self._temporary else scratch
        assert folder is not None
        self._merged: Path | None = None
        if model.is_gguf:
            files, added = _weights(model, adapter, folder), None
            self._merged = files if adapter else None
        else:
            files = exported(model)
            added = adapter and _added(genai, files, adapter)
        total = _cache_blocks(shape(model))
        self._pipeline: Any = _pipeline(genai, files, total, added)
        self._blocks = total - COMPANIONS
        self._longest = context_length(model)
        self._genai = genai
        self._status = genai.GenerationStatus
        self._next_id = 0

    @staticmethod
    def obstacle(model: Model) -> str | None:
        """Why OpenVINO cannot read this model, or None where it can."""
        if reason := obstacle(model):
            return reason
        room = (_cache_blocks(shape(model)) - COMPANIONS) * BLOCK
        if room < LEAST_ROOM:
            return (
                f"beside its weights, this machine's memory has room for {max(0, room)} tokens "
                f"of its cache, and {LEAST_ROOM} are needed"
            )
        return None

    def stream(
        self, requests: Sequence[Request], batch: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Give answers as they come, so many at a time: neighbours are nothing to a request."""
        prompts = [self.renderer.prompt(request.messages) for request in requests]
        refused = {
            place: because
            for place, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
            if (because := self._refused(len(prompt), request))
        }
        places = [place for place in range(len(requests)) if place not in refused]
        part = [*refused.items()]
        try:
            for place, ids in self._run(self._jobs(requests, prompts, places)):
                part.append((place, completed(self.renderer, ids)))
                if len(part) >= batch:
                    yield part
                    part = []
        except RuntimeError as error:
            raise EngineError(f"OpenVINO stopped: {error}") from error
        if part:
            yield part

    def close(self) -> None:
        """Give back the memory, and remove the weights that were written.

        In a scratch folder those of the model itself stay: other engines are made from them.
        """
        self._pipeline = None
        if self._merged:
            # As large as the model, and one for each adapter.
            self._merged.unlink(missing_ok=True)
        if self._temporary:
            self._temporary.cleanup()

    def _refused(self, prompt: int, request: Request) -> Completion | None:
        return too_long(prompt, request, self._longest, CONTEXT) or too_long(
            prompt, request, self._blocks * BLOCK, "OpenVINO's cache"
        )

    def _jobs(
        self, requests: Sequence[Request], prompts: Sequence[list[int]], places: Sequence[int]
    ) -> list[Job]:
        """Requests in an order that lets neighbours share their beginnings."""
        jobs: list[Job] = []
        last: list[int] = []
        for place in sorted(places, key=lambda place: prompts[place]):
            prompt = prompts[place]
            fresh = len(prompt) - shared_blocks(last, prompt)
            if len(prompt) % BLOCK < 2 and prompt != last:
                rehearsal = self._config(1)
                jobs.append(Job(place, prompt, 1, rehearsal, fresh, rehearsal=True))
            request = requests[place]
            jobs.append(Job(place, prompt, request.max_tokens, self._sampling(request), fresh))
            last = prompt
        return jobs

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[int]]]:
        """The place of every job, and the tokens of its answer, as they come."""
        queue = deque(jobs)
        running: list[tuple[Job, Any]] = []
        companion: Any = None
        try:
            while queue or running:
                if companion is None or companion.get_status() != self._status.RUNNING:
                    companion = self._companion()
                running += self._admitted(queue, [job for job, _ in running])
                self._pipeline.step()
                done = [
                    pair for pair in running if pair[1].get_status() != self._status.RUNNING
                ]
                running = [pair for pair in running if pair not in done]
                for job, handle in done:
                    tokens = self._read(handle)
                    if not job.rehearsal:
                        yield job.place, tokens
        finally:
            self._drop(
                [*(handle for _, handle in running), *([companion] if companion else [])]
            )

    def _admitted(self, queue: deque[Job], running: list[Job]) -> list[tuple[Job, Any]]:
        """Start as many jobs as the next step and the cache have room for."""
        admitted: list[tuple[Job, Any]] = []
        blocks = self._blocks - sum(job.blocks for job in running)
        tokens = STEP_TOKENS
        while queue and len(running) + len(admitted) < ROWS and queue[0].blocks <= blocks:
            if admitted and queue[0].fresh > tokens:
                break
            job = queue.popleft()
            blocks -= job.blocks
            tokens -= job.fresh
            admitted.append((job, self._add(job.prompt, job.config)))
            if job.rehearsal:
                break  # The next job needs what this leaves in the cache, a step later.
        return admitted

    def _drop(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _add(self, prompt: list[int], config: Any) -> Any:
        import numpy as np
        from openvino import Tensor

        self._next_id += 1
        ids = Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._next_id, ids, config)

    def _companion(self) -> Any:
        config = self._config(COMPANION_TOKENS)
        config.ignore_eos = True
        config.stop_token_ids = set()
        return self._add(list(self.renderer.stop_ids[:1]) * 2, config)

    def _read(self, handle: Any) -> list[int]:
        if handle.get_status() != self._status.FINISHED:
            raise EngineError(f"OpenVINO dropped a request ({handle.get_status().name}).")
        return list(handle.read_all()[0].generated_ids)

    def _config(self, max_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.stop_token_ids = set(self.renderer.stop_ids)
        config.do_sample = False
        return config

    def _sampling(self, request: Request) -> Any:
        config = self._config(request.max_tokens)
        if request.temperature > 0:
            config.do_sample = True
            config.temperature = request.temperature
            config.top_p = request.top_p
            # From the whole request: equal seeds must not give all prompts the same dice.
            config.rng_seed = int(request.id[:8], 16)
        return config


def blocks_of(tokens: int) -> int:
    """Blocks of the cache that so many tokens fill."""
    return -(-tokens // BLOCK)


def shared_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning, in whole blocks."""
    length = shared_prefix(one, other)
    return length - length % BLOCK


def _library() -> Any:
    if find_spec("openvino_genai") is None:
        raise MissingExtra("OpenVINO GenAI", "openvino")
    import openvino_genai

    return openvino_genai


def _weights(model: Model, adapter: Path | None, folder: Path) -> Path:
    """The F16 file that is served; one that an earlier process finished is taken as it is."""
    assert model.path is not None
    name = f"{model.digest}-{adapter_digest(adapter) if adapter else 'base'}.f16.gguf"
    out = folder / name
    return out if out.is_file() else merge_adapter(model.path, adapter, out)


def _added(genai: Any, folder: Path, adapter: Path) -> Any:
    """What has OpenVINO add an adapter to an export's weights, once, while it loads."""
    # It does not read the adapter's configuration: without the scale, half of it may be lost.
    scale = adapter_scale(folder, adapter)
    weights = genai.Adapter(str(adapter / TENSORS))
    return genai.AdapterConfig(weights, scale, genai.AdapterConfig.Mode.MODE_FUSE)


def _precision() -> str:
    """What the processor computes in fastest; also the precision of the cache."""
    from openvino import Core

    core = Core()
    _, processors = core.get_property("CPU", "RANGE_FOR_STREAMS")
    # With one to use, bf16 was seen to divide by zero on a processor with AMX, which ends the
    # process: github.com/openvinotoolkit/openvino/issues/33300
    if processors < 2:
        return "f32"
    able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if able and not bf16_is_slow() else "f32"


def _cache_blocks(of: Shape | None) -> int:
    """Blocks of the cache: 1 GiB of them, or more where that holds few and memory allows it.

    By the memory that there is, not what is free now: the choice of an engine depends on it,
    and must be the same when a run is gone on with.
    """
    assert of is not None  # Else the model was refused.
    number = 2 if _precision() == "bf16" else 4
    block = 2 * of.layers * of.keys * of.width * BLOCK * number
    # A quarter is for all else.
    spare = max(0, memory_bytes() * 3 // 4 - number * of.weights)
    return max(CACHE_BYTES // block, min(COMPANIONS + blocks_of(ROOM), spare // block))


def _pipeline(genai: Any, files: Path, blocks: int, added: Any) -> Any:
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = 2 * ROWS
    # More than any step has: what enters a step is decided by `_admitted`.
    scheduler.max_num_batched_tokens = blocks * BLOCK
    precision = _precision()
    settings = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    if added is not None:
        settings["adapters"] = added
    try:
        return genai.ContinuousBatchingPipeline(str(files), scheduler, "CPU", settings)
    except (RuntimeError, IndexError) as error:
        raise EngineError(
            f"OpenVINO cannot load {files.name}: {error}. Use the `transformers` engine."
        ) from error


def check_adapter(model: Model, adapter: Path) -> None:
    """Pass where an adapter can be added to this model's weights; loads none.

    Raises:
        ModelError: it cannot, and why.
    """
    if is_full_fine_tune(adapter):
        raise ModelError(
            f"{adapter}: expected a LoRA adapter, found a full fine-tune, which OpenVINO "
            "cannot read from safetensors. Use the `transformers` engine."
        )
    if model.is_gguf:
        check_merge(adapter, read_header(model.files))
    else:
        plain_lora(adapter)


def identity(model: Model, adapter: Path | None) -> str:
    """What an engine for this model will be called; loads no weights.

    Raises:
        MissingExtra: OpenVINO GenAI is not installed.
        ModelError: it cannot read this model, or what was trained on it.
    """
    _library()
    if reason := OpenVinoEngine.obstacle(model):
        raise ModelError(
            f"model {model.name}: OpenVINO cannot read it, because {reason}. "
            "Use the `transformers` engine."
        )
    if adapter is not None:
        check_adapter(model, adapter)
    trained = adapter_digest(adapter) if adapter else "base"
    release = version("openvino-genai")
    form = "f16" if model.is_gguf else "exported-f16"
    stops = named_stops(model)
    return f"openvino-genai {release}:{model.digest}:{trained}:{form}-{_precision()}{stops}"
