"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290): good answer, mistake.

A sample is a pair; the budget counts samples, the ordinary pairs of other methods included. The
objective itself is the trainer's.
"""

from misstep.methods.base import Materials, Method, Rows


class DPO(Method):
    """Trains on pairs of a good answer and the mistake."""

    name = "dpo"
    needs_good_answers = True
    uses_mistakes = True
    on_pairs = True
    uses_ordinary = False

    def rows(self, materials: Materials) -> Rows:
        return materials.some(materials.pairs(), materials.budget, "pairs")
