"""Supervised fine-tuning: good answers alone, in the place of analyses."""

from misstep.methods.base import Materials, Method, Rows, answers, ordinary_rows


class SFT(Method):
    """Trains on good answers to the attacked prompts, mixed with ordinary pairs."""

    name = "sft"
    needs_good_answers = True

    def rows(self, materials: Materials) -> Rows:
        good = materials.some(materials.answered, materials.lesson, "answered")
        return answers(materials, good, "good_answer") + ordinary_rows(materials)
