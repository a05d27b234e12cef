"""Scores that are kept: read once, the same to the last bit, never another judge's."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from misstep.engines.store import CACHE, Store
from misstep.judges.base import Judge
from misstep.judges.kept import AT_ONCE, KeptJudge
from misstep.records import Message, Prompt, Response, Score

ASKED = [Prompt.of("What do bees make?"), Prompt.of("What do bees make?", topic="bees")]
ANSWERS = [Response(prompt=ASKED[0], text=text) for text in ("Honey.", "Wax.", "Nothing.")]


class Counting(Judge):
    """Gives a number that no few digits hold, nothing to one text, and counts what it read."""

    metric = "mistake_rate"

    def __init__(self, name: str = "counting") -> None:
        self.name = name
        self.read: list[str] = []

    def score(self, responses: Sequence[Response]) -> list[Score]:
        self.read += [response.text for response in responses]
        return [
            self.unscored(r, "nothing to say")
            if r.text == "Nothing."
            else self.scored(r, 1 / (3 + len(r.text)), "read in 2 parts")
            for r in responses
        ]


def test_what_was_scored_is_not_read_again_and_is_the_same(tmp_path: Path) -> None:
    plain, first, second = Counting(), Counting(), Counting()
    wanted = plain.score(ANSWERS)
    assert KeptJudge(first, tmp_path / CACHE).score(ANSWERS) == wanted
    assert KeptJudge(second, tmp_path / CACHE).score([*ANSWERS, *ANSWERS]) == wanted * 2
    assert first.read == plain.read
    # What got no score is read again, once for all that are equal.
    assert second.read == ["Nothing."]


def test_what_was_scored_before_a_kill_is_kept(tmp_path: Path) -> None:
    class Killed(Counting):
        def score(self, responses: Sequence[Response]) -> list[Score]:
            if self.read:
                raise KeyboardInterrupt
            return super().score(responses)

    many = [Response(prompt=ASKED[0], text=f"{number}") for number in range(AT_ONCE + 3)]
    with pytest.raises(KeyboardInterrupt):
        KeptJudge(Killed(), tmp_path / CACHE).score(many)
    again = Counting()
    assert KeptJudge(again, tmp_path / CACHE).score(many) == Counting().score(many)
    assert again.read == [response.text for response in many[AT_ONCE:]]


def test_a_score_is_told_of_the_answer_that_was_asked_about(tmp_path: Path) -> None:
    judge = Counting()
    kept = KeptJudge(judge, tmp_path / CACHE)
    guided = ANSWERS[0].model_copy(update={"guided": True, "model": "another"})
    labelled = ANSWERS[0].model_copy(update={"prompt": ASKED[1]})
    scores = kept.score([ANSWERS[0], guided]) + kept.score([labelled])
    assert [score.response_id for score in scores] == [
        response.id for response in (ANSWERS[0], guided, labelled)
    ]
    assert len({score.response_id for score in scores}) == 3
    assert judge.read == ["Honey."]


def test_another_judge_another_answer_and_another_turn_are_read(tmp_path: Path) -> None:
    kept = tmp_path / CACHE
    KeptJudge(Counting(), kept).score(ANSWERS[:1])
    other = Counting("another")
    KeptJudge(other, kept).score(ANSWERS[:1])
    assert other.read == ["Honey."]
    turns = (Message(role="user", content="Hello."), *ASKED[0].messages)
    longer = Response(prompt=Prompt(messages=turns), text="Honey.")
    judge = Counting()
    KeptJudge(judge, kept).score([ANSWERS[0], longer, ANSWERS[1]])
    assert judge.read == ["Honey.", "Wax."]
    with Store(kept) as store:
        assert [(h.identity, h.answers) for h in store.holdings()] == [
            ("counting", 3),
            ("another", 1),
        ]


def test_what_a_judge_says_beside_its_score_is_its_own(tmp_path: Path) -> None:
    class Further(Counting):
        def applies(self, prompt: Prompt) -> bool:
            return prompt.topic == "bees"

        def further(self, response: Response, score: Score) -> list[Score]:
            return [score.model_copy(update={"metric": "beside"})]

    kept = KeptJudge(Further(), tmp_path / CACHE)
    assert [kept.applies(prompt) for prompt in ASKED] == [False, True]
    (score,) = kept.score(ANSWERS[:1])
    assert [s.metric for s in kept.further(ANSWERS[0], score)] == ["beside"]
    assert (kept.name, kept.metric, kept.votes) == ("counting", "mistake_rate", 1)
