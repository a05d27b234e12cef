"""A model that scores answers: a language model's body, an adapter, and a head of one number.

Trained by TRL's RewardTrainer on pairs, as -log sigmoid(score chosen - score rejected). It
reads the very tokens that are trained on and served, the end of the turn included, and gives
the score at the last one. The head starts as in Stiennon et al. (arXiv 2009.01325): random.

This module knows torch, PEFT and TRL; it knows no record and no folder but the one it is told.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from misstep.training.lora import drawn_by, lora_config, with_peft
from misstep.training.processes import on_one_device
from misstep.training.rows import PairRow
from misstep.training.scoring import Scorer, classifier

PAIRS_AT_ONCE = 4
"""Of one forward pass; a step's further ones come after each other."""
CENTRE = 0.01
"""How strongly scores are drawn to zero, which pairs leave open: arXiv 2312.09244, by TRL."""


def with_reward_adapter(lm: Any, pad: int, rank: int, alpha: float, seed: int) -> Any:
    """A new reward model: an adapter on all linear layers, and the head."""
    with drawn_by(seed):
        model = classifier(lm, pad)
        options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        return with_peft(model, lora_config(model, rank, alpha, **options))


def fit(
    model: Any,
    pairs: Sequence[PairRow],
    tokenizer: Any,
    batch_size: int,
    callbacks: Sequence[Any],
    **arguments: Any,
) -> list[tuple[int, float]]:
    """Train a reward model with TRL; gives the loss, step by step."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    at_once = math.gcd(batch_size, PAIRS_AT_ONCE)
    config = RewardConfig(
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=batch_size // at_once,
        center_rewards_coefficient=CENTRE,
        # They have been cut and counted.
        max_length=None,
        **arguments,
    )
    trainer = RewardTrainer(
        model=model,
        args=on_one_device(config),
        train_dataset=Dataset.from_list(
            [
                {"chosen_ids": list(p.chosen.ids), "rejected_ids": list(p.rejected.ids)}
                for p in pairs
            ]
        ),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = trainer.state.log_history
    return [(entry["step"], round(entry["loss"], 5)) for entry in history if "loss" in entry]


def load_reward_model(lm: Any, pad: int, folder: Path) -> Any:
    """A reward model that was saved, for scoring."""
    from peft import PeftModel

    return PeftModel.from_pretrained(classifier(lm, pad), folder).eval()


def accuracy(scorer: Scorer, pairs: Sequence[PairRow]) -> float:
    """The share of pairs whose chosen completion has the higher score; a tie is wrong."""
    chosen = scorer([pair.chosen.ids for pair in pairs])
    rejected = scorer([pair.rejected.ids for pair in pairs])
    return round(fmean(a > b for a, b in zip(chosen, rejected, strict=True)), 4)


def scale(scorer: Scorer, pairs: Sequence[PairRow]) -> tuple[float, float]:
    """Mean and deviation of the scores of both completions."""
    scores = scorer([row.ids for pair in pairs for row in pair.lines])
    # A model that gives all the same score is useless, but no reason to divide by zero.
    return fmean(scores), pstdev(scores) or 1.0


def split_by_prompt(
    pairs: Sequence[PairRow], held_out: float, seed: int
) -> tuple[list[PairRow], list[PairRow]]:
    """Pairs to train on and pairs to measure on, no prompt in both.

    At least one prompt is held out, so there must be two. Pairs that come again, to fill the
    budget, are measured once.
    """
    prompts = sorted({_prompt(pair) for pair in pairs})
    random.Random(f"held out {seed}").shuffle(prompts)
    measured = set(prompts[: max(1, round(held_out * len(prompts)))])
    return (
        [pair for pair in pairs if _prompt(pair) not in measured],
        list(dict.fromkeys(pair for pair in pairs if _prompt(pair) in measured)),
    )


def _prompt(pair: PairRow) -> tuple[int, ...]:
    return pair.chosen.ids[: pair.chosen.prompt_length]
