"""Whether test prompts are held out: which of their questions are learned from, too.

Such a prompt refuses no run, since it may be meant, but no number should be read without
knowing of it. Holds a few bytes for each prompt of the tests and nothing else.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256

from misstep.data.sources import question_of
from misstep.records import Prompt

Overlaps = dict[str, dict[str, int]]
"""By test set: a source that is learned from, and how many of the set's prompts it asks."""


def overlaps(
    tests: Mapping[str, Iterable[Prompt]], learned: Mapping[str, Iterable[Prompt]]
) -> Overlaps:
    """Count the test prompts whose question stands in a source that is learned from."""
    asked = {name: Counter(map(_name, prompts)) for name, prompts in tests.items()}
    found: Overlaps = defaultdict(dict)
    for key, prompts in learned.items():
        common: dict[str, set[bytes]] = defaultdict(set)
        for question in map(_name, prompts):
            for name, of in asked.items():
                if question in of:
                    common[name].add(question)
        for name, questions in common.items():
            found[name][key] = sum(asked[name][question] for question in questions)
    return dict(found)


def largest(several: Iterable[Overlaps]) -> Overlaps:
    """Of several runs the largest numbers."""
    found: Overlaps = defaultdict(dict)
    for each in several:
        for name, of in each.items():
            for key, number in of.items():
                found[name][key] = max(number, found[name].get(key, 0))
    return dict(found)


def told(found: Overlaps) -> Iterator[str]:
    """A phrase for each test set and source."""
    for name, of in found.items():
        for key, number in of.items():
            yield f"{number} of the prompts of {name} are asked in {key}, too"


def _name(prompt: Prompt) -> bytes:
    return sha256(question_of(prompt).encode()).digest()[:8]
