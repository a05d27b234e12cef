"""The model as it is."""

from misstep.methods.base import Materials, Method
from misstep.records import Example


class Vanilla(Method):
    """Trains nothing."""

    name = "vanilla"
    about = "the model as it is"

    def examples(self, materials: Materials) -> list[Example]:
        del materials
        return []
