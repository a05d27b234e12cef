"""Chain of Hindsight (Liu et al., arXiv 2302.02676): answers behind markers of their quality.

Four kinds of samples, drawn alike: a good answer (p), a bad one (n), good then bad (pn), bad
then good (np), each answer behind one of the policy's marker pairs. Loss falls on every answer,
the bad one too; markers and the user's text are masked. At inference the good marker is used.

In a chat a marker stands in the user's turn, so it is masked by what a user's turn is. A sample
of two answers is two rows, one a turn of loss: their summed loss is the sample's own.
"""

import random
from itertools import cycle

from misstep.methods.base import Materials, Method, Rows, ordinary_rows
from misstep.policy import Policy
from misstep.records import Example, Message, Pair

KINDS = ("p", "n", "pn", "np")
KIND = "hindsight"


class ChainOfHindsight(Method):
    """Trains on good and bad answers alike, told apart by their markers."""

    name = "coh"
    needs_good_answers = True
    uses_mistakes = True

    def rows(self, materials: Materials) -> Rows:
        drawn = materials.some(materials.pairs(), materials.lesson, "pairs")
        dice = random.Random(f"hindsight {materials.seed}")
        rows: list[Example] = []
        # The budget counts answers, of which a sample has one or two.
        for pair in cycle(drawn) if drawn else ():
            if len(rows) >= len(drawn):
                break
            good, bad = dice.choice(materials.policy.hindsight.markers)
            rows += sample(pair, dice.choice(KINDS), good, bad)
        return rows[: len(drawn)] + ordinary_rows(materials)

    def ask(self, policy: Policy, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return marked(messages, policy.hindsight.markers[0][0])


def sample(pair: Pair, kind: str, good: str, bad: str) -> list[Example]:
    """One sample of a kind: a row for each of its answers."""
    told = {"p": (good, pair.chosen), "n": (bad, pair.rejected)}
    (marker, answer), *then = [told[part] for part in kind]
    asked = marked(pair.messages, marker)
    rows = [Example(messages=asked, completion=answer, kind=KIND)]
    for marker, following in then:
        asked = (
            *asked,
            Message(role="assistant", content=answer),
            Message(role="user", content=marker),
        )
        rows.append(Example(messages=asked, completion=following, kind=KIND))
    return rows


def marked(messages: tuple[Message, ...], marker: str) -> tuple[Message, ...]:
    """The conversation with a marker at the end of its last turn, the user's."""
    last = messages[-1]
    return (
        *messages[:-1],
        last.model_copy(update={"content": f"{last.content}\n\n{marker}"}),
    )
