"""Mistake analysis with the rows of its paper (arXiv 2310.10477, section 4.3).

A row is (prompt, bad response, request for an analysis without the guide) -> the first analysis
that was sampled of the mistake. No gate is asked and no good answer is shown. An analysis that
is empty or broken off has no row: it would teach the model to say nothing, or never to stop.
The paper mixes each analysis in once; here they come again where other methods have more rows.
"""

from misstep.methods.base import Materials, Method, Rows, analysis_row, ordinary_rows
from misstep.records import Analysis
from misstep.stages.analyse import BROKEN_OFF


class Published(Method):
    """Trains on the first analysis of every mistake, mixed with ordinary pairs."""

    name = "published"
    uses_mistakes = True
    uses_analyses = True

    def rows(self, materials: Materials) -> Rows:
        drawn = materials.some(_first(materials), materials.lesson, "analyses")
        rows = [analysis_row(materials.policy, analysis) for analysis in drawn]
        return rows + ordinary_rows(materials)


def _first(materials: Materials) -> list[Analysis]:
    first: dict[str, Analysis] = {}
    for analysis in materials.sampled:
        first.setdefault(analysis.mistake.id, analysis)
    return [a for a in first.values() if a.text and BROKEN_OFF not in a.reasons]
