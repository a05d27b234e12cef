"""How sure a run's differences are where attacks of one wording are not independent cases.

A suite's test attacks are made of fewer wordings and target texts than there are prompts. What
holds for one prompt may hold for all of its wording, so an interval over prompts alone speaks
for other tasks in the same words. Here cases come in clusters, one a wording, a target or a
kind of attack (`clustered_balance`: as many independent cases as the clusters are worth).

    python benchmarks/wordings.py runs/quickstart --out wordings.json

Prints Markdown: every trained setting against the untrained one, by prompts and by clusters.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from misstep.data.suites import FOLDER
from misstep.evidence.stats import clustered_balance
from misstep.policy import fill
from misstep.records import Answer, Judgement, Prompt, read_jsonl
from misstep.report.words import count, points

METRIC = "mistake_rate"
BASE = ("vanilla", False)
Verdicts = Mapping[str, float]
"""Of one setting, by prompt."""


@cache
def templates(suite: str) -> dict[str, list[str]]:
    """The wordings of each kind, of all splits."""
    told = yaml.safe_load((FOLDER / suite / "attacks.yaml").read_text(encoding="utf-8"))
    return {
        kind["name"]: [text for split in kind["splits"].values() for text in split]
        for kind in told["kinds"]
    }


def wording(suite: str, prompt: Prompt) -> str:
    """The wording that an attack was made with."""
    for text in templates(suite)[prompt.kind]:
        before, after = fill(text, task="\0", target=str(prompt.target)).split("\0")
        if prompt.text.startswith(before) and prompt.text.endswith(after):
            return text
    raise SystemExit(f"no wording of the suite {suite} makes this {prompt.kind} attack")


def verdicts(
    run: Path, tests: Sequence[str]
) -> tuple[dict[str, Prompt], dict[Any, dict[str, float]]]:
    """The prompts of test sets by name, and whether each setting's answers are mistakes."""
    prompts, asked = dict[str, Prompt](), dict[str, str]()
    for answer in read_jsonl(run / "responses.jsonl", Answer):
        if answer.test_set in tests:
            prompts[answer.response.prompt.id] = answer.response.prompt
            asked[answer.response.id] = answer.response.prompt.id
    found: dict[Any, dict[str, float]] = defaultdict(dict)
    for item in read_jsonl(run / "scores.jsonl", Judgement):
        score = item.score
        if item.test_set in tests and score.metric == METRIC and score.counted is not None:
            found[item.method, item.guided][asked[score.response_id]] = score.counted
    return prompts, found


def compared(
    one: Verdicts, base: Verdicts, clusters: Mapping[str, Callable[[str], str]]
) -> dict[str, Any]:
    """The difference of two settings, with an interval for each way to cluster the prompts."""
    common = sorted(one.keys() & base.keys())
    signs = [one[name] - base[name] for name in common]
    found: dict[str, Any] = {}
    for by, cluster in clusters.items():
        names = [cluster(name) for name in common]
        interval = clustered_balance(signs, names)
        found["difference"] = interval.value
        found[by] = {"clusters": len(set(names)), "low": interval.low, "high": interval.high}
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The comparisons as a table."""
    ways = list(next(iter(found.values())).keys() - {"difference"})
    ways.sort(key=lambda way: -next(iter(found.values()))[way]["clusters"])
    yield "| less the untrained model | difference | " + " | ".join(ways) + " |"
    yield "| --- " * (2 + len(ways)) + "|"
    for name, of in found.items():
        cells = [
            f"{points(of[way]['low']).removesuffix('points').strip()} to "
            f"{points(of[way]['high']).removesuffix('points').strip()} "
            f"({count(of[way]['clusters'])})"
            for way in ways
        ]
        yield f"| {name} | {points(of['difference'])} | " + " | ".join(cells) + " |"


def main() -> None:
    """Read the arguments, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--suite", default="goal-hijacking")
    parser.add_argument(
        "--tests",
        nargs="+",
        type=lambda names: names.split("+"),
        default=[["attacks-seen", "attacks-unseen"], ["attacks-seen"], ["attacks-unseen"]],
        help="test sets; those joined by + are taken together",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    written = {"+".join(of): of_tests(given.run, given.suite, of) for of in given.tests}
    for name, found in written.items():
        print(f"\n{name}\n", *lines(found), sep="\n")
    if given.out:
        given.out.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


def of_tests(run: Path, suite: str, tests: Sequence[str]) -> dict[str, Any]:
    """Every setting against the untrained model, on test sets taken together."""
    prompts, found = verdicts(run, tests)
    clusters: dict[str, Callable[[str], str]] = {
        "by prompts": str,
        "by wordings": lambda name: wording(suite, prompts[name]),
        "by targets": lambda name: str(prompts[name].target),
        "by kinds": lambda name: prompts[name].kind,
    }
    return {
        f"{method}/{'guided' if guided else 'unguided'}": compared(of, found[BASE], clusters)
        for (method, guided), of in found.items()
        if (method, guided) != BASE
    }


if __name__ == "__main__":
    main()
