import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from misstep.errors import DataError
from misstep.records import (
    Message,
    Mistake,
    Prompt,
    Score,
    digest,
    read_jsonl,
    text_digest,
    write_jsonl,
    write_text,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
prompts = st.builds(
    Prompt,
    messages=st.lists(st.builds(Message, role=st.just("user"), content=text), min_size=1),
    reference=st.none() | text,
    accept=st.lists(text, max_size=3),
    target=st.none() | text,
    kind=text,
)
mistakes = st.builds(
    Mistake, prompt=prompts, response=text, source=st.sampled_from(["origin", "induced"])
)


@given(mistakes, mistakes)
def test_records_are_named_by_content_alone(a: Mistake, b: Mistake) -> None:
    assert a.id == Mistake.model_validate(a.model_dump(mode="json")).id
    assert (a.id == b.id) == (a == b)


def test_a_name_is_the_same_in_every_process() -> None:
    code = "from misstep.records import Prompt; print(Prompt.of('é', accept=('1', '2')).id)"
    for seed in ("1", "2"):
        shown = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.strip() == Prompt.of("é", accept=("1", "2")).id


def test_the_order_of_keys_names_nothing_and_the_order_of_items_does() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner),
    )
)
def test_the_fast_name_is_the_name(value: Any) -> None:
    assert text_digest(value) == digest(value)


def test_names_of_fractions_are_those_that_python_writes() -> None:
    # Settings are named with them; read from files of version 0.1.
    assert digest({"learning_rate": 5e-05}) == "a889e0da98dfcf14"


def test_a_changed_copy_has_a_name_of_its_own() -> None:
    record = Prompt.of("one")
    assert record.id != record.model_copy(update={"kind": "attack"}).id
    assert record.id == Prompt.of("one").id


def test_records_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        Prompt.of("one").kind = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Prompt.of("one", refrence="two")


def test_a_mistake_that_was_cut_is_the_same_mistake() -> None:
    whole = Mistake(prompt=Prompt.of("p"), response="r", source="induced")
    cut = whole.model_copy(update={"truncated": True})
    assert cut.id == whole.id == "9c90ebd77611a193"
    assert cut != whole and Mistake.model_validate_json(cut.model_dump_json()) == cut
    assert "truncated" not in whole.model_dump_json()
    assert Mistake.model_validate_json(whole.model_dump_json()) == whole


def test_the_text_of_a_conversation_is_its_last_user_turn() -> None:
    turns = [("system", "s"), ("user", "first"), ("assistant", "a"), ("user", "last")]
    messages = tuple(Message.model_validate({"role": r, "content": c}) for r, c in turns)
    assert Prompt(messages=messages).text == "last"


def test_a_score_of_nought_is_a_score() -> None:
    assert Score(response_id="r", metric="m", value=0.0, judge="j").scored
    assert not Score(response_id="r", metric="m", value=None, judge="j").scored


@given(st.lists(mistakes, max_size=4))
def test_jsonl_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Mistake]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "new" / "m.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path, Mistake)) == rows
    assert len(path.read_bytes().splitlines()) == len(rows)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_jsonl(path, [Prompt.of("old")])

    def broken() -> Any:
        yield Prompt.of("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert [p.text for p in read_jsonl(path, Prompt)] == ["old"]


def test_text_is_replaced_in_one_step_and_nothing_is_left_over(tmp_path: Path) -> None:
    for content in ("one", "zwei ü"):
        write_text(tmp_path / "deep" / "a.txt", content)
        assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_several_may_replace_a_text_at_once(tmp_path: Path) -> None:
    texts = [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(partial(write_text, tmp_path / "a.txt"), texts * 25))
    assert (tmp_path / "a.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "half a character: \ud83d")
    assert list(tmp_path.iterdir()) == []


GOOD = Prompt.of("fine").model_dump_json()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', ["line 3", "no JSON"]),
        ("[1, 2]", ["line 3", "expected a JSON object", "list"]),
        ('{"messages": [], "topic": 7}', ["line 3", "topic", "string", "7"]),
        ('{"topic": "t"}', ["line 3", "messages", "required"]),
        ('{"messages": [], "colour": "red"}', ["line 3", "colour", "red"]),
        ('{"messages": [{"role": "boss", "content": ""}]}', ["messages.0.role", "'boss'"]),
        ('{"messages": [], "topic": "\\ud83d"}', ["line 3", "topic", "\\ud83d"]),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: str, said: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path, Prompt))
    assert all(part in str(caught.value) for part in [str(path), *said])


def test_all_bad_fields_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"kind": 1, "topic": 2}))
    with pytest.raises(DataError, match=r"messages.*kind.*topic"):
        list(read_jsonl(tmp_path / "rows.jsonl", Prompt))


@pytest.mark.parametrize("content", [None, "prompt: ä".encode("latin-1")])
def test_an_absent_file_and_a_wrong_encoding_are_wrong_input(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        list(read_jsonl(path, Prompt))
