"""How far verdicts agree with labels, and raters with each other: AUC, kappa, alpha and more.

Intervals are 95 % and resample prompts, not answers: several answers to one prompt are no
independent cases. Where all resamples give the same number, as a judge without a fault does,
the interval is that number alone. Knows numbers only, as misstep.stats does.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from misstep.stats import Interval

RESAMPLES = 2_000
"""Fewer than misstep.stats draws: an AUC has to be counted anew for each."""
BINS = 10
"""Of a calibration curve, each of them as wide as the others."""
MOST_CELLS = 4_000_000
"""Numbers held in memory at once."""

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From weights, a line a resample and a column a case, to one number a line; NaN for none."""


class Bin(NamedTuple):
    """Cases with similar scores: their mean score, and the share of them that is labelled 1."""

    low: float
    high: float
    score: float
    share: float
    n: int


def auc(scores: Sequence[float], labels: Sequence[bool], prompts: Sequence[str]) -> Interval:
    """The chance that a case labelled 1 has a higher score than one labelled 0; ties are half.

    Raises:
        ValueError: one of the labels does not occur, or the lengths differ.
    """
    wanted, clusters = _checked(labels, prompts, len(scores))
    if wanted.all() or not wanted.any():
        raise ValueError("expected cases of both labels, found one label only")
    _, ranks = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    order = np.argsort(ranks, kind="stable")
    starts = np.flatnonzero(np.diff(ranks[order], prepend=-1))
    positive = wanted[order].astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        sorted_weights = weights[:, order]
        above = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        below = np.add.reduceat(sorted_weights * (1 - positive), starts, axis=1)
        lower = np.cumsum(below, axis=1) - below / 2
        with np.errstate(invalid="ignore"):
            won = (above * lower).sum(axis=1)
            return np.asarray(won / (above.sum(axis=1) * below.sum(axis=1)))

    return _interval(statistic, clusters, len(wanted))


def kappa(verdicts: Sequence[bool], labels: Sequence[bool], prompts: Sequence[str]) -> Interval:
    """Cohen's kappa: agreement beyond that of two who decide by chance at their own rates.

    Raises:
        ValueError: chance alone would agree on every case, or the lengths differ.
    """
    wanted, clusters = _checked(labels, prompts, len(verdicts))
    said = np.asarray(verdicts, dtype=bool)
    if len({*verdicts, *labels}) < 2:
        raise ValueError("expected both verdicts somewhere, found one only: chance agrees too")
    same = (said == wanted).astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        seen = weights @ same / total
        one, other = weights @ said / total, weights @ wanted / total
        by_chance = one * other + (1 - one) * (1 - other)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(by_chance < 1, (seen - by_chance) / (1 - by_chance), np.nan)

    return _interval(statistic, clusters, len(wanted))


def calibration_error(
    scores: Sequence[float], labels: Sequence[bool], prompts: Sequence[str]
) -> Interval:
    """The expected calibration error: how far mean score and share of 1 lie apart, by bins.

    Noise counts as miscalibration, so the value is too high for few cases, and resampling adds
    as much once more. The interval takes that off: once above, twice below, where it can reach
    0. Simulated, it held the true error in 81 to 99 of 100 cases, least where that is 0.

    Raises:
        ValueError: there are no scores, or one lies outside 0 to 1.
    """
    wanted, clusters = _checked(labels, prompts, len(scores))
    data, places = _binned(scores)
    inside = np.eye(BINS)[places]
    apart = inside * (data - wanted)[:, None]

    def statistic(weights: Floats) -> Floats:
        return np.asarray(np.abs(weights @ apart).sum(axis=1) / weights.sum(axis=1))

    value, numbers = _resampled(statistic, clusters, len(wanted))
    mean, top = float(numbers.mean()), float(np.quantile(numbers, 0.975))
    noise = max(0.0, mean - value)
    low, high = value - 2 * noise - (top - mean), top - noise
    return Interval(value, min(value, max(0.0, low)), max(value, high), len(wanted))


def calibration_curve(scores: Sequence[float], labels: Sequence[bool]) -> list[Bin]:
    """The bins that hold cases, from low scores to high ones.

    Raises:
        ValueError: there are no scores, or one lies outside 0 to 1.
    """
    data, places = _binned(scores)
    wanted = np.asarray(labels, dtype=np.float64)
    return [
        Bin(
            place / BINS,
            (place + 1) / BINS,
            float(data[places == place].mean()),
            float(wanted[places == place].mean()),
            int((places == place).sum()),
        )
        for place in sorted(set(places.tolist()))
    ]


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of nominal ratings: what raters called each unit, in any order.

    A unit with fewer than two ratings says nothing of agreement and is left out. None where no
    unit has two, or where all ratings are the same, since alpha is not defined there.
    """
    paired = [values for values in units if len(values) > 1]
    called = list(dict.fromkeys(value for values in paired for value in values))
    if len(called) < 2:
        return None
    counts = np.array([[list(v).count(c) for c in called] for v in paired], dtype=np.float64)
    each = counts.sum(axis=1)
    disagreeing = (each**2 - (counts**2).sum(axis=1)) / (each - 1)
    totals, n = counts.sum(axis=0), float(counts.sum())
    expected = (n**2 - float((totals**2).sum())) / (n - 1)
    return 1.0 - float(disagreeing.sum()) / expected


def _checked(
    labels: Sequence[bool], prompts: Sequence[str], n: int
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    if n == 0 or not n == len(labels) == len(prompts):
        raise ValueError(
            f"expected a label and a prompt a case, found {len(labels)} and {len(prompts)} "
            f"for {n}"
        )
    # In the order of the cases' first prompts, so that the prompts' names change no number.
    places = {name: place for place, name in enumerate(dict.fromkeys(prompts))}
    clusters = np.array([places[name] for name in prompts], dtype=np.intp)
    return np.asarray(labels, dtype=bool), clusters


def _binned(scores: Sequence[float]) -> tuple[Floats, NDArray[np.intp]]:
    data = np.asarray(scores, dtype=np.float64)
    if len(data) == 0 or not ((data >= 0) & (data <= 1)).all():
        raise ValueError("expected scores from 0 to 1, and at least one")
    return data, np.minimum((data * BINS).astype(np.intp), BINS - 1)


def _interval(statistic: Statistic, clusters: NDArray[np.intp], n: int) -> Interval:
    """A statistic with its percentile bootstrap interval over clusters of cases."""
    value, numbers = _resampled(statistic, clusters, n)
    low, high = np.quantile(numbers, (0.025, 0.975)) if len(numbers) else (value, value)
    return Interval(value, min(float(low), value), max(float(high), value), n)


def _resampled(
    statistic: Statistic, clusters: NDArray[np.intp], n: int
) -> tuple[float, Floats]:
    """A statistic, and what it is in resamples of clusters of cases."""
    value = float(statistic(np.ones((1, n)))[0])
    rng = np.random.default_rng(0)
    count = int(clusters.max()) + 1
    size = max(1, min(RESAMPLES, MOST_CELLS // n))
    found = []
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = rng.multinomial(count, [1 / count] * count, size=rows).astype(np.float64)
        found.append(statistic(drawn[:, clusters]))
    # A resample may hold cases of one label only; it has no such number.
    numbers = np.concatenate(found)
    return value, numbers[np.isfinite(numbers)]
