"""Pairs on helpfulness: read from data, and given to RLHF beside the mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from misstep.data.preferred import load_preferred
from misstep.data.sources import Source
from misstep.errors import DataError


def source(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> Source:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), **more)


def answers(found: Source) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in load_preferred(found, 0)]


def test_chosen_is_preferred_and_equal_answers_and_pairs_are_left_out(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    same = row | {"rejected": "good"}
    assert answers(source(tmp_path, row, same, row)) == [("good", "bad")]
    (pair,) = load_preferred(source(tmp_path, row), 0)
    assert [m.content for m in pair.messages] == ["p"] and pair.kind == "helpful"


@pytest.mark.parametrize(("better", "expected"), [(0, ("a", "b")), (1, ("b", "a"))])
def test_pku_pairs_go_by_helpfulness_and_not_by_safety(
    tmp_path: Path, better: int, expected: tuple[str, str]
) -> None:
    row = {
        "prompt": "p",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": better,
        "safer_response_id": 1,
    }
    assert answers(source(tmp_path, row)) == [expected]


def test_columns_can_be_mapped(tmp_path: Path) -> None:
    found = source(
        tmp_path,
        {"q": "p", "up": "x", "down": "y"},
        fields={"prompt": "q", "reference": "up", "response": "down"},
    )
    assert answers(found) == [("x", "y")]


def test_pairs_of_turns_share_their_conversation(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "p"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("x", "y"))
    for row in (
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"chosen": asked + good, "rejected": asked + bad},
    ):
        (pair,) = load_preferred(source(tmp_path, row), 0)
        assert [m.content for m in pair.messages] == ["p"]
        assert (pair.chosen, pair.rejected) == ("x", "y")
    longer = {"chosen": asked + good, "rejected": asked + bad + asked + bad}
    with pytest.raises(DataError, match="line 1: expected two answers to one conversation"):
        load_preferred(source(tmp_path, longer), 0)


def test_only_the_wanted_questions_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "x", "rejected": "y"} for i in range(200)]
    low, high = (
        len(answers(source(tmp_path, *rows, questions=q))) for q in ((0, 0.3), (0.3, 1))
    )
    assert low + high == 200 and 35 < low < 85


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "chosen": "x"}, "field 'response' is missing"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "found none"),
        (
            {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
            "expected 0 or 1, found '2'",
        ),
        (
            {"prompt": "p", "response_0": "a", "response_1": "", "better_response_id": 0},
            "'response_1': expected text",
        ),
    ],
)
def test_what_is_no_pair_is_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        load_preferred(source(tmp_path, row), 0)


def test_a_suite_has_no_pairs() -> None:
    with pytest.raises(DataError, match="a suite has none"):
        load_preferred(Source(suite="goal-hijacking", split="train"), 0)
