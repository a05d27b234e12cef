"""Our variant that learns to look: analyses of mistakes and of good answers in equal parts.

Trained on analyses of mistakes alone, a model comes to find fault in every answer, right ones
too (docs/results/study-trained.md). Here half of the analyses say why a good answer to the same
prompts is right. Both kinds answer the same request, so what an analysis says has to come from
the answer. All other rows are those of `mistake_analysis`, and they are as many.
"""

from misstep.methods.base import (
    Materials,
    Method,
    Rows,
    analysis_row,
    good_rows,
    ordinary_rows,
    praise_row,
)


class BalancedAnalysis(Method):
    """Trains on analyses of mistakes and of good answers, else as `mistake_analysis`."""

    name = "balanced_analysis"
    uses_mistakes = True
    uses_analyses = True
    uses_praise = True
    needs_good_answers = True

    def rows(self, materials: Materials) -> Rows:
        policy = materials.policy
        faults = materials.some(materials.analyses, 1 / 2, "analyses")
        praise = materials.some(materials.praise, 1, "praise")[len(faults) :]
        told = [analysis_row(policy, analysis) for analysis in faults]
        told += [praise_row(policy, words) for words in praise]
        return told + good_rows(materials) + ordinary_rows(materials)
