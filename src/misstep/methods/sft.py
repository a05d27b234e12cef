"""Supervised fine-tuning: good answers alone, in the place of analyses."""

from misstep.methods.base import Materials, Method, answers
from misstep.records import Example


class SFT(Method):
    """Trains on good answers to the attacked prompts, mixed with ordinary pairs."""

    name = "sft"
    about = "supervised fine-tuning on good answers"

    def examples(self, materials: Materials) -> list[Example]:
        mix = materials.mix
        good = materials.some(materials.answered, 1 + mix.good_answers, "answered")
        ordinary = materials.some(materials.ordinary, mix.ordinary, "ordinary")
        return answers(good, "good_answer") + answers(ordinary, "ordinary")
