from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from misstep.documents import check, read_yaml, suggestion
from misstep.errors import PolicyError, RecipeError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rounds: int = Field(1, ge=1)
    either: int | tuple[str, ...] = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[a-z]+$")]
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    listed: tuple[Inner, ...] = ()
    patterns: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)


def load(folder: Path, text: str) -> Outer:
    path = folder / "doc.yaml"
    path.write_text(text, encoding="utf-8")
    data, lines = read_yaml(path, RecipeError)
    return check(Outer, data, RecipeError, str(path), lines)


def test_a_right_document_becomes_its_schema(tmp_path: Path) -> None:
    found = load(tmp_path, "name: x\nnamed: {a: {rounds: 3}}\nlisted:\n- rounds: 2\n")
    assert (found.named["a"].rounds, found.listed[0].rounds, found.inner.rounds) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\ninner:\n  round: 2\n", "line 3: unknown key 'inner.round'. Did you mean"),
        ("name: x\nnamed:\n  a:\n    runds: 2\n", "line 4: unknown key 'named.a.runds'. Did"),
        ("name: x\nlisted:\n- {}\n- rouns: 2\n", "line 4: unknown key 'listed.1.rouns'. Did"),
        ("name: x\nzzz: 2\n", "line 2: unknown key 'zzz'. Known here: inner, listed, name"),
        ("inner: {}\n", "the key 'name' is missing"),
        ("name: x\ninner:\n  rounds: many\n", "line 3: 'inner.rounds': expected a whole"),
        ("name: x\ninner:\n  rounds: 0\n", "expected 1 or more (found 0)"),
        ("name: x\ninner: 5\n", "line 2: 'inner': expected keys with values (found 5)."),
        # The names that pydantic gives to the members of a union are no keys of the user's.
        ("name: x\ninner:\n  either: {}\n", "line 3: 'inner.either': expected a"),
        ("name: x\n\nname: y\n", "line 3: the key 'name' stands on line 1 already"),
        (
            "name: x\ninner: {rounds: 1,\n  rounds: 2}\n",
            "'inner.rounds' stands on line 2 already",
        ),
        ("name: [1\nother: 2\n", "no valid YAML. Line 2"),
        ("name: 2026-13-45\n", "no valid YAML (month must be"),
        ("name: &a [*a]\n", "a value without an end"),
        ("name: " + 2000 * "[" + "\n", "a value without an end"),
        ("- name\n", "expected keys with values, found a list"),
        ("", "found an empty file"),
        ("name: A b\n", "line 1: 'name': expected text that matches ^[a-z]+$ (found 'A b')"),
        ("name: x\npatterns: []\n", "line 2: 'patterns': expected at least 1 of them"),
        ("name: yes\n", "true or false (yes, no, on, off, too): put it in quotes (found True)"),
        ("name: 2026-01-02\n", "a date, or true or false"),
        ("name: [a]\n", "line 1: 'name': expected text (found ['a'])"),
        ("1: x\nname: x\n", "'1': Keys should be strings"),
    ],
)
def test_a_wrong_document_is_told_where_and_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "doc.yaml"))


def test_all_faults_are_named_at_once_a_line_each(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "inner:\n  rounds: x\n  extra: 1\nlisted: 3\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(str(tmp_path / "doc.yaml")) for line in lines)


def test_a_list_with_a_broken_member_is_not_called_too_short(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "name: x\npatterns:\n- many\n")
    (line,) = str(caught.value).splitlines()
    assert "line 3: 'patterns.0': expected a whole number (found 'many')" in line


def test_the_caller_chooses_the_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"absent\.yaml: cannot be read"):
        read_yaml(tmp_path / "absent.yaml", PolicyError)
    (tmp_path / "latin.yaml").write_bytes("name: ä".encode("latin-1"))
    with pytest.raises(PolicyError, match="expected UTF-8"):
        read_yaml(tmp_path / "latin.yaml", PolicyError)


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("epoch", ["epochs", "seed"], " Did you mean 'epochs'?"),
        ("zzz", ["b", "a"], " Known here: a, b."),
        ("zzz", [], ""),
    ],
)
def test_a_suggestion_is_close_or_a_list(word: str, known: list[Any], said: str) -> None:
    assert suggestion(word, known) == said
