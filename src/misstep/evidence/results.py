"""What a run measured: the content of results.json, and how scores become it.

Rates are fractions and intervals are 95 %. An unscored response is counted apart and is never a
0 or a 1; where nothing was scored there is no value. This module knows scores, prompts and the
file; it does not know which engine answered or which judge looked.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, FiniteFloat

from misstep.errors import DataError
from misstep.records import (
    KNOWN,
    Answer,
    Judgement,
    MistakeSource,
    Record,
    Score,
    base_metric,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from misstep.evidence.stats import Interval

LENGTH_BIAS = "length_bias"
"""Of a judge of pairs: how much more often the longer answer wins than the shorter one."""

NOT_RATES = (LENGTH_BIAS, "_score", "_loss", "_probability")
"""How metrics end whose values of 0 and 1 are two of many, and not verdicts."""

# stats is imported where it is needed: numpy is slow to load, and the command starts without
# it.


FOCUS = "mistake_analysis"
"""The method that results are about, where they have it."""


class Setting(NamedTuple):
    """A method, guided or not, and the values of swept keys, if there are any."""

    method: str
    guided: bool
    variant: str = ""

    @property
    def name(self) -> str:
        """As comparisons write it, such as `mistake_analysis/guided`."""
        variant = f"[{self.variant}]" if self.variant else ""
        return f"{self.method}{variant}/{'guided' if self.guided else 'unguided'}"

    @classmethod
    def of(cls, record: "Row | Answer | Judgement", variant: str = "") -> "Setting":
        """The setting that a record belongs to."""
        return cls(record.method, record.guided, variant)

    @classmethod
    def parse(cls, name: str) -> "Setting":
        """The setting of a name.

        Raises:
            DataError: it is none.
        """
        model, slash, way = name.rpartition("/")
        if not slash or way not in ("guided", "unguided"):
            raise DataError(
                f"setting '{name}': expected METHOD/guided or METHOD/unguided, such as "
                f"{BASE.name}."
            )
        method, _, variant = model.partition("[")
        return cls(method, way == "guided", variant.removesuffix("]"))


BASE, GUIDED = Setting("vanilla", False), Setting("vanilla", True)
"""The model as it was, without the guide and with it."""

BySeed = Mapping[int, Mapping[str, Score]]
"""Of one setting, test set and metric: training seed, prompt, score."""
Values = dict[tuple[Setting, str, str], dict[int, dict[str, Score]]]
"""Setting, test set and metric of what was measured."""
Pools = Mapping[str, Sequence[str]]
"""Names that stand for several test sets taken together, and these."""


class Corrected(Record):
    """A rate corrected for the judge's errors; the interval holds what is not known of them."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Metric(Record):
    """One number with its interval."""

    value: FiniteFloat | None
    """None, as the bounds are, only where `n` is 0."""
    low: FiniteFloat | None
    high: FiniteFloat | None
    n: int
    """How many responses have a score."""
    unscored: int = 0
    """How many have none; they move no other number here."""
    corrected: Annotated[Corrected | None, KNOWN] = None
    """Where the judge was measured; absent from files where it was not, and where no true rate
    would make a judge of these errors give this one."""

    @classmethod
    def of(cls, found: "Interval | None", unscored: int = 0) -> "Metric":
        """What was found; None where nothing has a score."""
        value, low, high, n = found or (None, None, None, 0)
        return Metric(value=value, low=low, high=high, n=n, unscored=unscored)


class Row(Record):
    """One model, asked in one way, on one test set."""

    method: str
    """`vanilla` for the model as it was, else the method that trained it."""
    guided: bool
    mistake_source: MistakeSource | None = None
    analysis_source: str | None = None
    """`self`, the name of a model, or None where no analyses were trained on."""
    variant: str = ""
    """The values of swept keys, in a comparison that sweeps some."""
    seed: int
    test_set: str
    metrics: dict[str, Metric]


class Pooled(Metric):
    """A metric of one setting and test set over all training seeds."""

    method: str
    guided: bool
    variant: str = ""
    test_set: str
    metric: str
    by_seed: dict[int, float]
    """The value of each seed alone."""

    @property
    def setting(self) -> Setting:
        """The setting that was measured."""
        return Setting(self.method, self.guided, self.variant)


class OfKind(Pooled):
    """The same on those of a test set's prompts that are of one kind."""

    kind: str


class Comparison(Record):
    """Two settings over the same prompts of one test set; the difference is a minus b."""

    a: str
    """The name of a `Setting`."""
    b: str
    metric: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: float
    """Not adjusted for the number of comparisons."""
    p_adjusted: float | None = None
    """Adjusted by Holm's method for all comparisons of the same metric and test set, those
    within variants and those between them apart."""
    test: str
    test_set: str
    seed: int
    n: int
    """The prompts that are scored on both sides."""

    @property
    def between_variants(self) -> bool:
        """Whether the two differ in swept keys."""
        return Setting.parse(self.a).variant != Setting.parse(self.b).variant


class Agreement(Record):
    """Two judges of one question on the same answers of a test set, all settings together."""

    test_set: str
    a: str
    """The metric of the one judge, as rows have it."""
    b: str
    same: Metric
    """The share of answers on which their verdicts are the same."""
    kappa: Metric | None
    """Cohen's; None where one verdict is all that was given."""


class Results(Record):
    """The whole of results.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    policy: str
    model: str
    rows: tuple[Row, ...] = ()
    pooled: tuple[Pooled, ...] = ()
    """Of a comparison: the rows' metrics over all seeds."""
    kinds: tuple[OfKind, ...] = ()
    """Of a comparison: mistakes by kind of prompt, on test sets that have several."""
    comparisons: tuple[Comparison, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    """Where several judges gave one metric."""

    @property
    def corrected(self) -> bool:
        """Whether rates were corrected for their judge."""
        of_rows = (metric for row in self.rows for metric in row.metrics.values())
        return any(metric.corrected for metric in self.pooled or of_rows)


def collect(
    values: Values,
    answers: Iterable[Answer],
    judgements: Iterable[Judgement],
    pools: Pools,
    seed: int,
    variant: str = "",
) -> None:
    """Add the scores of one run, each to its test set and to the pools that this is part of.

    Of sets that share prompts a pool has each of them once.
    """
    prompts = {
        (Setting.of(a), a.test_set, a.response.id): a.response.prompt.id for a in answers
    }
    for item in judgements:
        prompt = prompts[Setting.of(item), item.test_set, item.score.response_id]
        for name in with_pools(item.test_set, pools):
            of = values.setdefault((Setting.of(item, variant), name, item.score.metric), {})
            of.setdefault(seed, {}).setdefault(prompt, item.score)


def with_pools(test_set: str, pools: Pools) -> list[str]:
    """A test set, and the pools that it is part of."""
    return [test_set, *(pool for pool, members in pools.items() if test_set in members)]


def metric_from_scores(scores: Sequence[Score], seed: int = 0) -> Metric:
    """The mean of one metric's scores; Wilson's interval where all are 0 or 1, else bootstrap.

    A length bias, of 1, 0 and -1, has that of two paired proportions.

    Raises:
        ValueError: the scores are of several metrics.
    """
    from misstep.evidence.stats import clustered_balance, mean_interval, wilson

    if len({score.metric for score in scores}) > 1:
        names = ", ".join(sorted({score.metric for score in scores}))
        raise ValueError(f"expected scores of one metric, found {names}")
    values = [score.counted for score in scores if score.counted is not None]
    unscored = len(scores) - len(values)
    if not values:
        return Metric.of(None, unscored)
    if any(score.cases > 1 for score in scores):
        interval = _of_cases(scores)
    elif base_metric(scores[0].metric) == LENGTH_BIAS:
        answers = [score.response_id for score in scores if score.counted is not None]
        interval = clustered_balance(values, answers)
    elif is_rate(scores[0].metric) and _binary(values):
        interval = wilson(int(sum(values)), len(values))
    else:
        interval = mean_interval(values, seed)
    return Metric.of(interval, unscored)


def rate_of(verdicts: Iterable[bool | None]) -> Metric:
    """How often a verdict is yes, with Wilson's interval; no verdict is counted apart."""
    from misstep.evidence.stats import wilson

    known = list(verdicts)
    given = [verdict for verdict in known if verdict is not None]
    found = wilson(sum(given), len(given)) if given else None
    return Metric.of(found, len(known) - len(given))


def is_rate(metric: str) -> bool:
    """Whether values of 0 and 1 are verdicts, of which a rate is made."""
    return not base_metric(metric).endswith(NOT_RATES)


def _of_cases(scores: Sequence[Score]) -> "Interval":
    """The rate over the cases of all scores; those of one response are no independent ones."""
    from misstep.evidence.stats import clustered_rate

    scored = [
        (s.response_id, round(s.value * s.cases), s.cases)
        for s in scores
        if s.value is not None
    ]
    hits = [place < kept for _, kept, n in scored for place in range(n)]
    return clustered_rate(hits, [name for name, _, n in scored for _ in range(n)])


def pool(setting: Setting, test_set: str, metric: str, by_seed: BySeed, seed: int) -> Pooled:
    """A metric over all seeds, on the prompts that are scored under each of them.

    Of one seed it is the metric of that seed's row; `n` counts prompts.
    """
    from misstep.evidence.stats import clustered_balance, crossed_mean

    common, table = _tabled([by_seed])
    given = {prompt for scores in by_seed.values() for prompt in scores}
    of = setting._asdict() | {"test_set": test_set, "metric": metric}
    unscored = len(given) - len(common)
    if not common:
        return Pooled(**of, **Metric.of(None, unscored).model_dump(), by_seed={})
    (lines,) = table
    if len(lines) > 1 and base_metric(metric) == LENGTH_BIAS:
        signs = [sign for line in lines for sign in line]
        found = Metric.of(clustered_balance(signs, common * len(lines)))
    elif len(lines) > 1:
        found = Metric.of(crossed_mean(lines, is_rate(metric)))
    else:
        (scores,) = by_seed.values()
        found = metric_from_scores(list(scores.values()), seed)
    means = {s: sum(line) / len(line) for s, line in zip(by_seed, lines, strict=True)}
    counted = {"n": len(common), "unscored": unscored}
    return Pooled(**of, **(found.model_dump() | counted), by_seed=means)


def compare_pooled(
    a: Setting, b: Setting, test_set: str, metric: str, values: Values, seed: int
) -> Comparison | None:
    """Compare two settings on prompts and training seeds that are scored on both sides.

    Without such prompts there is no comparison.
    """
    from misstep.evidence.stats import crossed_difference, paired_binary, paired_mean

    sides = [values.get((setting, test_set, metric), {}) for setting in (a, b)]
    seeds = [s for s in sides[0] if s in sides[1]]
    common, tables = _tabled([{s: side[s] for s in seeds} for side in sides])
    if not seeds or not common:
        return None
    left, right = tables
    if len(seeds) > 1:
        found = crossed_difference(left, right, is_rate(metric))
    elif is_rate(metric) and _binary(left[0] + right[0]):
        found = paired_binary([bool(v) for v in left[0]], [bool(v) for v in right[0]])
    else:
        found = paired_mean(left[0], right[0], seed)
    return Comparison(
        a=a.name, b=b.name, metric=metric, test_set=test_set, seed=seed, **found._asdict()
    )


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, their p adjusted for the number of those of one metric and test set.

    What a swept key changes is another question than how methods differ: comparisons between
    variants are counted apart.
    """
    from misstep.evidence.stats import holm

    families: dict[tuple[str, str, bool], list[Comparison]] = {}
    for c in comparisons:
        families.setdefault((c.metric, c.test_set, c.between_variants), []).append(c)
    return [
        comparison.model_copy(update={"p_adjusted": p})
        for family in families.values()
        for comparison, p in zip(family, holm([c.p for c in family]), strict=True)
    ]


def _tabled(sides: Sequence[BySeed]) -> tuple[list[str], list[list[list[float]]]]:
    """The prompts that are scored everywhere, and each side's values: a line a seed."""
    lines = [scores for side in sides for scores in side.values()]
    scored = [{p for p, score in line.items() if score.scored} for line in lines]
    common = sorted(set.intersection(*scored)) if scored else []
    if not common:
        return [], []
    return common, [
        [
            _weighed([_Mean(scores[p].counted or 0.0, scores[p].cases) for p in common])
            for scores in side.values()
        ]
        for side in sides
    ]


def write_results(path: Path, results: Results) -> None:
    """Write results.json so that equal results are equal bytes."""
    data = results.model_dump(mode="json", by_alias=True)
    for section in ("pooled", "kinds", "agreements"):
        if not data[section]:
            del data[section]
    for item in (*data["rows"], *data["comparisons"]):
        # What only comparisons have is absent elsewhere.
        for key, empty in (("variant", ""), ("p_adjusted", None)):
            if item.get(key, empty) == empty:
                item.pop(key, None)
    write_json(path, data)


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        DataError: the file is absent, is no JSON, or a field of it is wrong.
    """
    if not path.is_file() and (path.parent / "manifest.json").is_file():
        raise DataError(
            f"{path}: expected the results of a finished run, found none yet. Run the recipe "
            "to its end."
        )
    return read_json(path, Results)


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


class _Mean(NamedTuple):
    value: float
    cases: int


def _weighed(means: Sequence[_Mean]) -> list[float]:
    """Values whose mean is the rate over all cases, and which spread as that rate does.

    Each is the rate, and how far the prompt's own cases move it: the ratio of two means is
    taken for linear there (Cochran, Sampling Techniques, section 6.4).
    """
    each = sum(of.cases for of in means) / len(means)
    rate = sum(of.value * of.cases for of in means) / (each * len(means))
    return [rate + of.cases / each * (of.value - rate) for of in means]
