"""Rows for another trainer: TRL makes of them the tokens that ours learns."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from misstep.models.adapter import check_adapter
from misstep.models.locate import locate
from misstep.models.rendering import Renderer
from misstep.records import Example, Message, Pair
from misstep.training.rows import Row, render_rows
from misstep.training.trl_rows import as_trl, write_trl

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""As Qwen3's: an answer follows thoughts, empty ones where the prompt says so."""


def turns(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(texts)
    return tuple(Message(role=r, content=t) for r, t in zip(roles, texts, strict=False))


UNLEARNED = -100
ROWS = [
    Example(messages=turns("Why is this wrong?"), completion="It obeys.\n\nTwice.", kind="x"),
    Example(messages=turns("你好", "Hm.", "Again: why?"), completion="  Since…", kind="x"),
]
PAIRS = [Pair(messages=turns("How?", "Hm.", "How?"), chosen="So.", rejected="Not so, friend.")]


def learned(row: Row) -> tuple[list[int], list[int]]:
    return list(row.ids[: row.prompt_length]), list(row.ids[row.prompt_length :])


def from_file(path: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=str(path), split="train")


@pytest.mark.parametrize("template", [None, THINKING])
def test_trl_learns_the_tokens_that_ours_learns(
    tiny_model: Path, tmp_path: Path, template: str | None
) -> None:
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template or tokenizer.chat_template
    renderer = Renderer(copy.deepcopy(tokenizer))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=from_file(write_trl(tmp_path / "rows.jsonl", ROWS)),
        processing_class=tokenizer,
    )
    ours = [learned(row) for row in render_rows(renderer, ROWS, 1000).kept]
    theirs = []
    for row in trainer.train_dataset:
        start = sum(label == UNLEARNED for label in row["labels"])
        assert row["labels"][start:] == row["input_ids"][start:]
        theirs.append((row["input_ids"][:start], row["input_ids"][start:]))
    # The template's line end after the turn is learned by TRL, too; a server stops before it.
    line_end = renderer.tokenizer.encode("\n", add_special_tokens=False)
    assert theirs == [(prompt, answer + line_end) for prompt, answer in ours]
    assert len(ours) == len(ROWS)


def test_trl_compares_the_answers_that_ours_compares(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    renderer = Renderer.for_model(locate(str(tiny_model)))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=from_file(write_trl(tmp_path / "rows.jsonl", PAIRS)),
        processing_class=renderer.tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    line_end = renderer.tokenizer.encode("\n", add_special_tokens=False)
    for row, pair in zip(trainer.train_dataset, PAIRS, strict=True):
        for half, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = renderer.example(pair.messages, text)
            assert row["prompt_ids"] == list(ids.ids[: ids.prompt_length])
            assert row[f"{half}_ids"] == list(ids.ids[ids.prompt_length :]) + line_end


def test_a_row_that_begins_its_own_answer_has_no_place_there() -> None:
    row = ROWS[0].model_copy(update={"prefill": "It "})
    with pytest.raises(ValueError, match="prefill"):
        as_trl(row)


def test_a_file_has_one_row_a_line_and_nothing_of_ours(tmp_path: Path) -> None:
    path = write_trl(tmp_path / "rows.jsonl", [*ROWS])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion", "chat_template_kwargs"}] * 2
    assert rows[1]["prompt"][0] == {"role": "user", "content": "你好"}


def test_the_page_shows_a_training_that_works(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    page = (Path(__file__).parents[2] / "docs/own-trainer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    changed = {
        '"runs/repair/rows/mistake_analysis.jsonl"': '"rows.jsonl"',
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(tiny_model)),
        "args=SFTConfig(": "args=SFTConfig(use_cpu=True, bf16=False, report_to='none', ",
    }
    for shown, here in changed.items():
        assert shown in code
        code = code.replace(shown, here)
    monkeypatch.chdir(tmp_path)
    write_trl(tmp_path / "rows.jsonl", ROWS * 4)
    exec(code, {})
    assert check_adapter("my-adapter", locate(str(tiny_model))) == Path("my-adapter")
