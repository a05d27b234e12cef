"""Training rows as TRL reads them, for a trainer that is not ours.

Conversational prompt-completion rows for SFTTrainer, conversational preference rows for
DPOTrainer and RewardTrainer (huggingface.co/docs/trl/dataset_formats). Thinking is off, as in
every prompt here. Knows rows; knows no trainer.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from misstep.records import Example, Message, Pair, write_text

NOT_THINKING = {"enable_thinking": False}
"""What TRL hands to the chat template; one that knows no thinking takes no notice."""


def as_trl(row: Example | Pair) -> dict[str, Any]:
    """One row. Of an `Example` that begins its own answer there is no such row.

    Raises:
        ValueError: the row has a prefill, for which TRL's formats have no place.
    """
    if isinstance(row, Pair):
        answers = {"chosen": _answer(row.chosen), "rejected": _answer(row.rejected)}
    elif row.prefill:
        raise ValueError("expected a row without a prefill")
    else:
        answers = {"completion": _answer(row.completion)}
    prompt = [message.model_dump() for message in row.messages]
    return {"prompt": prompt, **answers, "chat_template_kwargs": NOT_THINKING}


def write_trl(path: Path, rows: Iterable[Example | Pair]) -> Path:
    """Write rows one a line, in one step."""
    lines = (json.dumps(as_trl(row), ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path


def _answer(text: str) -> list[dict[str, Any]]:
    return [Message(role="assistant", content=text).model_dump()]
