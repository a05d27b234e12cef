"""Chat templates that ask a model on any day, and behind any server, as it was trained.

Words are put around the last user turn, as a guide or a marker is, and models that can think
do not. The words become part of the template itself, so that no client has to know them.
Templates that tell the date, as Llama 3.2's and Granite's, tell one and the same.
This module knows Jinja text; it knows no tokenizer and no policy.
"""

import re
from collections.abc import Sequence
from datetime import date

CLOCK = "strftime_now"
"""What templates call for the date, with a format."""
DAY = date(2024, 7, 26)
"""The day that Llama 3.2's template falls back to where there is no clock."""
CODES = (*"aAbBcdFHIjmMpSTxXyY", "-d", "-m")
NOT_THINKING = "{%- set enable_thinking = false %}"
AROUND = """\
{%- set misstep = namespace(last=-1, turns=[]) %}
{%- for turn in messages %}
{%- if turn['role'] == 'user' %}{%- set misstep.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for turn in messages %}
{%- if loop.index0 != misstep.last %}
{%- set misstep.turns = misstep.turns + [turn] %}
{%- elif turn['content'] is string %}
{%- set misstep.turns = misstep.turns + [{'role': 'user', 'content': TEXT}] %}
{%- else %}
{%- set misstep.turns = misstep.turns + [{'role': 'user', 'content': PARTS}] %}
{%- endif %}
{%- endfor %}
{%- set messages = misstep.turns %}"""
"""Rewrites the turns; a turn holds one text, or a list of parts."""


def on_one_day(template: str) -> str:
    """The template with a clock of its own, which stands still, where it asks one."""
    if CLOCK not in template:
        return template
    told = "".join(f".replace('%{code}', '{DAY.strftime('%' + code)}')" for code in CODES)
    # The plus keeps a line end with which the template may begin.
    return f"{{%- macro {CLOCK}(format) %}}{{{{ format{told} }}}}{{% endmacro +%}}{template}"


def asked_as_trained(template: str, words: Sequence[str]) -> str:
    """The template with thinking off and words around what the user says last.

    Args:
        template: a chat template as transformers, vLLM and llama.cpp read it.
        words: at least two texts, between which the user's own stands; `("", "")` adds none.
    """
    template = on_one_day(template)
    if list(words) == ["", ""]:
        return NOT_THINKING + template
    # In one pass: a guide may say TEXT or PARTS itself.
    put = {"TEXT": _text(words), "PARTS": _parts(words)}
    around = re.sub("|".join(put), lambda found: put[found[0]], AROUND)
    return NOT_THINKING + around + template


def _text(words: Sequence[str]) -> str:
    return " ~ turn['content'] ~ ".join(map(_literal, words))


def _parts(words: Sequence[str]) -> str:
    texts = [
        f"[{{'type': 'text', 'text': {_literal(said)}}}]" if said else "[]" for said in words
    ]
    return " + turn['content'] + ".join(texts)


def _literal(text: str) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"})
    return f'"{text.translate(escapes)}"'
