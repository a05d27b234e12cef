"""Gated analyses alone: mistake analysis without good answers to the attacked prompts.

The kinds of rows are the paper's (section 4.3); that only accepted analyses are learned is not.
The budget that other methods spend on good answers goes to the analyses, which come again where
they are too few.
"""

from misstep.methods.base import Materials, Method, Rows, analysis_row, ordinary_rows


class AnalysisOnly(Method):
    """Trains on analyses of mistakes, mixed with ordinary pairs."""

    name = "analysis_only"
    uses_mistakes = True
    uses_analyses = True

    def rows(self, materials: Materials) -> Rows:
        drawn = materials.some(materials.analyses, materials.lesson, "analyses")
        rows = [analysis_row(materials.policy, analysis) for analysis in drawn]
        return rows + ordinary_rows(materials)
