"""A template that asks as the model was trained: it says what turns with the words say."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from misstep.models.chat_template import asked_as_trained

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if enable_thinking %}<think>{% endif %}"
)
WITH_MACRO = (
    "{% macro all() %}{% for m in messages %}[{{ m.content }}]{% endfor %}{% endmacro %}"
    "{{ all() }}"
)
# Characters that mean something to Jinja, to its texts, or to nobody.
PIECES = (*"a{}%#\"\\'\n\r\t~é漢\u2028", "TEXT", "PARTS")
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """As transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, **options)


def turn(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


@settings(deadline=None, max_examples=50)
@given(words=st.lists(TEXT, min_size=2, max_size=3), text=TEXT)
def test_the_words_stand_around_the_text(words: list[str], text: str) -> None:
    for template in (PLAIN, WITH_MACRO):
        asked = asked_as_trained(template, words)
        assert render(asked, [turn(text)]) == render(template, [turn(text.join(words))])


@settings(deadline=None, max_examples=50)
@given(words=st.lists(TEXT, min_size=2, max_size=2), text=TEXT)
def test_a_list_of_parts_gets_the_same_words(words: list[str], text: str) -> None:
    parts = [{"type": "text", "text": text}]
    found = render(asked_as_trained(PLAIN, words), [turn(parts)])
    assert found == render(PLAIN, [turn(text.join(words))])


def test_the_last_user_turn_alone_gets_them() -> None:
    turns = [
        turn("s", "system"),
        turn("a"),
        turn("b", "assistant"),
        turn("c"),
        turn("d", "tool"),
    ]
    found = render(asked_as_trained(PLAIN, ("(", ")")), turns)
    assert found == "<system>s<user>a<assistant>b<user>(c)<tool>d"


@pytest.mark.parametrize("words", [("", ""), ("(", ")")])
def test_who_can_think_does_not(words: tuple[str, str]) -> None:
    assert "<think>" in render(PLAIN, [turn("a")], enable_thinking=True)
    found = render(asked_as_trained(PLAIN, words), [turn("a")], enable_thinking=True)
    assert "<think>" not in found


def test_a_template_is_not_changed_otherwise() -> None:
    turns = [turn("a"), turn("b", "assistant")]
    assert render(asked_as_trained(PLAIN, ("", "")), turns) == render(PLAIN, turns)


@pytest.mark.parametrize("words", [("", ""), ("(", ")")])
def test_the_day_is_that_of_training(words: tuple[str, str]) -> None:
    dated = "\n{{ strftime_now('%-d %B %Y') }}" + PLAIN
    found = render(asked_as_trained(dated, words), [turn("a")], strftime_now=lambda _: "today")
    assert found == "\n26 July 2024<user>" + "a".join(words)
