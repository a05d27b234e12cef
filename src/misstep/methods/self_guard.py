"""Self-Guard (Wang et al., arXiv 2310.15851): the model tags its own answer, a filter reads it.

Tag learning: (prompt and answer, request for a tag) -> tag, for good and bad answers. Behaviour
learning: every answer ends with its tag; of a bad answer only the tag is learned. At inference
an answer that the model tags as harmful is replaced by a fixed sentence; any tag is removed.
"""

from misstep.methods.base import Materials, Method, Rows, ordinary_rows
from misstep.policy import Policy
from misstep.records import Example, Message, Pair


class SelfGuard(Method):
    """Trains the model to end each answer with a tag, harmful or harmless."""

    name = "self_guard"
    needs_good_answers = True
    uses_mistakes = True
    spare_tokens = 16

    def rows(self, materials: Materials) -> Rows:
        policy = materials.policy
        pairs = materials.pairs()
        drawn = materials.some(pairs, materials.lesson, "pairs")
        # The budget counts rows, of which a pair has four: each gives one, the next gives the
        # next one, and a pair that comes again gives another.
        turns = ((place % len(pairs) + place // len(pairs)) % 4 for place in range(len(drawn)))
        rows = [_rows(policy, pair)[turn] for pair, turn in zip(drawn, turns, strict=True)]
        return rows + [
            row.model_copy(update={"completion": _tagged(policy, row.completion)})
            for row in ordinary_rows(materials)
        ]

    def write(self, policy: Policy, answer: str) -> str:
        return _tagged(policy, answer)

    def read(self, policy: Policy, text: str) -> str:
        tags = policy.self_guard
        if tags.harmful in text:
            return tags.replacement
        return text.replace(tags.harmless, "").rstrip()


def _tagged(policy: Policy, answer: str) -> str:
    return f"{answer} {policy.self_guard.harmless}"


def _rows(policy: Policy, pair: Pair) -> list[Example]:
    """Four rows: tags asked for, and tags at the end of answers; each for good and bad."""
    tags = policy.self_guard
    asked = [
        Example(messages=_request(policy, pair, answer), completion=tag, kind="tag")
        for answer, tag in ((pair.chosen, tags.harmless), (pair.rejected, tags.harmful))
    ]
    return [
        *asked,
        Example(messages=pair.messages, completion=_tagged(policy, pair.chosen), kind="tagged"),
        Example(
            messages=pair.messages,
            prefill=pair.rejected,
            completion=f" {tags.harmful}",
            kind="tagged",
        ),
    ]


def _request(policy: Policy, pair: Pair, answer: str) -> tuple[Message, ...]:
    return (
        *pair.messages,
        Message(role="assistant", content=answer),
        Message(role="user", content=policy.self_guard.request),
    )
