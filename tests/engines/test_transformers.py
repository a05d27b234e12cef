"""The transformers engine on a tiny fp32 model: what is shared is computed once, and right."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from misstep.engines import transformers
from misstep.engines.base import Request
from misstep.engines.transformers import TransformersEngine, shared_beginning
from misstep.errors import EngineError
from misstep.models.locate import Model, locate
from misstep.models.rendering import tokens_of
from misstep.models.weights import context_length
from misstep.records import Message


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("misstep.models.weights.weights_dtype", lambda: torch.float32)
        with TransformersEngine(locate(str(tiny_model))) as opened:
            # As they are made, the weights are near zero, and the answers all alike.
            torch.manual_seed(1)
            assert opened._model
            for weight in opened._model.parameters():
                torch.nn.init.normal_(weight, std=0.4)
            yield opened


def requests(temperature: float) -> list[Request]:
    dice = random.Random(0)
    system = Message(
        role="system", content="Two worked examples stand before the request. " * 4
    )
    return [
        Request(
            messages=(system, Message(role="user", content=f"{i} " * dice.randint(1, 40))),
            max_tokens=dice.randint(1, 24),
            temperature=temperature,
            seed=i,
        )
        for i in range(12)
    ]


def test_what_goes_beyond_the_models_context_has_no_answer_and_moves_no_other(
    engine: TransformersEngine,
) -> None:
    asked = requests(0.0)[:3]
    long = asked[1].model_copy(update={"max_tokens": 4096})
    first, refused, last = engine.generate([asked[0], long, asked[2]])
    assert refused.error and "exceed the model's context of 4096 tokens" in refused.error
    assert [first, last] == [engine.generate([r])[0] for r in (asked[0], asked[2])]


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_positions": 1024}, 1024),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            400,
        ),
        (
            {
                "max_position_embeddings": 160,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 100,
                },
            },
            400,
        ),
        # Llama 3.1 says how long texts may be, and not how long they were before.
        (
            {
                "max_position_embeddings": 100,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0},
            },
            100,
        ),
        ({}, None),
    ],
)
def test_a_configuration_says_how_long_texts_may_be(
    tmp_path: Path, config: dict[str, Any], longest: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(Model("m", tmp_path)) == longest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shared_beginning_changes_no_answer(
    engine: TransformersEngine, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(temperature)
    computed: list[int] = []
    inner = engine._computed

    def watched(beginning: Any, rows: int) -> Any:
        computed.append(beginning.shape[1])
        return inner(beginning, rows)

    monkeypatch.setattr(engine, "_computed", watched)
    together = engine.generate(asked)
    # Each alone shares nothing, and pads nothing.
    alone = [engine.generate([request])[0] for request in asked]
    monkeypatch.setattr(transformers, "LEAST_SHARED", 10**9)
    apart = engine.generate(asked)
    assert together == apart == alone
    assert len({answer.text for answer in together}) > 6
    assert computed[0] > 180
    assert set(computed[1:]) == {0}


def test_windows_of_a_model_that_sees_too_keep_their_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "max_position_embeddings": 4096,
    }
    sight = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    made = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=size | text,
            vision_config=size | sight,
            mm_tokens_per_image=4,
            # Tied, with weights as large as these, it would say one token again and again.
            tie_word_embeddings=False,
        )
    )
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("misstep.models.weights.weights_dtype", lambda: torch.float32)
    with TransformersEngine(locate(str(tmp_path))) as engine:
        asked = requests(0.0)
        assert engine.generate(asked) == [engine.generate([one])[0] for one in asked]


def test_what_memory_does_not_hold_is_answered_in_smaller_batches(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked, inner, tried = requests(1.0), engine._continue, list[int]()
    wanted = engine.generate(asked)
    most = 2 * max(len(engine.renderer.prompt(r.messages)) + r.max_tokens for r in asked)

    def limited(batch: Any) -> list[list[int]]:
        tried.append(len(batch) * batch[0].length)
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(batch)

    monkeypatch.setattr(engine, "_batch_tokens", engine._batch_tokens)
    monkeypatch.setattr(engine, "_continue", limited)
    assert engine.generate(asked) == wanted
    assert tried[0] > most
    tried.clear()
    assert engine.generate(asked) == wanted
    assert max(tried) <= most
    most = 1
    with pytest.raises(EngineError, match=r"request \d+: its prompt \(\d+ tokens\)"):
        engine.generate(asked)


def test_prompts_that_are_equal_keep_a_token_to_themselves(engine: TransformersEngine) -> None:
    asked = requests(0.0)[:1] * 3
    assert engine.generate(asked) == [engine.generate(asked[:1])[0]] * 3


def test_shared_beginning_leaves_each_prompt_a_token() -> None:
    assert shared_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == 2
    assert shared_beginning([[1, 2], [1, 2, 3]]) == 1
    assert shared_beginning([[1, 2], [1, 2]]) == 1
    assert shared_beginning([[3, 1], [1, 3]]) == 0


HABITS = {
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 12,
    "bad_words_ids": [[token] for token in range(3, 99)],
    "suppress_tokens": list(range(99, 150)),
}


@pytest.fixture(scope="module")
def habits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, the same with settings of its own, and adapters that change nothing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("habits")
    plain = shutil.copytree(tiny_model, folder / "plain")
    lm = LlamaForCausalLM.from_pretrained(plain)
    torch.manual_seed(1)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    lm.save_pretrained(plain)
    (plain / "generation_config.json").unlink()
    own = shutil.copytree(plain, folder / "own")
    (own / "generation_config.json").write_text(json.dumps(HABITS))
    same = LoraConfig(target_modules=["q_proj"])
    for name, task in (("unknown", None), ("language", "CAUSAL_LM")):
        same.task_type = task
        get_peft_model(copy.deepcopy(lm), same).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("adapter", [None, "unknown", "language"])
def test_settings_in_a_models_file_change_no_answer(
    habits: Path, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("misstep.models.weights.weights_dtype", lambda: torch.float32)
    with TransformersEngine(locate(str(habits / "plain"))) as engine:
        wanted = engine.generate(requests(0.0))
    model, same = locate(str(habits / "own")), habits / adapter if adapter else None
    with TransformersEngine(model, same) as engine:
        assert engine.generate(requests(0.0)) == wanted


def test_a_closed_engine_gives_a_gpu_back(tiny_model: Path, held: list[int]) -> None:
    with TransformersEngine(locate(str(tiny_model))) as engine:
        engine.generate(requests(0.0)[:1])
    assert held == [0]


def test_a_model_without_a_template_asks_itself_nothing(
    untuned_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    said = ["Fine.\nUser: And then?\nAssistant: Nothing.", "It rains.\nAssistant: Yes."]
    steps: list[int] = []

    def say(engine: TransformersEngine, batch: Any, width: int) -> dict[str, Any]:
        scripts = [tokens_of(engine.renderer.tokenizer, said[row.place]) for row in batch]

        def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            steps.append(ids.shape[1] - width)
            forced = torch.full_like(scores, float("-inf"))
            for row, script in enumerate(scripts):
                forced[row, script[steps[-1]]] = 0
            return forced

        return settings(engine, batch, width) | {"logits_processor": [force]}

    settings = TransformersEngine._settings
    monkeypatch.setattr(TransformersEngine, "_settings", say)
    asked = [Request(messages=(Message(role="user", content="?"),), max_tokens=25)] * 2
    with TransformersEngine(locate(str(untuned_model))) as engine:
        found = engine.generate(asked)
        assert [answer.text for answer in found] == ["Fine.", "It rains."]
        assert [answer.tokens for answer in found] == [11, len("It rains.\nAssistant:")]
        assert not any(answer.truncated for answer in found)
        assert max(steps) + 1 == found[1].tokens
        assert engine.generate(asked[:1]) == found[:1]


@pytest.mark.parametrize(
    ("slow", "memory", "held"),
    [(True, 1 << 40, "float32"), (True, 1, "bfloat16"), (False, 1 << 40, "bfloat16")],
)
def test_where_bf16_is_slow_it_answers_in_fp32_as_far_as_memory_holds_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, slow: bool, memory: int, held: str
) -> None:
    import torch

    monkeypatch.setattr("misstep.models.precision.bf16_is_slow", lambda: slow)
    monkeypatch.setattr("misstep.models.weights.weights_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr("misstep.models.weights.device", lambda: "cpu")
    monkeypatch.setattr("misstep.models.weights.memory_bytes", lambda: memory)
    with TransformersEngine(locate(str(tiny_model))) as opened:
        assert opened._model
        assert {str(p.dtype) for p in opened._model.parameters()} == {f"torch.{held}"}
        assert opened.identity.endswith(held)
