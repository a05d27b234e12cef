"""One contract for all engines, and the proof that an adapter's weights really answer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from served import Call, Reply, answer, serve, text_of

from misstep.engines.base import Completion, Engine, Request
from misstep.engines.openvino import BLOCK, OpenVinoEngine, shared_blocks
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import InputError, ModelError
from misstep.models import openvino_export
from misstep.models.adapter import adapter_digest
from misstep.models.locate import EMBEDDED, Model, locate
from misstep.models.weights import load_tokenizer, load_weights
from misstep.records import Message

LONG = "Copy each of these numbers into a list, one a line: " + " ".join(map(str, range(90)))


def ask(text: str, **options: Any) -> Request:
    return Request(
        messages=(Message(role="user", content=text),), **{"max_tokens": 12} | options
    )


def words(request: Request) -> str:
    """Many words that depend on the prompt and, with a temperature, on the seed."""
    dice = request.seed if request.temperature else "greedy"
    return f"{request.messages[-1].content} {dice} " + "and so on " * 40


def scripted(_scratch: Path) -> Engine:
    return ScriptedEngine(words)


def transformers(_scratch: Path) -> Engine:
    from misstep.engines.transformers import TransformersEngine

    # fp32, since in bf16 rounding follows the shape of the batch: the contract's equalities are
    # promised by this engine only as far as floating point allows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("misstep.models.weights.weights_dtype", float32)
        return TransformersEngine(locate(EMBEDDED))


def float32() -> Any:
    import torch

    return torch.float32


def openvino(scratch: Path) -> Engine:
    pytest.importorskip("openvino_genai")
    return OpenVinoEngine(locate(EMBEDDED), scratch=scratch)


def vllm(scratch: Path) -> Engine:
    """A real server; its command need not be this environment's."""
    from misstep.engines.vllm import VllmEngine, find_program

    if find_program() is None:
        pytest.skip("no vllm command on the path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("misstep.engines.vllm.weights_dtype", float32)
        return VllmEngine(as_folder(scratch))


def as_folder(scratch: Path) -> Model:
    """The embedded model as a folder of safetensors, which is what vLLM reads."""
    folder = scratch / "safetensors"
    if not folder.exists():
        load_weights(locate(EMBEDDED)).save_pretrained(folder)
        load_tokenizer(locate(EMBEDDED)).save_pretrained(folder)
    return locate(str(folder))


def openai(_scratch: Path) -> Engine:
    """A real client and a real server; behind it a script in place of a model."""
    pytest.importorskip("openai")
    from misstep.engines.openai import OpenAIEngine
    from misstep.models.endpoint import Endpoint

    server = serve(spoken)
    engine = OpenAIEngine(Endpoint("m", server.__enter__().url))
    SERVERS[id(engine)] = server
    return engine


def spoken(call: Call) -> tuple[int, Reply, dict[str, str]]:
    """Answer as `words` does; briefly where that is asked for."""
    dice = call["seed"] if call["temperature"] and call["top_p"] > 0.01 else "greedy"
    text = text_of(call)
    said = "yes" if text.startswith("Say only") else f"{text} {dice} " + "and so on " * 40
    kept = said.split(" ")[: call["max_tokens"]]
    finish = "stop" if len(kept) == len(said.split(" ")) else "length"
    return 200, answer(" ".join(kept), len(kept), finish), {}


SERVERS: dict[int, Any] = {}
ENGINES = [
    scripted,
    openai,
    # Place of `cached`: a cached engine around a scripted one keeps the same contract.
    pytest.param(transformers, marks=pytest.mark.model),
    pytest.param(openvino, marks=pytest.mark.model),
    pytest.param(vllm, marks=pytest.mark.model),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Engine]:
    make: Callable[[Path], Engine] = request.param
    with make(scratch) as opened:
        yield opened
    if server := SERVERS.pop(id(opened), None):
        server.__exit__(None, None, None)


def texts(completions: Sequence[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_nothing_in_nothing_out(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_order_is_kept_and_neighbours_do_not_matter(engine: Engine) -> None:
    requests = [ask("Hi"), ask(LONG), ask("Name three rivers."), ask("Hi", max_tokens=3)]
    together = texts(engine.generate(requests))
    assert together == [texts(engine.generate([request]))[0] for request in requests]
    assert together == texts(engine.generate(requests[::-1]))[::-1]
    assert len(set(together)) == 4


def test_sampling_follows_the_seed_and_not_the_neighbours(engine: Engine) -> None:
    samples = [ask("Tell me a story.", temperature=1.0, seed=seed) for seed in range(4)]
    first = texts(engine.generate(samples))
    assert len(set(first)) > 1
    assert texts(engine.generate(samples)) == first
    assert texts(engine.generate([ask("Hi"), samples[2]]))[1] == first[2]


def test_at_temperature_zero_the_seed_changes_nothing(engine: Engine) -> None:
    one, two = engine.generate([ask("Tell me a story.", seed=seed) for seed in (0, 1)])
    assert one.text == two.text


def test_nucleus_of_almost_nothing_is_greedy(engine: Engine) -> None:
    if isinstance(engine, ScriptedEngine):
        pytest.skip("a script has no probabilities")
    greedy, narrow = engine.generate(
        [ask("Name three rivers."), ask("Name three rivers.", temperature=1.0, top_p=1e-6)]
    )
    assert narrow.text == greedy.text


def test_max_tokens_holds_and_is_reported(engine: Engine) -> None:
    requests = [ask(LONG, max_tokens=n) for n in (1, 5, 9)]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert completion.tokens == request.max_tokens
        assert completion.truncated


def test_an_answer_that_ends_is_not_truncated(engine: Engine) -> None:
    if isinstance(engine, ScriptedEngine):
        engine = ScriptedEngine()
    (completion,) = engine.generate([ask("Say only: yes", max_tokens=200)])
    assert not completion.truncated
    assert completion.tokens < 200
    assert "<|im_end|>" not in completion.text


def test_identity_names_the_model(engine: Engine, scratch: Path) -> None:
    assert engine.identity
    if engine.identity.startswith("openai"):
        assert "m@http://127.0.0.1" in engine.identity
    elif engine.identity.startswith("vllm"):
        assert as_folder(scratch).digest in engine.identity
    elif not isinstance(engine, ScriptedEngine):
        assert locate(EMBEDDED).digest in engine.identity


def test_shared_blocks_are_whole_blocks() -> None:
    one = list(range(100))
    assert shared_blocks(one, one) == 100 - 100 % BLOCK
    assert shared_blocks(one, [*one[:40], -1]) == BLOCK
    assert shared_blocks([], one) == 0


def test_unknown_engines_are_refused() -> None:
    from misstep.engines.choose import choose

    with pytest.raises(InputError, match="expected auto, openvino, transformers, vllm"):
        choose("vlm", locate(EMBEDDED))


def test_what_openvino_cannot_read_is_said(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    pytest.importorskip("openvino_genai")
    assert OpenVinoEngine.obstacle(locate(EMBEDDED)) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_export, "find_program", lambda: None)
        reason = OpenVinoEngine.obstacle(locate(str(tmp_path)))
    assert reason and reason.startswith("it is no GGUF file, and optimum-cli")


@pytest.mark.model
def test_openvino_answers_alike_from_a_cold_and_a_warm_cache(scratch: Path) -> None:
    from misstep.models.rendering import Renderer

    renderer = Renderer.for_model(locate(EMBEDDED))
    # Lengths around whole blocks, where a warm cache leaves one token to compute.
    prompts = {len(renderer.prompt(ask(text).messages)) % BLOCK: text for text in beginnings()}
    requests = [ask(prompts[rest], max_tokens=24) for rest in (0, 1, 2, 31)]
    requests += [r.model_copy(update={"temperature": 1.0}) for r in requests]
    with openvino(scratch) as engine:
        cold = texts(engine.generate(requests))
        assert texts(engine.generate(requests)) == cold
        assert [texts(engine.generate([request]))[0] for request in requests] == cold
    with openvino(scratch) as engine:
        assert [texts(engine.generate([request]))[0] for request in requests[::-1]] == cold[
            ::-1
        ]


def beginnings() -> Iterator[str]:
    for count in range(40, 72):
        yield f"Count on from: {' one' * count}"


@pytest.mark.model
def test_openvino_refuses_what_its_cache_cannot_hold(scratch: Path) -> None:
    with openvino(scratch) as engine:
        assert isinstance(engine, OpenVinoEngine)
        engine._longest = None
        large, small = engine.generate([ask("Hi", max_tokens=10_000_000), ask("Hi")])
        assert large.error and "exceed OpenVINO's cache" in large.error
        assert small.tokens and not small.error


@pytest.mark.model
def test_openvino_refuses_what_goes_beyond_the_models_context(scratch: Path) -> None:
    with openvino(scratch) as engine:
        large, small = engine.generate([ask("Hi", max_tokens=8192), ask("Hi")])
        assert large.error and "exceed the model's context of 8192 tokens" in large.error
        assert small.tokens and not small.error


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from misstep.engines.base import Request
from misstep.engines.openvino import OpenVinoEngine
from misstep.models.locate import locate
from misstep.records import Message
with OpenVinoEngine(locate("smollm2-135m")) as engine:
    request = Request(messages=(Message(role="user", content="Hi"),), max_tokens=4)
    assert engine.generate([request, request])[1].tokens
"""


@pytest.mark.model
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity")
def test_openvino_answers_where_it_may_use_one_core_only() -> None:
    pytest.importorskip("openvino_genai")
    done = subprocess.run([sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on attention and feed-forward, large enough to change the text."""
    import torch
    from peft import LoraConfig, get_peft_model

    from misstep.models.weights import load_weights

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True)
    model = get_peft_model(load_weights(locate(EMBEDDED)), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.mark.model
@pytest.mark.parametrize("kind", ["transformers", "openvino"])
def test_the_adapter_answers_and_not_the_base(kind: str, adapter: Path, scratch: Path) -> None:
    from misstep.engines.choose import choose

    if kind == "openvino":
        pytest.importorskip("openvino_genai")
    requests = [ask("Name three rivers.", max_tokens=16), ask("Hi", max_tokens=16)]
    base = choose(kind, locate(EMBEDDED), None, scratch)
    with base.open() as engine:
        before = texts(engine.generate(requests))
        assert engine.identity == base.identity
    trained = choose(kind, locate(EMBEDDED), adapter, scratch)
    with trained.open() as engine:
        after = texts(engine.generate(requests))
        assert engine.identity == trained.identity
    assert not list(scratch.glob(f"*-{adapter_digest(adapter)}*"))
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert base.identity != trained.identity
    assert trained.why == base.why == f"{kind}, because the recipe asks for it"


@pytest.mark.model
def test_vllm_answers_as_transformers_does(
    adapter: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from misstep.engines import vllm
    from misstep.engines.choose import choose

    if vllm.find_program() is None:
        pytest.skip("no vllm command on the path")
    monkeypatch.setattr("misstep.models.weights.weights_dtype", float32)
    monkeypatch.setattr("misstep.engines.vllm.weights_dtype", float32)
    requests = [ask(text, max_tokens=32) for text in ("Name three rivers.", "Hi", LONG)]
    answers = {}
    for kind in ("transformers", "vllm"):
        for trained in (None, adapter):
            with choose(kind, as_folder(scratch), trained).open() as engine:
                answers[kind, trained] = engine.generate(requests)
    assert answers["vllm", None] == answers["transformers", None]
    assert answers["vllm", adapter] == answers["transformers", adapter]
    assert answers["vllm", None] != answers["vllm", adapter]


@pytest.mark.model
def test_the_merged_file_computes_what_peft_computes(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from misstep.models.gguf_merge import merge_adapter
    from misstep.models.rendering import Renderer
    from misstep.models.weights import load_weights

    monkeypatch.setattr("misstep.models.weights.weights_dtype", float32)
    model = locate(EMBEDDED)
    assert model.path
    merged = locate(str(merge_adapter(model.path, adapter, tmp_path / "merged.gguf")))
    ids = torch.tensor([Renderer.for_model(model).prompt(ask(LONG).messages)])
    with torch.inference_mode():
        adapted: Any = load_weights(model, adapter)
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            base = adapted(ids).logits
        del adapted
        found = load_weights(merged)(ids).logits
    # F16 rounds at 2^-11; rows of q and k in a wrong order would be as far off as the base.
    assert (found - expected).abs().mean() < 0.02
    assert (base - expected).abs().mean() > 0.5
    assert Renderer.for_model(merged).prompt(ask(LONG).messages) == ids[0].tolist()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias all"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"some_new_option": 3}, "some_new_option"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    from misstep.models.gguf_merge import merge_adapter

    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = locate(EMBEDDED).path
    assert model
    with pytest.raises(ModelError, match=named):
        merge_adapter(model, tmp_path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    "module", ["model.layers.0.no_such_proj", "model.layers.0.mlp.up_proj"]
)
def test_targets_without_a_tensor_are_refused(tmp_path: Path, module: str) -> None:
    import torch
    from safetensors.torch import save_file

    from misstep.models.gguf_merge import merge_adapter

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{module}"
    pair = {f"{key}.lora_A.weight": torch.ones(2, 9), f"{key}.lora_B.weight": torch.ones(9, 2)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    model = locate(EMBEDDED).path
    assert model
    with pytest.raises(ModelError, match="no such tensor"):
        merge_adapter(model, tmp_path, tmp_path / "out.gguf")
