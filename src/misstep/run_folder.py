"""A run directory and its manifest: what the run was made from, and what it took.

Knows the folder and what a run reads; knows no stage.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from misstep import __version__
from misstep.check_results import Check
from misstep.config import RunConfig, changed_keys
from misstep.errors import InputError
from misstep.inputs import Inputs
from misstep.records import digest, write_text
from misstep.sources import source_digest

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "openvino-genai", "openai")


def writable(folder: Path) -> Path:
    """Make the run directory, or say why it cannot be written.

    Raises:
        InputError: no permission, or a file stands in the way.
    """
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


class Manifest:
    """manifest.json: what the run was made from, and what it took."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.path = folder / "manifest.json"
        self.data: dict[str, Any] = self._previous()
        self.changed = self._changes(inputs.config)
        self.data.setdefault("stages", {})
        self.data.setdefault("yields", {})
        self.data.setdefault("training", {})
        self.data |= _describe(inputs)

    def _previous(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as fault:
            raise InputError(
                f"{self.path}: expected the manifest of a run, found something else ({fault}). "
                "Give another --out, or remove the folder."
            ) from fault
        assert isinstance(data, dict)
        return data

    def _changes(self, config: RunConfig) -> list[str]:
        old = self.data.get("recipe")
        if old is None:
            return []
        if old.get("name") != config.name:
            raise InputError(
                f"{self.path.parent}: this is the run directory of the recipe "
                f"'{old.get('name')}', found when running '{config.name}'. Give another --out."
            )
        return changed_keys(old, config.model_dump(mode="json"))

    def save(self) -> None:
        """Write the file in one step."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        known = self.data.get("peak_memory_mb", 0)
        self.data["peak_memory_mb"] = max(known, round(memory))
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


def _describe(inputs: Inputs) -> dict[str, Any]:
    config = inputs.config
    return {
        "schema": 1,
        "recipe": config.model_dump(mode="json"),
        "seed": config.seed,
        "policy": {"name": inputs.policy.name, "digest": inputs.policy.digest},
        "model": {"name": inputs.model.name, "digest": inputs.model.digest},
        "data": {key: source_digest(source) for key, source in config.sources().items()}
        | _check_digests(inputs.checks),
        "versions": {
            "misstep": __version__,
            "python": platform.python_version(),
            **_versions(),
        },
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _check_digests(checks: Sequence[Check]) -> dict[str, str]:
    digests = [digest(check.model_dump(mode="json")) for check in checks]
    return {"evaluate.judge_check": " ".join(digests)} if digests else {}


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
