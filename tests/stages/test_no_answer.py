"""What the stages make of requests that an engine could not answer."""

from collections.abc import Sequence

import pytest
from made import answer_of

from misstep.data.sources import Source
from misstep.engines.base import Completion, Engine, Request
from misstep.judges.base import EachJudge
from misstep.judges.seats import Seat
from misstep.methods.registry import METHODS
from misstep.policy import load_policy
from misstep.records import Message, Mistake, Prompt, Response, Score
from misstep.stages.analyse import AnalyseSettings, analyse
from misstep.stages.base import Tally, kind_of
from misstep.stages.discriminate import DiscriminateSettings, discriminate
from misstep.stages.evaluate import judge_answers
from misstep.stages.induce import InduceSettings, induce
from misstep.stages.respond import RespondSettings, respond
from misstep.stages.revise import ReviseSettings, revise

POLICY = load_policy("goal-hijacking")
PROMPTS = [Prompt.of(f"case {i}", target="Robots rule") for i in range(4)]
MISTAKES = [Mistake(prompt=p, response="Robots rule.", source="induced") for p in PROMPTS]
FAULT = "status 500: oops, tried 8 times"


class Failing(Engine):
    """Answers with a good analysis, but has no answer to every request with `case 1` in it."""

    identity = "failing"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        return [self._answer(request.messages) for request in requests]

    def _answer(self, messages: Sequence[Message]) -> Completion:
        if any("case 1" in message.content for message in messages):
            return Completion(text="", tokens=0, error=FAULT)
        return Completion(text="Robots rule. It obeyed the inserted text.", tokens=9)


class AnyText(EachJudge):
    """Calls every text a mistake, and an empty one most of all."""

    name = metric = "mistake_rate"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score_one(self, response: Response) -> Score:
        self.seen.append(response.text)
        return self.scored(response, 1.0)


def test_no_answer_is_no_mistake() -> None:
    judge = AnyText()
    settings = InduceSettings(data=Source(path="never-read.jsonl"), samples=1)
    tally = Tally()
    found = list(induce(PROMPTS, POLICY, Failing(), judge, settings, 0, tally))
    assert [m.prompt for m in found] == [PROMPTS[i] for i in (0, 2, 3)]
    assert tally.refused == {f"unscored: no answer: {FAULT}": 1}
    assert "" not in judge.seen


@pytest.mark.parametrize("gate", [True, False])
def test_no_answer_is_no_analysis_and_is_asked_for_again(gate: bool) -> None:
    engine = Failing()
    settings = AnalyseSettings(gate=gate, n=2, examples=False)
    found = list(analyse(MISTAKES, POLICY, engine, settings, 0, Tally()))
    refused = [a for a in found if a.mistake == MISTAKES[1]]
    assert [a.reasons for a in refused] == [(f"no answer: {FAULT}",)] * 2
    asked = [r for r in engine.requests if "case 1" in r.messages[-1].content]
    assert len({r.seed for r in asked}) == 2


def test_no_revision_without_both_answers() -> None:
    tally = Tally()
    given = (MISTAKES, POLICY_WITH_CRITIQUE, Failing(), ReviseSettings(), 0, tally)
    assert [r.mistake for r in revise(*given)] == [MISTAKES[i] for i in (0, 2, 3)]
    assert tally.refused == {f"no answer: {FAULT}": 1}


POLICY_WITH_CRITIQUE = load_policy("harmlessness")


def test_no_answer_is_unscored_and_no_judge_reads_it() -> None:
    judge = AnyText()
    settings = RespondSettings()
    asked = [(prompt, False) for prompt in PROMPTS]
    given = respond(asked, POLICY, Failing(), settings, 0, read=lambda t: f"<{t}>")
    responses = list(given)
    answers = [answer_of(response) for response in responses]
    scores = [judgement.score for judgement in judge_answers(answers, [Seat(judge)])]
    assert [score.value for score in scores] == [1.0, None, 1.0, 1.0]
    assert [score.response_id for score in scores] == [r.id for r in responses]
    assert scores[1].reason == f"no answer: {FAULT}"
    assert responses[1].text == "" and "" not in judge.seen


def test_no_analysis_is_undecided() -> None:
    responses = [Response(prompt=p, text="Robots rule.") for p in PROMPTS]
    settings = DiscriminateSettings()
    found = discriminate("m", responses, POLICY, Failing(), settings, False, 0)
    assert [d.says_mistake for d in found] == [True, None, True, True]
    assert [d.error for d in found] == [None, FAULT, None, None]


def test_answers_that_came_keep_the_names_that_they_had() -> None:
    response = Response(prompt=Prompt.of("a"), text="b")
    assert "error" not in response.model_dump()
    assert response.id == "5067dae2096bd7ef"
    failed = response.model_copy(update={"error": FAULT})
    assert failed.id != response.id
    assert Response.model_validate_json(failed.model_dump_json()) == failed


def test_methods_say_rightly_whether_they_train() -> None:
    assert all(method.trains == _reads_materials(method) for method in METHODS.values())


def _reads_materials(method: object) -> bool:
    """Whether the rows depend on anything at all: those of nothing are made without a look."""
    try:
        rows = method.rows(None)  # type: ignore[attr-defined]
    except AttributeError:
        return True
    assert rows == []
    return False


def test_reasons_that_differ_by_a_number_are_counted_together() -> None:
    assert kind_of("no answer: status 413: 1234 tokens, tried 8 times") == (
        "no answer: status 413: N tokens, tried 8 times"
    )

    class Full(Failing):
        def _answer(self, messages: Sequence[Message]) -> Completion:
            told = f"the prompt ({1000 + len(messages[-1].content)} tokens) exceeds 256 tokens"
            return Completion(text="", tokens=0, error=told)

    tally = Tally()
    several = [
        m.model_copy(update={"response": "x" * n}) for n, m in enumerate(MISTAKES, start=1)
    ]
    found = list(analyse(several, POLICY, Full(), AnalyseSettings(n=1), 0, tally))
    reason = "no answer: the prompt (N tokens) exceeds N tokens"
    assert tally.refused == {reason: len(several)}
    assert len({analysis.reasons for analysis in found}) == len(several), (
        "records keep it whole"
    )
