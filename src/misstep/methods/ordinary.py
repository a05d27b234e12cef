"""The control: ordinary question-answer pairs alone, as many rows as the method under test.

Fine-tuning on clean tasks can raise the mistake rate by itself; without this control an
analysis-only run looks harmful or helpful for the wrong reason.
"""

from misstep.methods.base import Materials, Method, Rows, answers


class Ordinary(Method):
    """Trains on ordinary pairs alone."""

    name = "ordinary"

    def rows(self, materials: Materials) -> Rows:
        found = materials.some(materials.ordinary, materials.budget, "ordinary")
        return answers(materials, found, "ordinary")
