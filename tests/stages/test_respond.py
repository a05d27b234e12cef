from collections.abc import Iterator
from itertools import count, islice

from made import answer_of

from misstep.engines.base import AT_ONCE
from misstep.engines.scripted import ScriptedEngine
from misstep.policy import load_policy
from misstep.records import Message, Prompt, Response
from misstep.stages.base import Tally
from misstep.stages.respond import Asked, RespondSettings, respond, whole_counted

POLICY = load_policy("goal-hijacking")
PROMPTS = [
    Prompt.of("What is 1 + 1? {response}", target="t", accept=("2",)),
    Prompt(messages=(Message(role="system", content="s"), Message(role="user", content="u"))),
    Prompt.of("What is 1 + 1? {response}", topic="again"),
]
SETTINGS = RespondSettings(max_tokens=9, temperature=0.5)


def asked(guided: bool) -> list[Asked]:
    return [(prompt, guided) for prompt in PROMPTS]


def test_the_guide_is_asked_and_the_record_keeps_the_prompt() -> None:
    engine = ScriptedEngine(lambda r: f"answer {len(r.messages)}")
    found = list(respond(asked(True), POLICY, engine, SETTINGS, seed=0))
    assert [r.prompt for r in found] == PROMPTS
    assert all(r.guided for r in found)
    for request, prompt in zip(engine.requests, PROMPTS, strict=True):
        assert request.messages == POLICY.guided_prompt(prompt) != prompt.messages


def test_without_the_guide_the_prompt_is_asked_as_it_is() -> None:
    engine = ScriptedEngine()
    found = list(respond(asked(False), POLICY, engine, SETTINGS, seed=0))
    assert [r.messages for r in engine.requests] == [p.messages for p in PROMPTS]
    assert not any(r.guided for r in found)


def test_guided_and_unguided_answers_share_their_dice() -> None:
    engine = ScriptedEngine()
    for guided in (False, True):
        list(respond(asked(guided), POLICY, engine, SETTINGS, seed=4))
    unguided, guided_ones = engine.requests[:3], engine.requests[3:]
    assert [r.seed for r in unguided] == [r.seed for r in guided_ones]
    assert len({r.seed for r in unguided}) == 3
    list(respond(asked(False), POLICY, engine, SETTINGS, seed=5))
    assert not {r.seed for r in unguided} & {r.seed for r in engine.requests[6:]}


def test_guided_and_plain_prompts_are_asked_in_one_stream() -> None:
    engine = ScriptedEngine(lambda r: r.messages[-1].content)
    calls: list[int] = []
    generate = engine.generate
    engine.generate = lambda requests: calls.append(len(requests)) or generate(requests)  # type: ignore[method-assign,func-returns-value]
    long = RespondSettings(max_tokens=99)
    found = list(respond([*asked(False), *asked(True)], POLICY, engine, long, seed=0))
    assert calls == [6]
    assert [(r.prompt, r.guided) for r in found] == [*asked(False), *asked(True)]
    guided = [POLICY.guided_prompt(prompt)[-1].content for prompt in PROMPTS]
    assert [r.text for r in found[3:]] == guided


def test_a_stage_reads_no_further_than_its_answers_are_wanted() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Asked]:
        for number in count():
            taken.append(number)
            yield Prompt.of(f"question {number}"), False

    engine = ScriptedEngine()
    found = respond(endless(), POLICY, engine, SETTINGS, seed=0)
    some = list(islice(found, AT_ONCE + 1))
    assert len(taken) == len(engine.requests) == 2 * AT_ONCE
    assert [r.prompt.text for r in some] == [f"question {i}" for i in range(AT_ONCE + 1)]


def test_an_answer_names_its_model_and_whether_it_broke_off() -> None:
    engine = ScriptedEngine(lambda r: " ".join(["word"] * (20 if "+" in str(r) else 2)))
    found = list(respond(asked(False), POLICY, engine, SETTINGS, seed=0))
    assert [r.truncated for r in found] == [True, False, True]
    assert {r.model for r in found} == {engine.identity}


def test_answers_that_stopped_at_the_limit_are_counted_by_method_and_kept() -> None:
    ends = [("vanilla", True, None), ("vanilla", False, None), ("sft", True, None)]
    answers = [
        answer_of(Response(prompt=PROMPTS[0], text="x", truncated=cut, error=error), method)
        for method, cut, error in [*ends, ("sft", False, "status 500")]
    ]
    tally = Tally()
    assert list(whole_counted(answers, tally)) == answers
    assert (tally.given, tally.kept) == (4, 1)
    assert tally.refused == {
        "stopped at the token limit, vanilla": 1,
        "stopped at the token limit, sft": 1,
        "no answer: status 500": 1,
    }
