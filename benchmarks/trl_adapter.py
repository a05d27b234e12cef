"""Train what `misstep rows` wrote by TRL, with the recipe's settings, into a PEFT folder.

    misstep rows recipes/quickstart.yaml
    python benchmarks/trl_adapter.py runs/quickstart mistake_analysis by-trl
    misstep run recipes/quickstart.yaml --set others.by-trl=by-trl

So the same rows are trained by two programs, and one table shows both. Rows of answers go to
SFTTrainer, rows of pairs to DPOTrainer.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from misstep.models.locate import locate
from misstep.models.precision import fastest_dtype
from misstep.models.weights import load_tokenizer, load_weights
from misstep.stages.train_settings import TrainSettings

ROWS_AT_ONCE = 8


def train(model: str, rows: Dataset, settings: TrainSettings, seed: int, out: Path) -> None:
    """Train an adapter on the rows and save it."""
    pairs = "chosen" in rows.column_names
    learning_rate = settings.preferences.learning_rate if pairs else settings.learning_rate
    tokenizer = load_tokenizer(locate(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm: Any = load_weights(locate(model))
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": min(ROWS_AT_ONCE, settings.batch_size),
            "gradient_accumulation_steps": max(1, settings.batch_size // ROWS_AT_ONCE),
            "learning_rate": learning_rate,
            "lr_scheduler_type": settings.scheduler,
            "warmup_steps": settings.warmup_ratio,
            "weight_decay": settings.weight_decay,
            "max_length": settings.max_length,
            "gradient_checkpointing": False,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
        }
        # Rows of a kind are no neighbours in the file's order, nor are they in ours.
        given: dict[str, Any] = {
            "model": lm.to(fastest_dtype()),
            "train_dataset": rows.shuffle(seed=seed),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        }
        if pairs:
            args = DPOConfig(beta=settings.preferences.beta, **common)
            trainer: Any = DPOTrainer(args=args, **given)
        else:
            args = SFTConfig(completion_only_loss=True, **common)
            trainer = SFTTrainer(args=args, **given)
        trainer.train()
    trainer.save_model(str(out))


def main() -> None:
    """Read the run's recipe and its rows, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory in which rows were written")
    parser.add_argument("method")
    parser.add_argument("out", type=Path, help="the folder of the adapter")
    given = parser.parse_args()
    recipe = json.loads((given.run / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    file = given.run / "rows" / f"{given.method}.jsonl"
    rows = load_dataset("json", data_files=str(file), split="train")
    seed = recipe["seed"] if recipe["train_seed"] is None else recipe["train_seed"]
    train(recipe["model"], rows, TrainSettings(**recipe["train"]), seed, given.out)


if __name__ == "__main__":
    main()
