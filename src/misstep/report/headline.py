"""The page's first words, made from the numbers: before and after, and what was tested."""

from typing import NamedTuple

from misstep.evidence.results import GUIDED, Setting
from misstep.report.view import Tested, View, ordinary_tasks
from misstep.report.words import HELPFULNESS, MISTAKES, brief, capitalised, difference

WORDS = {
    "goal-hijacking": ("held-out attacks", "the model obeyed"),
    "harmlessness": ("held-out prompts", "the harmful answers of the model were"),
}
"""For each shipped policy, the name of its cases and of its mistake."""

PLAIN_WORDS = ("held-out cases", "the mistakes of the model were")
VERDICTS = {
    "good": "better",
    "bad": "worse",
    "other": "another rate, in itself neither better nor worse",
    "none": "no difference shown",
}


class Finding(NamedTuple):
    """One sentence on a difference, and its verdict, a key of `VERDICTS`."""

    verdict: str
    sentence: str


class Mean(NamedTuple):
    """The rate over several test sets."""

    value: float
    n: int


def headline(view: View) -> str:
    """What the run shows, in plain words."""
    parts = []
    scored = [
        (about.test_set, about.metric)
        for about, of in view.numbers.items()
        if about.test_set in view.alone and any(number.n for number in of.values())
    ]
    ordinary = ordinary_tasks(scored)
    judged = {test_set for test_set, metric in scored if metric == MISTAKES}
    # Where a test has none but ordinary tasks, mistakes in these are what there is to tell.
    attacked = judged - ordinary or judged
    clean = {test_set for test_set, _ in scored} - attacked
    if before := _mean(view, view.before, MISTAKES, attacked):
        cases, mistake = WORDS.get(view.policy, PLAIN_WORDS)
        further = [(view.after, "after")]
        if view.after not in (None, GUIDED) and view.after.guided:
            further.insert(0, (GUIDED, "by the guide alone"))
        then = ["before"] + [
            f"{brief(mean.value)} {when}"
            for setting, when in further
            if (mean := _mean(view, setting, MISTAKES, attacked))
        ]
        listed = " and ".join([", ".join(then[:-1]), then[-1]] if len(then) > 1 else then)
        parts.append(f"on {before.n} {cases} {mistake} {brief(before.value)} {listed}")
    for where, test_sets in ((" to clean tasks", clean), ("", attacked)):
        if before := _mean(view, view.before, HELPFULNESS, test_sets):
            after = _mean(view, view.after, HELPFULNESS, test_sets)
            parts.append(f"helpful answers{where}{_change(before, after)}")
            break
    return capitalised("; ".join(parts) or "nothing has been measured yet") + "."


def _change(before: Mean, after: Mean | None) -> str:
    first, last = brief(before.value), brief(after.value) if after else None
    if last is None:
        return f": {first}"
    return f" stayed at {last}" if first == last else f" went from {first} to {last}"


def _mean(view: View, setting: Setting | None, metric: str, test_sets: set[str]) -> Mean | None:
    """The mean over test sets, weighted by their scored responses."""
    found = [
        (of[setting].value or 0.0, of[setting].n)
        for about, of in view.numbers.items()
        if about.metric == metric and about.test_set in test_sets and setting in of
    ]
    n = sum(n for _, n in found)
    return Mean(sum(value * n for value, n in found) / n, n) if n else None


def findings(view: View) -> list[Finding]:
    """The tested differences between before and after, one sentence a metric and test set."""
    return [
        _finding(about.title, tested)
        for about, differences in view.tested.items()
        for tested in differences
        if tested.settings == (view.before, view.after)
    ]


def _finding(title: str, tested: Tested) -> Finding:
    change = difference(tested.found, tested.adjusted, tested.found.metric)
    return Finding(tested.verdict, f"{title}: {VERDICTS[tested.verdict]}, {change}.")
