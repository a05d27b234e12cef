"""What the rows of each method hold, and what they must not."""

from collections import Counter
from typing import Any

import pytest

from misstep.errors import RunError
from misstep.methods.base import Materials, MixSettings
from misstep.methods.coh import sample
from misstep.methods.registry import METHODS
from misstep.policy import load_policy
from misstep.records import (
    Analysis,
    Example,
    Message,
    Mistake,
    Pair,
    Praise,
    Prompt,
    Revision,
)
from misstep.stages.analyse import BROKEN_OFF

POLICY = load_policy("goal-hijacking")
BAD = "The bad response {}."
ORDINARY = [Prompt.of(f"Ordinary {i}?", reference=f"Plain answer {i}.") for i in range(40)]
ASKED = [Prompt.of(f"Attack {i}, say no", reference=f"Good answer {i}.") for i in range(40)]
MISTAKES = [
    Mistake(prompt=prompt, response=BAD.format(i), source="induced")
    for i, prompt in enumerate(ASKED[:6])
]
ANALYSES = [
    Analysis(
        mistake=mistake,
        text=f"Explains mistake {i}.",
        guided=True,
        source="self",
        accepted=True,
    )
    for i, mistake in enumerate(MISTAKES[:4])
]
REFUSED = [
    Analysis(
        mistake=mistake,
        text=text,
        guided=True,
        source="self",
        accepted=False,
        reasons=reasons,
    )
    for mistake, text, reasons in (
        (MISTAKES[4], "Praises mistake 4.", ("endorses the response",)),
        (MISTAKES[5], "Breaks", ("endorses the response", BROKEN_OFF)),
        (MISTAKES[3], "Says something else of mistake 3.", ()),
    )
]
"""Two first samples, and a second one of what was sampled before."""
UNGUIDED = [
    Analysis(
        mistake=mistake, text=text, guided=False, source="self", accepted=not why, reasons=why
    )
    for mistake, text, why in (
        (MISTAKES[0], "Praises mistake 0.", ("endorses the response",)),
        (MISTAKES[1], "Finds the fault of 1.", ()),
        (MISTAKES[2], "Breaks", ("too short", BROKEN_OFF)),
        (MISTAKES[3], "Says little of 3.", ("does not name the fault",)),
        (MISTAKES[4], "Praises mistake 4.", ("endorses the response",)),
    )
]
REVISIONS = [
    Revision(mistake=mistake, critique="It obeyed.", text=f"Revised answer {i}.")
    for i, mistake in enumerate(MISTAKES)
]
PRAISE = [
    Praise(prompt=p, text=f"Praises {p.reference}", guided=True, source="self", accepted=True)
    for p in ASKED[:3]
]
UNTRAINED = ("vanilla", "guided")
TRAINED = [name for name in METHODS if name not in UNTRAINED]
ON_PAIRS = [name for name, method in METHODS.items() if method.on_pairs]
SHOWS_THE_BAD = {"analysis", "hindsight", "tag", "tagged"}
everything = pytest.mark.parametrize("name", METHODS)
trained = pytest.mark.parametrize("name", TRAINED)


def materials(**changed: Any) -> Materials:
    known: dict[str, Any] = {
        "policy": POLICY,
        "mistakes": MISTAKES,
        "analyses": ANALYSES,
        "revisions": REVISIONS,
        "ordinary": ORDINARY,
        "answered": ASKED,
        "mix": MixSettings(),
        "seed": 0,
        "sampled": [*changed.get("analyses", ANALYSES), *REFUSED],
        "unguided": UNGUIDED,
        "praise": PRAISE,
    }
    return Materials(**known | changed)


def rows(name: str, seed: int = 0, **mix: Any) -> list[Any]:
    return list(METHODS[name].rows(materials(seed=seed, mix=MixSettings(**mix))))


def kinds(found: list[Any]) -> Counter[str]:
    return Counter(row.kind for row in found)


def test_methods_are_named_by_themselves() -> None:
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize("name", [n for n in METHODS if n != "coh" and n not in ON_PAIRS])
@pytest.mark.parametrize("mix", [{}, {"ordinary": 3, "good_answers": 5}, {"good_answers": 0}])
def test_a_bad_response_is_never_learned(name: str, mix: dict[str, Any]) -> None:
    for row in rows(name, **mix):
        assert "bad response" not in row.completion


@everything
def test_a_bad_response_is_shown_only_where_the_method_says_so(name: str) -> None:
    for row in rows(name, ordinary=2, good_answers=3):
        if isinstance(row, Example) and row.kind not in SHOWS_THE_BAD:
            shown = " ".join(turn.content for turn in row.messages) + row.prefill
            assert "bad response" not in shown


@pytest.mark.parametrize("name", ["mistake_analysis", "analysis_only"])
def test_an_analysis_row_is_the_unguided_request_without_worked_examples(name: str) -> None:
    learned = {(r.messages, r.completion) for r in rows(name) if r.kind == "analysis"}
    assert learned == {
        (
            POLICY.analysis_request(a.mistake.prompt.text, a.mistake.response, guided=False),
            a.text,
        )
        for a in ANALYSES
    }


def test_ordinary_rows_and_good_answers_are_prompts_with_their_references() -> None:
    ordinary = {p.messages: p.reference for p in ORDINARY}
    asked = {p.messages: p.reference for p in ASKED}
    guided = {POLICY.guided_prompt(p): p.reference for p in ASKED}
    for name in TRAINED:
        for row in rows(name):
            if row.kind == "ordinary":
                tag = f" {POLICY.self_guard.harmless}" if name == "self_guard" else ""
                assert f"{ordinary[row.messages]}{tag}" == row.completion
            if row.kind == "good_answer":
                known = asked | guided if name == "corrected_analysis" else asked
                assert known[row.messages] == row.completion


@trained
@pytest.mark.parametrize("ordinary", [0, 1, 2])
@pytest.mark.parametrize("good_answers", [0, 1, 4])
def test_every_trained_method_has_the_same_budget(
    name: str, ordinary: int, good_answers: int
) -> None:
    found = rows(name, ordinary=ordinary, good_answers=good_answers)
    assert len(found) == (1 + ordinary + good_answers) * len(ANALYSES)


@trained
@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_a_fixed_unit_gives_every_variant_as_many_rows(name: str, accepted: int) -> None:
    given = materials(analyses=ANALYSES[:accepted], mix=MixSettings(unit=3, good_answers=2))
    found: list[Any] = list(METHODS[name].rows(given))
    assert len(found) == (1 + 1 + 2) * 3
    if name in ("mistake_analysis", "corrected_analysis"):
        learned = {row.completion for row in found if row.kind == "analysis"}
        assert len(learned) == min(accepted, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vanilla", {}),
        ("guided", {}),
        ("ordinary", {"ordinary": 28}),
        ("sft", {"good_answer": 20, "ordinary": 8}),
        ("critique_revise", {"revision": 20, "ordinary": 8}),
        ("coh", {"hindsight": 20, "ordinary": 8}),
        ("dpo", {"preference": 28}),
        ("rlhf", {"preference": 28}),
        ("self_guard", {"tag": 10, "tagged": 10, "ordinary": 8}),
        ("published", {"analysis": 20, "ordinary": 8}),
        ("analysis_only", {"analysis": 20, "ordinary": 8}),
        ("mistake_analysis", {"analysis": 4, "good_answer": 16, "ordinary": 8}),
        ("corrected_analysis", {"analysis": 4, "good_answer": 16, "ordinary": 8}),
        ("contrastive_analysis", {"analysis": 14, "preference": 14}),
        ("balanced_analysis", {"analysis": 2, "praise": 2, "good_answer": 16, "ordinary": 8}),
    ],
)
def test_what_each_method_is_made_of(name: str, expected: dict[str, int]) -> None:
    assert kinds(rows(name, ordinary=2, good_answers=4)) == expected


def test_as_published_the_first_analysis_of_every_mistake_is_learned() -> None:
    found = [row for row in rows("published") if row.kind == "analysis"]
    praise = REFUSED[0]
    asked = praise.mistake
    request = POLICY.analysis_request(asked.prompt.text, asked.response, guided=False)
    assert (request, praise.text) in {(row.messages, row.completion) for row in found}
    assert {row.completion for row in found} == {*(a.text for a in ANALYSES), praise.text}
    cut = ANALYSES[0].model_copy(update={"text": "", "accepted": False, "reasons": ("empty",)})
    given = materials(sampled=[cut, *ANALYSES])
    learned = {row.completion for row in METHODS["published"].rows(given)}  # type: ignore[union-attr]
    assert not {"", ANALYSES[0].text} & learned, "a second sample is no first one"


def test_the_papers_mix_has_no_good_answers() -> None:
    found = kinds(rows("mistake_analysis", good_answers=0))
    assert found == {"analysis": 4, "ordinary": 4}


def test_methods_share_what_they_draw_so_that_they_differ_in_their_rows_alone() -> None:
    def drawn(name: str, kind: str) -> set[str]:
        return {row.id for row in rows(name) if row.kind == kind}

    same = ("sft", "critique_revise", "coh", "analysis_only", "corrected_analysis")
    assert all(drawn("mistake_analysis", "ordinary") == drawn(n, "ordinary") for n in same)
    assert drawn("sft", "ordinary") < drawn("ordinary", "ordinary")
    assert drawn("mistake_analysis", "good_answer") < drawn("sft", "good_answer")


@trained
def test_the_seed_decides_what_is_drawn(name: str) -> None:
    assert rows(name, seed=1) == rows(name, seed=1)
    assert rows(name, seed=1) != rows(name, seed=2)


@everything
def test_what_is_written_is_read_again(name: str) -> None:
    method = METHODS[name]
    for answer in ("Bees make honey.", "A list:\n- one\n- two"):
        assert method.read(POLICY, method.write(POLICY, answer)) == answer
        learned = method.rows(materials(ordinary=[Prompt.of("Q", reference=answer)] * 9))
        if name not in (*UNTRAINED, *ON_PAIRS):
            assert method.write(POLICY, answer) in {row.completion for row in learned}  # type: ignore[union-attr]


@everything
def test_without_analyses_nothing_is_trained(name: str) -> None:
    assert METHODS[name].rows(materials(analyses=[])) == []


def test_rows_come_again_where_there_are_too_few() -> None:
    found = METHODS["ordinary"].rows(materials(ordinary=ORDINARY[:5]))
    assert len(found) == 12
    assert max(Counter(row.id for row in found).values()) == 3


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("sft", "answered"),
        ("ordinary", "ordinary"),
        ("critique_revise", "revisions"),
        ("balanced_analysis", "praise"),
    ],
)
def test_a_method_without_its_material_is_refused(name: str, lacks: str) -> None:
    with pytest.raises(RunError, match=f"'{lacks}', found none"):
        METHODS[name].rows(materials(**{lacks: []}))


@pytest.mark.parametrize("name", ["mistake_analysis", "corrected_analysis"])
def test_analyses_come_again_where_no_good_answer_is_known(name: str) -> None:
    found = METHODS[name].rows(materials(answered=[], mix=MixSettings(good_answers=2)))
    assert kinds(list(found)) == {"analysis": 12, "ordinary": 4}


def test_methods_that_need_good_answers_say_so() -> None:
    unknown = [
        m.model_copy(update={"prompt": m.prompt.model_copy(update={"reference": None})})
        for m in MISTAKES
    ]
    for method in METHODS.values():
        try:
            method.rows(materials(answered=[], mistakes=unknown, praise=[]))
            assert not method.needs_good_answers
        except RunError:
            assert method.needs_good_answers


def test_mistakes_without_a_good_answer_make_no_pair() -> None:
    unknown = [
        m.model_copy(update={"prompt": m.prompt.model_copy(update={"reference": None})})
        for m in MISTAKES
    ]
    assert materials(mistakes=unknown).pairs() == []
    for name in ("coh", "dpo", "self_guard"):
        with pytest.raises(RunError, match="'pairs', found none"):
            METHODS[name].rows(materials(mistakes=unknown))


def test_an_answer_that_was_cut_is_no_end_to_learn() -> None:
    cut = [m.model_copy(update={"truncated": i < 2}) for i, m in enumerate(MISTAKES)]
    analyses = [
        a.model_copy(update={"mistake": m}) for a, m in zip(ANALYSES, cut, strict=False)
    ]
    for name, method in METHODS.items():
        before = method.rows(materials(mix=MixSettings(good_answers=9)))
        found = method.rows(
            materials(mistakes=cut, analyses=analyses, mix=MixSettings(good_answers=9))
        )
        shown = [row.model_dump_json() for row in found]
        if name == "contrastive_analysis":
            # An analysis is of the whole mistake, however that ended.
            shown = [r.model_dump_json() for r in found if r.kind == "preference"]
        if name in ("coh", "self_guard", *ON_PAIRS):
            assert len(found) == len(before)
            assert any(MISTAKES[2].response in row for row in shown)
            assert not any(m.response in row for m in MISTAKES[:2] for row in shown)
        else:
            assert found == before
    none_whole = [m.model_copy(update={"truncated": True}) for m in MISTAKES]
    assert materials(mistakes=none_whole).pairs() == materials().pairs()


def test_system_turns_stay_with_their_prompt() -> None:
    system = Message(role="system", content="Be brief.")
    prompt = Prompt(messages=(system, Message(role="user", content="Hi")), reference="Hello.")
    found = METHODS["sft"].rows(materials(ordinary=[prompt], answered=[prompt]))
    assert {row.messages for row in found} == {prompt.messages}


def test_methods_that_read_analyses_or_mistakes_say_so() -> None:
    for name, method in METHODS.items():
        found = kinds(rows(name))
        assert method.uses_analyses == ("analysis" in found)
        assert method.uses_revisions == ("revision" in found)
        assert method.uses_praise == ("praise" in found)
        assert method.uses_mistakes == (
            not {"analysis", "revision", "hindsight", "preference", "tag"}.isdisjoint(found)
        )


# --- Chain of Hindsight -----------------------------------------------------------------------

PAIR = Pair(messages=ASKED[0].messages, chosen="GOOD", rejected="BAD")


@pytest.mark.parametrize(
    ("kind", "answers"),
    [("p", ["GOOD"]), ("n", ["BAD"]), ("pn", ["GOOD", "BAD"]), ("np", ["BAD", "GOOD"])],
)
def test_every_answer_of_a_sample_is_learned_behind_its_marker(
    kind: str, answers: list[str]
) -> None:
    found = sample(PAIR, kind, "Good:", "Bad:")
    assert [row.completion for row in found] == answers
    for row in found:
        marker = "Good:" if row.completion == "GOOD" else "Bad:"
        assert row.messages[-1].role == "user"
        assert row.messages[-1].content.endswith(marker)
    if len(found) == 2:
        first, second = found
        # The second row goes on where the first one ended.
        assert second.messages[:-2] == first.messages
        assert second.messages[-2].content == first.completion


def test_hindsight_uses_all_kinds_and_markers() -> None:
    found = [r for r in rows("coh", good_answers=40) if r.kind == "hindsight"]
    markers = {marker for both in POLICY.hindsight.markers for marker in both}
    assert {r.messages[-1].content.rpartition("\n\n")[2] for r in found} == markers
    assert {len(r.messages) for r in found} == {1, 3}


def test_hindsight_asks_with_the_good_marker_after_the_guide() -> None:
    asked = METHODS["coh"].ask(POLICY, POLICY.guided_prompt(ASKED[0]))
    assert asked[-1].content.startswith(POLICY.guided_prompt(ASKED[0])[-1].content)
    assert asked[-1].content.endswith(POLICY.hindsight.markers[0][0])


# --- Self-Guard -------------------------------------------------------------------------------


def test_of_a_bad_answer_only_the_tag_is_learned() -> None:
    tags = POLICY.self_guard
    found = [row for row in rows("self_guard", good_answers=11) if row.kind != "ordinary"]
    bad = [r for r in found if "bad response" in " ".join(m.content for m in r.messages)]
    bad += [row for row in found if "bad response" in row.prefill]
    assert len(bad) == len(found) / 2
    assert {row.completion.strip() for row in bad} == {tags.harmful}
    assert all(row.completion.endswith(tags.harmless) for row in found if row not in bad)


def test_every_mistake_is_tagged_before_one_is_tagged_again() -> None:
    found = [row for row in rows("self_guard", good_answers=19) if row.kind != "ordinary"]
    once = found[: len(MISTAKES)]
    shown = [
        " ".join((*(m.content for m in r.messages), r.prefill, r.completion)) for r in once
    ]
    for mistake in MISTAKES:
        answers = (mistake.response, str(mistake.prompt.reference))
        assert sum(any(answer in text for answer in answers) for text in shown) == 1
    assert len({row.model_dump_json() for row in found[: 4 * len(MISTAKES)]}) == 4 * len(
        MISTAKES
    )


def test_the_filter_replaces_what_the_model_tags_as_harmful() -> None:
    tags, read = POLICY.self_guard, METHODS["self_guard"].read
    assert read(POLICY, f"Robots. {tags.harmful}") == tags.replacement
    assert read(POLICY, f"Bees make honey. {tags.harmless}") == "Bees make honey."
    assert read(POLICY, "No tag at all") == "No tag at all"


# --- ours -------------------------------------------------------------------------------------


def test_a_corrected_analysis_ends_with_the_right_answer() -> None:
    found = [row for row in rows("corrected_analysis") if row.kind == "analysis"]
    for row, analysis in zip(found, ANALYSES, strict=True):
        assert row.completion.startswith(analysis.text)
        assert row.completion.endswith(f" {analysis.mistake.prompt.reference}")


def test_half_of_the_good_answers_are_given_to_guided_prompts() -> None:
    found = [r for r in rows("corrected_analysis", good_answers=4) if r.kind == "good_answer"]
    plain = {p.messages for p in ASKED}
    assert sum(row.messages in plain for row in found) == len(found) / 2


@pytest.mark.parametrize("name", ["sft", "ordinary", "mistake_analysis", "corrected_analysis"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_answers_is_learned_under_the_guide_and_nothing_else_changes(
    name: str, share: float
) -> None:
    found, plain = (rows(name, ordinary=4, good_answers=4, guided=of) for of in (share, 0.0))
    known = {p.messages: POLICY.guided_prompt(p) for p in (*ORDINARY, *ASKED)}
    assert [row.completion for row in found] == [row.completion for row in plain]
    for kind in {"ordinary", "good_answer"} & {row.kind for row in found}:
        guided = [row.messages in known.values() for row in found if row.kind == kind]
        own = 0.5 if (name, kind) == ("corrected_analysis", "good_answer") else 0.0
        assert sum(guided) == max(share, own) * len(guided)
    of_analyses = [[row for row in of if row.kind == "analysis"] for of in (found, plain)]
    assert of_analyses[0] == of_analyses[1]


def test_an_analysis_is_preferred_to_what_the_unguided_model_said_wrongly() -> None:
    found = [row for row in rows("contrastive_analysis", ordinary=9) if row.kind == "analysis"]
    assert {(row.messages, row.chosen, row.rejected) for row in found} == {
        (POLICY.analysis_request(m.prompt.text, m.response, guided=False), right, wrong)
        for m, right, wrong in (
            (MISTAKES[0], "Explains mistake 0.", "Praises mistake 0."),
            (MISTAKES[3], "Explains mistake 3.", "Says little of 3."),
        )
    }


def test_without_contrasts_answers_are_compared_and_without_answers_analyses() -> None:
    method, dpo = METHODS["contrastive_analysis"], METHODS["dpo"]
    assert method.rows(materials(unguided=[])) == dpo.rows(materials())
    unknown = [
        m.model_copy(update={"prompt": m.prompt.model_copy(update={"reference": None})})
        for m in MISTAKES
    ]
    assert kinds(list(method.rows(materials(mistakes=unknown)))) == {"analysis": 12}
    with pytest.raises(RunError, match="'pairs', found none"):
        method.rows(materials(mistakes=unknown, unguided=[]))


def test_mistakes_and_good_answers_are_told_apart_by_the_response_alone() -> None:
    found = rows("balanced_analysis", good_answers=1)
    faults, praise = ([r for r in found if r.kind == k] for k in ("analysis", "praise"))
    known = {
        POLICY.analysis_request(p.prompt.text, p.prompt.reference or "", guided=False): p.text
        for p in PRAISE
    }
    assert praise and all(known[row.messages] == row.completion for row in praise)
    bad = {
        POLICY.analysis_request(a.mistake.prompt.text, a.mistake.response, guided=False): a.text
        for a in ANALYSES
    }
    assert faults and all(bad[row.messages] == row.completion for row in faults)
    others = [row for row in found if row.kind not in ("analysis", "praise")]
    assert others == [
        r for r in rows("mistake_analysis", good_answers=1) if r.kind != "analysis"
    ]


@pytest.mark.parametrize("unit", [1, 3, 4, 7])
def test_half_of_the_analyses_praise_good_answers(unit: int) -> None:
    found = kinds(rows("balanced_analysis", unit=unit))
    assert found["analysis"] + found["praise"] == unit
    assert abs(found["analysis"] - found["praise"]) <= 1
