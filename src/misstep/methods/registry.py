"""The methods by name."""

from misstep.methods.analysis_only import AnalysisOnly
from misstep.methods.base import Method
from misstep.methods.coh import ChainOfHindsight
from misstep.methods.contrastive_analysis import ContrastiveAnalysis
from misstep.methods.corrected_analysis import CorrectedAnalysis
from misstep.methods.critique_revise import CritiqueRevise
from misstep.methods.dpo import DPO
from misstep.methods.guided import Guided
from misstep.methods.mistake_analysis import MistakeAnalysis
from misstep.methods.ordinary import Ordinary
from misstep.methods.other import Other
from misstep.methods.published import Published
from misstep.methods.rlhf import RLHF
from misstep.methods.self_guard import SelfGuard
from misstep.methods.sft import SFT
from misstep.methods.vanilla import Vanilla

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Vanilla(),
        Guided(),
        Ordinary(),
        SFT(),
        CritiqueRevise(),
        ChainOfHindsight(),
        DPO(),
        RLHF(),
        SelfGuard(),
        Published(),
        AnalysisOnly(),
        MistakeAnalysis(),
        CorrectedAnalysis(),
        ContrastiveAnalysis(),
    )
}
OTHER = Other()


def method_of(name: str) -> Method:
    """The method that a row of results is named after; any other name is a recipe's own."""
    return METHODS.get(name, OTHER)
