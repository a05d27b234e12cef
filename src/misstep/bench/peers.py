"""How peers are set up: as their documentation does it, and at their best known settings.

What differs from our side is said beside each. This module knows names and settings; it loads
no library.
"""

import shutil
from typing import Any, NamedTuple

from misstep.models.locate import Model

ROWS_A_STEP = 16
"""Rows of one optimiser step, for all sides: the default of `train.batch_size`."""


class Peer(NamedTuple):
    """One peer at one setting."""

    name: str
    side: str
    """The function of misstep.bench.sides that runs it."""
    settings: dict[str, Any]
    differs: str
    """What it does otherwise than our side; results carry it."""


TRAINING = (
    Peer(
        "trl-documented",
        "train_trl",
        {"weights": "float32", "batch": 8, "options": {}},
        "SFTTrainer's defaults where they run on a CPU (bf16 autocast off, which is slower "
        "there): fp32 weights, gradient checkpointing, batches of 8 accumulated to 16 rows; "
        "its rows may have a token more than ours, after the end of the answer",
    ),
    Peer(
        "trl-best",
        "train_trl",
        {
            "weights": "auto",
            "batch": 8,
            "options": {
                "completion_only_loss": True,
                "gradient_checkpointing": False,
                "train_sampling_strategy": "group_by_length",
            },
        },
        "weights in the type that matrices are multiplied fastest in, fp32 adapter, loss on "
        "completions only, rows grouped by length, no gradient checkpointing, batches of 8 "
        "accumulated to 16 rows",
    ),
)
GENERATION = (
    Peer(
        "transformers-documented",
        "generate_transformers",
        {"batch": 8, "by_length": False},
        "model.generate, padded on the left, batches of 8 in the given order",
    ),
    Peer(
        "transformers-best",
        "generate_transformers",
        {"batch": 32, "by_length": True},
        "model.generate, padded on the left, batches of 32 prompts of like length",
    ),
)
SERVERS = {
    "llama.cpp": (
        "llama-server",
        ("{program} --model {files} --alias bench --port {port} --parallel 8 --ctx-size 16384"),
    ),
    "vllm": (
        "vllm",
        "{program} serve {files} --served-model-name bench --port {port}",
    ),
}
"""Programs that serve a model, by the name of the peer."""


def installed_servers(model: Model) -> list[Peer]:
    """The servers on this machine that can read the model's files."""
    readable = {"llama.cpp": model.is_gguf, "vllm": not model.is_gguf}
    return [
        Peer(
            name,
            "generate_served",
            {"command": command, "program": found},
            f"{program}, asked over HTTP by our openai engine; memory is that of all its "
            "processes, each at its peak",
        )
        for name, (program, command) in SERVERS.items()
        if readable[name] and (found := shutil.which(program))
    ]
