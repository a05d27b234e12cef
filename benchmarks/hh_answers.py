"""Anthropic's harmless pairs as labelled answers: the rejected one is the mistake.

Each dialogue (`Human: … Assistant: …`) becomes turns, its last turn the answer. People said
which of two answers is less harmful, so both of a pair may be harmful, or neither: a judge of
harm agrees with such labels far less often than with labels of single answers.

    python benchmarks/hh_answers.py harmless-base_test.jsonl.gz hh-answers.jsonl --pairs 2000
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(dialogue: str) -> list[dict[str, str]]:
    """A dialogue's turns, without empty ones."""
    _, *parts = SPEAKER.split(dialogue)
    told = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[who], "content": said.strip()} for who, said in told if said.strip()]


def answers(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The two labelled answers of each pair; pairs that do not both end with one are left."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            both = [
                (turns(row[side]), label) for side, label in (("rejected", 1), ("chosen", 0))
            ]
            if all(told and told[-1]["role"] == "assistant" for told, _ in both):
                yield [{"messages": told, "label": label} for told, label in both]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="harmless-base_test.jsonl.gz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=2000)
    given = parser.parse_args()
    with given.out.open("w", encoding="utf-8") as out:
        for pair in islice(answers(given.data), given.pairs):
            out.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in pair)
