"""The control: ordinary question-answer pairs alone, as many rows as the method under test.

Fine-tuning on clean tasks can raise the mistake rate by itself; without this control an
analysis-only run looks harmful or helpful for the wrong reason.
"""

from misstep.methods.base import Materials, Method, answers
from misstep.records import Example


class Ordinary(Method):
    """Trains on ordinary pairs alone."""

    name = "ordinary"
    about = "control: ordinary question-answer pairs alone"

    def examples(self, materials: Materials) -> list[Example]:
        mix = materials.mix
        share = 1 + mix.ordinary + mix.good_answers
        return answers(materials.some(materials.ordinary, share, "ordinary"), "ordinary")
