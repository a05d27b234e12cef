"""Shipped attack suites: clean tasks, attack wordings and target texts, put together by seed.

A suite is a folder of text files with `train`, `dev` and `test` parts that share no task, no
wording and no target text. Kinds of attack marked `seen: false` never occur in `train`, and
some topics of tasks occur in `test` alone. Knows no model and no policy.
"""

import json
import random
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import yaml

from misstep.policy import fill
from misstep.records import Prompt

FOLDER = Path(__file__).parent / "suites"
Split = Literal["train", "dev", "test"]
Part = Literal["attacks", "clean"]
Kinds = Literal["all", "seen", "unseen"]
Topics = Literal["all", "seen", "unseen"]


def names() -> list[str]:
    """The shipped suites."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def suite_digest(suite: str) -> str:
    """Names a suite by the content of its files."""
    from hashlib import sha256

    files = sorted((FOLDER / suite).iterdir())
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def clean_prompts(suite: str, split: Split, seed: int, topics: Topics = "all") -> list[Prompt]:
    """The tasks of one split as they are, shuffled."""
    tasks = _tasks(suite, split, topics)
    random.Random(f"clean {seed}").shuffle(tasks)
    return [_prompt(task, task["prompt"]) for task in tasks]


def attacked_prompts(
    suite: str, split: Split, kinds: Kinds, seed: int, topics: Topics = "all"
) -> Iterator[Prompt]:
    """Tasks of one split under attack, without end: kinds take turns, the rest is drawn.

    Every task comes once before any comes twice, always with a wording and a target text of the
    same split. Unseen kinds take the tasks from the other end, so that two sets of at most half
    the tasks each, one of seen and one of unseen kinds, share none.
    """
    dice = random.Random(f"attacks {seed}")
    wordings = _by_kind(suite, split, kinds)
    tasks, targets = _tasks(suite, split, topics), _read_yaml(suite, "targets.yaml")[split]
    dice.shuffle(tasks)
    if kinds == "unseen":
        tasks.reverse()
    for task, kind in zip(cycle(tasks), cycle(sorted(wordings)), strict=False):
        template, target = dice.choice(wordings[kind]), dice.choice(targets)
        text = fill(template, task=task["prompt"], target=target)
        yield _prompt(task, text, kind=kind, target=target)


def _by_kind(suite: str, split: Split, kinds: Kinds) -> dict[str, list[str]]:
    return {
        kind["name"]: kind["splits"][split]
        for kind in _read_yaml(suite, "attacks.yaml")["kinds"]
        if split in kind["splits"] and (kinds == "all" or kind["seen"] == (kinds == "seen"))
    }


def _prompt(task: dict[str, Any], text: str, **known: Any) -> Prompt:
    return Prompt.of(
        text,
        reference=task["reference"],
        accept=tuple(task["accept"]),
        topic=task["topic"],
        **known,
    )


def _tasks(suite: str, split: Split, topics: Topics) -> list[dict[str, Any]]:
    """In the order of the file; a topic is seen where a task of `train` has it."""
    with (FOLDER / suite / "tasks.jsonl").open(encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    seen = {task["topic"] for task in tasks if task["split"] == "train"}
    return [
        task
        for task in tasks
        if task["split"] == split
        and (topics == "all" or (task["topic"] in seen) == (topics == "seen"))
    ]


@cache
def _read_yaml(suite: str, name: str) -> Any:
    return yaml.safe_load((FOLDER / suite / name).read_text(encoding="utf-8"))
