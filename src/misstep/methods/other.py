"""A model that something else has trained: a row beside those that are trained here.

The recipe names it (`others`). It is asked as any model is, and what it answers is read as it
stands: how it was made is not known here.
"""

from misstep.methods.base import Materials, Method, Rows


class Other(Method):
    """Answers with the weights that it came with."""

    name = "other"
    trains = False
    uses_ordinary = False

    def rows(self, materials: Materials) -> Rows:
        del materials
        return []
