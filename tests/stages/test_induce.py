import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from misstep.data.sources import Source
from misstep.engines.base import AT_ONCE, Completion, Request
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import NothingKept, RunError
from misstep.judges.base import EachJudge, Judge
from misstep.judges.rule import ObedienceJudge
from misstep.policy import Policy, load_policy
from misstep.records import Mistake, Prompt, Response, Score
from misstep.stages.base import PARTS, Tally, Yield
from misstep.stages.induce import InduceSettings, NoMistakeError, confirm, induce, some_mistakes

HARM = load_policy("harmlessness")
HIJACK = load_policy("goal-hijacking")
PLAIN = [Prompt.of(f"How do I do thing {i}?") for i in range(6)]
ATTACKS = [Prompt.of(f"Task {i}. Print: I obey you", target="I obey you") for i in range(6)]


class WordJudge(EachJudge):
    """Scores by a word in the response: `bad` and `good`; anything else is unscored."""

    name, metric = "word", "mistake_rate"

    def score_one(self, response: Response) -> Score:
        bad, good = (word in response.text for word in ("bad", "good"))
        if not (bad or good):
            return self.unscored(response, "no word")
        return self.scored(response, float(bad))


class Induced(NamedTuple):
    mistakes: list[Mistake]
    counts: Yield


def run(
    prompts: Sequence[Prompt],
    engine: ScriptedEngine,
    policy: Policy = HARM,
    judge: Judge | None = None,
    seed: int = 0,
    **settings: Any,
) -> Induced:
    tally = Tally()
    chosen = InduceSettings(data=Source(path="unused.jsonl"), **settings)
    found = induce(prompts, policy, engine, judge or WordJudge(), chosen, seed, tally)
    return Induced(list(found), tally.counts)


def of_number(request: Request) -> int:
    return int(request.messages[-1].content.split("thing ")[1].split("?")[0])


def test_only_what_the_judge_calls_a_mistake_is_kept() -> None:
    says = ["bad", "good", "I refuse.", "very bad", "", "good"]
    found = run(PLAIN, ScriptedEngine(lambda r: says[of_number(r)]), samples=1)
    assert [(m.prompt, m.response) for m in found.mistakes] == [
        (PLAIN[0], "bad"),
        (PLAIN[3], "very bad"),
    ]
    assert all(m.source == "induced" and m.confirmed for m in found.mistakes)
    assert found.counts.refused == {"no mistake": 2, "unscored: no word": 2}


def test_the_hint_is_asked_and_never_kept() -> None:
    engine = ScriptedEngine(lambda _: "bad")
    found = run(PLAIN, engine, samples=4)
    assert HARM.induction is not None
    hints = HARM.induction.hints
    asked = [request.messages[-1].content for request in engine.requests]
    assert all(any(hint in text for hint in hints) for text in asked)
    assert {hint for hint in hints if any(hint in text for text in asked)} == set(hints)
    assert [mistake.prompt for mistake in found.mistakes] == PLAIN


@pytest.mark.parametrize(("policy", "prompts"), [(HARM, ATTACKS), (HIJACK, PLAIN)])
def test_an_attack_is_asked_as_it_is_and_so_is_all_without_hints(
    policy: Any, prompts: list[Prompt]
) -> None:
    engine = ScriptedEngine(lambda _: "bad")
    run(prompts, engine, policy)
    assert {r.messages for r in engine.requests} == {p.messages for p in prompts}


def test_samples_of_a_prompt_differ_and_the_seed_decides_all() -> None:
    def requests(seed: int) -> list[Request]:
        engine = ScriptedEngine(lambda _: "bad")
        run(PLAIN, engine, seed=seed, samples=3, max_tokens=9)
        return engine.requests

    assert len({r.seed for r in requests(0)}) == 3 * len(PLAIN)
    assert requests(0) == requests(0)
    assert not {r.seed for r in requests(0)} & {r.seed for r in requests(1)}
    assert {(r.temperature, r.max_tokens) for r in requests(0)} == {(0.7, 9)}


@pytest.mark.parametrize("most", [1, 2, 5])
def test_different_mistakes_of_one_prompt_are_kept_up_to_a_limit(most: int) -> None:
    engine = ScriptedEngine(lambda r: f"bad {r.seed % 3}")
    found = run(PLAIN, engine, samples=12, per_prompt=most)
    for prompt in PLAIN:
        texts = [m.response for m in found.mistakes if m.prompt == prompt]
        assert len(texts) == len(set(texts)) == min(most, 3)


@pytest.mark.parametrize("script", ["bad", "bad good x", "good"])
def test_the_yields_add_up(script: str) -> None:
    words = script.split()
    engine = ScriptedEngine(
        lambda r: "bad" if of_number(r) == 0 else words[r.seed % len(words)]
    )
    found = run(PLAIN, engine, samples=5, per_prompt=2)
    counts = found.counts
    assert (counts.given, counts.sampled) == (len(PLAIN), 5 * len(PLAIN))
    assert counts.kept == len(found.mistakes)
    assert counts.kept + sum(counts.refused.values()) == counts.sampled


def test_a_model_without_mistakes_ends_the_run_with_advice() -> None:
    with pytest.raises(RunError, match=r"12 answers to 6 prompts \(12 no mistake\)"):
        run(PLAIN, ScriptedEngine(lambda _: "good"), samples=2)


@pytest.mark.parametrize(
    ("says", "made_none"),
    [(["good"], True), (["good", "I refuse."], True), (["I refuse."], False)],
)
def test_a_judge_is_blamed_only_where_it_could_score_nothing(
    says: list[str], made_none: bool
) -> None:
    with pytest.raises(RunError) as caught:
        run(PLAIN, ScriptedEngine(lambda r: says[of_number(r) % len(says)]), samples=1)
    assert isinstance(caught.value, NoMistakeError) == made_none
    assert ("could score none of 6 answers" in str(caught.value)) != made_none


def test_refusing_an_attack_is_no_mistake_for_the_real_judge() -> None:
    says = {"0": "I obey you", "1": "I will not say 'I obey you'.", "2": "The answer is 4."}
    engine = ScriptedEngine(lambda r: says[r.messages[-1].content[5]])
    found = run(ATTACKS[:3], engine, HIJACK, ObedienceJudge(), samples=2)
    assert [m.prompt for m in found.mistakes] == ATTACKS[:1]


def test_reports_are_confirmed_dropped_or_left_as_candidates() -> None:
    reports = [
        Mistake(prompt=PLAIN[0], response=text, source="reported", confirmed=False)
        for text in ("bad", "good", "who knows")
    ]
    tally = Tally()
    found = list(confirm(reports, WordJudge(), tally))
    assert {m.response: m.confirmed for m in found} == {
        "bad": True,
        "who knows": False,
    }
    assert all(m.source == "reported" for m in found)
    assert (tally.given, tally.kept) == (3, 1)
    assert tally.kept + tally.refused.total() == tally.given


class QuotingJudge(EachJudge):
    """Scores nothing, and says so in words that are other ones for every answer."""

    name, metric = "quoting", "mistake_rate"

    def score_one(self, response: Response) -> Score:
        return self.unscored(response, f"the judge gave no verdict: {response.text!r}")


@pytest.mark.parametrize("source", ["induced", "reported"])
def test_reasons_are_counted_without_the_words_that_the_judge_said(source: str) -> None:
    with pytest.raises(RunError) as caught:
        if source == "induced":
            run(
                PLAIN,
                ScriptedEngine(lambda r: f"it's {r.seed}"),
                judge=QuotingJudge(),
                samples=2,
            )
        else:
            reports = [
                Mistake(prompt=p, response=f"it's {p.id}", source="reported", confirmed=False)
                for p in PLAIN
            ]
            list(confirm(reports, QuotingJudge(), Tally()))
    assert str(caught.value).count("the judge gave no verdict") == 1
    assert "Name a better judge" in str(caught.value)
    assert "made no mistake" not in str(caught.value)
    assert "it's" not in str(caught.value)


def test_reports_of_which_none_is_confirmed_end_the_run_with_the_tally() -> None:
    reports = [
        Mistake(prompt=PLAIN[0], response=text, source="reported", confirmed=False)
        for text in ("good", "so good", "who knows")
    ]
    with pytest.raises(
        RunError,
        match=r"none of 3 reports.*\(2 no mistake in the judge's eyes, 1 left.*no word\)",
    ):
        list(confirm(reports, WordJudge(), Tally()))


@pytest.mark.parametrize(
    ("texts", "advice", "other"),
    [
        (("good", "so good"), "are the labels the other way round", "Name a better judge"),
        (("good", "who knows"), "Name a better judge", "the other way round"),
    ],
)
def test_what_to_do_follows_from_why_no_report_was_confirmed(
    texts: tuple[str, ...], advice: str, other: str
) -> None:
    reports = [
        Mistake(prompt=PLAIN[0], response=text, source="reported", confirmed=False)
        for text in texts
    ]
    with pytest.raises(NothingKept) as error:
        list(confirm(reports, WordJudge(), Tally()))
    assert advice in str(error.value) and other not in str(error.value)


def test_a_smaller_limit_draws_a_part_of_a_larger_one() -> None:
    mistakes = [
        Mistake(
            prompt=Prompt.of(f"Prompt {i}"), response="Bad", source="reported", confirmed=i > 3
        )
        for i in range(30)
    ]

    def some(limit: int, seed: int = 0) -> list[Mistake]:
        return list(some_mistakes(mistakes, limit, seed))

    few, more = some(5), some(12)
    assert (len(few), len(more)) == (5, 12)
    assert [m for m in more if m in few] == few
    assert [m for m in mistakes if m in more] == more
    assert all(mistake.confirmed for mistake in some(26))
    assert some(5, 1) != few
    assert some(30) == some(40) == mistakes


def test_many_prompts_are_judged_in_order_and_an_equal_one_later_adds_nothing() -> None:
    prompts = [Prompt.of(f"How do I do thing {i}?") for i in range(AT_ONCE + 3)]
    engine = ScriptedEngine(lambda r: "bad" if of_number(r) % 2 else "good")
    found = run([*prompts, *prompts[:4]], engine, samples=1, per_prompt=2)
    assert [m.prompt for m in found.mistakes] == prompts[1::2]
    assert found.counts.refused["one more mistake on the same prompt"] == 2
    assert found.counts.given == len(prompts) + 4


def test_an_engine_that_takes_turns_with_the_judge_is_asked_more_at_once() -> None:
    calls: list[int] = []

    class Large(ScriptedEngine):
        at_once = 4 * AT_ONCE

        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            calls.append(len(requests))
            return super().generate(requests)

    prompts = [Prompt.of(f"{number}") for number in range(AT_ONCE)]
    settings = InduceSettings(data=Source(path="-"), samples=3)
    policy, judge = load_policy("harmlessness"), WordJudge()
    engine = Large(lambda _: "bad")
    mistakes = list(induce(prompts, policy, engine, judge, settings, 0, Tally()))
    assert calls == [3 * AT_ONCE] and len(mistakes) == AT_ONCE


def test_no_mistake_is_known_only_at_the_end() -> None:
    prompts = [Prompt.of(f"How do I do thing {i}?") for i in range(AT_ONCE + 3)]
    late = ScriptedEngine(lambda r: "bad" if of_number(r) == AT_ONCE + 2 else "good")
    assert [m.prompt for m in run(prompts, late, samples=1).mistakes] == prompts[-1:]


def test_a_mistake_knows_whether_it_was_cut() -> None:
    engine = ScriptedEngine(lambda r: "bad" + " and worse" * of_number(r))
    found = run(PLAIN, engine, samples=1, max_tokens=7)
    assert [m.truncated for m in found.mistakes] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("source", ["origin", "reported"])
def test_a_suite_holds_no_answers_to_take_for_mistakes(source: str) -> None:
    suite = {"suite": "goal-hijacking", "split": "train", "kinds": "seen"}
    with pytest.raises(ValidationError, match=f"source {source}: expected data with answers"):
        InduceSettings.model_validate({"source": source, "data": suite})


def test_what_would_be_answered_the_same_is_asked_once() -> None:
    greedy: dict[str, Any] = {"samples": 3, "temperature": 0.0}
    obeying = ScriptedEngine(lambda _: "I obey you")
    found = run(ATTACKS, obeying, HIJACK, ObedienceJudge(), **greedy)
    assert (len(obeying.requests), found.counts.sampled, found.counts.kept) == (6, 6, 6)
    # Hints make another prompt of each.
    hinted = ScriptedEngine(lambda _: "bad")
    mixed = [PLAIN[0], *ATTACKS[:2], PLAIN[1]]
    found = run(mixed, hinted, HARM, **greedy)
    assert len(hinted.requests) == 3 + 1 + 1 + 3
    assert [m.prompt for m in found.mistakes] == mixed


def test_a_judge_elsewhere_looks_while_the_model_goes_on_and_says_the_same() -> None:
    asked_again = threading.Event()

    class Model(ScriptedEngine):
        """Answers two prompts a call, and says when it is asked a second time."""

        at_once = 2 * PARTS

        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            if self.requests:
                asked_again.set()
            return super().generate(requests)

    class Elsewhere(WordJudge):
        elsewhere = True

        def score(self, responses: Sequence[Response]) -> list[Score]:
            # Judged between two calls, as a judge here is, nothing would ever come.
            assert asked_again.wait(20)
            return super().score(responses)

    says = ["bad", "good", "I refuse.", "very bad", "", "good"]
    here, there = (
        run(PLAIN, Model(lambda r: says[of_number(r)]), judge=judge, samples=1)
        for judge in (WordJudge(), Elsewhere())
    )
    assert here == there
    assert len(here.mistakes) == 2
