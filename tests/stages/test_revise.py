"""Critique and revision: what is asked, in which order, and what is dropped."""

from collections.abc import Sequence

from misstep.engines.base import Completion, Engine, Request
from misstep.policy import load_policy
from misstep.records import Mistake, Prompt, Revision
from misstep.stages.base import Tally
from misstep.stages.revise import ReviseSettings, revise

POLICY = load_policy("goal-hijacking")
MISTAKES = [
    Mistake(prompt=Prompt.of(f"Question {i}"), response=f"Bad {i}", source="induced")
    for i in range(3)
]


class Writer(Engine):
    """Answers by the number of turns, and keeps what it was asked."""

    identity = "writer"

    def __init__(self, revision: str = "Better", truncated: bool = False) -> None:
        self.asked: list[Request] = []
        self.revision = Completion(text=revision, tokens=1, truncated=truncated)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += requests
        critique = Completion(text="It obeyed.", tokens=2)
        return [critique if len(r.messages) == 3 else self.revision for r in requests]


def run(mistakes: list[Mistake], engine: Writer) -> tuple[list[Revision], Tally]:
    tally = Tally()
    return list(revise(mistakes, POLICY, engine, ReviseSettings(), 0, tally)), tally


def test_the_revision_is_asked_for_after_the_critique() -> None:
    engine = Writer()
    found, _ = run(MISTAKES, engine)
    assert [(r.mistake, r.critique, r.text) for r in found] == [
        (mistake, "It obeyed.", "Better") for mistake in MISTAKES
    ]
    last = engine.asked[-1].messages
    assert [turn.role for turn in last] == ["user", "assistant"] * 2 + ["user"]
    assert [turn.content for turn in last[:4]][::2] == ["Question 2", POLICY.critique.critique]
    assert [turn.content for turn in last[1:4]][::2] == ["Bad 2", "It obeyed."]


def test_seeds_differ_from_mistake_to_mistake_and_do_not_change() -> None:
    one, other = Writer(), Writer()
    run(MISTAKES, one)
    run(MISTAKES, other)
    assert one.asked == other.asked
    assert len({request.seed for request in one.asked}) == 6


def test_broken_and_empty_revisions_and_candidates_are_dropped() -> None:
    cut, tally = run(MISTAKES, Writer(truncated=True))
    assert (cut, tally.refused) == ([], {"broken off at the token limit": 3})
    empty, tally = run(MISTAKES, Writer(" "))
    assert (empty, tally.refused) == ([], {"empty": 3})
    reported = [m.model_copy(update={"confirmed": False}) for m in MISTAKES]
    assert run(reported, Writer()) == ([], Tally())
