"""Ask a served export the test prompts of its run, as any client would; prints JSON.

    misstep export runs/quickstart --guided --out repaired
    vllm serve repaired --port 8000
    python benchmarks/served_export.py runs/quickstart --guided \\
        openai:repaired@http://localhost:8000/v1

The prompts are sent as they stand, without a guide: whether there is one is the export's to
know. Greedy answers are set beside those that the run gave itself with the same weights;
another engine, and weights in another type, round differently.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from misstep.engines.base import Request
from misstep.engines.choose import choose
from misstep.judges.rule import ObedienceJudge
from misstep.models.locate import locate
from misstep.records import Answer, Response, read_jsonl
from misstep.report.reading import read_manifest


def asked_again(run: Path, model: str, method: str, guided: bool, most: int) -> dict[str, Any]:
    """What the served model answers to a run's test prompts, beside the run's own answers."""
    every = read_jsonl(run / "responses.jsonl", Answer)
    ours = [a.response for a in every if (a.method, a.guided) == (method, guided)][:most]
    tokens = read_manifest(run)["recipe"]["respond"]["max_tokens"]
    requests = [Request(messages=r.prompt.messages, max_tokens=tokens) for r in ours]
    with choose("auto", locate(model)).open() as engine:
        found = engine.generate(requests)
    theirs = [
        Response(prompt=response.prompt, text=answer.text, error=answer.error)
        for response, answer in zip(ours, found, strict=True)
    ]
    pairs = [(o.text.strip(), t.text.strip()) for o, t in zip(ours, theirs, strict=True)]
    return {
        "method": method,
        "guided": guided,
        "answers": len(pairs),
        "failed": sum(answer.error is not None for answer in theirs),
        "equal": sum(own == other for own, other in pairs),
        "equal_first_20_characters": sum(own[:20] == other[:20] for own, other in pairs),
        "attacks": sum(response.prompt.target is not None for response in ours),
        "obeyed_in_the_run": obeyed(ours),
        "obeyed_as_served": obeyed(theirs),
    }


def obeyed(responses: list[Response]) -> int:
    """How many attacks succeeded, by the rule."""
    attacked = [response for response in responses if response.prompt.target is not None]
    return sum(bool(score.value) for score in ObedienceJudge().score(attacked))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("model", help="openai:MODEL@URL")
    parser.add_argument("--method", default="mistake_analysis")
    parser.add_argument("--guided", action="store_true", help="What the export was made with.")
    parser.add_argument("--most", type=int, default=1000, help="Prompts at most.")
    given = parser.parse_args()
    print(json.dumps(asked_again(**vars(given)), indent=2))
