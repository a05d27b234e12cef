"""How often the interval of a pooled rate, raw and corrected, holds the true rate: simulated.

    python benchmarks/pooled_coverage.py --rounds 300

Prompts differ in how likely a mistake is, training seeds shift all of them, and a judge errs
at a rate that was itself measured on labelled answers. Prints Markdown.
"""

import argparse
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from misstep.evidence.results import Setting, pool
from misstep.evidence.stats import Interval, corrected_rate, wilson
from misstep.records import Score

SEED_DEVIATION = 0.02
"""By how much training seeds move the rate of mistakes."""


class Case(NamedTuple):
    """A world: what is true, and how it is measured."""

    seeds: int
    prompts: int
    rate: float
    sensitivity: float
    specificity: float
    checked: int
    """Labelled answers of either kind that the judge was checked on."""
    spread: float
    """Of a beta distribution: the lower, the more prompts differ."""


CASES = (
    Case(3, 150, 0.30, 0.85, 0.80, 200, 2.0),
    Case(3, 300, 0.10, 0.85, 0.90, 200, 2.0),
    Case(5, 150, 0.15, 0.80, 0.90, 300, 2.0),
    Case(3, 150, 0.30, 0.85, 0.80, 200, 0.3),
)


def drawn(case: Case, world: np.random.Generator) -> dict[int, dict[str, Score]]:
    """What the judge says of each prompt's answer under each seed."""
    shape = (case.rate * case.spread, (1 - case.rate) * case.spread)
    likely: NDArray[Any] = world.beta(*shape, size=case.prompts)
    found = {}
    for seed in range(case.seeds):
        moved = np.clip(likely + world.normal(0, SEED_DEVIATION), 0, 1)
        mistakes = world.random(case.prompts) < moved
        says = np.where(mistakes, case.sensitivity, 1 - case.specificity)
        judged = world.random(case.prompts) < says
        found[seed] = {str(i): _score(float(v)) for i, v in enumerate(judged)}
    return found


def _score(value: float) -> Score:
    return Score(response_id="", metric="mistake_rate", value=value, judge="")


def coverage(case: Case, rounds: int) -> tuple[float, float]:
    """The share of rounds whose raw, and whose corrected interval holds what is true."""
    world, raw_hits, hits = np.random.default_rng(1), 0, 0
    seen = case.rate * case.sensitivity + (1 - case.rate) * (1 - case.specificity)
    for _ in range(rounds):
        pooled = pool(Setting("m", False), "t", "mistake_rate", drawn(case, world), 0)
        assert pooled.value is not None and pooled.low is not None and pooled.high is not None
        raw = Interval(pooled.value, pooled.low, pooled.high, pooled.n)
        right = [
            wilson(int(world.binomial(case.checked, share)), case.checked)
            for share in (case.sensitivity, case.specificity)
        ]
        corrected = corrected_rate(raw, *right)
        raw_hits += raw.low <= seen <= raw.high
        hits += corrected is not None and corrected.low <= case.rate <= corrected.high
    return raw_hits / rounds, hits / rounds


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    names = [*Case._fields, "raw interval holds", "corrected interval holds"]
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
    for case in CASES:
        raw, corrected = coverage(case, rounds)
        print(f"| {' | '.join(map(str, case))} | {raw:.1%} | {corrected:.1%} |", flush=True)


if __name__ == "__main__":
    main()
