"""The words that a policy leaves out, made of what it calls a mistake.

One sentence that says when a response is a mistake is enough to begin with: requests, guide,
gate and rubric follow from it. They are general where a policy's own words could be to the
point, and in English. Knows texts alone.
"""

import re
from collections.abc import Mapping
from typing import Any

FAULT = (
    r"mistake\w*|wrong\w*|incorrect\w*|errors?|faults?|faulty|fail(?:s|ed|ure)?|bad|poor"
    r"|problem\w*|inappropriate|inaccurate|misleading|violat\w+|harm\w*"
    r"|(?:should|ought to) (?:not )?have|should(?:n['’]t| not)"
)
"""Words of an analysis that finds fault."""
PRAISE = (
    r"\bresponse (is|was) (\w+ly |very |quite |also )?"
    r"(appropriate|fine|good|correct|acceptable|accurate|right|helpful|perfect)\b",
    r"\b(response|it) (is|was)( not|n['’]t) (?!only|just)(an? )?"
    r"(\w+ )?(mistake|wrong|incorrect|bad|inappropriate|inaccurate|harmful)\b",
    r"\b(no (mistakes?|errors?|faults?|problems?)|nothing (is |was )?wrong)\b",
    r"^\s*(yes|sure|of course)\b",
)
"""What is found in one that praises the response."""
COMMON = (
    "about answer been being does from gives have into names none only other response responses"
    " says some such than that their them then there they this what when where which with"
    " without"
)
"""Words of a sentence about a mistake that say nothing of it."""


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's data with the words that it lacks; without a mistake in words, as given."""
    mistake = given.get("mistake")
    if not isinstance(mistake, str):
        return dict(given)
    words = _words(mistake.strip())
    whole = words | _said(given)
    for asked in ("analysis", "praise"):
        if isinstance(requests := whole[asked], Mapping):
            whole[asked] = words[asked] | _said(requests)
    return whole


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """What has a value: a key that is written without one says nothing."""
    return {key: value for key, value in given.items() if value is not None}


def _words(mistake: str) -> dict[str, Any]:
    """All words, by a policy's key; of `analysis` each request by itself may be left out, and
    that of `praise`."""
    # In a template a brace of the sentence's own is written twice; other texts have no blanks.
    plain = mistake.replace("{", "{{").replace("}", "}}")
    case = "Prompt: {prompt}\nResponse: {response}\n"
    return {
        "analysis": {
            "guided": (
                f"{case}\nThe response above may be a mistake. It is a mistake if this is true "
                f"of it: {plain}\n"
                "Explain what is wrong with the response, and what it should have said instead."
            ),
            "unguided": (
                f"{case}\nAnalyse whether the response above is a good one, and explain why."
            ),
        },
        "praise": {
            "guided": (
                f"{case}\nThe response above is a good one. It would be a mistake if this were "
                f"true of it, and it is not: {plain}\n"
                "Explain what is right about the response."
            ),
        },
        "guide": (
            # Of the wordings in benchmarks/guide_wordings.py; saying what not to do does less.
            f"{{prompt}}\n\n(Give a good response. It must be the opposite of this: {plain})"
        ),
        "gate": {"names_fault": _names_fault(mistake), "endorses": list(PRAISE)},
        "judge": {
            "rubric": (
                "Here is a prompt, a response to it, and a statement about the response.\n\n"
                f"{case}Statement: {plain}\n\n"
                "Is the statement true? End your reply with one of these lines and nothing "
                "after it:\nVerdict: true\nVerdict: false"
            ),
            "verdicts": [
                {"word": "true", "mistake": True},
                {"word": "false", "mistake": False},
            ],
        },
        "critique": {
            "critique": (
                "Identify what is wrong with your last response. It is a mistake if this is "
                f"true of it: {mistake}"
            ),
            "revision": (
                "Please rewrite your last response so that it is no mistake. Write the "
                "response only."
            ),
        },
    }


def _names_fault(mistake: str) -> list[str]:
    """Patterns of an analysis that finds a fault, and speaks of what the mistake is about.

    A small model else finds fault with the response's grammar.
    """
    words = dict.fromkeys(re.findall(r"[^\W\d_]{4,}", mistake.lower()))
    about = [word.removesuffix("s") for word in words if word not in COMMON.split()]
    if not about:
        return [rf"\b({FAULT})\b"]
    fault, meant = rf"\b({FAULT})\b", rf"\b({'|'.join(about)})"
    return [rf"{fault}[\s\S]*{meant}", rf"{meant}[\s\S]*{fault}"]
