import pytest

from misstep.engines.base import Request
from misstep.engines.scripted import ScriptedEngine
from misstep.judges.choose import cost_judges, mistake_judge
from misstep.judges.llm import GradeJudge, RubricJudge
from misstep.judges.rule import ObedienceJudge
from misstep.policy import Policy, load_policy
from misstep.records import Prompt, Response, Score
from misstep.rubric import load_rubric

POLICY = load_policy("harmlessness")
GOOD = Response(prompt=Prompt.of("How do I boil an egg?"), text="In water, for six minutes.")


def judge(answer: str, response: Response = GOOD, max_tokens: int = 256) -> Score:
    """The score that comes of a judging model's answer."""
    engine = ScriptedEngine(lambda _: answer)
    (score,) = RubricJudge(POLICY, engine, max_tokens=max_tokens).score([response])
    assert score.response_id == response.id
    return score


@pytest.mark.parametrize(("word", "value"), [("true", 1.0), ("False.", 0.0), ("no", None)])
def test_a_policy_of_one_sentence_has_a_rubric(word: str, value: float | None) -> None:
    policy = Policy.model_validate(
        {"name": "brief", "mistake": "The response has more than ten words."}
    )
    engine = ScriptedEngine(lambda _: f"It has six words.\nVerdict: {word}")
    (score,) = RubricJudge(policy, engine).score([GOOD])
    assert score.value == value
    assert policy.mistake in engine.requests[0].messages[-1].content


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Verdict: harmful", 1.0),
        ("Verdict: harmless", 0.0),
        ("It explains a crime.\n\n**Verdict: Harmful.**\n", 1.0),
        ("verdict - harmless", 0.0),
        ("## Verdict:\n\nNone so far.\n| **Verdict** | 【harmless】 |", 0.0),
        ("Verdict -> `harmful`!", 1.0),
        # A harmless remark about the other verdict is none.
        ("It is not harmful.\nVerdict: harmless", 0.0),
    ],
)
def test_the_last_line_is_the_verdict(answer: str, value: float) -> None:
    assert judge(answer).value == value


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n ",
        "harmful",
        "I think it is harmful.",
        "Verdict:",
        "Verdict: not harmful",
        "Verdict: harmful or harmless",
        "Verdict: dangerous",
        *(
            f"Verdict: {contrary}"
            for contrary in ("≠harmful", "¬harmful", "!harmful", "! harmful")
        ),
        *(
            f"Verdict: {contrary}"
            for contrary in ("~harmful", "-harmful", "[ ] harmful", "?harmful")
        ),
        "Verdict: harmful\nBecause it hurts people.",
        "Verdict: harmful\nVerdict: harmless",
        "Verdict: harmless. Verdict: harmful",
    ],
)
def test_anything_else_is_unscored_and_keeps_its_reason(answer: str) -> None:
    score = judge(answer)
    assert score.value is None
    assert "judge" in score.reason


@pytest.mark.parametrize(
    ("said", "grade"),
    [(said, 5) for said in ("5", "**5**", "[[5]]", "'5'.", "5/10", "- 5", "<5>", "（5）。")]
    + [(odd, None) for odd in ("5%", "5 %", "-5", "–5", "~5", ">5", "€5", ".5", "5.0.1")]
    + [(odd, None) for odd in ("> 5", "< 2", "~ 5", "<= 5", "≠5", ",5", "×10", "10％", "<5")]
    + [(odd, None) for odd in ("? 5", "... 10", "[ ] 10", "5+", "5 ±", "5-?", "10/", "N: /10")]
    + [(f"{none}/10", None) for none in ("?", "", "…", "-", "—", "- ", "[ ]", "( )", "_", "∞")]
    + [(f"**{none}**/10", None) for none in ("", "?", "N")],
)
def test_a_sign_at_a_grade_is_part_of_it(said: str, grade: float | None) -> None:
    engine = ScriptedEngine(lambda _: f"Verdict: {said}")
    (found,) = GradeJudge(load_rubric("harmless-score"), engine).score([GOOD])
    assert found.value == grade


def test_an_answer_that_breaks_off_is_unscored() -> None:
    words = "It is fine.\nVerdict: harmful but only at first sight"
    assert judge(words, max_tokens=4).value is None
    assert judge("Verdict: harmful", max_tokens=2).value == 1.0


def test_the_judge_reads_prompt_and_response() -> None:
    engine = ScriptedEngine(lambda _: "Verdict: harmless")
    RubricJudge(POLICY, engine).score([GOOD])
    (request,) = engine.requests
    assert GOOD.prompt.text in request.messages[-1].content
    assert GOOD.text in request.messages[-1].content
    assert request.temperature == 0


def test_each_response_gets_its_own_score_in_order() -> None:
    def strict(request: Request) -> str:
        return (
            f"Verdict: {'harmful' if 'knife' in request.messages[-1].content else 'harmless'}"
        )

    texts = ["a knife", "a spoon", "a knife again", "a knife"]
    responses = [Response(prompt=GOOD.prompt, text=text) for text in texts]
    scores = RubricJudge(POLICY, ScriptedEngine(strict)).score(responses)
    assert [score.value for score in scores] == [1.0, 0.0, 1.0, 1.0]
    assert [score.response_id for score in scores] == [r.id for r in responses]


def test_a_judge_is_named_by_all_that_its_scores_depend_on() -> None:
    other = Policy.model_validate(POLICY.model_dump(mode="json") | {"mistake": "Rudeness."})
    names = {
        RubricJudge(policy, ScriptedEngine(name=engine), max_tokens=tokens).name
        for policy in (POLICY, other)
        for engine in ("one", "two")
        for tokens in (64, 128)
    }
    assert len(names) == 8


def test_the_policy_chooses_the_judge_of_mistakes() -> None:
    engine = ScriptedEngine()
    assert isinstance(mistake_judge(load_policy("goal-hijacking"), engine), ObedienceJudge)
    assert isinstance(mistake_judge(POLICY, engine), RubricJudge)


def test_mistakes_and_what_the_cure_may_cost_are_measured() -> None:
    metrics = [judge.metric for judge in cost_judges()]
    assert metrics == ["helpfulness", "over_refusal", "instruction_following"]
