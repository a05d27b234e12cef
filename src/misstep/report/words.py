"""Names, numbers and model text as the page writes them. Knows no run.

A metric is a rate, a fraction that is written as a percentage, unless it has a unit here.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from misstep.evidence.results import Comparison, Setting
from misstep.evidence.study_results import Tested
from misstep.methods.registry import METHODS
from misstep.records import base_metric

MISTAKES = "mistake_rate"
HELPFULNESS = "helpfulness"
REFUSALS = "over_refusal"

BETTER = {
    MISTAKES: "lower",
    "mistake_probability": "lower",
    "answered_without_mistake": "higher",
    "stock_opening": "lower",
    HELPFULNESS: "higher",
    REFUSALS: "lower",
    "safe_full_compliance": "higher",
    "safe_partial_refusal": "lower",
    "safe_full_refusal": "lower",
    "refusal_rate": "neither",
    "unsafe_refusal": "higher",
    "unsafe_full_compliance": "lower",
    "unsafe_partial_refusal": "neither",
    "unsafe_full_refusal": "higher",
    "instruction_following": "higher",
    "instruction_following_loose": "higher",
    "instructions_followed": "higher",
    "instructions_followed_loose": "higher",
    "reference_loss": "lower",
    "harmless_score": "higher",
    "helpfulness_score": "higher",
    "harm_help_score": "higher",
    "win_rate": "higher",
    "tie_rate": "neither",
    "lose_rate": "lower",
    "position_bias": "neither",
    "length_bias": "neither",
    "votes_agree": "neither",
}
"""Which end of a metric is the good one; the page shows metrics in this order."""

UNITS = {
    "reference_loss": "nats",
    "length_bias": "",
    "auc": "",
    "kappa": "",
    "calibration_error": "",
}
"""Of metrics that are no rates; grades are none, too."""

NOTES = {
    "answered_without_mistake": "neither a mistake nor a refusal",
    "stock_opening": "of all answers, those without mistake that begin with the same four "
    "words; not measured among fewer than 20 such",
}
"""What a metric is, where its name does not say so."""

METHOD_TITLES = {
    "vanilla": "Model as it was",
    "ordinary": "Ordinary data only",
    "sft": "SFT",
    "dpo": "DPO",
    "rlhf": "RLHF",
    "coh": "Chain of Hindsight",
}

SPACE = "\u202f"
_MINUS = "\u2212"


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics, the known ones first, each with those of further judges behind it."""
    found = dict.fromkeys(metrics)
    known = list(BETTER)
    return sorted(
        found, key=lambda m: known.index(b) if (b := base_metric(m)) in known else len(known)
    )


def method_title(method: str) -> str:
    """A method's name as a reader would write it; one of a recipe's own as it is."""
    if method not in METHODS:
        return method
    return METHOD_TITLES.get(method, capitalised(method.replace("_", " ")))


def setting_title(setting: Setting) -> str:
    """A setting in words."""
    variant = f" [{setting.variant}]" if setting.variant else ""
    way = "guided" if setting.guided else "unguided"
    return f"{method_title(setting.method)}{variant}, {way}"


def metric_title(metric: str) -> str:
    """A metric's name as a reader would write it, with its judge where it is the second."""
    name, _, judge = metric.partition("@")
    title = capitalised(name.replace("_", " "))
    return f"{title}, judge {judge}" if judge else title


def unit(metric: str) -> str | None:
    """What a metric is counted in that is no rate; None of a rate."""
    name = base_metric(metric)
    return "of 1 to 10" if name.endswith("_score") else UNITS.get(name)


def better(metric: str) -> str:
    """The good end of a metric, `lower` or `higher`; `neither` where there is none."""
    return BETTER.get(base_metric(metric), "neither")


def capitalised(text: str) -> str:
    """A text with a capital at its start and the rest as it is."""
    return text[:1].upper() + text[1:]


def direction(metric: str) -> str:
    """Which end of a metric is the good one, in words."""
    good = better(metric)
    return "" if good == "neither" else f"{good} is better"


def note(metric: str) -> str:
    """What a metric is, where its name does not say so; else nothing."""
    return NOTES.get(base_metric(metric), "")


def rate(value: float | None, metric: str = "") -> str:
    """A rate for a table, or the number of a metric that is none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if unit(metric) is not None else f"{100 * value:.1f}{SPACE}%"


def brief(value: float) -> str:
    """A rate for a sentence: no more digits than a reader keeps."""
    percent = 100 * value
    # A small rate is not none, and a large one is not all.
    edge = 0 < percent < 1 or 99 < percent < 100
    return f"{percent:.{1 if edge else 0}f}{SPACE}%"


def gap(value: float, metric: str = "") -> str:
    """A difference of rates in points, or of a metric in its unit, with its sign."""
    size = f"{abs(value):.3f}" if unit(metric) is not None else f"{100 * abs(value):.1f}"
    return ("" if float(size) == 0 else _MINUS if value < 0 else "+") + size


def points(value: float, metric: str = "") -> str:
    """A difference with its unit."""
    of = unit(metric)
    return f"{gap(value, metric)}{SPACE}{'points' if of is None else of}".rstrip(SPACE)


def difference(
    found: Comparison | Tested, adjusted: float, metric: str = "", more: str = ""
) -> str:
    """A tested difference with its interval and its adjusted p, for a sentence."""
    p = p_text(adjusted)
    p = p if p.startswith("<") else f"=\u00a0{p}"
    interval = f"95{SPACE}% interval {gap(found.low, metric)} to {gap(found.high, metric)}"
    return f"{points(found.difference, metric)} ({interval}, adjusted p\u00a0{p}{more})"


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}".replace(",", SPACE)


def sample_size(least: int, most: int | None = None) -> str:
    """How many cases stand behind a number, or behind several."""
    return f"n{SPACE}={SPACE}{least}" + (f"–{most}" if most not in (None, least) else "")


def p_text(p: float) -> str:
    """A p value as journals print it."""
    return f"<{SPACE}0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{SPACE}h {minutes:02}{SPACE}min"
    return f"{minutes}{SPACE}min {rest:02}{SPACE}s"


def most_frequent(counts: Mapping[str, int], most: int = 8) -> dict[str, int]:
    """Counted reasons in order: a judge may give a different one for each text."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(number for _, number in ordered[most:])
    return dict(ordered[:most]) | ({"other reasons": rest} if rest else {})


def what_stage_makes(stage: str) -> str:
    """What a stage's counts are about, by the name that the manifest has: `induce, round 2`."""
    name, _, round_ = stage.partition(", ")
    made = {
        "induce": "Mistakes",
        "analyse": "Analyses",
        "analyse unguided": "Analyses without the guide",
        "praise": "Praise of good answers",
        "revise": "Revisions",
        "respond": "Answers to the tests",
    }
    title = made.get(name, name.capitalize())
    return f"{title}, {round_}" if round_ else title


class Text(NamedTuple):
    """Model text for the page: cut by characters, with the language that chooses its glyphs."""

    text: str
    lang: str
    cut: int
    """So many characters are left out."""


_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("ko", re.compile("[\u1100-\u11ff\uac00-\ud7af]")),
    ("zh", re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")),
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def model_text(text: str, longest: int = 900) -> Text:
    """A text that may hold anything, made showable."""
    end = min(len(text), longest)
    # An accent, a variation selector or a joined emoji stays with the character it belongs to.
    while 0 < end < len(text) and (
        unicodedata.combining(text[end])
        or text[end] in "\u200d\ufe0f"
        or text[end - 1] == "\u200d"
    ):
        end -= 1
    shown = _CONTROLS.sub("\ufffd", text[:end])
    lang = next((lang for lang, script in _SCRIPTS if script.search(shown)), "")
    return Text(shown, lang, len(text) - end)
