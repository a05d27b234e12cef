"""Learning from mistakes by analysing them (arXiv 2310.10477, section 4).

A row is (prompt, bad response, request for an analysis without the guide) -> analysis. The bad
response is context: loss falls on the analysis alone. Departures from the paper: analyses pass
a gate, and good answers to the attacked prompts are mixed in where they exist.
"""

from misstep.methods.base import (
    Materials,
    Method,
    Rows,
    analysis_row,
    good_rows,
    ordinary_rows,
)


class MistakeAnalysis(Method):
    """Trains on analyses of mistakes, mixed with ordinary pairs and good answers."""

    name = "mistake_analysis"
    uses_mistakes = True
    uses_analyses = True

    def rows(self, materials: Materials) -> Rows:
        rows = [analysis_row(materials.policy, a) for a in materials.each_analysis()]
        return rows + good_rows(materials) + ordinary_rows(materials)
