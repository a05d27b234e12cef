"""Our variant that learns to tell: analyses that find the fault against those that praise it.

Of its mistake a guided model finds the fault where, unguided, it often praises (paper, section
3). An analysis that the gate let through is preferred to what the same model says of the same
mistake without the guide, where the gate refuses that; in equal parts with pairs of a good
answer and the mistake, as in `dpo`. Where there are none of one part, the other is all.
"""

from misstep.methods.base import Materials, Method, Rows
from misstep.records import Pair
from misstep.stages.analyse import BROKEN_OFF


class ContrastiveAnalysis(Method):
    """Trains on pairs of a right and a wrong analysis, and of a good answer and the mistake."""

    name = "contrastive_analysis"
    uses_mistakes = True
    uses_analyses = True
    uses_unguided = True
    on_pairs = True
    uses_ordinary = False

    def rows(self, materials: Materials) -> Rows:
        share = materials.budget
        answers, analyses = materials.pairs(), contrasts(materials)
        if not answers or not analyses:
            return materials.some(answers or analyses, share, "pairs")
        told = materials.some(analyses, share / 2, "contrasts")
        return told + materials.some(answers, share, "pairs")[len(told) :]


def contrasts(materials: Materials) -> list[Pair]:
    """An accepted analysis beside a refused unguided one of the same mistake, where there is.

    One that broke off, or is empty, would teach how an analysis ends and not what it says.
    """
    refused = {
        analysis.mistake.id: analysis.text
        for analysis in materials.unguided
        if not analysis.accepted and analysis.text and BROKEN_OFF not in analysis.reasons
    }
    return [
        Pair(
            messages=materials.policy.analysis_request(
                right.mistake.prompt.transcript, right.mistake.response, guided=False
            ),
            chosen=right.text,
            rejected=refused[right.mistake.id],
            kind="analysis",
        )
        for right in materials.analyses
        if right.mistake.id in refused
    ]
