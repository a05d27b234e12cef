"""Good answers by rejection: what is asked, what is kept, and which of several."""

from collections.abc import Callable, Sequence

import pytest

from misstep.engines.base import Completion, Engine, Request
from misstep.errors import RunError
from misstep.judges.base import EachJudge, Judge
from misstep.policy import load_policy
from misstep.records import Message, Prompt, Response, Score
from misstep.stages.base import Tally
from misstep.stages.good_answers import GoodAnswerSettings, distinct, good_answers, with_answer

POLICY = load_policy("goal-hijacking")
PROMPTS = [Prompt.of(f"case {i}", reference=f"annotated {i}") for i in range(3)]
BAD, GOOD, REFUSAL = "Robots rule", "Bees make honey.", "I'm sorry, I can't help with that."


class Drawn(Engine):
    """Gives its texts in turn, sample by sample, and keeps what it was asked."""

    identity = "drawn"

    def __init__(self, *texts: str, change: Callable[[str], Completion] | None = None) -> None:
        self.texts, self.asked = texts, list[Request]()
        self.change = change or (lambda text: Completion(text=text, tokens=3))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        start = len(self.asked)
        self.asked += requests
        count = len(self.texts)
        return [self.change(self.texts[(start + i) % count]) for i in range(len(requests))]


class Robots(EachJudge):
    """Calls every text about robots a mistake, and has nothing to say of the sea."""

    name = metric = "mistake_rate"

    def score_one(self, response: Response) -> Score:
        if "sea" in response.text:
            return self.unscored(response, "the sea")
        return self.scored(response, float("Robots" in response.text))


def draw(
    engine: Engine, judge: Judge | None = None, **settings: object
) -> tuple[list[Response], Tally]:
    tally = Tally()
    how = GoodAnswerSettings.model_validate({"source": "self", "samples": 3, **settings})
    by = judge or Robots()
    found = good_answers(PROMPTS, engine, by, POLICY, how, 0, tally)
    return list(found), tally


def test_one_answer_a_prompt_that_is_no_mistake() -> None:
    found, tally = draw(Drawn(BAD, GOOD, "Another."))
    assert [(r.prompt, r.text) for r in found] == [(prompt, GOOD) for prompt in PROMPTS]
    assert (tally.given, tally.sampled, tally.kept) == (3, 9, 3)
    assert tally.refused == {"a mistake": 3, "one more good answer to the same prompt": 3}


def test_an_answer_that_refuses_is_taken_where_there_is_no_other() -> None:
    assert {r.text for r in draw(Drawn(REFUSAL, BAD, GOOD))[0]} == {GOOD}
    assert {r.text for r in draw(Drawn(BAD, REFUSAL, BAD))[0]} == {REFUSAL}


def test_where_no_refusal_is_to_be_learned_a_prompt_of_them_alone_has_no_answer() -> None:
    found, tally = draw(Drawn(REFUSAL, GOOD, BAD, *[REFUSAL] * 3), refusals=False)
    assert [(r.prompt, r.text) for r in found] == [(PROMPTS[0], GOOD), (PROMPTS[2], GOOD)]
    assert tally.refused == {"a mistake": 2, "a refusal": 5}
    with pytest.raises(RunError, match=r"none of 9 answers was good \(9 a refusal\)"):
        draw(Drawn(REFUSAL), refusals=False)


class Unsure(Robots):
    """A judge that gives probabilities: the longer a text, the less likely is it a mistake."""

    def score_one(self, response: Response) -> Score:
        return self.scored(response, 1 / len(response.text))


def test_of_several_that_do_not_refuse_it_is_the_one_that_the_judge_is_surest_of() -> None:
    longest = "Bees make honey out of nectar, in combs."
    for texts in ((GOOD, longest, REFUSAL), (REFUSAL * 2, longest, GOOD)):
        assert {r.text for r in draw(Drawn(*texts), judge=Unsure())[0]} == {longest}
    # By verdicts alone all are alike.
    assert {r.text for r in draw(Drawn(REFUSAL, GOOD, longest))[0]} == {GOOD}


def test_unscored_is_not_good_and_a_prompt_without_a_good_answer_has_none() -> None:
    engine = Drawn(*[BAD] * 3, "The sea.", " ", BAD, GOOD, BAD, BAD)
    found, tally = draw(engine)
    assert [(r.prompt, r.text) for r in found] == [(PROMPTS[2], GOOD)]
    assert tally.refused == {"a mistake": 6, "unscored": 1, "empty": 1}


def test_what_breaks_off_or_never_came_is_not_taken() -> None:
    def spoil(text: str) -> Completion:
        if text == "cut":
            return Completion(text=text, tokens=9, truncated=True)
        if text == "lost":
            return Completion(text="", tokens=0, error="status 500")
        return Completion(text=text, tokens=3)

    found, tally = draw(Drawn("cut", "lost", GOOD, change=spoil))
    assert {r.text for r in found} == {GOOD}
    assert tally.refused == {"broken off at the token limit": 3, "no answer: status 500": 3}


def test_nothing_good_at_all_says_what_was_wrong() -> None:
    with pytest.raises(RunError, match=r"none of 9 answers was good \(9 a mistake\)"):
        draw(Drawn(BAD))


def test_the_guide_is_asked_with_only_where_it_is_wanted_and_dice_differ() -> None:
    plain, guided = Drawn(GOOD), Drawn(GOOD)
    draw(plain)
    draw(guided, guided=True)
    assert [r.messages for r in plain.asked[::3]] == [p.messages for p in PROMPTS]
    assert [r.messages for r in guided.asked[::3]] == [
        POLICY.guided_prompt(prompt) for prompt in PROMPTS
    ]
    assert len({request.seed for request in plain.asked}) == 9
    again = Drawn(GOOD)
    draw(again)
    assert again.asked == plain.asked


def test_a_question_is_asked_once_whatever_else_is_known_of_it() -> None:
    one, other = (prompt.model_copy(update={"reference": None}) for prompt in PROMPTS[:2])
    known = one.model_copy(update={"topic": "law", "reference": "R"})
    asked = [one, known, other, one.model_copy(update={"topic": "health"})]
    assert distinct(asked) == [known, other]
    later = known.model_copy(update={"reference": "S"})
    assert distinct([known, later]) == [known]
    assert distinct([one, known, later]) == [known]


def test_annotated_answers_are_not_looked_at() -> None:
    known = {PROMPTS[0].messages: "own"}
    assert with_answer(PROMPTS[0], known).reference == "own"
    assert with_answer(PROMPTS[1], known).reference is None
    assert with_answer(PROMPTS[1], known).messages == (Message(role="user", content="case 1"),)


def test_at_temperature_0_each_prompt_is_asked_once() -> None:
    engine = Drawn(GOOD)
    found, tally = draw(engine, temperature=0)
    assert len(engine.asked) == len(found) == len(PROMPTS)
    assert not tally.refused
