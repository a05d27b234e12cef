"""How far verdicts agree with labels, and raters with each other: AUC, kappa, alpha and more.

Intervals are 95 % and count prompts, not answers: several answers to one prompt are no
independent cases. Those of AUC and kappa hold near 1, where a bootstrap is too narrow, and have
a width for a judge without a fault, too. Knows numbers only, as misstep.evidence.stats does.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from misstep.evidence.stats import (
    NOTHING,
    Floats,
    Interval,
    Z,
    batches,
    design_effect,
    numbered,
)

RESAMPLES = 2_000
"""Of a calibration error, which has to be counted anew for each."""
DRAWS = 10_000
"""Of a kappa, which costs little."""
PRIOR = 0.25
"""Perks' prior (1947) of a 2 x 2 table: one case, a quarter of it in each cell."""
BINS = 10
"""Of a calibration curve, each of them as wide as the others."""


class Bin(NamedTuple):
    """Cases with similar scores: their mean score, and the share of them that is labelled 1."""

    low: float
    high: float
    score: float
    share: float
    n: int


def auc(scores: Sequence[float], labels: Sequence[bool], prompts: Sequence[str]) -> Interval:
    """The chance that a case labelled 1 has a higher score than one labelled 0; ties are half.

    The interval is method 5 of Newcombe, "Confidence intervals for an effect size measure based
    on the Mann-Whitney statistic. Part 2", Statistics in Medicine 25 (2006), for as many cases
    as these are worth: their number over the ratio of DeLong's variance (1988), taken between
    prompts, to the one that the method expects, and never more than there are.

    Raises:
        ValueError: one of the labels does not occur, or the lengths differ.
    """
    wanted, clusters = _checked(labels, prompts, len(scores))
    if wanted.all() or not wanted.any():
        raise ValueError("expected cases of both labels, found one label only")
    data = np.asarray(scores, dtype=np.float64)
    ahead = _share_below(data[~wanted], data[wanted])
    behind = 1 - _share_below(data[wanted], data[~wanted])
    value, m, n = float(ahead.mean()), len(ahead), len(behind)
    pull = np.empty(m + n)
    pull[wanted], pull[~wanted] = (ahead - value) / m, (behind - value) / n
    effect = design_effect(pull, clusters, _auc_variance(value, m, n))
    low = _lowest_auc(value, m / effect, n / effect)
    high = 1 - _lowest_auc(1 - value, m / effect, n / effect)
    return Interval(value, low, high, m + n)


def kappa(verdicts: Sequence[bool], labels: Sequence[bool], prompts: Sequence[str]) -> Interval:
    """Cohen's kappa: agreement beyond that of two who decide by chance at their own rates.

    The interval holds the middle 95 % of what kappa is in tables drawn from the Dirichlet
    distribution of the counted one and `PRIOR`. The counts are divided by the design effect:
    kappa's variance between prompts over that of as many independent cases.

    Raises:
        ValueError: chance alone would agree on every case, or the lengths differ.
    """
    wanted, clusters = _checked(labels, prompts, len(verdicts))
    said = np.asarray(verdicts, dtype=bool)
    if len({*verdicts, *labels}) < 2:
        raise ValueError("expected both verdicts somewhere, found one only: chance agrees too")
    counts = np.array(
        [np.sum((said == one) & (wanted == other)) for one in (1, 0) for other in (1, 0)]
    )
    value = float(_kappa(counts))
    one, other, same = said.mean(), wanted.mean(), said == wanted
    chance = one * other + (1 - one) * (1 - other)
    # How far each case moves kappa, through the agreement and through what chance would do.
    moved = (said - one) * (2 * other - 1) + (wanted - other) * (2 * one - 1)
    pull = (same - same.mean() - (1 - value) * moved) / (1 - chance) / len(said)
    alphas = counts / design_effect(pull, clusters) + PRIOR
    drawn = _kappa(np.random.default_rng(0).dirichlet(alphas, DRAWS).T)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, min(float(low), value), max(float(high), value), len(said))


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

    def error(weights: Floats) -> Floats:
        """Of each line of weights, one a case."""
        return np.asarray(np.abs(weights @ apart).sum(axis=1) / weights.sum(axis=1))

    value = float(error(np.ones((1, len(wanted))))[0])
    numbers = np.concatenate([error(weights) for weights in _resampled(clusters)])
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
    # Not by the prompts' names, so that these change no number.
    return np.asarray(labels, dtype=bool), numbered(prompts)


def _binned(scores: Sequence[float]) -> tuple[Floats, NDArray[np.intp]]:
    data = np.asarray(scores, dtype=np.float64)
    if len(data) == 0 or not ((data >= 0) & (data <= 1)).all():
        raise ValueError("expected scores from 0 to 1, and at least one")
    return data, np.minimum((data * BINS).astype(np.intp), BINS - 1)


def _share_below(of: Floats, scores: Floats) -> Floats:
    """Of each score, the share of others that lie below it; equal ones are half below."""
    of = np.sort(of)
    below, not_above = (np.searchsorted(of, scores, side) for side in ("left", "right"))
    return np.asarray((below + not_above) / 2 / len(of))


def _auc_variance(value: float, m: float, n: float) -> float:
    """Hanley and McNeil's (1982), with Newcombe's mean of both numbers of cases."""
    each = (m + n) / 2 - 1
    shares = (1 - value) / (2 - value) + value / (1 + value)
    return value * (1 - value) * (1 + each * shares) / (m * n)


def _lowest_auc(value: float, m: float, n: float) -> float:
    """The lowest AUC that still lies within z of its own standard errors of what was found."""
    from scipy.optimize import brentq

    def beyond(low: float) -> float:
        return (value - low) ** 2 - Z**2 * _auc_variance(low, m, n)

    if value < NOTHING:
        return 0.0
    # An AUC of 1 has no variance and is a root itself; the bound is the one below.
    return float(brentq(beyond, 0.0, value - NOTHING))


def _kappa(table: Floats) -> Floats:
    """Of the cells yes-yes, yes-no, no-yes and no-no, as counts or shares."""
    yes, one, other, no = table / table.sum(axis=0)
    chance = (yes + one) * (yes + other) + (other + no) * (one + no)
    return np.asarray((yes + no - chance) / (1 - chance))


def _resampled(clusters: NDArray[np.intp]) -> Iterator[Floats]:
    """How often each case counts, a line a resample of clusters of cases."""
    rng = np.random.default_rng(0)
    count = int(clusters.max()) + 1
    for rows in batches(RESAMPLES, len(clusters)):
        drawn = rng.multinomial(count, [1 / count] * count, size=rows).astype(np.float64)
        yield drawn[:, clusters]
