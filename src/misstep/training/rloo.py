"""Policy optimisation by TRL's RLOOTrainer, on prompts that are tokens already.

RLOO (Ahmadian et al., arXiv 2402.14740): several answers are sampled to a prompt, and the
advantage of each is its reward less the mean reward of the others. It is the policy gradient
without bias, needs no value model, and puts the KL penalty into the reward, as RLHF was
described. GRPO divides by the deviation within a prompt's samples, which makes much of
differences that for a small reward model are noise.

This module knows TRL; it knows no record and no reward but as a function of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig, PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from misstep.training.processes import on_one_device
from misstep.training.report import ReinforceStep

Reward = Callable[[list[list[int]], list[list[int]]], list[float]]
"""Rewards of answers, given the prompts and the answers as tokens."""


class TokenTrainer(RLOOTrainer):  # type: ignore[misc]
    """RLOO on prompts that are lists of tokens: TRL would render and tokenise them itself.

    Were this method no longer called, TRL's tokenizer would refuse the lists: a version of TRL
    that does otherwise fails, and does not train on other tokens than are served.
    """

    def _tokenize_prompts(
        self, prompts: list[list[int]]
    ) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}


def policy_trainer(
    lm: Any,
    stop_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    arguments: dict[str, Any],
    **options: Any,
) -> RLOOTrainer:
    """A trainer of a new adapter; the model without it is the reference.

    `arguments` are those of TRL's configuration, `options` of its trainer.
    """
    from datasets import Dataset

    # Which tokens end an answer is the renderer's to say, as in serving; nothing else of the
    # model's own settings, such as a penalty on repetition, is to shape what is sampled.
    lm.generation_config = GenerationConfig(eos_token_id=list(stop_ids))

    def rewarded(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
        return reward(prompts, completion_ids)

    trainer = TokenTrainer(
        model=lm,
        reward_funcs=rewarded,
        args=on_one_device(RLOOConfig(**arguments)),
        train_dataset=Dataset.from_list([{"prompt": list(prompt)} for prompt in prompts]),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps_of(trainer: Any) -> list[ReinforceStep]:
    """What TRL logged, step by step."""
    return [
        ReinforceStep(
            step=entry["step"],
            reward=round(entry["reward"], 4),
            kl=round(entry.get("kl", 0.0), 5),
            tokens=round(entry["completions/mean_length"], 2),
            unfinished=round(entry["completions/clipped_ratio"], 4),
        )
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
