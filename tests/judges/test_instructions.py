"""IFEval's checks as a judge."""

import sys
from pathlib import Path
from typing import Any

import pytest
from made import answer_of

from misstep.data.sources import Source, load_prompts
from misstep.errors import DataError, InputError
from misstep.evidence.results import Row
from misstep.judges.instructions import InstructionJudge, check_instructions
from misstep.judges.seats import Seat
from misstep.records import Instruction, Prompt, Response, write_text
from misstep.stages.evaluate import Table, judge_answers

IFEVAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "ifeval" / "input_data.jsonl"
NO_COMMA = Instruction(name="punctuation:no_comma")
WORDS = Instruction(
    name="length_constraints:number_words",
    arguments={"relation": "at least", "num_words": 3},
)
ENDS = Instruction(name="startend:end_checker", arguments={"end_phrase": "The end."})


def prompt(number: int, *instructions: Instruction) -> Prompt:
    return Prompt.of(f"Write text {number}.", instructions=instructions)


def table(texts: dict[str, list[tuple[Prompt, str]]]) -> Table:
    pytest.importorskip("if_verifiable", reason="needs the extra misstep[ifeval]")
    answers = [
        answer_of(Response(prompt=asked, text=text), method)
        for method, of in texts.items()
        for asked, text in of
    ]
    return Table(answers, judge_answers(answers, [Seat(InstructionJudge())]), {}, 0)


def rows(found: Table) -> list[Row]:
    return found.rows(lambda _: {"mistake_source": None, "analysis_source": None})


def test_prompts_and_instructions_are_counted_apart() -> None:
    asked = [prompt(1, NO_COMMA, WORDS, ENDS), prompt(2, NO_COMMA), prompt(3, WORDS)]
    texts = ["one two, three", "a, b", "one two three"]
    (row,) = rows(table({"vanilla": list(zip(asked, texts, strict=True))}))
    values = {name: (m.value, m.n) for name, m in row.metrics.items()}
    assert values == {
        "instruction_following": (1 / 3, 3),
        "instruction_following_loose": (1 / 3, 3),
        "instructions_followed": (2 / 5, 5),
        "instructions_followed_loose": (2 / 5, 5),
    }


def test_loose_forgives_a_last_line() -> None:
    (row,) = rows(table({"vanilla": [(prompt(1, ENDS), "So it goes.\nThe end.\nDone?")]}))
    values = {name: m.value for name, m in row.metrics.items()}
    assert values["instruction_following"] == values["instructions_followed"] == 0
    assert values["instruction_following_loose"] == values["instructions_followed_loose"] == 1


def test_instructions_of_one_prompt_are_no_independent_cases() -> None:
    """All of a prompt's instructions stand or fall together: three say no more than one."""
    good, bad = "one two three", "a, b"
    many = [(prompt(i, NO_COMMA, WORDS, WORDS), good if i % 2 else bad) for i in range(20)]
    one = [(prompt(i, WORDS), good if i % 2 else bad) for i in range(20)]
    wide, same = (
        next(iter(rows(table({"vanilla": of})))).metrics["instructions_followed"]
        for of in (many, one)
    )
    assert (wide.n, same.n) == (60, 20)
    assert wide.low is not None
    assert same.low is not None
    assert wide.high is not None
    assert same.high is not None
    assert wide.high - wide.low >= 0.95 * (same.high - same.low)


def test_a_difference_is_that_of_the_two_rates() -> None:
    asked = [prompt(1, NO_COMMA, WORDS, ENDS), prompt(2, NO_COMMA)]
    found = table(
        {
            "vanilla": [(asked[0], "a, b"), (asked[1], "well")],
            "sft": [(asked[0], "one two three. The end."), (asked[1], "a, b")],
        }
    )
    of = {row.method: row.metrics["instructions_followed"].value for row in rows(found)}
    assert of == {"vanilla": 1 / 4, "sft": 3 / 4}
    (difference,) = (
        c.difference for c in found.comparisons("sft") if c.metric == "instructions_followed"
    )
    assert difference == pytest.approx(1 / 2)


def test_an_empty_answer_follows_nothing_and_a_missing_one_is_unscored() -> None:
    found = table({"vanilla": [(prompt(1, NO_COMMA, WORDS), "")]})
    assert {m.value for row in rows(found) for m in row.metrics.values()} == {0.0}
    gone = answer_of(Response(prompt=prompt(1, WORDS), text="", error="no server"))
    scores = [j.score for j in judge_answers([gone], [Seat(InstructionJudge())])]
    assert [score.value for score in scores] == [None] * 4


@pytest.mark.parametrize("kwargs", ["[]", "[1]", "3"])
def test_broken_arguments_name_the_line(tmp_path: Path, kwargs: str) -> None:
    path = tmp_path / "p.jsonl"
    row = f'{{"prompt": "?", "instruction_id_list": ["a:b"], "kwargs": {kwargs}}}'
    write_text(path, row)
    with pytest.raises(DataError, match=r"line 1.*instruction_id_list"):
        load_prompts(Source(path=str(path)), 0)


def test_an_unknown_instruction_is_refused_before_a_model_loads() -> None:
    pytest.importorskip("if_verifiable", reason="needs the extra misstep[ifeval]")
    with pytest.raises(InputError, match="no:such"):
        check_instructions([prompt(1, Instruction(name="no:such"))])


@pytest.mark.parametrize("package", ["if_verifiable.ifeval.instructions_registry"])
def test_without_the_package_the_error_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from misstep.judges import instructions

    instructions._registry.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'pip install "misstep\[ifeval\]"'):
        check_instructions([prompt(1, WORDS)])
    check_instructions([prompt(1)])


def test_without_the_sentences_the_error_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("if_verifiable", reason="needs the extra misstep[ifeval]")
    import nltk

    def absent(name: str) -> Any:
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", absent)
    with pytest.raises(InputError, match=r"nltk\.downloader punkt_tab"):
        check_instructions([prompt(1, WORDS)])


def test_ifevals_own_prompts_need_no_mapping() -> None:
    if not IFEVAL.is_file():
        pytest.skip("IFEval is not in ../shared/data, which is not part of the project")
    found = load_prompts(Source(path=str(IFEVAL)), 0)
    assert sum(len(p.instructions) for p in found) == 834
    assert all(p.instructions for p in found)
