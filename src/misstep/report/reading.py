"""The files of a run, as far as there are any.

A file that is absent or unreadable is noted with what the page then lacks, and the rest is
read.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from misstep.data.held_out import Overlaps
from misstep.errors import DataError, PolicyError
from misstep.evidence.results import Results, read_results
from misstep.methods.registry import method_of
from misstep.policy import Policy, load_policy
from misstep.records import Analysis, Answer, Judgement, Record, Score, describe, read_jsonl

FILES = ("manifest.json", "results.json", "analyses.jsonl", "responses.jsonl", "scores.jsonl")

MANIFEST_KEYS = {"recipe", "device", "versions"}
"""What every manifest has."""

T = TypeVar("T")
R = TypeVar("R", bound=Record)


class Part(Record):
    """A part of manifest.json, of which the page passes over some keys."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Stage(Part):
    """What a stage took."""

    seconds: float


class Yield(Part):
    """How much of what went into a stage came out of it, and why the rest did not."""

    given: int
    sampled: int
    kept: int
    refused: dict[str, int]


class Training(Part):
    """What the training of one method took, and how it went."""

    rows: int
    tokens: int
    seconds: float
    loss_curve: tuple[tuple[int, float], ...]
    """Step and loss."""
    ranks: dict[str, Any] | None = None
    """Of training on pairs."""
    reinforced: dict[str, Any] | None = None
    """Of training for a reward."""


class Manifest(Part):
    """What the run was made from, and what it took; empty where the file could not be read."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    policy: dict[str, str] = Field(default_factory=dict)
    model: dict[str, str] = Field(default_factory=dict)
    """Name and digest, as of the policy."""
    data: dict[str, str] = Field(default_factory=dict)
    overlaps: Overlaps = Field(default_factory=dict)
    """Of the test sets with what was learned from."""
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    stages: dict[str, Stage] = Field(default_factory=dict)
    yields: dict[str, Yield] = Field(default_factory=dict)
    training: dict[str, Training] = Field(default_factory=dict)
    peak_memory_mb: float | None = None

    @property
    def analyses(self) -> bool:
        """Whether the recipe has some made."""
        methods = self.recipe.get("methods")
        # Of a recipe that could not be read nothing is known.
        return methods is None or any(method_of(str(name)).uses_analyses for name in methods)

    @property
    def pools(self) -> frozenset[str]:
        """The names in the results that stand for several test sets taken together."""
        evaluate = self.recipe.get("evaluate")
        return frozenset(evaluate.get("pools", ()) if isinstance(evaluate, dict) else ())


class Scored(NamedTuple):
    """An answer and its scores by metric."""

    answer: Answer
    scores: Mapping[str, Score]


class Run(NamedTuple):
    """What a run directory holds, and what it lacks."""

    name: str
    manifest: Manifest
    results: Results
    analyses: list[Analysis]
    answers: list[Scored]
    missing: list[str]
    """A sentence for each file that could not be read."""


def read_run(folder: Path) -> Run:
    """Read a run directory, complete or not.

    Raises:
        DataError: the folder holds no file of a run at all.
    """
    if not any((folder / file).is_file() for file in FILES):
        raise DataError(
            f"{folder}: expected the directory of a run, found none of its files "
            f"({', '.join(FILES)}). Give the directory that `misstep run` wrote."
        )
    missing: list[str] = []

    def read(file: str, without: str, reader: Callable[[Path], T]) -> T | None:
        path = folder / file
        try:
            if path.is_file():
                return reader(path)
            missing.append(f"{file} is absent: {without}.")
        except DataError as error:
            missing.append(f"{file} is unreadable: {without}. {error}")
        return None

    manifest = read("manifest.json", "no recipe, yields, losses or costs", _manifest)
    results = read("results.json", "no rates, pictures or comparisons", read_results)
    analyses: list[Analysis] | None = None
    if manifest is None or manifest.analyses or (folder / "analyses.jsonl").is_file():
        analyses = read("analyses.jsonl", "no sampled analyses", _lines(Analysis))
    answers = read("responses.jsonl", "no sampled answers", _lines(Answer))
    judgements = read("scores.jsonl", "no verdicts and no rates by kind", _lines(Judgement))
    return Run(
        name=folder.resolve().name,
        manifest=manifest or Manifest(),
        results=results or Results(policy="", model=""),
        analyses=analyses or [],
        answers=_joined(answers or [], judgements or []),
        missing=missing,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json as it stands, of a run, a comparison or a study.

    Raises:
        DataError: it is absent, or no manifest.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        why = f"none ({fault.strerror})"
    except ValueError as fault:
        why = f"what is no JSON ({fault})"
    else:
        lacks = MANIFEST_KEYS - set(manifest if isinstance(manifest, dict) else ())
        if not lacks and isinstance(manifest["recipe"], dict):
            return dict(manifest)
        why = f"one without {', '.join(sorted(lacks)) or 'a recipe'}"
    raise DataError(
        f"{path}: expected the manifest that misstep wrote, found {why}. Give another "
        "directory, or run the recipe there again."
    )


def known_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json as it stands; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(manifest, dict):
            return manifest
    return {}


def run_policy(folder: Path) -> Policy:
    """The policy that a directory's manifest names.

    Raises:
        DataError: there is no manifest, or it names none.
        PolicyError: it cannot be read; names the manifest and what its paths begin at.
    """
    key = f"{folder / 'manifest.json'}: recipe.policy"
    name = read_manifest(folder)["recipe"].get("policy")
    if name is None:
        raise DataError(
            f"{key}: expected the policy of a run, found none. Give the directory that "
            "`misstep run` wrote."
        )
    try:
        return load_policy(str(name))
    except PolicyError as fault:
        raise PolicyError(
            f"{key}: {fault} A path there is read from where you are: give the command where "
            "the run was started."
        ) from fault


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError("; ".join(describe(error))) from error


def _lines(kind: type[R]) -> Callable[[Path], list[R]]:
    return lambda path: list(read_jsonl(path, kind))


def _joined(answers: Sequence[Answer], judgements: Sequence[Judgement]) -> list[Scored]:
    """The answers with their scores; equal responses of two settings have each their own."""
    found: dict[tuple[object, str], dict[str, Score]] = defaultdict(dict)
    for item in judgements:
        found[_asked(item), item.score.response_id][item.score.metric] = item.score
    return [Scored(a, found.get((_asked(a), a.response.id), {})) for a in answers]


def _asked(item: Answer | Judgement) -> tuple[str, bool, str, int]:
    return item.method, item.guided, item.test_set, item.seed
