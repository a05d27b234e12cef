"""The methods by name: those that come with the package, and those that are installed.

A package of somebody's own adds a method by an entry point of the group `misstep.methods`, as
plugins of pytest or inspect_ai are added; a recipe names it as any other.
"""

import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from misstep.errors import InputError
from misstep.methods.analysis_only import AnalysisOnly
from misstep.methods.balanced_analysis import BalancedAnalysis
from misstep.methods.base import Method
from misstep.methods.coh import ChainOfHindsight
from misstep.methods.contrastive_analysis import ContrastiveAnalysis
from misstep.methods.corrected_analysis import CorrectedAnalysis
from misstep.methods.critique_revise import CritiqueRevise
from misstep.methods.dpo import DPO
from misstep.methods.guided import Guided
from misstep.methods.mistake_analysis import MistakeAnalysis
from misstep.methods.ordinary import Ordinary
from misstep.methods.published import Published
from misstep.methods.rlhf import RLHF
from misstep.methods.self_guard import SelfGuard
from misstep.methods.sft import SFT
from misstep.methods.vanilla import Vanilla
from misstep.records import digest

GROUP = "misstep.methods"
SHIPPED: dict[str, Method] = {
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
        BalancedAnalysis(),
    )
}


def _installed() -> Iterator[Method]:
    """The methods of other packages.

    Raises:
        InputError: one is none, or its name is none or another's.
    """
    names = set(SHIPPED)
    for entry in entry_points(group=GROUP):
        said = f"{entry.value}, installed as a method ({GROUP})"
        try:
            method = entry.load()()
        except Exception as error:
            raise InputError(f"{said}: cannot be loaded: {error}.") from error
        if not isinstance(method, Method):
            raise InputError(f"{said}: expected a Method, found {type(method).__name__}.")
        name = str(getattr(method, "name", ""))
        if name in names or not name.isidentifier():
            raise InputError(
                f"{said}: expected a name of its own, in letters, digits and '_'; found "
                f"'{name}'."
            )
        names.add(name)
        yield method


METHODS: dict[str, Method] = SHIPPED | {method.name: method for method in _installed()}


def source_of(name: str) -> str:
    """Names the code of a method by its content."""
    return digest(inspect.getsource(sys.modules[type(METHODS[name]).__module__]))


def method_of(name: str) -> Method:
    """The method that a row of results is named after.

    Any other name is a recipe's own: a model that something else has trained, which is asked
    and read as the untrained one is.
    """
    return METHODS.get(name, METHODS[Vanilla.name])
