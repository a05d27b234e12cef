"""The transformers engine on a tiny fp32 model: what is shared is computed once, and right."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from misstep.engines import transformers
from misstep.engines.base import Request
from misstep.engines.transformers import TransformersEngine, shared_beginning
from misstep.models import locate
from misstep.records import Message


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("misstep.models.weights_dtype", lambda: torch.float32)
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


def test_prompts_that_are_equal_keep_a_token_to_themselves(engine: TransformersEngine) -> None:
    asked = requests(0.0)[:1] * 3
    assert engine.generate(asked) == [engine.generate(asked[:1])[0]] * 3


def test_shared_beginning_leaves_each_prompt_a_token() -> None:
    assert shared_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == 2
    assert shared_beginning([[1, 2], [1, 2, 3]]) == 1
    assert shared_beginning([[1, 2], [1, 2]]) == 1
    assert shared_beginning([[3, 1], [1, 3]]) == 0
