"""A written policy: what counts as a mistake, and all the words that the method needs for it.

A policy is text, not code: a YAML file, shipped or the user's own, checked when it is loaded.
Templates have checked blanks such as `{prompt}` and are filled in one pass, so a prompt that
contains `{response}` or Jinja code stays as it is. Knows no model, no engine and no judge.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from misstep.documents import Document, Settings, load_document, suggestion
from misstep.errors import PolicyError
from misstep.policy_words import completed
from misstep.records import SOME, Message, Mistake, Prompt

SHIPPED = Path(__file__).parent / "policies"
BLANK = re.compile(r"\{\{|\}\}|\{([a-z_]*)\}|[{}]")
BY_NUMBER = re.compile(r"\\[1-9]|\(\?\(")
"""In a pattern: another group of it, by its number."""
SMALL = re.compile(
    r"(?:[^A-Z\\\[(\u0130\u0131\u017f\u212a]|\\[bBdDsSwW]|\\[^\w\s]|\((?!\?)|\(\?(?:[:=!]|<[=!])"
    r"|\[\^?(?:[a-z]-[a-z]|[0-9]-[0-9]|\\[dDsSwW]|[^-\\\]A-Z\u0130\u0131\u017f\u212a])+\])*"
)
"""A pattern that finds in ASCII text in small letters what it finds, whatever the case."""


def fill(template: str, **values: str) -> str:
    """Fill a template's blanks in one pass; `{{` and `}}` stand for plain braces.

    What is filled in is never read again, so it may contain braces or blanks of its own.
    """
    return "".join([values[part] if blank else part for part, blank in _parts(template)])


@cache
def _parts(template: str) -> tuple[tuple[str, bool], ...]:
    """A template in parts: its own words, and the names of its blanks."""
    parts, end = list[tuple[str, bool]](), 0
    for match in BLANK.finditer(template):
        whole, name = match.group(0), match.group(1)
        parts += [(template[end : match.start()], False), (name or whole[0], name is not None)]
        end = match.end()
    return (*parts, (template[end:], False))


def blanks(template: str) -> set[str]:
    """The names of a template's blanks.

    Raises:
        ValueError: a brace that belongs to no blank.
    """
    names = set()
    for match in BLANK.finditer(template):
        if match.group(0) in ("{", "}"):
            raise ValueError("a lone brace; write {{ or }} for a plain brace")
        if match.group(1) is not None:
            names.add(match.group(1))
    return names


class _Blanks:
    """Checks that a template has exactly these blanks."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def __call__(self, template: str) -> str:
        found = blanks(template)
        faults = [f"the blank {{{n}}} is missing" for n in sorted(self.names - found)]
        faults += [
            f"the blank {{{n}}} is unknown here.{suggestion(n, sorted(self.names))}"
            for n in sorted(found - self.names)
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return template


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ValueError(f"no valid regular expression: {fault}") from fault
    if "\b" in pattern:
        raise ValueError(
            "expected a regular expression, found a backspace in it: in double quotes YAML "
            "reads \\b so, and it matches nothing. Put the pattern in single quotes"
        )
    return pattern


PromptTemplate = Annotated[str, AfterValidator(_Blanks("prompt"))]
HintTemplate = Annotated[str, AfterValidator(_Blanks("prompt", "hint"))]
PairTemplate = Annotated[str, AfterValidator(_Blanks("prompt", "response"))]
Text = Annotated[str, Field(min_length=1)]
Pattern = Annotated[Text, AfterValidator(_regex)]
DERIVED = Field(json_schema_extra={"made of": "mistake"})
"""A key whose words are made of another one where it is left out."""


class Induction(Settings):
    """How the model is brought to make the mistake (paper, section 4.1)."""

    template: HintTemplate
    """The prompt with a hint word added."""
    hints: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Hint words; each request has one of them, drawn by the seed."""


class WorkedExample(Settings):
    """One analysis shown to the model before it writes its own."""

    prompt: Text
    """What was asked."""
    response: Text
    """A mistake; under `praise` a good answer."""
    analysis: Text
    """A good analysis of it."""


class AnalysisRequests(Settings):
    """The two requests for an analysis: with the guide (asked), without it (trained on)."""

    guided: Annotated[PairTemplate, DERIVED]
    """With the guide: it says that the response may be bad."""
    unguided: Annotated[PairTemplate, DERIVED]
    """Without it; the request that a model is trained on."""
    examples: tuple[WorkedExample, ...] = ()
    """Worked examples, shown before the request."""


class PraiseRequests(Settings):
    """How the model is asked what is right about a good answer."""

    guided: Annotated[PairTemplate, DERIVED]
    """It says that the response is right, as `analysis.guided` says that it may be wrong."""
    examples: tuple[WorkedExample, ...] = ()
    """Worked examples, shown before the request."""


class CritiqueRequests(Settings):
    """What the model is asked about its own bad response (Constitutional AI)."""

    critique: Text
    """The request that asks how the response is bad."""
    revision: Text
    """The request for a better one, after the critique."""


class Hindsight(Settings):
    """How answers are told apart in Chain of Hindsight."""

    markers: Annotated[tuple[tuple[Text, Text], ...], Field(min_length=1)] = (
        ("A good answer:", "A bad answer:"),
        ("A helpful answer:", "An unhelpful answer:"),
    )
    """Pairs of a good and a bad marker; the first good one is used at inference."""


class SelfGuardWords(Settings):
    """The tags of Self-Guard, and what stands in for an answer that is tagged as harmful."""

    request: Text = "Is the answer above harmful? Reply with a tag, [harmful] or [harmless]."
    """Asks for the tag of an answer; a training row."""
    harmful: Text = "[harmful]"
    """The tag of a mistake."""
    harmless: Text = "[harmless]"
    """The tag of a good answer; it is cut from what a user gets."""
    replacement: Text = "Sorry, I cannot give the answer that I had in mind."
    """What a user gets in the place of an answer with the tag of a mistake."""


class Gate(Settings):
    """When an analysis is accepted. The patterns are searched without regard to case."""

    names_fault: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    """At least one must be found: the analysis says what is wrong."""
    endorses: tuple[Pattern, ...] = ()
    """None may be found: the analysis praises or repeats the bad response."""
    min_words: Annotated[int, Field(ge=1)] = 8
    """A shorter analysis is refused."""


class Verdict(Settings):
    """A word that ends the judge's answer, and what it is worth."""

    word: Text
    """As the rubric asks for it, after `Verdict:`."""
    mistake: bool
    """Whether it calls the response a mistake."""


class JudgeRule(Settings):
    """What decides whether a response is a mistake: a rule, patterns, or a rubric."""

    rule: Literal["obedience"] | None = None
    """`obedience`: the response does what the attack's target text asks for."""
    patterns: Annotated[tuple[Pattern, ...], SOME] = ()
    """The response is a mistake where at least one is found in it, without regard to case:
    `\\$ ?[0-9]` for prices in dollars. `(?s)\\A(?!.*PATTERN)` is found where PATTERN is not."""
    rubric: PairTemplate | None = None
    """What a judging model is asked; its answer ends with one of the verdict words."""
    verdicts: tuple[Verdict, ...] = ()
    """Of a rubric: the words that its answer can end with."""

    @model_validator(mode="after")
    def _one_way(self) -> "JudgeRule":
        if sum(map(bool, (self.rule, self.patterns, self.rubric))) != 1:
            raise ValueError("give either a rule, or patterns, or a rubric")
        kinds = {v.mistake for v in self.verdicts}
        if self.rubric is not None and kinds != {True, False}:
            raise ValueError(
                "a rubric needs verdicts: at least one mistake and one that is none"
            )
        asked = (self.rubric or "").casefold()
        absent = [v.word for v in self.verdicts if f"verdict: {v.word.casefold()}" not in asked]
        if self.rubric is not None and absent:
            raise ValueError(
                "a rubric must ask for each verdict in the form in which it is read: expected "
                + " and ".join(f"'Verdict: {word}'" for word in absent)
            )
        return self


class Policy(Document):
    """What counts as a mistake, and all the words that are needed for it."""

    mistake: Text
    """What counts as a mistake, in one or two sentences, as `The response is rude.`"""
    induction: Induction | None = None
    analysis: Annotated[AnalysisRequests, DERIVED]
    praise: Annotated[PraiseRequests, DERIVED]
    guide: Annotated[PromptTemplate, DERIVED]
    """What the model reads at inference: the prompt and a reminder."""
    gate: Annotated[Gate, DERIVED]
    judge: Annotated[JudgeRule, DERIVED]
    critique: Annotated[CritiqueRequests, DERIVED]
    hindsight: Hindsight = Hindsight()
    self_guard: SelfGuardWords = SelfGuardWords()

    @model_validator(mode="before")
    @classmethod
    def _with_all_words(cls, given: Any) -> Any:
        return completed(given) if isinstance(given, Mapping) else given

    def turns(self, prompt: Prompt, guided: bool) -> tuple[Message, ...]:
        """The conversation as a model is asked it, with the guide or as it stands."""
        return self.guided_prompt(prompt) if guided else prompt.messages

    def guided_prompt(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation with the guide put around its last user turn."""
        last = max(i for i, m in enumerate(prompt.messages) if m.role == "user")
        turns = list(prompt.messages)
        turns[last] = Message(role="user", content=fill(self.guide, prompt=turns[last].content))
        return tuple(turns)

    def induction_request(self, prompt: Prompt, hint: str) -> tuple[Message, ...]:
        """The prompt with a hint word, which brings the model to make the mistake."""
        assert self.induction is not None
        content = fill(self.induction.template, prompt=prompt.text, hint=hint)
        return (*prompt.messages[:-1], Message(role="user", content=content))

    def analysis_request(self, prompt: str, response: str, guided: bool) -> tuple[Message, ...]:
        """The request for an analysis, as it is trained on: no worked examples."""
        template = self.analysis.guided if guided else self.analysis.unguided
        return _about(template, prompt, response)

    def praise_request(self, prompt: str, response: str, guided: bool) -> tuple[Message, ...]:
        """The request for what is right about a good answer; unguided, that for an analysis."""
        template = self.praise.guided if guided else self.analysis.unguided
        return _about(template, prompt, response)

    def critique_request(self, mistake: Mistake) -> tuple[Message, ...]:
        """The conversation in which the mistake was made, and the request for a critique."""
        return (
            *mistake.prompt.messages,
            Message(role="assistant", content=mistake.response),
            Message(role="user", content=self.critique.critique),
        )

    def revision_request(self, mistake: Mistake, critique: str) -> tuple[Message, ...]:
        """The same conversation after the critique, and the request for a revision."""
        return (
            *self.critique_request(mistake),
            Message(role="assistant", content=critique),
            Message(role="user", content=self.critique.revision),
        )

    def worked_request(self, prompt: str, response: str, guided: bool) -> tuple[Message, ...]:
        """The request for an analysis, after turns that are the policy's worked examples."""
        return (*self._worked[guided], *self.analysis_request(prompt, response, guided))

    def worked_praise(self, prompt: str, response: str, guided: bool) -> tuple[Message, ...]:
        """The request for praise, after turns that are its worked examples."""
        return (*self._praised[guided], *self.praise_request(prompt, response, guided))

    @cached_property
    def _worked(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """The worked examples as turns: without the guide, with it."""
        shown = partial(_shown, self.analysis.examples, self.analysis_request)
        return shown(False), shown(True)

    @cached_property
    def _praised(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """Those of praise, likewise."""
        shown = partial(_shown, self.praise.examples, self.praise_request)
        return shown(False), shown(True)


def _about(template: str, prompt: str, response: str) -> tuple[Message, ...]:
    """A request about a prompt and a response to it."""
    return (Message(role="user", content=fill(template, prompt=prompt, response=response)),)


def _shown(
    examples: Sequence[WorkedExample],
    request: Callable[[str, str, bool], tuple[Message, ...]],
    guided: bool,
) -> tuple[Message, ...]:
    """Worked examples as turns, each asked for as the real one is."""
    return tuple(
        turn
        for example in examples
        for turn in (
            *request(example.prompt, example.response, guided),
            Message(role="assistant", content=example.analysis),
        )
    )


def shipped() -> list[str]:
    """The names of the policies that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_policy(name: str) -> Policy:
    """Load a shipped policy by its name, or a user's own by its path.

    Args:
        name: a shipped name, or a path that ends in `.yaml` or `.yml`.

    Raises:
        PolicyError: no such policy, or all that is wrong with it, a line each.
    """
    return load_document(Policy, name, SHIPPED, "policy", PolicyError)


def is_policy(data: Mapping[str, Any]) -> bool:
    """Whether the keys of a YAML file are a policy's and no other file's."""
    return "mistake" in data


def matches(patterns: Sequence[str], text: str) -> str | None:
    """The first pattern that is found in the text, without regard to case."""
    return next((p for p in patterns if _compiled(p).search(text)), None)


def found(patterns: tuple[str, ...], text: str) -> bool:
    """Whether any pattern is found in the text, without regard to case; sooner than which."""
    if text.isascii() and _small(patterns):
        # A search that regards case takes half as long.
        return any(pattern.search(text.lower()) for pattern in _together(patterns, 0))
    return any(pattern.search(text) for pattern in _together(patterns, re.IGNORECASE))


@cache
def _small(patterns: tuple[str, ...]) -> bool:
    return all(map(SMALL.fullmatch, patterns))


@cache
def _together(patterns: tuple[str, ...], flags: int) -> tuple[re.Pattern[str], ...]:
    """One pattern for all of them, which goes through a text once, where that can be made."""
    # Groups that are referred to by number have other numbers beside other patterns.
    if patterns and not any(map(BY_NUMBER.search, patterns)):
        # One that begins with flags of its own, or repeats a group's name, stands alone.
        with suppress(re.error):
            return (re.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags),)
    return tuple(re.compile(pattern, flags) for pattern in patterns)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Looked up faster than by `re` itself, which counts where texts are short and many."""
    return re.compile(pattern, re.IGNORECASE)
