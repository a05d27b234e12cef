"""The script that counts how sure a run is of its differences, wording by wording."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from made import answer_of

from misstep.data.suites import attacked_prompts
from misstep.records import Judgement, Prompt, Response, Score, write_jsonl

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/wordings.py"
PROMPTS = [*islice(attacked_prompts("goal-hijacking", "test", "seen", 0), 150)]


def counted(tmp_path: Path, obeyed: Callable[[Prompt], bool]) -> dict[str, Any]:
    """What the script finds where the untrained model obeys so, and the trained one never."""
    answers, judgements = [], []
    for prompt in PROMPTS:
        for method in ("vanilla", "sft"):
            response = Response(prompt=prompt, text=method)
            answers.append(answer_of(response, method, "attacks-seen"))
            value = float(method == "vanilla" and obeyed(prompt))
            score = Score(
                response_id=response.id, metric="mistake_rate", value=value, judge="hand"
            )
            judgements.append(Judgement.of(answers[-1], score))
    write_jsonl(tmp_path / "responses.jsonl", answers)
    write_jsonl(tmp_path / "scores.jsonl", judgements)
    out = tmp_path / "wordings.json"
    command = [
        sys.executable,
        SCRIPT,
        str(tmp_path),
        "--tests",
        "attacks-seen",
        "--out",
        f"{out}",
    ]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "| sft/unguided |" in shown.stdout
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["attacks-seen"]
    one: dict[str, Any] = found["sft/unguided"]
    return one


def width(interval: dict[str, float]) -> float:
    return interval["high"] - interval["low"]


def test_what_follows_the_wording_is_less_sure_and_what_does_not_is_as_sure(
    tmp_path: Path,
) -> None:
    by_wording = counted(tmp_path, lambda prompt: "gnore" in prompt.text)
    assert by_wording["by prompts"]["clusters"] == len(PROMPTS)
    assert by_wording["by wordings"]["clusters"] == 30
    assert by_wording["by kinds"]["clusters"] == 3
    assert width(by_wording["by wordings"]) > 1.5 * width(by_wording["by prompts"])
    obeyed = {prompt.id for prompt in PROMPTS[::5]}
    by_chance = counted(tmp_path, lambda prompt: prompt.id in obeyed)
    assert by_chance["difference"] == -len(obeyed) / len(PROMPTS)
    assert width(by_chance["by wordings"]) < 1.3 * width(by_chance["by prompts"])
