"""Test prompts that are learned from, too, are counted; those of shipped recipes never are."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from test_architecture import RECIPES, configs

from misstep.config import RunConfig
from misstep.data.held_out import largest, overlaps, told
from misstep.data.sources import Source, load_prompts
from misstep.records import Message, Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.of(text) for text in texts]


def test_a_question_is_known_again_whatever_stands_beside_it() -> None:
    tests = {
        "one": prompts("What  is RAIN?", "what is rain?", "Else?", "Snow?"),
        "two": prompts("Else?"),
        "none": prompts("What is rain"),
    }
    learned = {
        "mistakes.data": prompts("What is rain?", "What is rain?", "Other"),
        "ordinary": [Prompt.of("else?", reference="Yes."), *prompts("what IS rain?")],
        "helpful_pairs": prompts("Nothing of it"),
    }
    found = overlaps(tests, {key: iter(each) for key, each in learned.items()})
    assert found == {
        "one": {"mistakes.data": 2, "ordinary": 3},
        "two": {"ordinary": 1},
    }
    assert next(told(found)) == "2 of the prompts of one are asked in mistakes.data, too"


def test_the_whole_conversation_is_the_question() -> None:
    turns = [Message(role="user", content="Hi"), Message(role="assistant", content="Yes?")]
    long = Prompt(messages=(*turns, Message(role="user", content="What is rain?")))
    assert overlaps({"a": [long]}, {"b": prompts("What is rain?")}) == {}


def test_of_several_runs_the_largest_numbers_are_told() -> None:
    found = largest([{}, {"a": {"x": 2}}, {"a": {"x": 1, "y": 1}, "b": {"x": 1}}])
    assert found == {"a": {"x": 2, "y": 1}, "b": {"x": 1}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_test_on_what_is_held_out(path: Path) -> None:
    for config in configs(path)[:1]:
        if isinstance(config, RunConfig):
            sources = config.sources()
            tests = {k: _loaded(s) for k, s in sources.items() if k.startswith("evaluate.")}
            learned = {k: _loaded(s) for k, s in sources.items() if k not in tests}
            assert overlaps(tests, learned) == {}


def _loaded(source: Source) -> Sequence[Prompt]:
    """What every machine has: the shipped suites."""
    return load_prompts(source, 0) if source.suite else ()
