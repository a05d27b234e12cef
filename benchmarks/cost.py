"""What a recipe costs at most, counted from the recipe and its data; prints Markdown.

    python benchmarks/cost.py recipes/quickstart.yaml --run docs/results/quickstart
    python benchmarks/cost.py recipes/quickstart.yaml --answers 900 --training 400 --devices 2

Requests and rows are counted as if every prompt gave its mistakes and every attempt at an
analysis were needed; tokens as if every answer were as long as it may be. A finished run says
how much less it was (`--run`). Rates are the reader's: tokens a second on one device.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from misstep.config import RunConfig, load_recipe
from misstep.data.sources import load_mistakes, load_prompts


class Work(NamedTuple):
    """One stage's work at most."""

    stage: str
    items: int
    """Requests to the model; of training rows, every epoch counted."""
    what: str
    tokens: int
    """New ones; of training those of whole rows."""


def works(config: RunConfig, row_tokens: int) -> Iterator[Work]:
    """The work of each stage; a judge that asks a model is not counted."""
    mistakes = config.mistakes
    assert mistakes is not None, "the recipe names no mistakes"
    if mistakes.source == "induced":
        prompts = len(load_prompts(mistakes.data, config.seed))
        asked = prompts * mistakes.samples
        found = prompts * mistakes.per_prompt
        what = "prompts x `mistakes.samples`"
        yield Work("induce", asked, what, asked * mistakes.max_tokens)
    else:
        found = len(load_mistakes(mistakes.data, mistakes.source, config.seed))
    found = min(found, mistakes.limit or found)
    asked = found * (config.analysis.n if config.analysis.temperature else 1)
    yield Work("analyse", asked, "mistakes x `analysis.n`", asked * config.analysis.max_tokens)
    share = 1 + config.mix.ordinary + config.mix.good_answers
    rows = round(found * share * config.train.epochs) * len(config.trained)
    what = "analyses x (1 + `mix.ordinary` + `mix.good_answers`) x `train.epochs` x methods"
    yield Work("train", rows, what, rows * row_tokens)
    tests = sum(len(load_prompts(s, config.seed)) for s in config.evaluate.tests.values())
    answers = tests * len(config.respond.guided) * len(config.methods)
    what = "test prompts x `respond.guided` x methods"
    yield Work("respond", answers, what, answers * config.respond.max_tokens)


def table(config: RunConfig, row_tokens: int, run: Path | None = None) -> str:
    """The work of each stage as a Markdown table, beside what a run came to."""
    titles = ["Stage", "Counted as", "Requests or rows at most", "Tokens at most"]
    rows = [
        [w.stage, w.what, f"{w.items:,}", f"{w.tokens:,}"] for w in works(config, row_tokens)
    ]
    if run is not None:
        titles += ["In the run", "Seconds"]
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        for row in rows:
            seconds = manifest["stages"][row[0]]["seconds"]
            row += [done(row[0], manifest), f"{seconds:.0f}"]
    aligned = ["---", "---", *["---:"] * (len(titles) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, aligned, *rows))


def done(stage: str, manifest: dict[str, Any]) -> str:
    """What a run's manifest says of a stage: requests, or rows and their tokens."""
    if stage in manifest["yields"]:
        return f"{manifest['yields'][stage]['sampled']:,}"
    if stage != "train":
        return "the same"
    epochs = manifest["recipe"]["train"]["epochs"]
    rows, tokens = (
        round(epochs * sum(m[key] for m in manifest["training"].values()))
        for key in ("trained", "tokens")
    )
    return f"{rows:,} ({tokens:,} tokens)"


def hours(config: RunConfig, row_tokens: int, answers: float, training: float) -> float:
    """Of one device, at so many tokens a second."""
    rates = {"train": training}
    done = works(config, row_tokens)
    return sum(work.tokens / rates.get(work.stage, answers) for work in done) / 3600


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, help="the folder of a finished run")
    parser.add_argument("--row-tokens", type=int, default=128, help="of a training row")
    parser.add_argument("--answers", type=float, help="new tokens a second of a device")
    parser.add_argument("--training", type=float, help="trained tokens a second of a device")
    parser.add_argument("--devices", type=int, default=1)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    print(table(recipe, given.row_tokens, given.run))
    if given.answers and given.training:
        spent = hours(recipe, given.row_tokens, given.answers, given.training)
        print(f"\n{spent:.2f} device hours, {spent / given.devices:.2f} on {given.devices}")
