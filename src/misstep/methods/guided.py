"""Guidance at inference and nothing else (paper, section 4.4, without the training)."""

from misstep.methods.base import Materials, Method, Rows


class Guided(Method):
    """Trains nothing; every prompt carries the policy's guide."""

    name = "guided"
    trains = False
    guided = (True,)

    def rows(self, materials: Materials) -> Rows:
        del materials
        return []
