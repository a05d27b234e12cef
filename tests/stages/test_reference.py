"""The loss on reference answers."""

from pathlib import Path

import pytest
from made import answer_of

from misstep.models.locate import Model
from misstep.models.rendering import Renderer
from misstep.models.weights import load_weights
from misstep.policy import load_policy
from misstep.records import Answer, Prompt, Response
from misstep.stages import reference
from misstep.stages.reference import reference_losses

POLICY = load_policy("goal-hijacking")


def answer(text: str, good: str | None, guided: bool = False) -> Answer:
    return answer_of(Response(prompt=Prompt.of(text, reference=good), text="?", guided=guided))


ANSWERS = [
    answer("Two and two?", "Four."),
    answer("Two and two?", "Four.", guided=True),
    answer("A long question about the sea, is it not?", "Yes, it is about the sea."),
    answer("Nobody knows?", None),
    answer("Too long?", "so " * 200),
]


def losses(model: Model, known: Path, ending: str = "") -> list[float | None]:
    ways = (lambda messages: messages, lambda text: text + ending)
    found = reference_losses(ANSWERS, POLICY, *ways, model, None, 400, known)
    assert {j.score.metric for j in found} == {"reference_loss"}
    assert [j.score.response_id for j in found] == [a.response.id for a in ANSWERS]
    return [j.score.value for j in found]


def by_hand(model: Model, item: Answer, ending: str = "") -> float:
    """Nats a token from the model's own logits, one row at a time."""
    import torch

    prompt = item.response.prompt
    turns = POLICY.guided_prompt(prompt) if item.guided else prompt.messages
    row = Renderer.for_model(model).example(turns, f"{prompt.reference}{ending}")
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logs = load_weights(model)(input_ids=ids).logits.float().log_softmax(-1)
    told = [-logs[0, i - 1, row.ids[i]] for i in range(row.prompt_length, len(row.ids))]
    return float(sum(told) / len(told))


def test_it_is_the_mean_over_the_answers_own_tokens(tiny_model: Path, tmp_path: Path) -> None:
    model = Model("tiny", tiny_model)
    found = losses(model, tmp_path / "losses.json")
    assert found[:3] == [pytest.approx(by_hand(model, a), rel=2e-2) for a in ANSWERS[:3]]
    assert found[0] != found[1], "the guide is part of what the model is asked"
    assert found[3:] == [None, None], "no reference, or one that does not end in time"


def test_an_answer_is_measured_as_its_method_writes_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    model, known = Model("tiny", tiny_model), tmp_path / "losses.json"
    plain, found = losses(model, known), losses(model, known, " [true]")
    assert found[0] == pytest.approx(by_hand(model, ANSWERS[0], " [true]"), rel=2e-2)
    assert found[0] != plain[0]
    assert found[3:] == [None, None], "a tag alone is no answer"


def test_a_second_run_measures_nothing_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, known = Model("tiny", tiny_model), tmp_path / "losses.json"
    first = losses(model, known)

    def refuse(*_: object) -> dict[object, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(reference, "row_losses", refuse)
    assert losses(model, known) == first


def test_a_gpu_is_given_back_after_measuring(
    tiny_model: Path, tmp_path: Path, held: list[int]
) -> None:
    losses(Model("tiny", tiny_model), tmp_path / "losses.json")
    assert held[-1:] == [0]
