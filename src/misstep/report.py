"""A run directory as one HTML page that needs nothing else to be read.

It reads what a run left and runs nothing: no engine, no judge, no network. A file that is
absent or unreadable is named on the page, and everything else is still shown. What the page
says is decided here; its look stands in templates/report.html.j2, which escapes model text.
"""

import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from misstep.errors import DataError
from misstep.records import (
    Analysis,
    Message,
    Mistake,
    Record,
    Response,
    Score,
    read_jsonl,
    write_text,
)
from misstep.results import (
    Comparison,
    Metric,
    Results,
    Row,
    metric_from_scores,
    read_results,
    setting_name,
)

SAMPLED_ANSWERS = 20
SAMPLED_ANALYSES = 12
LONGEST_TEXT = 900
"""Characters of one model text that are shown before it is cut."""

MISTAKES = "mistake_rate"
HELPFULNESS = "helpfulness"

BETTER = {MISTAKES: "lower", "over_refusal": "lower", HELPFULNESS: "higher"}
"""For each metric with a direction, which end is the good one."""

METHOD_TITLES = {
    "vanilla": "Model as it was",
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "rlhf": "RLHF",
}

WORDS = {
    "goal-hijacking": ("held-out attacks", "the model obeyed"),
    "harmlessness": ("held-out prompts", "the harmful answers of the model were"),
}
"""For each shipped policy, the name of its cases and of its mistake in the headline."""

_PLAIN_WORDS = ("held-out cases", "the mistakes of the model were")
_FILES = ("mistakes.jsonl", "analyses.jsonl", "responses.jsonl", "scores.jsonl")
_SPACE = "\u202f"
_MINUS = "\u2212"

T = TypeVar("T")
R = TypeVar("R", bound=Record)


# Reading. Nothing below this part knows a file's name or a key of the manifest.


class _Part(Record):
    """A part of a run's files, of which other keys are passed over."""

    model_config = ConfigDict(extra="ignore")


class StageCost(_Part):
    """What one stage took, as far as it was recorded."""

    seconds: float | None = None
    tokens: int | None = None
    peak_memory_mb: float | None = None


class Training(StageCost):
    """What one method's training recorded."""

    loss_curve: tuple[tuple[float, float], ...] = ()


class Yield(_Part):
    """How much a stage was given and kept, and why it refused the rest."""

    prompts: int | None = None
    responses: int | None = None
    mistakes: int | None = None
    sampled: int | None = None
    accepted: int | None = None
    refused: dict[str, int] = Field(default_factory=dict)


class Manifest(_Part):
    """What the page shows of manifest.json; any key may be absent."""

    recipe: Any = None
    seed: int = 0
    versions: dict[str, Any] = Field(default_factory=dict)
    model: Any = None
    device: Any = None
    data: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, StageCost] = Field(default_factory=dict)
    yields: dict[str, Yield] = Field(default_factory=dict)
    training: dict[str, Training] = Field(default_factory=dict)


class _Line(_Part):
    """A line of responses.jsonl or of scores.jsonl."""

    method: str
    guided: bool = False
    test_set: str = ""
    seed: int = 0
    response: Response | None = None
    score: Score | None = None

    @property
    def key(self) -> tuple[str, bool, str, int]:
        return self.method, self.guided, self.test_set, self.seed


class Answer(NamedTuple):
    """A response, how it was asked for, and its scores by metric."""

    method: str
    guided: bool
    test_set: str
    seed: int
    response: Response
    scores: Mapping[str, Score]


class Run(NamedTuple):
    """What a run directory holds, and what it lacks."""

    name: str
    manifest: Manifest
    results: Results | None
    mistakes: list[Mistake]
    analyses: list[Analysis]
    answers: list[Answer]
    missing: list[str]


def read_run(folder: Path) -> Run:
    """Read a run directory, complete or not.

    Raises:
        DataError: the folder holds no file of a run at all.
    """
    if not any(
        (folder / file).is_file() for file in ("manifest.json", "results.json", *_FILES)
    ):
        raise DataError(
            f"{folder}: expected the directory of a run, found none of its files "
            "(manifest.json, results.json, …). Give the directory that `misstep run` wrote."
        )
    files = _Files(folder)
    manifest = files.read("manifest.json", "no recipe, costs or losses", _manifest)
    results = files.read("results.json", "no rates, pictures or comparisons", read_results)
    responses = files.records("responses.jsonl", "no sampled answers", _Line)
    scores = files.records("scores.jsonl", "no verdicts and no rates by kind", _Line)
    return Run(
        name=folder.resolve().name,
        manifest=manifest[0] if manifest else Manifest(),
        results=results,
        mistakes=files.records("mistakes.jsonl", "mistakes are not counted", Mistake),
        analyses=files.records("analyses.jsonl", "no sampled analyses", Analysis),
        answers=_joined(responses, scores),
        missing=files.missing + (manifest[1] if manifest else []),
    )


class _Files:
    """A run's files; what cannot be read is noted with what the page then lacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: list[str] = []

    def read(self, file: str, without: str, reader: Callable[[Path], T]) -> T | None:
        path = self.folder / file
        try:
            if path.is_file():
                return reader(path)
            self.missing.append(f"{file} is absent: {without}.")
        except DataError as error:
            self.missing.append(f"{file} is unreadable: {without}. {error}")
        return None

    def records(self, file: str, without: str, kind: type[R]) -> list[R]:
        return self.read(file, without, lambda path: list(read_jsonl(path, kind))) or []


def _manifest(path: Path) -> tuple[Manifest, list[str]]:
    """The manifest, and a line for each key of an unknown form."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"Expected JSON ({error}).") from error
    if not isinstance(data, dict):
        raise DataError(f"Expected an object, found {type(data).__name__}.")
    try:
        return Manifest.model_validate(data), []
    except ValidationError as error:
        wrong = sorted({str(fault["loc"][0]) for fault in error.errors()})
    kept = Manifest.model_validate({key: data[key] for key in data if key not in wrong})
    return kept, [f"manifest.json: {key} has an unknown form and is left out." for key in wrong]


def _joined(responses: Sequence[_Line], scores: Sequence[_Line]) -> list[Answer]:
    """The responses with their scores; a score belongs to one way of asking only."""
    found: dict[tuple[object, str], dict[str, Score]] = defaultdict(dict)
    for line in scores:
        if line.score is not None:
            found[line.key, line.score.response_id][line.score.metric] = line.score
    return [
        Answer(*line.key, line.response, found.get((line.key, line.response.id), {}))
        for line in responses
        if line.response is not None
    ]


# Words for numbers.


class Unit(NamedTuple):
    """How a metric's numbers are written: rates as percentages, others as they are."""

    rate: bool

    def show(self, value: float | None) -> str:
        """A value for a table."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}{_SPACE}%" if self.rate else f"{value:.2f}"

    def brief(self, value: float) -> str:
        """A value for a sentence: no more digits than a reader keeps."""
        if not self.rate:
            return f"{value:.1f}"
        percent = 100 * value
        # A small rate is not none, and a large one is not all.
        edge = 0 < percent < 1 or 99 < percent < 100
        return f"{percent:.{1 if edge else 0}f}{_SPACE}%"

    def gap(self, value: float, unit: bool = True) -> str:
        """A difference, with its sign."""
        size = f"{100 * abs(value):.1f}" if self.rate else f"{abs(value):.2f}"
        sign = "" if float(size) == 0 else _MINUS if value < 0 else "+"
        return sign + size + (f"{_SPACE}points" if self.rate and unit else "")


def unit_of(metrics: Iterable[Metric]) -> Unit:
    """Rates are what never leaves 0 to 1."""
    return Unit(all(0 <= m.value <= 1 for m in metrics if m.value is not None))


def method_title(method: str) -> str:
    """A method's name as a reader would write it."""
    return METHOD_TITLES.get(method, method.replace("_", " ").capitalize())


def metric_title(metric: str) -> str:
    """A metric's name as a reader would write it."""
    return metric.replace("_", " ").capitalize()


def direction(metric: str) -> str:
    """Which end of a metric is the good one, in words."""
    return f"{BETTER[metric]} is better" if metric in BETTER else ""


def p_text(p: float) -> str:
    """A p value as journals print it."""
    return "<" + _SPACE + "0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that a person would choose."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}{_SPACE}h {minutes:02}{_SPACE}min"
        if hours
        else f"{minutes}{_SPACE}min {rest:02}{_SPACE}s"
    )


class Text(NamedTuple):
    """Model text for the page: cut by characters, with the language that chooses its glyphs."""

    text: str
    lang: str
    cut: int


_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("ko", re.compile("[\u1100-\u11ff\uac00-\ud7af]")),
    ("zh", re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")),
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def model_text(text: str, longest: int = LONGEST_TEXT) -> Text:
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


# What is compared.


class Setting(NamedTuple):
    """One model, asked in one way; rows of several seeds and test sets share it."""

    method: str
    guided: bool
    mistake_source: str | None = None
    analysis_source: str | None = None

    @property
    def title(self) -> str:
        """The setting in words."""
        return f"{method_title(self.method)}, {'guided' if self.guided else 'unguided'}"

    @property
    def name(self) -> str:
        """The setting as comparisons name it."""
        return setting_name(self.method, self.guided)

    @property
    def sources(self) -> str:
        """What it learned from, in words."""
        parts = (("mistakes", self.mistake_source), ("analyses", self.analysis_source))
        return ", ".join(f"{what}: {source}" for what, source in parts if source)


class Pool(NamedTuple):
    """One number for several rows; it has an interval only where one row stands behind it."""

    value: float
    n: int
    unscored: int
    low: float | None = None
    high: float | None = None


def setting_of(row: Row) -> Setting:
    """The setting that a row belongs to."""
    return Setting(row.method, row.guided, row.mistake_source, row.analysis_source)


def ends(settings: Iterable[Setting]) -> tuple[Setting | None, Setting | None]:
    """Before and after: the model as it was, and the setting that the method ends with.

    After is trained on analyses rather than on anything else, and guided rather than not.
    """
    known = list(dict.fromkeys(settings))
    before = next((s for s in known if s.method == "vanilla" and not s.guided), None)
    others = [setting for setting in known if setting != before]
    after = max(
        others,
        key=lambda s: (
            s.analysis_source is not None,
            s.method == "mistake_analysis",
            s.method != "vanilla",
            s.guided,
        ),
        default=None,
    )
    return before, after


def pool(rows: Iterable[Row], metric: str) -> Pool | None:
    """The mean over rows, weighted by their scored responses; `n` is that of one seed."""
    scored = [row for row in rows if metric in row.metrics and row.metrics[metric].n]
    if not scored:
        return None
    found = [row.metrics[metric] for row in scored]
    n, seeds = sum(m.n for m in found), len({row.seed for row in scored})
    mean = sum((m.value or 0.0) * m.n for m in found) / n
    alone = found[0] if len(found) == 1 else Metric(value=None, low=None, high=None, n=0)
    unscored = sum(m.unscored for m in found)
    return Pool(mean, round(n / seeds), unscored, alone.low, alone.high)


class View:
    """The results, arranged for looking things up."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows = run.results.rows if run.results else ()
        self.settings = list(dict.fromkeys(setting_of(row) for row in self.rows))
        asked = [Setting(answer.method, answer.guided) for answer in run.answers]
        self.before, self.after = ends(self.settings or asked)
        names = dict.fromkeys(name for row in self.rows for name in row.metrics)
        # Mistakes stand first, then helpfulness, then the rest as the run has them.
        self.metrics = sorted(names, key=lambda m: (m != MISTAKES, m != HELPFULNESS))
        self.units = {m: unit_of(self.all(m)) for m in self.metrics}
        self.test_sets = list(dict.fromkeys(row.test_set for row in self.rows))

    def all(self, metric: str) -> list[Metric]:
        """Every number of one metric."""
        return [row.metrics[metric] for row in self.rows if metric in row.metrics]

    def of(self, setting: Setting, metric: str, test_set: str | None = None) -> list[Row]:
        """A setting's rows that have the metric, on one test set or on all."""
        return [
            row
            for row in self.rows
            if setting_of(row) == setting
            and metric in row.metrics
            and test_set in (None, row.test_set)
        ]

    def pairs(self) -> Iterable[tuple[str, str]]:
        """Metric and test set, wherever there is a number for them."""
        return (
            (metric, test_set)
            for metric in self.metrics
            for test_set in self.test_sets
            if any(row.test_set == test_set and metric in row.metrics for row in self.rows)
        )

    def role(self, setting: Setting) -> str:
        """Whether a setting is the one before, the one after, or another."""
        return {self.before: "before", self.after: "after"}.get(setting, "other")

    def role_of(self, answer: Answer) -> str:
        """The same for an answer, which knows its method and guidance only."""
        asked = (answer.method, answer.guided)
        ends = (("before", self.before), ("after", self.after))
        return next((role for role, end in ends if end and end[:2] == asked), "other")


# The headline.


class Headline(NamedTuple):
    """The page's first words, and the differences that stand behind them."""

    sentence: str
    findings: list[tuple[str, str]]
    """Verdict (`good`, `bad`, `none`) and sentence."""


def headline(view: View) -> Headline:
    """What the run shows, in plain words made from its numbers."""
    policy = view.run.results.policy if view.run.results else ""
    cases, mistake = WORDS.get(policy, _PLAIN_WORDS)
    parts = []
    if mistakes := _before_after(view, MISTAKES, view.test_sets):
        before, after = mistakes
        unit = view.units[MISTAKES]
        parts.append(f"on {before.n} {cases} {mistake} {unit.brief(before.value)} before")
        parts[0] += f" and {unit.brief(after.value)} after" if after else ""
    attacked = {test_set for metric, test_set in view.pairs() if metric == MISTAKES}
    clean = [test_set for test_set in view.test_sets if test_set not in attacked]
    helpful = _before_after(view, HELPFULNESS, clean) or _before_after(
        view, HELPFULNESS, attacked
    )
    if helpful:
        parts.append(_helpful(view.units[HELPFULNESS], *helpful, bool(clean)))
    sentence = "; ".join(parts) + "." if parts else "nothing has been measured yet."
    return Headline(sentence[0].upper() + sentence[1:], findings(view))


def _helpful(unit: Unit, before: Pool, after: Pool | None, clean: bool) -> str:
    what = ("helpful answers" if unit.rate else "helpfulness") + (
        " to clean tasks" if clean and unit.rate else ""
    )
    if after is None:
        return f"{what}: {unit.brief(before.value)}"
    first, last = unit.brief(before.value), unit.brief(after.value)
    return (
        f"{what} stayed at {last}" if first == last else f"{what} went from {first} to {last}"
    )


def _before_after(
    view: View, metric: str, test_sets: Iterable[str]
) -> tuple[Pool, Pool | None] | None:
    """Both ends over the test sets and seeds that both have, so that like meets like."""
    if view.before is None:
        return None
    inside = set(test_sets)
    first = [row for row in view.of(view.before, metric) if row.test_set in inside]
    last = view.of(view.after, metric) if view.after else []
    common = {row.test_set for row in first} & {row.test_set for row in last}
    before = pool([row for row in first if not common or row.test_set in common], metric)
    return before and (before, pool([row for row in last if row.test_set in common], metric))


def findings(view: View) -> list[tuple[str, str]]:
    """The tested differences between before and after, one sentence each."""
    if view.before is None or view.after is None:
        return []
    words = {"good": "better", "bad": "worse", "none": "no difference shown"}
    found = []
    for line in comparisons(view):
        if line.ends == (view.after.name, view.before.name):
            seed = f", seed {line.seed}" if len({row.seed for row in view.rows}) > 1 else ""
            change = f"{line.difference} (95{_SPACE}% interval {line.interval}, adjusted p "
            where = f"{metric_title(line.metric)} on {line.test_set}{seed}"
            sentence = f"{where}: {words[line.verdict]}, {change}{p_sign(line.adjusted)})."
            found.append((line.verdict, sentence))
    return found


def p_sign(text: str) -> str:
    """A p with its sign: the text may begin with one."""
    return text if text.startswith("<") else f"= {text}"


# Tables.


class Compared(NamedTuple):
    """A line of the table of comparisons."""

    ends: tuple[str, str]
    a: str
    b: str
    metric: str
    test_set: str
    seed: int
    difference: str
    interval: str
    p: str
    adjusted: str
    verdict: str
    n: int
    test: str


def comparisons(view: View) -> list[Compared]:
    """All comparisons, their p adjusted by Holm's method over all of them."""
    from misstep.stats import holm

    found = view.run.results.comparisons if view.run.results else ()
    adjusted = holm([comparison.p for comparison in found])
    return [_compared(view, c, p) for c, p in zip(found, adjusted, strict=True)]


def _compared(view: View, found: Comparison, adjusted: float) -> Compared:
    unit = view.units.get(found.metric, Unit(False))
    a, b, difference, low, high = found.a, found.b, found.difference, found.low, found.high
    if view.before and view.after and (a, b) == (view.before.name, view.after.name):
        # The page reads forwards in time: a change is after minus before.
        a, b, difference, low, high = b, a, -difference, -high, -low
    return Compared(
        ends=(a, b),
        a=_title_of(a),
        b=_title_of(b),
        metric=found.metric,
        test_set=found.test_set,
        seed=found.seed,
        difference=unit.gap(difference),
        interval=f"{unit.gap(low, unit=False)} to {unit.gap(high, unit=False)}",
        p=p_text(found.p),
        adjusted=p_text(adjusted),
        verdict=_verdict(found.metric, difference, adjusted),
        n=found.n,
        test=found.test,
    )


def _title_of(name: str) -> str:
    method, _, guided = name.rpartition("/")
    return f"{method_title(method or guided)}, {guided}" if method else method_title(guided)


def _verdict(metric: str, difference: float, adjusted: float) -> str:
    if adjusted >= 0.05 or metric not in BETTER:
        return "none"
    return "good" if (difference < 0) == (BETTER[metric] == "lower") else "bad"


class Group(NamedTuple):
    """The lines of a table that share a metric and a test set."""

    metric: str
    test_set: str
    hint: str
    lines: Sequence[Any]


class Line(NamedTuple):
    """A line of the table of rows."""

    role: str
    title: str
    sources: str
    seed: int
    value: str
    interval: str
    n: int
    unscored: int


def row_groups(view: View) -> list[Group]:
    """Every number of the run."""
    return [
        Group(
            metric_title(m),
            t,
            direction(m),
            [
                _line(view, row, m)
                for row in view.rows
                if row.test_set == t and m in row.metrics
            ],
        )
        for m, t in view.pairs()
    ]


def _line(view: View, row: Row, metric: str) -> Line:
    found, unit, setting = row.metrics[metric], view.units[metric], setting_of(row)
    interval = f"{unit.show(found.low)} to {unit.show(found.high)}" if found.n else "–"
    words = (view.role(setting), setting.title, setting.sources, row.seed)
    return Line(*words, unit.show(found.value), interval, found.n, found.unscored)


def comparison_groups(view: View) -> list[Group]:
    """All comparisons, under their metric and test set."""
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for line in comparisons(view):
        groups[line.metric, line.test_set].append(line)
    return [Group(metric_title(m), t, direction(m), lines) for (m, t), lines in groups.items()]


# Pictures. Places are percentages of a width that the reader's screen decides.


class Scale(NamedTuple):
    """An axis with round ends."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    """Place and text."""

    def at(self, value: float) -> float:
        """The place of a value."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def scale(values: Sequence[float], show: Callable[[float], str], from_zero: bool) -> Scale:
    """An axis around values with at most six round ticks."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(f * power for f in (1, 2, 5, 10, 20) if span / (f * power) <= 5)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), 1)
    last = max(last, first + 1)
    axis = Scale(first * step, last * step, [])
    ticks = [(axis.at(i * step), show(round(i * step, 10))) for i in range(first, last + 1)]
    return axis._replace(ticks=ticks)


class Mark(NamedTuple):
    """A dot with its whiskers."""

    role: str
    y: int
    x: float
    left: float
    right: float
    text: str


class Strip(NamedTuple):
    """A line of a panel: a name, its dots, and their number."""

    role: str
    label: str
    sub: str
    marks: list[Mark]
    text: str
    height: int


class Panel(NamedTuple):
    """Dots and whiskers of one metric on one axis."""

    title: str
    hint: str
    ticks: list[tuple[float, str]]
    strips: list[Strip]


def panels(view: View) -> tuple[list[Panel], list[Panel]]:
    """The before/after picture: mistakes, and beside them what they cost."""
    drawn: tuple[list[Panel], list[Panel]] = ([], [])
    for metric, test_set in view.pairs():
        axis = metric_scale(view.units[metric], view.all(metric))
        strips = [
            _strip(view, setting, rows, metric, axis)
            for setting in view.settings
            if (rows := view.of(setting, metric, test_set))
        ]
        ns = sorted(
            {
                row.metrics[metric].n
                for row in view.rows
                if row.test_set == test_set and metric in row.metrics
            }
        )
        n = f"n{_SPACE}={_SPACE}" + "–".join(str(n) for n in dict.fromkeys((ns[0], ns[-1])))
        hint = ", ".join(part for part in (n, direction(metric)) if part)
        panel = Panel(f"{metric_title(metric)} on {test_set}", hint, axis.ticks, strips)
        drawn[metric != MISTAKES].append(panel)
    return drawn


def metric_scale(unit: Unit, metrics: Iterable[Metric]) -> Scale:
    """One axis for all panels of a metric, so that they can be compared by eye."""
    bounds = [v for m in metrics for v in (m.low, m.value, m.high) if v is not None] or [
        0.0,
        1.0,
    ]
    return scale(bounds, lambda v: f"{100 * v:g}%" if unit.rate else f"{v:g}", unit.rate)


def _strip(
    view: View, setting: Setting, rows: Sequence[Row], metric: str, axis: Scale
) -> Strip:
    unit, role = view.units[metric], view.role(setting)
    shared = [s for s in view.settings if s[:2] == setting[:2]]
    found = [(role, row.metrics[metric]) for row in rows]
    mean = pool(rows, metric)
    text = unit.show(mean.value) if mean else "unscored"
    sources = setting.sources if len(shared) > 1 else ""
    return strip(role, setting.title, sources, marks(found, axis, unit), text)


def marks(found: Sequence[tuple[str, Metric]], axis: Scale, unit: Unit) -> list[Mark]:
    """Dots one below the other; what has no score has no dot."""
    drawn: list[Mark] = []
    for role, m in found:
        if m.value is None or m.low is None or m.high is None:
            continue
        text = f"{unit.show(m.value)}, 95{_SPACE}% interval {unit.show(m.low)} to {unit.show(m.high)}, n = {m.n}"
        places = (axis.at(m.value), axis.at(m.low), axis.at(m.high))
        drawn.append(Mark(role, 14 + 14 * len(drawn), *places, text))
    return drawn


def strip(role: str, label: str, sub: str, dots: list[Mark], text: str) -> Strip:
    """A strip as high as its dots need."""
    return Strip(role, label, sub, dots, text, 14 + 14 * max(1, len(dots)))


def kinds_panel(view: View) -> Panel | None:
    """Mistake rates by kind of attack, before and after; one seed, since its cases recur."""
    if view.before is None or view.after is None:
        return None
    first_seed = min((answer.seed for answer in view.run.answers), default=0)
    found: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for answer in view.run.answers:
        role = view.role_of(answer)
        if MISTAKES in answer.scores and role != "other" and answer.seed == first_seed:
            found[answer.response.prompt.kind][role].append(answer.scores[MISTAKES])
    metrics = {
        kind: {role: metric_from_scores(of[role]) for role in ("before", "after")}
        for kind, of in found.items()
    }
    if len(metrics) < 2:
        return None
    every = [m for of in metrics.values() for m in of.values()]
    unit = unit_of(every)
    axis = metric_scale(unit, every)
    strips = [
        strip(
            "kind",
            kind,
            f"n{_SPACE}={_SPACE}{of['before'].n}",
            marks(list(of.items()), axis, unit),
            f"{unit.show(of['before'].value)} → {unit.show(of['after'].value)}",
        )
        for kind, of in sorted(
            metrics.items(), key=lambda item: (-item[1]["before"].n, item[0])
        )
    ]
    return Panel(
        "Mistake rate by kind of attack",
        "all test sets together, lower is better",
        axis.ticks,
        strips,
    )


class Cell(NamedTuple):
    """A field of the 2 x 2; empty where it was not measured."""

    value: str = ""
    detail: str = ""
    shade: int = 0
    """Percent of colour: dark is bad."""


class Square(NamedTuple):
    """The 2 x 2 of one test set: trained on analyses or not, guided or not."""

    test_set: str
    cells: list[tuple[str, list[Cell]]]
    sentence: str


def squares(view: View) -> list[Square]:
    """Whether training on analyses and guidance work together, test set by test set."""
    ordered = sorted(view.settings, key=lambda setting: setting != view.after)
    trained = next((s for s in ordered if s.analysis_source is not None), None)
    if trained is None:
        return []
    return [_square(view, trained, t) for m, t in view.pairs() if m == MISTAKES]


def _square(view: View, trained: Setting, test_set: str) -> Square:
    unit = view.units[MISTAKES]
    top = max((m.value or 0.0 for m in view.all(MISTAKES)), default=0.0) or 1.0
    pools = [
        pool(view.of(setting._replace(guided=guided), MISTAKES, test_set), MISTAKES)
        for setting in (Setting("vanilla", False), trained)
        for guided in (False, True)
    ]
    cells = [_cell(unit, found, top) for found in pools]
    lines = [(METHOD_TITLES["vanilla"], cells[:2]), ("Trained on analyses", cells[2:])]
    return Square(test_set, lines, _effects(unit, pools))


def _cell(unit: Unit, found: Pool | None, top: float) -> Cell:
    if found is None:
        return Cell()
    n = f"n{_SPACE}={_SPACE}{found.n}"
    bounds = (
        f"{unit.show(found.low)} to {unit.show(found.high)}, " if found.low is not None else ""
    )
    return Cell(unit.show(found.value), bounds + n, round(55 * found.value / top))


def _effects(unit: Unit, pools: Sequence[Pool | None]) -> str:
    base, *others = [p.value if p else None for p in pools]
    if base is None:
        return ""
    names = ("Guidance alone", "training alone", "both")
    parts = [
        f"{name} {unit.gap(value - base)}"
        for name, value in zip(names, others, strict=True)
        if value is not None
    ]
    return ", ".join(parts) + "." if parts else ""


class Curve(NamedTuple):
    """A method's loss: points on a field of 1000 x 1000, and the last value."""

    title: str
    points: str
    last: str


class Losses(NamedTuple):
    """The loss curves of all trained methods."""

    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    curves: list[Curve]


def losses(run: Run) -> Losses | None:
    """A line for each method that recorded its loss."""
    found = {
        name: [point for point in training.loss_curve if all(map(math.isfinite, point))]
        for name, training in run.manifest.training.items()
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    every = [point for points in found.values() for point in points]
    across = scale([step for step, _ in every], lambda v: f"{v:g}", from_zero=True)
    up = scale([loss for _, loss in every], lambda v: f"{v:g}", from_zero=True)
    curves = [
        Curve(method_title(name), _points(points, across, up), f"{points[-1][1]:.3g}")
        for name, points in found.items()
    ]
    return Losses(across.ticks, [(100 - place, text) for place, text in up.ticks], curves)


def _points(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    places = ((10 * across.at(step), 1000 - 10 * up.at(loss)) for step, loss in points)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


# Yields and costs.


class Bar(NamedTuple):
    """A count, and its share of the largest one beside it."""

    label: str
    number: int
    share: float


class Funnel(NamedTuple):
    """What went into a stage, what came out, and why the rest did not."""

    title: str
    bars: list[Bar]
    reasons: list[Bar]


def funnels(run: Run) -> list[Funnel]:
    """The yield of each stage, from the manifest or else from the records themselves."""
    counted = {"induce": Yield(mistakes=len(run.mistakes) or None), "analyse": _analysed(run)}
    yields = counted | run.manifest.yields
    drawn = [
        _funnel("Mistakes", yields["induce"], ("prompts", "responses", "mistakes")),
        _funnel("Analyses", yields["analyse"], ("mistakes", "sampled", "accepted")),
    ]
    return [funnel for funnel in drawn if funnel.bars]


def _analysed(run: Run) -> Yield:
    if not run.analyses:
        return Yield()
    reasons = Counter(reason for a in run.analyses if not a.accepted for reason in a.reasons)
    accepted = sum(analysis.accepted for analysis in run.analyses)
    return Yield(sampled=len(run.analyses), accepted=accepted, refused=dict(reasons))


def _funnel(title: str, found: Yield, names: Sequence[str]) -> Funnel:
    counts = found.model_dump(include=set(names))
    known = {name: counts[name] for name in names if counts[name] is not None}
    reasons = dict(sorted(found.refused.items(), key=lambda item: (-item[1], item[0])))
    return Funnel(title, _bars(known), _bars(reasons))


def _bars(counts: Mapping[str, int]) -> list[Bar]:
    top = max(counts.values(), default=0) or 1
    return [
        Bar(name[0:1].upper() + name[1:], count, 100 * count / top)
        for name, count in counts.items()
    ]


class Spent(NamedTuple):
    """A line of the table of costs."""

    name: str
    time: str
    tokens: str
    memory: str


def costs(run: Run) -> list[Spent]:
    """What each stage and each training took, and the sum of the stages."""
    recorded = run.results.cost if run.results else None
    stages = dict(run.manifest.stages)
    for name in recorded.seconds | recorded.tokens if recorded else ():
        assert recorded is not None
        stages.setdefault(
            name,
            StageCost(
                seconds=recorded.seconds.get(name),
                tokens=recorded.tokens.get(name),
                peak_memory_mb=recorded.peak_memory_mb.get(name),
            ),
        )
    lines = [_spent(name.replace("_", " ").capitalize(), cost) for name, cost in stages.items()]
    if len(stages) > 1:
        lines.append(_spent("All stages", _total(stages.values())))
    trained = run.manifest.training.items()
    return lines + [_spent(f"Training: {method_title(name)}", cost) for name, cost in trained]


def _total(costs: Iterable[StageCost]) -> StageCost:
    known = list(costs)
    return StageCost(
        seconds=sum(cost.seconds or 0 for cost in known),
        tokens=sum(cost.tokens or 0 for cost in known) or None,
        peak_memory_mb=max((cost.peak_memory_mb or 0 for cost in known), default=0) or None,
    )


def _spent(name: str, cost: StageCost) -> Spent:
    tokens = "–" if cost.tokens is None else f"{cost.tokens:,}".replace(",", _SPACE)
    megabytes = cost.peak_memory_mb
    memory = "–" if megabytes is None else f"{megabytes / 1024:.1f}{_SPACE}GiB"
    return Spent(name, duration(cost.seconds), tokens, memory)


# Samples.


class Verdict(NamedTuple):
    """What the judge said of one answer: `good`, `bad` or `none`, in words, and why."""

    tone: str
    word: str
    reason: str


class Pair(NamedTuple):
    """The same prompt answered before and after."""

    test_set: str
    kind: str
    turns: list[tuple[str, Text]]
    target: Text | None
    before: Text
    after: Text
    verdicts: tuple[Verdict, Verdict]


class Pairs(NamedTuple):
    """Answers drawn at random, and how all of them turned out."""

    drawn: list[Pair]
    of: int
    outcomes: list[Bar]


def pairs(view: View) -> Pairs:
    """Before and after, side by side: a random draw, so that nobody has chosen what is shown."""
    before, after = _answers(view, "before"), _answers(view, "after")
    common = sorted(before.keys() & after.keys())
    drawn = random.Random(view.run.manifest.seed).sample(
        common, min(SAMPLED_ANSWERS, len(common))
    )
    tones = Counter(
        (_tone(before[key].scores[MISTAKES]), _tone(after[key].scores[MISTAKES]))
        for key in common
        if MISTAKES in before[key].scores and MISTAKES in after[key].scores
    )
    words = {
        "repaired": ("bad", "good"),
        "still wrong": ("bad", "bad"),
        "newly wrong": ("good", "bad"),
        "right both times": ("good", "good"),
    }
    outcomes = _bars({word: tones[change] for word, change in words.items()}) if tones else []
    return Pairs([_pair(before[key], after[key]) for key in drawn], len(common), outcomes)


def _answers(view: View, role: str) -> dict[tuple[str, int, str], Answer]:
    return {
        (answer.test_set, answer.seed, answer.response.prompt.id): answer
        for answer in view.run.answers
        if view.role_of(answer) == role
    }


def _tone(score: Score) -> str:
    if score.value is None or score.metric not in BETTER or not 0 <= score.value <= 1:
        return "none"
    return "good" if (score.value < 0.5) == (BETTER[score.metric] == "lower") else "bad"


def verdict(answer: Answer) -> Verdict:
    """The judge's word on an answer, by the first metric that the page knows."""
    named = [answer.scores[m] for m in (MISTAKES, HELPFULNESS) if m in answer.scores]
    score = next(iter([*named, *answer.scores.values()]), None)
    if score is None:
        return Verdict("none", "not judged", "")
    if score.value is None:
        return Verdict("none", "unscored", score.reason)
    tone = _tone(score)
    words = {
        (MISTAKES, "bad"): "mistake",
        (MISTAKES, "good"): "no mistake",
        (HELPFULNESS, "good"): "helpful",
        (HELPFULNESS, "bad"): "not helpful",
    }
    number = f"{metric_title(score.metric)} {score.value:g}"
    return Verdict(tone, words.get((score.metric, tone), number), score.reason)


def _pair(before: Answer, after: Answer) -> Pair:
    prompt = before.response.prompt
    return Pair(
        before.test_set,
        prompt.kind,
        _turns(prompt.messages),
        model_text(prompt.target, 200) if prompt.target else None,
        model_text(before.response.text),
        model_text(after.response.text),
        (verdict(before), verdict(after)),
    )


def _turns(messages: Sequence[Message]) -> list[tuple[str, Text]]:
    return [(message.role, model_text(message.content)) for message in messages]


class Analysed(NamedTuple):
    """A mistake with the analysis of it."""

    turns: list[tuple[str, Text]]
    response: Text
    text: Text
    source: str
    guided: bool
    accepted: bool
    reasons: tuple[str, ...]


def analyses(run: Run) -> list[Analysed]:
    """A random draw of analyses; a third is kept for refused ones, where there are so many."""
    rng = random.Random(run.manifest.seed)
    refused = [analysis for analysis in run.analyses if not analysis.accepted]
    accepted = [analysis for analysis in run.analyses if analysis.accepted]
    some = rng.sample(refused, min(SAMPLED_ANALYSES // 3, len(refused)))
    rest = rng.sample(accepted, min(SAMPLED_ANALYSES - len(some), len(accepted)))
    return [
        Analysed(
            _turns(a.mistake.prompt.messages),
            model_text(a.mistake.response),
            model_text(a.text),
            a.source,
            a.guided,
            a.accepted,
            a.reasons,
        )
        for a in rest + some
    ]


# The page.


def facts(value: Any) -> list[tuple[str, str]]:
    """A nested value of the manifest as lines of name and text."""
    if value is None:
        return []
    if not isinstance(value, dict):
        return [("", str(value))]
    lines = []
    for key, inner in value.items():
        lines += [
            (" ".join(filter(None, (str(key), name))), text) for name, text in facts(inner)
        ]
    return lines


def recipe_text(recipe: Any) -> str:
    """The recipe as its author would write it."""
    import yaml

    if recipe is None or isinstance(recipe, str):
        return recipe or ""
    return str(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False, width=88))


def write_report(folder: Path) -> Path:
    """Write report.html into a run directory, from what stands there, and return its path.

    Raises:
        DataError: the folder holds no file of a run at all.
    """
    # jinja2 is loaded here because the command line starts without it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(_page(read_run(folder)))
    target = folder / "report.html"
    # Half a surrogate pair, as broken model text may hold, has no UTF-8 form.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def _page(run: Run) -> dict[str, Any]:
    view = View(run)
    mistakes, others = panels(view)
    model = facts(run.manifest.model) or [("", run.results.model if run.results else "unknown")]
    return {
        "run": run,
        "policy": run.results.policy if run.results else "",
        "model": model,
        "headline": headline(view),
        "before": view.before,
        "after": view.after,
        "mistake_panels": mistakes,
        "other_panels": others,
        "squares": squares(view),
        "rows": row_groups(view),
        "comparisons": comparison_groups(view),
        "funnels": funnels(run),
        "kinds": kinds_panel(view),
        "losses": losses(run),
        "costs": costs(run),
        "pairs": pairs(view),
        "analyses": analyses(run),
        "recipe": recipe_text(run.manifest.recipe),
        "versions": facts(run.manifest.versions),
        "data": facts(run.manifest.data),
        "device": facts(run.manifest.device),
    }
