"""Mistake analysis with the paper's own rows: analyses and ordinary pairs (section 4.3).

No good answer to an attacked prompt is shown. The budget that other methods spend on good
answers goes to the analyses, which come again where they are too few.
"""

from misstep.methods.base import Materials, Method, Rows, analysis_row, ordinary_rows


class AnalysisOnly(Method):
    """Trains on analyses of mistakes, mixed with ordinary pairs."""

    name = "analysis_only"
    about = "learning from mistakes with the paper's rows: analyses, ordinary pairs"
    uses_mistakes = True
    uses_analyses = True

    def rows(self, materials: Materials) -> Rows:
        drawn = materials.some(materials.analyses, materials.lesson, "analyses")
        rows = [analysis_row(materials.policy, analysis) for analysis in drawn]
        return rows + ordinary_rows(materials)
