"""What a run measured: the content of results.json, and how scores become it.

Rates are fractions and intervals are 95 %. An unscored response is counted apart and is never a
0 or a 1; where nothing was scored there is no value. This module knows scores, prompts and the
file; it does not know which engine answered or which judge looked.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, FiniteFloat, ValidationError

from misstep.errors import DataError
from misstep.records import MistakeSource, Record, Response, Score, describe, write_text

# misstep.stats is imported where it is needed: numpy is slow to load, and the command starts
# without it.


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


class Row(Record):
    """One model, asked in one way, on one test set."""

    method: str
    """`vanilla` for the model as it was, else the method that trained it."""
    guided: bool
    mistake_source: MistakeSource | None = None
    analysis_source: str | None = None
    """`self`, the name of a model, or None where no analyses were trained on."""
    seed: int
    test_set: str
    metrics: dict[str, Metric]


class Comparison(Record):
    """Two settings over the same prompts of one test set; the difference is a minus b."""

    a: str
    """A setting as `setting_name` writes it."""
    b: str
    metric: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: float
    """Not adjusted for the number of comparisons."""
    test: str
    test_set: str
    seed: int
    n: int
    """The prompts that are scored on both sides."""


class Cost(Record):
    """What the run took, by stage."""

    seconds: dict[str, float] = Field(default_factory=dict)
    tokens: dict[str, int] = Field(default_factory=dict)
    peak_memory_mb: dict[str, float] = Field(default_factory=dict)


class Results(Record):
    """The whole of results.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    policy: str
    model: str
    rows: tuple[Row, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    cost: Cost | None = None

    def without_times(self) -> "Results":
        """The same results without wall times and memory, which differ from run to run."""
        if self.cost is None:
            return self
        return self.model_copy(update={"cost": Cost(tokens=self.cost.tokens)})


class Side(NamedTuple):
    """One side of a comparison: its responses, and scores of them by any metric."""

    name: str
    responses: Sequence[Response]
    scores: Sequence[Score]


def setting_name(method: str, guided: bool) -> str:
    """The name of a setting in comparisons, such as `mistake_analysis/guided`."""
    return f"{method}/{'guided' if guided else 'unguided'}"


def metric_from_scores(scores: Sequence[Score], seed: int = 0) -> Metric:
    """The mean of one metric's scores; Wilson's interval where all are 0 or 1, else bootstrap.

    Raises:
        ValueError: the scores are of several metrics.
    """
    from misstep.stats import mean_interval, wilson

    if len({score.metric for score in scores}) > 1:
        names = ", ".join(sorted({score.metric for score in scores}))
        raise ValueError(f"expected scores of one metric, found {names}")
    values = [score.value for score in scores if score.value is not None]
    unscored = len(scores) - len(values)
    if not values:
        return Metric(value=None, low=None, high=None, n=0, unscored=unscored)
    if _binary(values):
        interval = wilson(int(sum(values)), len(values))
    else:
        interval = mean_interval(values, seed)
    return Metric(**interval._asdict(), unscored=unscored)


def compare(a: Side, b: Side, metric: str, test_set: str, seed: int) -> Comparison | None:
    """Compare two settings over the prompts that have a score on both sides.

    A prompt with several scored responses counts once, with their mean. Without a common prompt
    there is no comparison.
    """
    from misstep.stats import paired_binary, paired_mean

    left, right = _by_prompt(a, metric), _by_prompt(b, metric)
    common = sorted(left.keys() & right.keys())
    if not common:
        return None
    of_a, of_b = [left[prompt] for prompt in common], [right[prompt] for prompt in common]
    if _binary(of_a + of_b):
        found = paired_binary([bool(value) for value in of_a], [bool(value) for value in of_b])
    else:
        found = paired_mean(of_a, of_b, seed)
    return Comparison(
        a=a.name, b=b.name, metric=metric, test_set=test_set, seed=seed, **found._asdict()
    )


def write_results(path: Path, results: Results) -> None:
    """Write results.json so that equal results are equal bytes."""
    data = results.model_dump(mode="json", by_alias=True)
    if results.cost is None:
        del data["cost"]
    text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        DataError: the file is absent, is no JSON, or a field of it is wrong.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path."
        ) from error
    except ValidationError as error:
        raise DataError(f"{path}: " + "; ".join(describe(error))) from error


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _by_prompt(side: Side, metric: str) -> Mapping[str, float]:
    """The mean score of each prompt that has one."""
    scores = {s.response_id: s.value for s in side.scores if s.metric == metric}
    found: dict[str, list[float]] = {}
    for response in side.responses:
        value = scores.get(response.id)
        if value is not None:
            found.setdefault(response.prompt.id, []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}
