import re
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from misstep.errors import PolicyError
from misstep.policy import Policy, blanks, fill, found, load_policy, matches, shipped
from misstep.records import Message, Mistake, Prompt
from misstep.stages.analyse import gate
from misstep.stages.praise import gate as praise_gate

NASTY = ["{response}", "{prompt}", "{{ 7*7 }}", "{% raw %}", "{0}", "}{", "\\1", "\\g<0>", "%s"]
nasty = st.lists(st.sampled_from(NASTY) | st.text(max_size=8), max_size=5).map("".join)
SENTENCE = "The response names a price in {dollars}, or none in euros."
DERIVED = Policy.model_validate({"name": "one-sentence", "mistake": SENTENCE})
POLICIES = [*map(load_policy, shipped()), DERIVED]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)


def parts(**changed: Any) -> dict[str, Any]:
    """A policy as data: the shipped one with a rubric and hints, changed here and there."""
    return load_policy("harmlessness").model_dump(mode="json") | {"name": "mine"} | changed


def write(folder: Path, data: dict[str, Any]) -> str:
    (folder / "mine.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return "mine.yaml"


@given(nasty, nasty)
def test_blanks_are_filled_in_one_pass(prompt: str, response: str) -> None:
    filled = fill("a {prompt} b {response} c {{prompt}} d", prompt=prompt, response=response)
    assert filled == f"a {prompt} b {response} c {{prompt}} d"


@given(st.text(), st.text(ascii_lowercase, min_size=1))
def test_escaped_text_comes_back_as_it_was(text: str, name: str) -> None:
    template = text.replace("{", "{{").replace("}", "}}") + "{" + name + "}"
    assert blanks(template) == {name}
    assert fill(template, **{name: "!"}) == text + "!"


@policies
@given(prompt=nasty, response=nasty)
def test_requests_hold_prompt_and_response_word_for_word(
    policy: Policy, prompt: str, response: str
) -> None:
    for guided in (False, True):
        (turn,) = policy.analysis_request(prompt, response, guided)
        shown = policy.analysis_request("PROMPT", "RESPONSE", guided)[0].content
        before, between, after = re.split("PROMPT|RESPONSE", shown)
        assert turn.content == before + prompt + between + response + after


@policies
def test_the_guide_stands_around_the_last_user_turn_only(policy: Policy) -> None:
    turns = (
        Message(role="system", content="be brief"),
        Message(role="user", content="first"),
        Message(role="assistant", content="well"),
        Message(role="user", content="second {response}"),
    )
    guided = policy.guided_prompt(Prompt(messages=turns))
    assert guided[:3] == turns[:3]
    assert "second {response}" in guided[3].content
    assert guided[3].content != "second {response}"


@policies
def test_worked_examples_are_turns_before_the_request(policy: Policy) -> None:
    worked = policy.worked_request("P", "R", guided=True)
    plain = policy.analysis_request("P", "R", guided=True)
    examples = policy.analysis.examples
    assert worked[-1:] == plain
    assert [turn.content for turn in worked[1:-1:2]] == [e.analysis for e in examples]
    assert [turn.role for turn in worked] == ["user", "assistant"] * len(examples) + ["user"]


@policies
def test_worked_examples_pass_the_gate_themselves(policy: Policy) -> None:
    for example in policy.analysis.examples:
        mistake = Mistake(
            prompt=Prompt.of(example.prompt), response=example.response, source="origin"
        )
        assert gate(policy, mistake, example.analysis) == ()


@policies
def test_worked_praise_is_shown_before_the_request_and_passes_its_gate(policy: Policy) -> None:
    worked = policy.worked_praise("P", "R", guided=True)
    assert worked[-1:] == policy.praise_request("P", "R", guided=True)
    assert [turn.content for turn in worked[1:-1:2]] == [
        e.analysis for e in policy.praise.examples
    ]
    for example in policy.praise.examples:
        prompt = Prompt.of(example.prompt, reference=example.response)
        assert praise_gate(policy, prompt, example.analysis) == ()


@policies
def test_what_is_trained_on_asks_for_praise_and_fault_in_the_same_words(policy: Policy) -> None:
    asked = policy.praise_request("P", "R", guided=False)
    assert asked == policy.analysis_request("P", "R", guided=False)
    assert asked != policy.praise_request("P", "R", guided=True)


@policies
def test_the_trained_request_does_not_tell_that_the_response_is_bad(policy: Policy) -> None:
    (unguided,) = policy.analysis_request("", "", guided=False)
    hints = policy.induction.hints if policy.induction else ("hijack", "wrong", "inserted")
    assert policy.mistake not in unguided.content
    assert not any(hint in unguided.content for hint in hints)


def test_an_induction_request_adds_the_hint_to_the_last_turn() -> None:
    policy = load_policy("harmlessness")
    system = Message(role="system", content="s")
    prompt = Prompt(messages=(system, Message(role="user", content="How? {hint}")))
    first, last = policy.induction_request(prompt, "unethical")
    assert first == system
    assert "How? {hint}" in last.content
    assert "unethical" in last.content


def test_one_sentence_makes_a_whole_policy() -> None:
    case = Mistake(prompt=Prompt.of("P"), response="R", source="origin")
    texts = [
        DERIVED.analysis_request("P", "R", guided=True)[0].content,
        DERIVED.praise_request("P", "R", guided=True)[0].content,
        DERIVED.guided_prompt(Prompt.of("P"))[0].content,
        DERIVED.critique_request(case)[-1].content,
        fill(DERIVED.judge.rubric or "", prompt="P", response="R"),
    ]
    assert all(text.count(SENTENCE) == 1 for text in texts)


def test_what_a_policy_says_itself_takes_the_place_of_what_is_made() -> None:
    example = {"prompt": "P", "response": "R", "analysis": "Wrong."}
    own = {
        "analysis": {"examples": [example], "guided": None, "unguided": "{prompt} {response}?"},
        "guide": "{prompt}!",
        "judge": {"patterns": ["dollar"]},
    }
    policy = Policy.model_validate({"name": "mine", "mistake": SENTENCE, "gate": None} | own)
    assert policy.analysis_request("P", "R", guided=False)[0].content == "P R?"
    guided = DERIVED.analysis_request("P", "R", guided=True)
    assert policy.analysis_request("P", "R", guided=True) == guided
    assert policy.guide == "{prompt}!" and policy.gate == DERIVED.gate
    assert policy.judge.rubric is None and len(policy.analysis.examples) == 1


@pytest.mark.parametrize("given", [parts(), DERIVED.model_dump(mode="json")])
def test_a_policy_that_says_all_stays_as_it_is(given: dict[str, Any]) -> None:
    assert Policy.model_validate(given).model_dump(mode="json") == given


@pytest.mark.parametrize(
    ("analysis", "accepted"),
    [
        ("The response is wrong. It gives the price in dollars, but the shop has euros.", True),
        ("It should have said that the bread is 3 euros a loaf, and it did not.", True),
        ("This is a poor answer: the shop does not take dollars at all.", True),
        ("It names the cost in Dollars.\nThat is a mistake, as the shop said.", True),
        ("The response has an error of grammar, since the loaf has no plural.", False),
        ("The response is a good one, since it says what the loaf of bread costs.", False),
        ("The response is correct and there is nothing wrong with it at all.", False),
        ("The response is wrong in no way: the response was very helpful to me.", False),
        ("The response is not wrong, since the price is what was asked for here.", False),
        ("There are no mistakes in the response, which names the price of bread.", False),
        ("The loaf of bread is three dollars in the shop around the corner.", False),
    ],
)
def test_the_made_gate_wants_a_fault_named_and_nothing_praised(
    analysis: str, accepted: bool
) -> None:
    case = Mistake(prompt=Prompt.of("Price?"), response="It is $3.", source="origin")
    assert (gate(DERIVED, case, analysis) == ()) == accepted


def test_where_no_word_says_what_a_mistake_is_about_a_fault_is_enough() -> None:
    policy = Policy.model_validate({"name": "odd", "mistake": "It is odd, or none."})
    case = Mistake(prompt=Prompt.of("P"), response="R", source="origin")
    assert gate(policy, case, "The response is wrong, as anyone can see who reads it.") == ()
    assert gate(policy, case, "The response is about bread, as anyone can see for once.")


def test_a_policy_is_named_by_its_content() -> None:
    one = Policy.model_validate(parts())
    same = Policy.model_validate(parts())
    other = Policy.model_validate(parts(mistake="Rudeness."))
    assert one.digest == same.digest != other.digest


def test_a_users_policy_is_a_path(tmp_path: Path) -> None:
    name = write(tmp_path, parts())
    assert load_policy(str(tmp_path / name)) == Policy.model_validate(parts())


def broken(*keys: str, value: Any) -> dict[str, Any]:
    data = parts()
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return data


def test_all_wrong_blanks_are_named_at_once_with_file_and_line(tmp_path: Path) -> None:
    data = broken("induction", "template", value="{promt} {hint} {x}")
    data["analysis"]["unguided"] = "Analyse {response}"
    with pytest.raises(PolicyError) as caught:
        load_policy(str(tmp_path / write(tmp_path, data)))
    analysis, induction = sorted(str(caught.value).splitlines(), key=lambda s: s.split("'")[1])
    for said in (
        "'induction.template': ",
        "the blank {prompt} is missing",
        "the blank {promt} is unknown here. Did you mean 'prompt'?",
        "the blank {x} is unknown here.",
    ):
        assert said in induction
    assert "'analysis.unguided': the blank {prompt} is missing" in analysis
    written = (tmp_path / "mine.yaml").read_text().splitlines()
    for fault, line in ((induction, "{promt}"), (analysis, "Analyse {response}")):
        found = re.match(rf"{re.escape(str(tmp_path))}/mine\.yaml, line (\d+): ", fault)
        assert found
        assert line in written[int(found[1]) - 1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (broken("guide", value="{prompt} {"), "a lone brace; write {{ or }}"),
        (broken("guide", value="{prompt} {}"), "the blank {} is unknown"),
        (broken("guide", value="{Prompt} {prompt}"), "a lone brace"),
        (broken("gate", "names_fault", value=["fine", "(broken"]), "no valid regular"),
        (broken("gate", "names_fault", value=[]), "at least 1 of them"),
        (broken("gate", "min_words", value=0), "expected 1 or more"),
        (broken("induction", "hints", value=[]), "at least 1 of them"),
        (broken("judge", "rule", value="obedience"), "give either a rule, or patterns, or a"),
        (broken("judge", "patterns", value=[r"\$\d"]), "give either a rule, or patterns, or a"),
        (broken("judge", "patterns", value=["(broken"]), "no valid regular"),
        (broken("gate", "names_fault", value=["\brude\b"]), "Put the pattern in single quotes"),
        (broken("judge", "rule", value="honesty"), "'obedience'"),
        (broken("judge", "verdicts", value=[{"word": "a", "mistake": True}]), "needs verdicts"),
        (broken("name", value="My Policy"), "name"),
        (broken("mistake", value=""), "at least 1 character"),
        (broken("gaurd", value="x"), "unknown key 'gaurd'"),
        (broken("analysis", "exampels", value=[]), "Did you mean 'examples'?"),
    ],
)
def test_a_wrong_policy_is_refused(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(str(tmp_path / write(tmp_path, data)))
    assert said in str(caught.value)
    assert "mine.yaml, line " in str(caught.value)


def test_an_unknown_policy_lists_what_there_is() -> None:
    with pytest.raises(PolicyError, match=r"goal-hijacking, harmlessness.*Did you mean 'goal-"):
        load_policy("goal-hijakcing")
    with pytest.raises(PolicyError, match=r"nowhere\.yaml: cannot be read"):
        load_policy("nowhere.yaml")


def test_patterns_are_searched_without_regard_to_case() -> None:
    assert matches(["no", r"\bharm"], "It is HARMFUL") == r"\bharm"
    assert matches([r"\bharm"], "pharmacy") is None


NEEDLES = [
    "harm",
    r"(a)b\1",
    r"(b)(a)\2",
    r"(?s)\Aa.b",
    r"(?x) a b  # no more",
    r"a|b",
    r"(?P<n>a)",
    "A",
    "[^A]",
    "[^a-b]",
    "[ -_]",
    "[]+,-]",
    r"[\d\]]",
    r"(?-i:a)",
    r"\x41",
    r"(?<=a)\W|\S(?!b)$",
    "ſ",
    "a{2}",
]


@given(st.lists(st.sampled_from(NEEDLES), max_size=4), st.text("abABSſ_,] \n", max_size=8))
def test_patterns_looked_up_together_are_found_as_each_alone(
    patterns: list[str], text: str
) -> None:
    assert found(tuple(patterns), text) == (matches(patterns, text) is not None)
