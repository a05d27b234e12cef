"""The head of a trained model's card: what the Hub, and those who load it, read first.

Knows a model's names and what its file says of its licence; nothing of how it was trained.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from misstep.models.gguf_header import read_header
from misstep.models.locate import Model


def card_head(base: Model, tags: Sequence[str], datasets: Sequence[str]) -> str:
    """The metadata between their two lines; `datasets` are names on the Hub."""
    adapter = "lora" in tags
    facts: dict[str, Any] = {
        "base_model": base.published,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": _license(base),
        "datasets": list(datasets),
        "tags": ["misstep", *tags],
    }
    known = {key: value for key, value in facts.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, default_flow_style=None)}---"


def _license(base: Model) -> str | None:
    """As a GGUF file names it; what is trained from the weights is bound by it, too."""
    if not base.is_gguf:
        return None
    found = read_header(base.files).values.get("general.license")
    return str(found) if found else None
