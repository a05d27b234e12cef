"""Intervals and tests for what a run measures.

Every interval is 95 % and every p is two-sided. This module knows numbers only: no record, no
judge and no file. Nothing to count is an error here (`ValueError`), never a NaN: whoever has no
values has no rate, and says so itself.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Bootstrap resamples, and sign flips where too many exist to try them all."""

CROSSED = "crossed analysis of variance"

Floats = NDArray[np.float64]

_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)
"""The quantile of the normal distribution that bounds 95 % on both sides."""
NOTHING = 1e-12
"""What rounding leaves of 0."""
_EXACT_PAIRS = 13
"""Up to here all sign flips are tried: 2^13 are fewer than `RESAMPLES`."""
_CELLS_AT_ONCE = 4_000_000
"""Random numbers held in memory at once, so that a large test set needs no large machine."""


class Interval(NamedTuple):
    """An estimate from `n` values with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """The paired difference a minus b, its 95 % interval, and the p of no difference at all."""

    difference: float
    low: float
    high: float
    p: float
    test: str
    n: int


def wilson(successes: int, n: int) -> Interval:
    """A proportion with Wilson's score interval (1927), which holds near 0 and 1.

    Raises:
        ValueError: `n` is 0, or `successes` lies outside 0 to `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, found {successes} of {n}")
    rate = successes / n
    return Interval(rate, *_score_interval(rate, n), n)


def mean_of_two(a: Interval, b: Interval) -> Interval:
    """The mean of two proportions over different cases, such as a balanced accuracy.

    The interval joins both intervals' arms as those of independent estimates are joined (Zou
    and Donner, "Construction of confidence limits about effect measures", Statistics in
    Medicine 27, 2008). `n` is all cases together.
    """
    down = _joined(a.value - a.low, b.value - b.low, 0.0) / 2
    up = _joined(a.high - a.value, b.high - b.value, 0.0) / 2
    value = (a.value + b.value) / 2
    return Interval(value, value - down, value + up, a.n + b.n)


def clustered_rate(hits: Sequence[bool], clusters: Sequence[str]) -> Interval:
    """A proportion over cases that come in clusters, such as several answers to one prompt.

    Wilson's interval, for as many independent cases as these are worth (`design_effect`).

    Raises:
        ValueError: there are no cases, or the lengths differ.
    """
    _check_clusters(hits, clusters)
    data = np.asarray(hits, dtype=np.float64)
    n, rate = len(data), float(data.mean())
    worth = n / design_effect((data - rate) / n, numbered(clusters))
    return Interval(rate, *_score_interval(rate, worth), n)


def clustered_balance(signs: Sequence[float], clusters: Sequence[str]) -> Interval:
    """How much more often 1 occurs than -1, over cases of 1, 0 or -1 that come in clusters.

    The interval is that of `paired_binary`, for as many independent cases as these are worth.

    Raises:
        ValueError: there are no cases, or the lengths differ.
    """
    _check_clusters(signs, clusters)
    data = np.asarray(signs, dtype=np.float64)
    n, value = len(data), float(data.mean())
    effect = design_effect((data - value) / n, numbered(clusters))
    ups, downs = (float((data == sign).sum()) / effect for sign in (1, -1))
    return Interval(value, *_newcombe(0, ups, downs, n / effect), n)


def design_effect(
    pull: Floats, clusters: NDArray[np.intp], expected: float = math.inf
) -> float:
    """How many cases are worth one independent case, where they come in clusters (Kish 1965).

    The variance of a number between clusters over that of independent cases, or over the one
    that a method expects of them where that is less; never below 1. Above, it is not known
    better than from so many clusters: it is widened until the normal distribution's quantile
    gives what Student's t would. Where no case pulls, or where there is one cluster, nothing
    can be told of clusters and each is worth one case.

    Args:
        pull: how far each case moves the number away from what it is.
        clusters: the cluster of each case, counted from 0.
        expected: the variance that a method expects.
    """
    n, k = len(pull), int(clusters.max()) + 1
    if k == 1 or np.abs(pull).max() < NOTHING:
        return n / k
    together = float((np.bincount(clusters, weights=pull) ** 2).sum())
    if k < n:
        together *= k / (k - 1)
    effect = together / min(float((pull**2).sum()), expected)
    return effect * (_student(k - 1) / Z) ** 2 if effect > 1 + NOTHING else 1.0


def corrected_rate(
    raw: Interval, sensitivity: Interval, specificity: Interval
) -> Interval | None:
    """The rate that a fallible judge's rate stands for (Rogan and Gladen 1978), within 0 to 1.

    None where the whole interval lies outside: no true rate would make a judge of these errors
    say this, such as fewer mistakes than it finds among harmless cases. It errs otherwise here.

    The interval holds the uncertainty of all three (Lang and Reiczigel, "Confidence limits for
    prevalence of disease adjusted for estimated sensitivity and specificity", Preventive
    Veterinary Medicine 113, 2014). It supposes that the judge errs on these cases as it does on
    those that it was measured on, and that the three were measured on different cases.

    Raises:
        ValueError: sensitivity and specificity together do not exceed 1, so that the judge's
            rate says nothing of the true one.
    """
    youden = sensitivity.value + specificity.value - 1
    if youden <= 0:
        raise ValueError("expected sensitivity and specificity that together exceed 1")
    value = (raw.value + specificity.value - 1) / youden
    low, high = _lang_reiczigel(raw, sensitivity, specificity)
    if high <= 0 or low >= 1:
        return None
    point = min(1.0, max(0.0, value))
    # The estimate stays inside its own interval where the interval's small shift would lose it.
    return Interval(point, min(max(low, 0.0), point), max(min(high, 1.0), point), raw.n)


def mean_interval(values: Sequence[float], seed: int) -> Interval:
    """A mean with its bias-corrected accelerated (BCa) bootstrap interval (Efron 1987).

    The order of the values does not matter. Values that are all equal (a single one, too) show
    no spread: the interval is then that value alone, and `n` says how little it may mean.

    Raises:
        ValueError: there are no values, or one of them is no finite number.
    """
    data = _finite(values)
    mean = float(data.mean())
    if data[0] == data[-1]:
        return Interval(float(data[0]), float(data[0]), float(data[0]), len(data))
    means = _bootstrap_means(data, seed)
    low, high = np.quantile(means, _bca_levels(data, means))
    # The estimate stays inside its own interval even where the correction is extreme.
    return Interval(mean, min(float(low), mean), max(float(high), mean), len(data))


def paired_binary(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """The difference of two proportions over the same cases.

    The p is McNemar's exact one: a binomial test on the discordant pairs; without such pairs it
    is 1. The interval is method 10 of Newcombe, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", Statistics in Medicine 17
    (1998): Wilson's intervals of both proportions, joined by their correlation.

    Raises:
        ValueError: there are no pairs, or the lengths differ.
    """
    from scipy.stats import binomtest

    _check_pairs(len(a), len(b))
    left, right = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    low, high = _newcombe(int((left & right).sum()), only_a, only_b, len(left))
    return Difference((only_a - only_b) / len(left), low, high, p, "McNemar exact", len(left))


def paired_mean(a: Sequence[float], b: Sequence[float], seed: int) -> Difference:
    """The mean difference over the same cases.

    The interval is the BCa bootstrap of the differences. The p comes from flipping their signs:
    all flips for few pairs, else `RESAMPLES` random ones with the observed one counted among
    them. Differences that are all 0 give p = 1.

    Raises:
        ValueError: there are no pairs, the lengths differ, or a value is no finite number.
    """
    _check_pairs(len(a), len(b))
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    value, low, high, n = mean_interval(differences.tolist(), seed)
    return Difference(value, low, high, _sign_flip_p(differences, seed), "sign-flip", n)


def crossed_mean(table: Sequence[Sequence[float]], rate: bool = True) -> Interval:
    """The mean of a table, a line a training seed and a column a prompt, for both at once.

    Lines and columns are taken for random effects (`_crossed_variance`), so the interval speaks
    for other prompts and for another training. A rate has Wilson's interval for as many cases
    as its variance is worth. `n` counts the columns.

    Args:
        table: the values.
        rate: whether values of 0 and 1 are those of a rate, and not two of many grades.

    Raises:
        ValueError: the table is empty, or its lines are not equally long.
    """
    data = _table(table)
    n, value = data.shape[1], float(data.mean())
    binary = rate and _binary(data)
    if binary and value in (0.0, 1.0):
        return wilson(n if value else 0, n)
    variance, freedom = _crossed_variance(data)
    quantile = _student(freedom)
    if binary:
        worth = min(data.size, value * (1 - value) / variance) if variance else data.size
        return Interval(value, *_score_interval(value, worth, quantile), n)
    half = quantile * math.sqrt(variance)
    return Interval(value, value - half, value + half, n)


def crossed_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], rate: bool = True
) -> Difference:
    """The mean paired difference of two such tables, and the p of Student's t.

    Rates whose difference is the same everywhere have the interval of `paired_binary`, with
    the mean counts of the lines: that a few prompts do not differ says little of others.

    Raises:
        ValueError: a table is empty, or they are not of one shape.
    """
    from scipy.stats import t

    left, right = _table(a), _table(b)
    if left.shape != right.shape:
        raise ValueError(f"expected tables of one shape, found {left.shape} and {right.shape}")
    differences = left - right
    n, value = differences.shape[1], float(differences.mean())
    variance, freedom = _crossed_variance(differences)
    error = math.sqrt(variance)
    half = _student(freedom) * error
    low, high = value - half, value + half
    if rate:
        # No two rates are further apart than 0 and 1.
        low, high = max(-1.0, low), min(1.0, high)
    if error < NOTHING and rate and _binary(left) and _binary(right):
        both, only_a, only_b = (
            float(cells.sum()) / len(left)
            for cells in (left * right, left * (1 - right), right * (1 - left))
        )
        low, high = _newcombe(both, only_a, only_b, n)
    if not differences.any():
        return Difference(0.0, low, high, 1.0, CROSSED, n)
    p = float(2 * t.sf(abs(value) / error, freedom)) if error else 0.0
    # No exchange of signs could give less: few prompts show little, however alike they are.
    p = max(p, 2.0 ** (1 - n))
    return Difference(value, low, high, p, CROSSED, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number by Holm's step-down method (1979), in their order.

    Raises:
        ValueError: a value lies outside 0 to 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"expected p values from 0 to 1, found {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def numbered(clusters: Sequence[str]) -> NDArray[np.intp]:
    """The cluster of each case, counted from 0 in the order in which they first come."""
    # Names may be whole texts, of which an array would make all as long as the longest.
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    return np.asarray([places[name] for name in clusters], dtype=np.intp)


def batches(resamples: int, width: int) -> list[int]:
    """Resamples in pieces of which each fits in memory at `width` numbers a resample."""
    size = max(1, min(resamples, _CELLS_AT_ONCE // width))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _check_clusters(cases: Sequence[float], clusters: Sequence[str]) -> None:
    if len(cases) != len(clusters) or not cases:
        raise ValueError(f"expected a cluster a case, found {len(clusters)} for {len(cases)}")


def _table(table: Sequence[Sequence[float]]) -> Floats:
    lengths = {len(line) for line in table}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"expected lines of one length and not empty, found {sorted(lengths)}")
    return np.asarray(table, dtype=np.float64)


def _binary(data: Floats) -> bool:
    return bool(np.isin(data, (0.0, 1.0)).all())


def _crossed_variance(data: Floats) -> tuple[float, float]:
    """The variance of a table's mean, and its degrees of freedom.

    The analysis of variance of two crossed random effects (Clark, "The language-as-fixed-effect
    fallacy", 1973): what lines differ by beyond chance is added to what columns differ by; the
    degrees of freedom are Satterthwaite's (1946), no fewer than one of the effects has.
    """
    lines, columns = data.shape
    of_lines, of_columns = data.mean(axis=1), data.mean(axis=0)
    by_columns = lines * float(of_columns.var(ddof=1)) if columns > 1 else 0.0
    if lines == 1:
        return by_columns / data.size, max(1, columns - 1)
    by_lines = columns * float(of_lines.var(ddof=1))
    rest = data - of_lines[:, None] - of_columns[None, :] + data.mean()
    left = (lines - 1) * max(1, columns - 1)
    by_chance = float((rest**2).sum()) / left
    if max(by_lines, by_columns) <= by_chance:
        # Both effects hold chance, too: together they are never expected to be less.
        return by_chance / data.size, left
    if by_lines <= by_chance:
        return by_columns / data.size, max(1, columns - 1)
    total = max(by_columns + by_lines - by_chance, by_chance)
    squares = (
        by_columns**2 / max(1, columns - 1),
        by_lines**2 / (lines - 1),
        by_chance**2 / left,
    )
    # What is subtracted can bring Satterthwaite's number to almost nothing; a sum of variances
    # has no fewer degrees of freedom than the one that has fewest.
    return total / data.size, max(min(lines, columns) - 1, total**2 / sum(squares), 1)


def _student(freedom: float) -> float:
    """The quantile of Student's t that bounds 95 % on both sides."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def _score_interval(rate: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a proportion from so many independent cases."""
    shrink = 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At the ends the score interval touches 0 or 1 exactly; rounding alone would miss them.
    return 0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half


def _worth(found: Interval) -> float:
    """The independent cases that Wilson's interval of this width is made from."""
    half = (found.high - found.low) / 2
    spread = found.value * (1 - found.value)
    # The square of the half width, solved for n.
    a, b = half**2, 2 * half**2 * Z**2 - Z**2 * spread
    c = half**2 * Z**4 - Z**4 / 4
    return (-b + math.sqrt(max(0.0, b**2 - 4 * a * c))) / (2 * a)


def _lang_reiczigel(raw: Interval, sens: Interval, spec: Interval) -> tuple[float, float]:
    n, positives, negatives = _worth(raw), _worth(sens) + 2, _worth(spec) + 2
    p = (raw.value * n + Z**2 / 2) / (n + Z**2)
    se = (sens.value * (positives - 2) + 1) / positives
    sp = (spec.value * (negatives - 2) + 1) / negatives
    youden = se + sp - 1
    if youden <= 0:
        return 0.0, 1.0
    value = (p + sp - 1) / youden
    of_se, of_sp = se * (1 - se) / positives, sp * (1 - sp) / negatives
    variance = p * (1 - p) / (n + Z**2) + value**2 * of_se + (1 - value) ** 2 * of_sp
    middle = value + 2 * Z**2 * (value * of_se - (1 - value) * of_sp)
    half = Z * math.sqrt(variance) / youden
    return middle - half, middle + half


def _check_pairs(a: int, b: int) -> None:
    if a != b or a == 0:
        raise ValueError(f"expected as many of a as of b, and at least one; found {a} and {b}")


def _finite(values: Sequence[float]) -> Floats:
    """The values in ascending order, so that equal sets of values give equal resamples."""
    data = np.sort(np.asarray(values, dtype=np.float64))
    if len(data) == 0:
        raise ValueError("expected at least one value, found none")
    if not np.isfinite(data).all():
        raise ValueError("expected finite numbers, found infinity or NaN")
    return data


def _bootstrap_means(data: Floats, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    n = len(data)
    draws = (rng.integers(n, size=(rows, n)) for rows in batches(RESAMPLES, n))
    return np.concatenate([data[drawn].mean(axis=1) for drawn in draws])


def _bca_levels(data: Floats, means: Floats) -> list[float]:
    """The two quantiles of the resampled means that bound the interval."""
    centred = data - data.mean()
    # For a mean, the jackknife's acceleration is a sixth of the skewness over the root of n.
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    below = (means < data.mean()).mean() + (means == data.mean()).mean() / 2
    bias = _NORMAL.inv_cdf(float(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES)))
    shifted = [bias + sign * Z for sign in (-1, 1)]
    return [_NORMAL.cdf(bias + z / (1 - float(acceleration) * z)) for z in shifted]


def _newcombe(both: float, only_a: float, only_b: float, n: float) -> tuple[float, float]:
    of_a, of_b = (both + only_a) / n, (both + only_b) / n
    a, b = _score_interval(of_a, n), _score_interval(of_b, n)
    # Parts of a case may leave less than nothing by rounding.
    phi = _correlation(both, only_a, only_b, max(0.0, n - both - only_a - only_b))
    difference = of_a - of_b
    down, up = (of_a - a[0], b[1] - of_b), (a[1] - of_a, of_b - b[0])
    return difference - _joined(*down, phi), difference + _joined(*up, phi)


def _joined(one: float, other: float, phi: float) -> float:
    # Where both sides agree in all cases the terms cancel; rounding may leave less than 0.
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(both: float, only_a: float, only_b: float, neither: float) -> float:
    """The phi of a paired 2 x 2 table, with method 10's continuity correction towards 0."""
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_a * only_b
    if product > 0:
        product = max(0.0, product - n / 2)
    return product / math.sqrt(margins)


def _sign_flip_p(differences: Floats, seed: int) -> float:
    # A difference of 0 has no sign to flip; without it more cases can be tried in full.
    moved = np.sort(differences[differences != 0])
    if len(moved) == 0:
        return 1.0
    # Sums that are equal on paper may differ in the last bit.
    observed = abs(float(moved.sum())) - 1e-9 * float(np.abs(moved).sum())
    if len(moved) <= _EXACT_PAIRS:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= observed).mean())
    rng = np.random.default_rng(seed)
    draws = (
        rng.integers(2, size=(rows, len(moved))) for rows in batches(RESAMPLES, len(moved))
    )
    extreme = sum(int((np.abs((2 * d - 1) @ moved) >= observed).sum()) for d in draws)
    return (extreme + 1) / (RESAMPLES + 1)
