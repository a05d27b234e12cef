"""The methods by name."""

from misstep.methods.base import Method
from misstep.methods.mistake_analysis import MistakeAnalysis
from misstep.methods.ordinary import Ordinary
from misstep.methods.sft import SFT
from misstep.methods.vanilla import Vanilla

METHODS: dict[str, Method] = {
    method.name: method for method in (Vanilla(), Ordinary(), SFT(), MistakeAnalysis())
}
