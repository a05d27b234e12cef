"""RLHF: a reward model from pairs, then a policy that is optimised for its reward.

Where pairs on harmlessness are given, a second model is made of them as in Safe-RLHF (Dai et
al., arXiv 2310.12773). Departures from it: the weight of harmlessness is fixed, since pairs
alone, without labels of what is harmful as such, name no bound that a multiplier could be
fitted to; and the optimiser is RLOO, not PPO, which needs a value model besides.

Rewards are standardised on the completions that the reward model was trained on, so that one KL
coefficient means the same for every reward model. Answers that stop at the token limit are
scored as if they ended there and lose a fixed amount: a reward model has seen ends only.

The reward model's folder, `reward`, is kept, and used again where its own inputs are equal. A
policy is not gone on with after an interruption: it begins anew, on the kept reward model. One
process; TRL is an optional library. This module knows settings, files and reports.
"""

import copy
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from misstep import __version__
from misstep.errors import MissingExtra, TrainingError
from misstep.models import Model, load_weights
from misstep.records import Pair, Prompt, digest, write_text
from misstep.rendering import Renderer
from misstep.stages.base import Notify, Settings
from misstep.stages.train import (
    CARD,
    REPORT,
    TrainReport,
    TrainSettings,
    clear_outputs,
    finished,
    micro_tokens,
    peak_memory_mb,
    usable_rows,
)
from misstep.training.report import ReinforceReport, RewardReport
from misstep.training.rows import PairRow, Rows

if TYPE_CHECKING:
    from misstep.training.reward import Scorer

FORMAT = 1
"""Raised when equal inputs no longer give an equal result."""
REWARD_REPORT = "reward.json"


class RewardSettings(Settings):
    """How a reward model is trained; adapter, batch and longest row are those of `train`."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """TRL 1.16's."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Of more, reward models learn the pairs by heart (InstructGPT, arXiv 2203.02155, C.2)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the prompts whose pairs only measure the ranking."""


class ReinforceSettings(Settings):
    """How a policy is optimised for a reward."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Of the optimiser. Ours: on a processor, sampling is what takes the time."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 8
    """Ours; with four samples of each, 32 answers a step."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to one prompt; of 2 and 4, 4 was better in the RLOO paper (arXiv 2402.14740)."""
    kl: Annotated[float, Field(ge=0)] = 0.05
    """What a nat of distance from the reference costs, in deviations of the reward; TRL's."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Ten times TRL 1.16's 1e-6, which is for all weights."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Of a sampled answer. TRL's is 512; small models that go on so long repeat themselves."""
    unfinished_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What an answer loses that stops at `max_tokens`, in deviations of the reward; ours."""
    harmlessness: Annotated[float, Field(ge=0)] = 1.0
    """What the second model's reward counts for, where there is one; ours."""
    reward: RewardSettings = RewardSettings()


class Feedback(NamedTuple):
    """What there is to learn from: questions, and what was preferred."""

    prompts: Sequence[Prompt]
    """To which the policy answers in training."""
    pairs: Sequence[Pair]
    harmless: Sequence[Pair] = ()
    """Pairs whose chosen completion is the less harmful one, for a model of their own."""


@dataclass(frozen=True)
class Job:
    """One training for a reward, checked and ready to begin."""

    model: Model
    renderer: Renderer
    train: TrainSettings
    settings: ReinforceSettings
    seed: int
    folder: Path
    notify: Notify

    @cached_property
    def tokenizer(self) -> Any:
        """A copy that pads with `pad`: TRL takes what it pads with from the tokenizer."""
        tokenizer = copy.deepcopy(self.renderer.tokenizer)
        tokenizer.pad_token_id = self.pad
        return tokenizer

    @cached_property
    def pad(self) -> int:
        """The token that rows are filled up with.

        Not the one that ends a turn, which many models pad with, if there is another: scores
        are read at the last token that is no pad, and the end belongs to what is scored.
        """
        own = self.renderer.tokenizer
        control = sorted(n for n, token in own.added_tokens_decoder.items() if token.special)
        known = [own.pad_token_id, *control]
        end = self.renderer.end_of_turn
        return next((int(i) for i in known if i is not None and i != end), end)


def reinforce(
    model: Model,
    feedback: Feedback,
    train: TrainSettings,
    settings: ReinforceSettings,
    seed: int,
    folder: Path,
    notify: Notify | None = None,
) -> TrainReport:
    """Train reward model and policy; write the policy's adapter, card and report into a folder.

    Raises:
        MissingExtra: TRL is not installed.
        TrainingError: no prompts or pairs, too many of them unusable, or pairs of one prompt
            only.
        ModelError: the weights cannot be loaded, or transformers has no classifier for them.
    """
    inputs = input_digest(model, feedback, train, settings, seed)
    report = finished(folder, inputs)
    if report is None:
        require_trl()
        clear_outputs(folder)
        renderer = Renderer.for_model(model)
        tell = notify or (lambda *_: None)
        job = Job(model, renderer, train, settings, seed, folder, tell)
        report = _reinforce(job, feedback, inputs)
        gc.collect()
    return report


def require_trl() -> None:
    """Pass where TRL is installed.

    Raises:
        MissingExtra: it is not.
    """
    if find_spec("trl") is None:
        raise MissingExtra("TRL", "rlhf")


def input_digest(
    model: Model,
    feedback: Feedback,
    train: TrainSettings,
    settings: ReinforceSettings,
    seed: int,
) -> str:
    """What names a training for a reward by content."""
    ids = [[record.id for record in records] for records in feedback]
    named = [_used(train), settings.model_dump(mode="json"), seed]
    return digest(["reinforce", FORMAT, model.digest, ids, *named])


def _used(train: TrainSettings) -> dict[str, Any]:
    """The settings of `train` that reward models and policies share with other methods."""
    return train.model_dump(
        mode="json", exclude={"learning_rate", "epochs", "preferences", "report_to"}
    )


# --- reward models ----------------------------------------------------------------------------


def train_reward(job: Job, pairs: Sequence[Pair], folder: Path, what: str) -> RewardReport:
    """Train a reward model into a folder, or give the report of one that is finished.

    Raises:
        TrainingError: pairs of one prompt only, or too many of them unusable.
        ModelError: the weights cannot be loaded, or transformers has no classifier for them.
    """
    named = [_used(job.train), job.settings.reward.model_dump(mode="json"), job.seed]
    ids = [pair.id for pair in pairs]
    inputs = digest(["reward", FORMAT, job.model.digest, ids, *named])
    return _finished_reward(folder, inputs) or _train_reward(job, pairs, folder, inputs, what)


def _finished_reward(folder: Path, inputs: str) -> RewardReport | None:
    try:
        text = (folder / REWARD_REPORT).read_text(encoding="utf-8")
        report = RewardReport.model_validate_json(text)
    except (OSError, ValidationError):
        return None
    return report if report.inputs == inputs else None


def _train_reward(
    job: Job, pairs: Sequence[Pair], folder: Path, inputs: str, what: str
) -> RewardReport:
    from misstep.training.reward import (
        Scorer,
        accuracy,
        fit,
        scale,
        split_by_prompt,
        with_reward_adapter,
    )
    from misstep.training.weights import save_adapter

    rows = _usable_pairs(job, pairs)
    own = job.settings.reward
    trained, measured = split_by_prompt(rows.kept, own.held_out, job.seed)
    if not trained:
        raise TrainingError(
            f"{what}: expected pairs of two prompts or more, since those of one are held out "
            f"to measure the ranking; found {len(measured)} pairs of one. Give more prompts."
        )
    (folder / REWARD_REPORT).unlink(missing_ok=True)
    lm, train = load_weights(job.model), job.train
    model = with_reward_adapter(lm, job.pad, train.rank, train.alpha, job.seed)
    started = time.monotonic()
    curve = fit(
        model,
        trained,
        job.tokenizer,
        train.batch_size,
        [_steps(job, f"{what} steps")],
        num_train_epochs=own.epochs,
        **_arguments(job, folder, own.learning_rate),
    )
    seconds = time.monotonic() - started
    scorer = Scorer(model, job.pad, micro_tokens())
    mean, deviation = scale(scorer, trained)
    report = RewardReport(
        inputs=inputs,
        pairs=len(trained),
        dropped=rows.dropped,
        truncated=rows.truncated,
        held_out=len(measured),
        accuracy=accuracy(scorer, measured),
        accuracy_trained=accuracy(scorer, trained),
        mean=mean,
        deviation=deviation,
        loss_curve=tuple(curve),
        seconds=round(seconds, 1),
    )
    save_adapter(model, job.model.name, folder)
    write_text(folder / REWARD_REPORT, report.model_dump_json(indent=2) + "\n")
    return report


def _usable_pairs(job: Job, pairs: Sequence[Pair]) -> Rows[PairRow]:
    rows = usable_rows(job.renderer, pairs, job.train)
    kept = tuple(row for row in rows.kept if isinstance(row, PairRow))
    return Rows(kept, rows.given, rows.dropped, rows.truncated)


def load_scorer(job: Job, folder: Path, report: RewardReport) -> "Scorer":
    """A trained reward model, whose scores are standardised."""
    from misstep.training.reward import Scorer, load_reward_model

    model = load_reward_model(load_weights(job.model), job.pad, folder)
    model.to(_device())
    return Scorer(model, job.pad, micro_tokens(), report.mean, report.deviation)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- the policy -------------------------------------------------------------------------------


def _reinforce(job: Job, feedback: Feedback, inputs: str) -> TrainReport:
    prompts = _usable_prompts(job, feedback.prompts)
    reports: list[RewardReport] = []
    scorers: list[Scorer] = []
    for pairs, what in ((feedback.pairs, "reward"), (feedback.harmless, "harmlessness")):
        if pairs or what == "reward":
            reports.append(train_reward(job, pairs, job.folder / what, what))
            # Trainer and its callbacks hold each other, and the model with them.
            gc.collect()
            scorers.append(load_scorer(job, job.folder / what, reports[-1]))
    trainer = _policy_trainer(job, prompts, scorers)
    started = time.monotonic()
    trainer.train()
    report = _report(
        job, len(feedback.prompts), prompts, trainer, time.monotonic() - started, reports
    ).model_copy(update={"inputs": inputs})
    _save(job, trainer.model, report)
    return report


def _usable_prompts(job: Job, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts as serving tokens, those that leave room for an answer."""
    rendered = [job.renderer.prompt(prompt.messages) for prompt in prompts]
    longest = job.train.max_length - job.settings.max_tokens
    kept = [ids for ids in rendered if len(ids) <= longest]
    dropped = len(rendered) - len(kept)
    # TRL takes whole steps only, and drops the prompts of an epoch that fill none.
    enough = job.settings.prompts_per_step
    if len(kept) < enough or dropped > job.train.max_dropped * len(rendered):
        raise TrainingError(
            f"reinforce: of {len(rendered)} prompts {dropped} are longer than {longest} "
            f"tokens, which is train.max_length less reinforce.max_tokens; expected at most "
            f"{job.train.max_dropped:.0%} of them, and {enough} prompts at least, one step's. "
            "Raise train.max_length, give more prompts, or lower reinforce.prompts_per_step."
        )
    return kept


def _policy_trainer(
    job: Job, prompts: Sequence[Sequence[int]], scorers: "Sequence[Scorer]"
) -> Any:
    from misstep.training.policy import policy_trainer
    from misstep.training.weights import lora_config

    settings, train = job.settings, job.train
    return policy_trainer(
        load_weights(job.model),
        job.tokenizer,
        job.renderer.stop_ids,
        prompts,
        lambda asked, answers: _rewards(job, scorers, asked, answers),
        lora_config(train.rank, train.alpha, task_type="CAUSAL_LM"),
        [_steps(job, "policy steps")],
        max_steps=settings.steps,
        # A prompt's samples at a time; the step's further prompts come after each other.
        per_device_train_batch_size=settings.samples,
        gradient_accumulation_steps=settings.prompts_per_step,
        num_generations=settings.samples,
        max_completion_length=settings.max_tokens,
        beta=settings.kl,
        **_arguments(job, job.folder, settings.learning_rate),
    )


def _rewards(
    job: Job,
    scorers: "Sequence[Scorer]",
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[float]:
    """Scores of the answers, harmlessness weighed, less what the unfinished ones lose."""
    stops, end = job.renderer.stop_ids, job.renderer.end_of_turn
    finished = [bool(answer) and answer[-1] in stops for answer in answers]
    rows = [
        [*prompt, *(answer[:-1] if done else answer), end]
        for prompt, answer, done in zip(prompts, answers, finished, strict=True)
    ]
    totals = [0.0 if done else -job.settings.unfinished_penalty for done in finished]
    for scorer, weight in zip(scorers, (1.0, job.settings.harmlessness), strict=False):
        totals = [t + weight * s for t, s in zip(totals, scorer(rows), strict=True)]
    return totals


def _arguments(job: Job, folder: Path, learning_rate: float) -> dict[str, Any]:
    """What both of TRL's trainers are told alike."""
    return {
        "output_dir": str(folder),
        "learning_rate": learning_rate,
        "lr_scheduler_type": job.train.scheduler,
        "warmup_steps": job.train.warmup_ratio,
        "weight_decay": job.train.weight_decay,
        # The adapter is computed in the weights' type without autocast.
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": _device() == "cpu",
        "seed": job.seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": list(job.train.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _steps(job: Job, what: str) -> Any:
    from misstep.training.trainer import Steps

    return Steps(lambda done, total: job.notify(what, done, total))


def _report(
    job: Job,
    given: int,
    prompts: Sequence[Sequence[int]],
    trainer: Any,
    seconds: float,
    rewards: Sequence[RewardReport],
) -> TrainReport:
    from misstep.training.policy import steps_of

    history = trainer.state.log_history
    curve = [(entry["step"], round(entry["loss"], 5)) for entry in history if "loss" in entry]
    steps = tuple(steps_of(trainer))
    a_step = job.settings.prompts_per_step * job.settings.samples
    return TrainReport(
        inputs="",
        rows=given,
        trained=len(prompts),
        dropped=given - len(prompts),
        truncated=0,
        tokens=sum(map(len, prompts)),
        completion_tokens=round(sum(step.tokens * a_step for step in steps)),
        steps=len(curve),
        first_loss=curve[0][1],
        last_loss=curve[-1][1],
        loss_curve=tuple(curve),
        loss_before={},
        loss_after={},
        seconds=round(seconds, 1),
        tokens_per_second=round(trainer.state.num_input_tokens_seen / seconds, 1),
        peak_memory_mb=peak_memory_mb(),
        resumed_from=0,
        reinforced=ReinforceReport(
            reward=rewards[0],
            harmlessness=rewards[1] if len(rewards) > 1 else None,
            curve=steps,
            samples=a_step * len(steps),
        ),
    )


def _save(job: Job, adapted: Any, report: TrainReport) -> None:
    """Write weights, card and, last, the report: with it the folder is finished."""
    from misstep.training.weights import save_adapter

    save_adapter(adapted, job.model.name, job.folder)
    write_text(job.folder / CARD, policy_card(job.model.name, job.settings, report))
    write_text(job.folder / REPORT, report.model_dump_json(indent=2) + "\n")


def policy_card(base: str, settings: ReinforceSettings, report: TrainReport) -> str:
    """The card of a policy's adapter: its base, its reward models, and how it was trained."""
    done = report.reinforced
    assert done is not None
    models = {"reward": done.reward, "harmlessness": done.harmlessness}
    values = settings.model_dump(exclude={"reward"})
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base)}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags: [misstep, lora, rloo]",
            "---",
            "",
            f"# {base}, optimised for a reward on {report.trained} prompts with misstep",
            "",
            "A LoRA adapter on all linear layers, trained by TRL's RLOO (arXiv 2402.14740).",
            "",
            "| reward model | pairs | ranks right, of pairs held out | held out |",
            "|---|---|---|---|",
            *(
                f"| {name} | {model.pairs} | {model.accuracy:.3f} | {model.held_out} |"
                for name, model in models.items()
                if model is not None
            ),
            "",
            f"{report.steps} steps, {done.samples:,} answers. Mean reward "
            f"{done.curve[0].reward} in the first step, {done.curve[-1].reward} in the last.",
            "",
            *(f"- {key.replace('_', ' ')}: {value}" for key, value in values.items()),
            f"- misstep {__version__}, inputs `{report.inputs}`",
            "",
        ]
    )
