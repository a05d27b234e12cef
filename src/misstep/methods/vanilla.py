"""The model as it is."""

from misstep.methods.base import Materials, Method, Rows


class Vanilla(Method):
    """Trains nothing."""

    name = "vanilla"
    trains = False

    def rows(self, materials: Materials) -> Rows:
        del materials
        return []
