"""Our variant of mistake analysis: the analysis is followed by the answer that was due.

The paper's method learns to say what is wrong and never sees what would be right. Here a row is
(prompt, bad response, request without the guide) -> analysis and corrected answer, where a good
answer is known; and of the good answers mixed in, every second one is given to the guided
prompt, so that guidance at inference is no stranger to the model.
"""

from misstep.methods.base import (
    Materials,
    Method,
    Rows,
    analysis_row,
    good_rows,
    ordinary_rows,
)
from misstep.policy import Policy
from misstep.records import Analysis, Example

CORRECTION = "\n\nA right response: "


class CorrectedAnalysis(Method):
    """Trains on analyses with corrections, ordinary pairs, good answers guided and not."""

    name = "corrected_analysis"
    uses_mistakes = True
    uses_analyses = True

    def rows(self, materials: Materials) -> Rows:
        policy = materials.policy
        rows = [_corrected(policy, analysis) for analysis in materials.each_analysis()]
        return rows + good_rows(materials, guided=0.5) + ordinary_rows(materials)


def _corrected(policy: Policy, analysis: Analysis) -> Example:
    row, right = analysis_row(policy, analysis), analysis.mistake.prompt.reference
    if not right:
        return row
    return row.model_copy(update={"completion": f"{row.completion}{CORRECTION}{right}"})
