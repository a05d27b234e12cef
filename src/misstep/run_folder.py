"""A run directory and its manifest: what the run was made from, and what it took.

What was not written by a run is never overwritten, and results stand beside the manifest of the
recipe that they came from and no other. Knows files and what a run reads; knows no stage.
"""

import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from shutil import copy2
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from misstep.claims import LOCK
from misstep.config import RunConfig, changed_keys
from misstep.data.sources import source_digest
from misstep.errors import InputError
from misstep.evidence.check_results import Check
from misstep.inputs import Inputs
from misstep.machine import device_text, peak_memory_mb, versions
from misstep.methods.registry import SHIPPED, source_of
from misstep.models.adapter import adapter_digest
from misstep.policy import Policy
from misstep.progress import Progress
from misstep.records import digest, write_text
from misstep.study_config import StudyConfig

MANIFEST = "manifest.json"
FORMER = "former"


def writable(folder: Path) -> Path:
    """Make the run directory, or say why it cannot be written; `~/` is the user's own folder.

    Raises:
        InputError: no permission, or a file stands in the way.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as fault:
        raise InputError(
            f"{folder}: expected a folder that can be written ({fault.strerror}). "
            "Give another --out."
        ) from fault
    return folder


def refuse_foreign(folder: Path, own: Iterable[str], mark: str) -> None:
    """Pass where nothing would be overwritten that this program did not write.

    Args:
        folder: the directory that is to be filled.
        own: the names that are written there.
        mark: what stands there from the beginning, in a folder of ours.

    Raises:
        InputError: names the first file or folder in the way.
    """
    found = [name for name in own if (folder / name).exists()]
    if found and not (folder / mark).exists():
        raise InputError(
            f"{folder}: expected an empty folder, or one that an earlier run began; found "
            f"{found[0]}, which would be overwritten, and no {mark}. Give another --out."
        )


def beside_runs(folder: Path, own: Iterable[str]) -> Path:
    """Make the directory of a command that is no run's; nothing but its own is overwritten.

    Args:
        folder: the directory that is to be filled.
        own: the names that are written there; once claimed, it bears a lock.

    Raises:
        InputError: it cannot be written, is a run's, or holds somebody else's files.
    """
    place = writable(folder)
    if (place / MANIFEST).exists():
        raise InputError(
            f"{place}: expected another folder than that of a run, whose report and results "
            f"would no longer be its own; found {MANIFEST}. Give another --out."
        )
    refuse_foreign(place, own, LOCK)
    return place


def refuse_own(folder: Path, own: Iterable[str], read: Mapping[str, str | None]) -> None:
    """Pass where nothing is read that stands where the run itself writes.

    Args:
        folder: the run directory.
        own: the names that are written there.
        read: paths by their keys in the recipe; names that are no path do no harm.

    Raises:
        InputError: names the key and the file.
    """
    home, written = folder.resolve(), {MANIFEST, *own}
    for key, path in read.items():
        place = Path(path or "").expanduser().resolve()
        if place.is_relative_to(home) and written & set(place.relative_to(home).parts[:1]):
            raise InputError(
                f"{key}: expected a path that the run does not write to, found {path} in its "
                f"own directory {folder}. Copy it to another place, or give another --out."
            )


def set_aside(folder: Path, records: Iterable[str]) -> Path:
    """Move what was finished, with a copy of a run's manifest, to a folder that is new."""
    numbered = (folder / FORMER / str(number) for number in count(1))
    place = next(place for place in numbered if not place.exists())
    place.mkdir(parents=True)
    if (folder / MANIFEST).exists():
        copy2(folder / MANIFEST, place)
    for name in records:
        if (folder / name).exists():
            (folder / name).rename(place / name)
    return place


class Layout(NamedTuple):
    """What a directory holds beside its manifest, and what tells it from others."""

    records: tuple[str, ...]
    """What the stages leave, the results last."""
    work: tuple[str, ...]
    """Folders that are filled and emptied."""
    mark: str
    """A key that the recipes of this kind alone have."""
    content: tuple[str, ...]
    """Keys of the manifest beside the recipe's; other content there is a change, too."""
    counted: tuple[str, ...]
    """Keys that are filled while the stages pass."""
    config: type[BaseModel]
    """What its recipes are; a key that an earlier version did not know had its default."""

    @property
    def own(self) -> tuple[str, ...]:
        """What is written beside the manifest, under names that a user may use, too."""
        return (*self.records, *self.work)


RUN = Layout(
    records=(
        *("mistakes.jsonl", "analyses.jsonl", "unguided.jsonl", "revisions.jsonl"),
        *("good_answers.jsonl", "praise.jsonl", "examples.jsonl", "rows"),
        *("responses.jsonl", "scores.jsonl", "report.html", "results.json"),
    ),
    work=("adapter", "adapters", "rounds", "scratch"),
    mark="evaluate",
    content=("policy", "model", "data", "parts"),
    counted=("stages", "yields", "training"),
    config=RunConfig,
)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], layout: Layout) -> list[str]:
    """Keys of the recipe; where it is the same, what it names and has another content."""
    # A manifest of an earlier version may lack some.
    content = {key: now[key] for key in layout.content if key in before}
    return changed_keys(as_now(before["recipe"], layout), now["recipe"]) or changed_keys(
        {key: before[key] for key in content}, content
    )


def as_now(recipe: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
    """A recipe as this version would write it, with the keys that are new since."""
    with suppress(ValidationError):
        return layout.config.model_validate(recipe).model_dump(mode="json")
    return recipe


class Manifest:
    """manifest.json: what a run or a study was made from, and what it took."""

    def __init__(self, folder: Path, described: Mapping[str, Any], layout: Layout) -> None:
        self.path, self.layout = folder / MANIFEST, layout
        self.data: dict[str, Any] = self._previous()
        self.changed = self._changes(described)
        counted: dict[str, Any] = {key: {} for key in layout.counted}
        # Of a changed recipe they are counted anew.
        known = self.data | counted if self.changed else counted | self.data
        self.data = {**known, **described}

    def begin_anew(self, progress: Progress) -> None:
        """Where the recipe has changed, say so, and set aside what the former one left.

        Also what one left that was stopped: a report would show it as this one's.
        """
        if not self.changed:
            return
        progress.say(
            f"The recipe has changed since the last run: {', '.join(self.changed)}. Only what "
            "depends on that is done again."
        )
        folder, records = self.path.parent, self.layout.records
        if any((folder / name).exists() for name in records):
            place = set_aside(folder, records)
            progress.say(f"What the former recipe left is in {place}.")

    def _previous(self) -> dict[str, Any]:
        refuse_foreign(self.path.parent, self.layout.own, MANIFEST)
        if not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise self._foreign(str(fault)) from fault
        if not isinstance(data, dict) or not {"recipe", "stages"} <= set(data):
            raise self._foreign("it has no recipe and stages")
        return data

    def _foreign(self, why: str) -> InputError:
        return InputError(
            f"{self.path}: expected the manifest of a run, found something else ({why}). "
            "Give another --out."
        )

    def _changes(self, now: Mapping[str, Any]) -> list[str]:
        """Keys of the recipe; where it is the same, what it names and has another content."""
        if not self.data:
            return []
        old, new = self.data["recipe"], now["recipe"]
        if old.get("name") != new["name"] or self.layout.mark not in old:
            raise InputError(
                f"{self.path.parent}: this is the directory of the recipe '{old.get('name')}', "
                f"found when running '{new['name']}'. Give another --out."
            )
        return changes(self.data, now, self.layout)

    def save(self) -> None:
        """Write the file in one step."""
        known = self.data.get("peak_memory_mb", 0)
        self.data["peak_memory_mb"] = max(known, peak_memory_mb())
        write_text(self.path, json.dumps(self.data, indent=2, ensure_ascii=False, default=str))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the wall time of a stage; a continued stage adds to what it took before."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.data["stages"].setdefault(name, {"seconds": 0.0})
            spent["seconds"] = round(spent["seconds"] + time.monotonic() - start, 2)
            self.save()


def described(config: RunConfig | StudyConfig, policy: Policy) -> dict[str, Any]:
    """What every manifest says of the recipe, its policy and the machine."""
    return {
        "schema": 1,
        "recipe": config.model_dump(mode="json"),
        "seed": config.seed,
        "policy": {"name": policy.name, "digest": policy.digest},
        "versions": {"python": platform.python_version(), **versions()},
        "device": device_text(),
    }


def described_run(inputs: Inputs) -> dict[str, Any]:
    """The same, and what a run reads."""
    return described(inputs.config, inputs.policy) | {
        "model": {"name": inputs.model.name, "digest": inputs.model.digest},
        "data": {key: source_digest(of) for key, of in inputs.config.sources().items()}
        | _check_digests(inputs.checks),
        "parts": _part_digests(inputs),
        "overlaps": inputs.overlaps,
    }


def _check_digests(checks: Sequence[Check]) -> dict[str, str]:
    digests = [digest(check.model_dump(mode="json")) for check in checks]
    return {"evaluate.judge_check": " ".join(digests)} if digests else {}


def _part_digests(inputs: Inputs) -> dict[str, str]:
    """What else the recipe names, by its key: digests of models, of an adapter, of judges."""
    judges = {f"evaluate.judges.{name}": of for name, of in inputs.judges.items()}
    judge = inputs.of_mistakes if inputs.config.judge_file else inputs.judge
    found = {"analysis.engine": inputs.analyst.digest, "judge": judge.digest}
    found |= {key: of.digest for key, of in judges.items()}
    if inputs.adapter is not None:
        found["adapter"] = adapter_digest(inputs.adapter)
    found |= {f"others.{name}": of.digest for name, of in inputs.others.items()}
    installed = (name for name in inputs.config.methods if name not in SHIPPED)
    return found | {f"methods.{name}": source_of(name) for name in installed}
