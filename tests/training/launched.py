"""What the processes run that `test_processes.py` launches: python launched.py PLAN.

The plan is a JSON file of trainings: model, folder, which rows, and where to be killed. Weights
are held in fp32 here, so that rounding is small.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState

from misstep.models import precision
from misstep.models import weights as models
from misstep.models.locate import locate
from misstep.records import Example, Message, Pair
from misstep.stages import fit
from misstep.stages.train import follow, train
from misstep.stages.train_settings import PreferenceSettings, TrainSettings
from misstep.training import processes

vars(models)["weights_dtype"] = lambda: torch.float32
precision.MICRO_TOKENS = {"cpu": 120, "cuda": 120}
fit.SECONDS_BETWEEN_CHECKPOINTS = 0.0


def asked(number: int) -> tuple[Message]:
    return (Message(role="user", content="w" * (5 * number % 31) + f" {number}?"),)


# 18 rows in steps of 4 and 5: the last step of one row is less than one for each process.
ROWS = [
    Example(messages=asked(n), completion=f"{n} " * (1 + n % 7), kind="analysis")
    for n in range(17)
]
PAIRS = [
    Pair(messages=asked(n), chosen=f"nay {n}", rejected=f"yes, {n}" * (1 + n % 3), kind="a")
    for n in range(9)
]
SETTINGS = TrainSettings(
    rank=4,
    alpha=8,
    epochs=1,
    batch_size=4,
    learning_rate=1e-2,
    preferences=PreferenceSettings(learning_rate=2e-2),
)
WORK: dict[str, tuple[Any, TrainSettings]] = {
    "lora": (ROWS, SETTINGS),
    "full": (ROWS, SETTINGS.model_copy(update={"adapter": "full", "learning_rate": 1e-3})),
    "pairs": (PAIRS, SETTINGS),
}


def run(plan: list[dict[str, Any]]) -> None:
    for part in plan:
        rows, settings = WORK[part["work"]]

        def notify(_what: str, done: int, _total: int, last: int = part["killed_at"]) -> None:
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

        train(locate(part["model"]), rows, settings, 7, Path(part["folder"]), notify)


def parted_on_processors() -> None:
    """Let accelerate take processors for GPUs, which it parts models between and these not."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    gpus = ("gloo", DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda *_: gpus


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        parted_on_processors()
    if processes.is_leader():
        Path(sys.argv[1]).with_name("processes").write_text(str(processes.count()))
        with processes.leading():
            run(json.loads(Path(sys.argv[1]).read_text()))
    else:
        processes.follow(follow)
