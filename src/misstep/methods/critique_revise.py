"""Critique and revision (Constitutional AI, arXiv 2212.08073, section 3.1).

The model criticises its own bad response by the policy and writes a better one; it is then
fine-tuned on (prompt -> revision), mixed with ordinary pairs. Nothing else judges a revision.
"""

from misstep.methods.base import Materials, Method, Rows, ordinary_rows
from misstep.records import Example


class CritiqueRevise(Method):
    """Trains on the model's own revisions of its mistakes."""

    name = "critique_revise"
    uses_mistakes = True
    uses_revisions = True

    def rows(self, materials: Materials) -> Rows:
        drawn = materials.some(materials.revisions, materials.lesson, "revisions")
        rows = [
            Example(messages=r.mistake.prompt.messages, completion=r.text, kind="revision")
            for r in drawn
        ]
        return rows + ordinary_rows(materials)
