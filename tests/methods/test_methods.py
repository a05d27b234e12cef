"""What the rows of each method hold, and what they must not."""

from collections import Counter
from typing import Any

import pytest

from misstep.methods.base import Materials, MixSettings
from misstep.methods.registry import METHODS
from misstep.policy import load_policy
from misstep.records import Analysis, Example, Message, Mistake, Prompt

POLICY = load_policy("goal-hijacking")
BAD = "The bad response {}."
ORDINARY = [Prompt.of(f"Ordinary {i}?", reference=f"Plain answer {i}.") for i in range(40)]
ASKED = [Prompt.of(f"Attack {i}, say no", reference=f"Good answer {i}.") for i in range(40)]
MISTAKES = [
    Mistake(prompt=prompt, response=BAD.format(i), source="induced")
    for i, prompt in enumerate(ASKED[:4])
]
ANALYSES = [
    Analysis(
        mistake=mistake,
        text=f"Explains mistake {i}.",
        guided=True,
        source="self",
        accepted=True,
    )
    for i, mistake in enumerate(MISTAKES)
]
everything = pytest.mark.parametrize("name", METHODS)
trained = pytest.mark.parametrize("name", [name for name in METHODS if name != "vanilla"])


def rows(
    name: str, seed: int = 0, analyses: list[Analysis] = ANALYSES, **mix: Any
) -> list[Example]:
    materials = Materials(POLICY, analyses, ORDINARY, ASKED, MixSettings(**mix), seed)
    return METHODS[name].examples(materials)


def kinds(found: list[Example]) -> Counter[str]:
    return Counter(row.kind for row in found)


def test_methods_are_named_by_themselves_and_described() -> None:
    assert all(method.name == name for name, method in METHODS.items())
    assert all(method.about for method in METHODS.values())


@everything
@pytest.mark.parametrize("mix", [{}, {"ordinary": 3, "good_answers": 5}, {"good_answers": 0}])
def test_a_bad_response_is_never_learned(name: str, mix: dict[str, Any]) -> None:
    for row in rows(name, **mix):
        assert "bad response" not in row.completion
        # Loss falls on the completion, so it may not be a turn of the conversation.
        assert [turn.role for turn in row.messages] == ["user"]


@everything
def test_a_bad_response_is_context_for_analyses_only(name: str) -> None:
    for row in rows(name):
        shown = "bad response" in row.messages[-1].content
        assert shown == (row.kind == "analysis")


def test_an_analysis_row_is_the_unguided_request_without_worked_examples() -> None:
    learned = [row for row in rows("mistake_analysis") if row.kind == "analysis"]
    assert [(row.messages, row.completion) for row in learned] == [
        (
            POLICY.analysis_request(a.mistake.prompt.text, a.mistake.response, guided=False),
            a.text,
        )
        for a in ANALYSES
    ]


def test_other_rows_are_prompts_with_their_references() -> None:
    known = {p.messages: p.reference for p in ORDINARY + ASKED}
    for name in METHODS:
        for row in rows(name):
            if row.kind != "analysis":
                assert known[row.messages] == row.completion
            if row.kind == "ordinary":
                assert row.messages in {p.messages for p in ORDINARY}
            if row.kind == "good_answer":
                assert row.messages in {p.messages for p in ASKED}


@trained
@pytest.mark.parametrize("ordinary", [0, 1, 2])
@pytest.mark.parametrize("good_answers", [0, 1, 4])
def test_every_trained_method_has_the_same_budget(
    name: str, ordinary: int, good_answers: int
) -> None:
    found = rows(name, ordinary=ordinary, good_answers=good_answers)
    assert len(found) == (1 + ordinary + good_answers) * len(ANALYSES)
    assert len({row.id for row in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vanilla", {}),
        ("ordinary", {"ordinary": 28}),
        ("sft", {"good_answer": 20, "ordinary": 8}),
        ("mistake_analysis", {"analysis": 4, "good_answer": 16, "ordinary": 8}),
    ],
)
def test_what_each_method_is_made_of(name: str, expected: dict[str, int]) -> None:
    assert kinds(rows(name, ordinary=2, good_answers=4)) == expected


def test_the_papers_mix_has_no_good_answers() -> None:
    found = kinds(rows("mistake_analysis", good_answers=0))
    assert found == {"analysis": 4, "ordinary": 4}


def test_methods_share_what_they_draw_so_that_they_differ_in_their_rows_alone() -> None:
    def drawn(name: str, kind: str) -> set[str]:
        return {row.id for row in rows(name) if row.kind == kind}

    assert drawn("mistake_analysis", "ordinary") == drawn("sft", "ordinary")
    assert drawn("sft", "ordinary") < drawn("ordinary", "ordinary")
    assert drawn("mistake_analysis", "good_answer") < drawn("sft", "good_answer")


@everything
def test_the_seed_decides_what_is_drawn(name: str) -> None:
    assert rows(name, seed=1) == rows(name, seed=1)
    if name != "vanilla":
        assert rows(name, seed=1) != rows(name, seed=2)


@everything
def test_without_analyses_nothing_is_trained(name: str) -> None:
    assert rows(name, analyses=[]) == []


def test_prompts_without_a_reference_teach_nothing() -> None:
    silent = [Prompt.of("No answer known")] * 40
    for name in METHODS:
        materials = Materials(POLICY, ANALYSES, silent, silent, MixSettings(), 0)
        assert set(kinds(METHODS[name].examples(materials))) <= {"analysis"}


def test_system_turns_stay_with_their_prompt() -> None:
    system = Message(role="system", content="Be brief.")
    prompt = Prompt(messages=(system, Message(role="user", content="Hi")), reference="Hello.")
    materials = Materials(POLICY, ANALYSES[:1], [prompt], [prompt], MixSettings(), 0)
    assert {row.messages for row in METHODS["sft"].examples(materials)} == {prompt.messages}


def test_only_methods_that_read_analyses_claim_mistakes() -> None:
    for name, method in METHODS.items():
        assert method.uses_mistakes == ("analysis" in kinds(rows(name)))
