"""Learning from mistakes by analysing them (arXiv 2310.10477, section 4).

A row is (prompt, bad response, request for an analysis without the guide) -> analysis. The bad
response is context: loss falls on the analysis alone. Departures from the paper: analyses pass
a gate, and good answers to the attacked prompts are mixed in where they exist
(`mix.good_answers: 0` is the paper's setting).
"""

from misstep.methods.base import Materials, Method, answers
from misstep.policy import Policy
from misstep.records import Analysis, Example


class MistakeAnalysis(Method):
    """Trains on analyses of mistakes, mixed with ordinary pairs and good answers."""

    name = "mistake_analysis"
    about = "learning from mistakes: analyses, ordinary pairs, good answers"
    uses_mistakes = True

    def examples(self, materials: Materials) -> list[Example]:
        mix = materials.mix
        rows = [_row(materials.policy, analysis) for analysis in materials.analyses]
        good = materials.some(materials.answered, mix.good_answers, "answered")
        ordinary = materials.some(materials.ordinary, mix.ordinary, "ordinary")
        return rows + answers(good, "good_answer") + answers(ordinary, "ordinary")


def _row(policy: Policy, analysis: Analysis) -> Example:
    mistake = analysis.mistake
    return Example(
        messages=policy.analysis_request(mistake.prompt.text, mistake.response, guided=False),
        completion=analysis.text,
        kind="analysis",
    )
