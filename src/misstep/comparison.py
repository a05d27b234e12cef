"""Methods x seeds x swept keys: every cell is a run, and one table is made of all of them.

A comparison is a run recipe with two keys more, `seeds` and `sweep`. The seeds are those of
training alone, so all cells of a variant share their mistakes, analyses and the answers of the
untrained model; model calls and adapters lie in one store, and a cell that is done is passed
through. Of several seeds an interval speaks for other prompts and other seeds: both are
crossed random effects (`stats.crossed_mean`).

This module knows runs and their files; it trains and generates nothing itself.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from misstep.claims import claimed
from misstep.config import RunConfig, overridden, put, read_recipe
from misstep.data.held_out import largest
from misstep.data.labelled import MISTAKES
from misstep.documents import Places, Seed, Settings, check
from misstep.errors import InputError, RecipeError
from misstep.evidence.results import (
    BASE,
    GUIDED,
    Comparison,
    OfKind,
    Pooled,
    Results,
    Setting,
    Values,
    adjusted,
    collect,
    compare_pooled,
    pool,
    read_results,
    write_results,
)
from misstep.inputs import Inputs, check_inputs
from misstep.methods.registry import method_of
from misstep.pipeline import Run
from misstep.progress import Progress
from misstep.records import Answer, Judgement, digest, read_jsonl, write_text
from misstep.report.compared_page import write_comparison
from misstep.report.reading import known_manifest
from misstep.run_folder import (
    MANIFEST,
    RUN,
    as_now,
    changes,
    described_run,
    refuse_foreign,
    refuse_own,
    set_aside,
    writable,
)
from misstep.stages.evaluate import Correct, agreements

CELLS = "cells"
LONGEST_NAME = 120
"""Bytes of a cell's folder name; a longer one is a digest and its end."""
RESULTS = ("results.json", "report.html")
OWN = (MANIFEST, *RESULTS, "adapters")
"""What is written beside the cells, under names that a user may use, too."""
Corrections = dict[tuple[str, str], Correct]
"""By variant and metric."""
Variant = tuple[tuple[str, Any], ...]
"""The swept keys and their values."""


class ComparedSettings(Settings):
    """What a comparison adds to a run."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of training, each a run's `train_seed`."""
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """Dotted keys of the recipe, each with the values that it takes in turn."""


class Cell(NamedTuple):
    """One run of a comparison."""

    variant: Variant
    seed: int
    config: RunConfig
    apart: str = ""
    """Ends the folder's name where another cell's would be the same."""

    @property
    def title(self) -> str:
        """Names the variant, empty where nothing is swept."""
        return ", ".join(f"{key}={value}" for key, value in self.variant)

    @property
    def folder(self) -> str:
        """Of the cell's run: readable, and safe as a name of a folder."""
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.variant]
        text = "_".join([*parts, f"seed-{self.seed}", *filter(None, [self.apart])])
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
        # File systems take 255 bytes and no more.
        return name if len(name.encode()) <= LONGEST_NAME else f"{digest(text)}_{name[-40:]}"


def load_cells(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Read a comparison's recipe; one cell a variant and seed.

    Raises:
        RecipeError: a line for each fault, of the recipe itself or of a variant.
    """
    data, lines = read_recipe(path, overrides, "compare")
    own: dict[str, Any] = {k: data.pop(k) for k in ("seeds", "sweep") if k in data}
    settings = check(ComparedSettings, own, RecipeError, str(path), lines)
    swept = [[(key, value) for value in values] for key, values in settings.sweep.items()]
    cells = [
        Cell(variant, seed, _config(path, data, lines, variant, seed))
        for variant in product(*swept)
        for seed in settings.seeds
    ]
    _refuse_same(path, cells)
    names = Counter(cell.folder for cell in cells)
    return [
        cell._replace(apart=digest(cell.title)[:6]) if names[cell.folder] > 1 else cell
        for cell in cells
    ]


def _refuse_same(path: Path, cells: Sequence[Cell]) -> None:
    """Cells that are the same would be compared as if they were independent."""
    known: dict[str, Cell] = {}
    for cell in cells:
        # A name changes nothing that is done.
        content = digest(cell.config.model_dump(mode="json", exclude={"name"}))
        other = known.setdefault(content, cell)
        if other is not cell:
            raise RecipeError(
                f"{path}: seeds and sweep: expected cells that differ, found two that are the "
                f"same: {other.folder} and {cell.folder}. Leave one of them out."
            )


def _config(
    path: Path,
    data: Mapping[str, Any],
    lines: Places,
    variant: Variant,
    seed: int,
) -> RunConfig:
    for key, value in variant:
        keys, said = tuple(key.split(".")), f"{path}: sweep.{key}"
        data = put(data, keys, value, said)
        lines = overridden(lines, keys, said)
    if "train_seed" in data:
        raise RecipeError(f"{path}: train_seed: a comparison takes it from 'seeds'.")
    return check(RunConfig, {**data, "train_seed": seed}, RecipeError, str(path), lines)


def compare_methods(
    recipe: Path, out: Path | None, overrides: list[str], progress: Progress
) -> Path:
    """Run every cell and write results.json and report.html of all; gives the directory.

    Raises:
        InputError: recipe, data, policy, model or folder; before any model loads.
        RunError: a cell failed; the same command goes on from there.
    """
    cells = load_cells(recipe, overrides)
    inputs = [check_inputs(cell.config) for cell in cells]
    with claimed(writable(out or Path("runs") / cells[0].config.name)) as folder:
        _check_folder(folder, cells)
        standing = _standing(folder, cells, inputs, progress)
        corrections: Corrections = {}
        for number, (cell, read) in enumerate(zip(cells, inputs, strict=True), 1):
            progress.say(f"Cell {number} of {len(cells)}: {cell.folder}")
            made = _run_cell(folder, cell, read, progress)
            corrections |= {(cell.title, metric): of for metric, of in made.items()}
            # After each cell, so that a comparison can be read while it goes on; what stands
            # there of more cells is not made less.
            if number >= standing:
                _gather(folder, cells[:number], corrections)
    return folder


def _standing(
    folder: Path, cells: Sequence[Cell], inputs: Sequence[Inputs], progress: Progress
) -> int:
    """How many of these cells the results in the folder hold; those of others are set aside."""
    data = known_manifest(folder)
    if not data:
        return 0
    known = _recipe(as_now(data.get("recipe") or {}, RUN))
    same = known == _recipe(inputs[0].config.model_dump(mode="json"))
    # Other folders may be of a recipe before this one: they are in no results that stand.
    held = [pair for pair in zip(cells, inputs, strict=True) if pair[0].folder in data["cells"]]
    if same and not any(_changed(folder, *pair) for pair in held):
        return len({cell.folder for cell, _ in held})
    if any((folder / name).exists() for name in RESULTS):
        progress.say(f"What the former recipe left is in {set_aside(folder, RESULTS)}.")
    return 0


def _changed(folder: Path, cell: Cell, inputs: Inputs) -> bool:
    """Whether a cell that was run reads something else now under the same names."""
    before = known_manifest(folder / CELLS / cell.folder)
    return "recipe" in before and bool(changes(before, described_run(inputs), RUN))


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's recipe without what tells it from the others of its variant."""
    return {key: value for key, value in recipe.items() if key != "train_seed"}


def _check_folder(folder: Path, cells: Sequence[Cell]) -> None:
    for cell in cells:
        refuse_own(folder / CELLS / cell.folder, RUN.own, cell.config.paths())
        refuse_own(folder, OWN, cell.config.paths())
    if (folder / "mistakes.jsonl").exists():
        raise InputError(
            f"{folder}: expected the directory of a comparison, found that of a run. "
            "Give another --out."
        )
    refuse_foreign(folder, OWN, CELLS)


def _run_cell(
    folder: Path, cell: Cell, inputs: Inputs, progress: Progress
) -> Mapping[str, Correct]:
    """Run a cell; gives the corrections of its rates by metric."""
    place = folder / CELLS / cell.folder
    place.mkdir(parents=True, exist_ok=True)
    run = Run(inputs, place, progress, store=folder)
    run.through("evaluate")
    return run.corrections


def _gather(folder: Path, cells: Sequence[Cell], corrections: Corrections) -> None:
    """Write what all finished cells say together."""
    values: Values = {}
    of_cells, rows, answers, judgements = [], [], [], []
    for cell in cells:
        place = folder / CELLS / cell.folder
        found = read_results(place / "results.json")
        of_cells.append(found)
        rows += [row.model_copy(update={"variant": cell.title}) for row in found.rows]
        given = list(read_jsonl(place / "responses.jsonl", Answer))
        answers += given
        judged = list(read_jsonl(place / "scores.jsonl", Judgement))
        judgements += judged
        collect(values, given, judged, cell.config.evaluate.pools, cell.seed, cell.title)
    config = cells[0].config
    results = Results(
        policy=", ".join(dict.fromkeys(found.policy for found in of_cells)),
        model=", ".join(dict.fromkeys(found.model for found in of_cells)),
        rows=tuple(rows),
        pooled=tuple(_pooled(values, corrections, config.seed)),
        kinds=tuple(_of_kinds(values, answers, config)),
        comparisons=tuple(_comparisons(values, cells, config.seed)),
        agreements=tuple(agreements(answers, judgements)),
    )
    write_results(folder / "results.json", results)
    _write_manifest(folder, cells)
    write_comparison(folder)


def _pooled(values: Values, corrections: Corrections, seed: int) -> Iterator[Pooled]:
    for (setting, test_set, metric), by_seed in values.items():
        found = pool(setting, test_set, metric, by_seed, seed)
        correct = corrections.get((setting.variant, metric))
        yield found.model_copy(update={"corrected": correct(found)}) if correct else found


def _of_kinds(values: Values, answers: Iterable[Answer], config: RunConfig) -> Iterator[OfKind]:
    """Mistakes by kind of prompt; of a pool its test sets say more."""
    kind_of = {a.response.prompt.id: a.response.prompt.kind for a in answers}
    for (setting, test_set, metric), by_seed in values.items():
        kinds = sorted({kind_of[prompt] for scores in by_seed.values() for prompt in scores})
        if metric != MISTAKES or test_set in config.evaluate.pools or len(kinds) == 1:
            continue
        for kind in kinds:
            some = {
                seed: {prompt: s for prompt, s in scores.items() if kind_of[prompt] == kind}
                for seed, scores in by_seed.items()
            }
            found = pool(setting, test_set, metric, some, config.seed)
            yield OfKind(**found.model_dump(), kind=kind)


def _comparisons(values: Values, cells: Sequence[Cell], seed: int) -> list[Comparison]:
    """Within variants and between them, adjusted.

    Within: every setting with the untrained model, and ours with every other. Between: every
    setting with itself under a variant that differs in one key, the later less the earlier.
    """
    neighbours = _neighbours(cells)
    pairs = [
        (a, b, test_set, metric)
        for (a, test_set, metric), scores in values.items()
        for others in [
            {s: v for (s, t, m), v in values.items() if (t, m) == (test_set, metric)}
        ]
        for b in (
            *_against(a, list(others)),
            # What a swept key does not reach is answered and scored alike: nothing to test.
            *(b for b in _before(a, list(others), neighbours) if others[b] != scores),
        )
    ]
    found = [compare_pooled(*pair, values, seed) for pair in pairs]
    return adjusted([comparison for comparison in found if comparison is not None])


def _neighbours(cells: Sequence[Cell]) -> set[tuple[str, str]]:
    """The later and the earlier of every two variants that differ in one key."""
    variants = {cell.title: cell.variant for cell in cells}
    return {
        (a, b)
        for (b, of_b), (a, of_a) in combinations(variants.items(), 2)
        if sum(x != y for x, y in zip(of_a, of_b, strict=True)) == 1
    }


def _before(
    a: Setting, others: Sequence[Setting], neighbours: set[tuple[str, str]]
) -> Iterator[Setting]:
    if a.method == "guided" and a._replace(method=BASE.method) in others:
        return
    for b in others:
        if b._replace(variant=a.variant) == a and (a.variant, b.variant) in neighbours:
            yield b


def _against(a: Setting, others: Sequence[Setting]) -> Iterator[Setting]:
    base, guide = (of._replace(variant=a.variant) for of in (BASE, GUIDED))
    # The method `guided` gives the answers of the guided untrained model, which stand already.
    same = [
        other
        for other in others
        if other.variant == a.variant and not (other.method == "guided" and guide in others)
    ]
    if a not in same or a == base:
        return
    if base in same:
        yield base
    if method_of(a.method).uses_analyses:
        later = same[same.index(a) + 1 :]
        # Two of ours are compared once.
        yield from (
            other
            for other in same
            if other not in (a, base)
            and (other in later or not method_of(other.method).uses_analyses)
        )


def _write_manifest(folder: Path, cells: Sequence[Cell]) -> None:
    """What the cells have in common, and what each of them took."""
    manifests = {
        cell.folder: json.loads(
            (folder / CELLS / cell.folder / MANIFEST).read_text(encoding="utf-8")
        )
        for cell in cells
    }
    first = next(iter(manifests.values()))
    kept = ("schema", "policy", "model", "data", "judges", "versions", "device")
    whole = {key: first[key] for key in kept if key in first} | {
        "recipe": _recipe(first["recipe"]),
        "overlaps": largest(of["overlaps"] for of in manifests.values()),
        "cells": {
            name: {key: of[key] for key in ("stages", "yields", "training", "peak_memory_mb")}
            | {"variant": cell.title, "seed": cell.seed}
            for cell, (name, of) in zip(cells, manifests.items(), strict=True)
        },
    }
    write_text(folder / MANIFEST, json.dumps(whole, indent=2, ensure_ascii=False))
