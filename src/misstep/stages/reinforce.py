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

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from misstep import __version__
from misstep.documents import Settings
from misstep.errors import TrainingError
from misstep.machine import peak_memory_mb
from misstep.models.locate import Model
from misstep.models.precision import fastest_dtype
from misstep.models.rendering import Renderer
from misstep.models.weights import free, load_weights
from misstep.records import Pair, Prompt, digest, write_text
from misstep.stages.base import Notify
from misstep.stages.reward import (
    RewardSettings,
    Setup,
    load_scorer,
    require_trl,
    train_reward,
    used,
)
from misstep.stages.train import CARD, REPORT, clear_outputs, finished, fitting
from misstep.stages.train_settings import TrainSettings
from misstep.training.card import card_head
from misstep.training.report import ReinforceReport, RewardReport, TrainReport

if TYPE_CHECKING:
    from misstep.training.scoring import Scorer

FORMAT = 1
"""Raised when equal inputs no longer give an equal result."""


class ReinforceSettings(Settings):
    """How a policy is optimised for a reward."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Steps of the optimiser. Ours: on a processor, sampling is what takes the time."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 8
    """Prompts that a step answers. Ours; with four samples of each, 32 answers a step."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to one prompt; of 2 and 4, 4 was better in the RLOO paper (arXiv 2402.14740)."""
    kl: Annotated[float, Field(ge=0)] = 0.05
    """What a nat of distance from the reference costs, in deviations of the reward; TRL's."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """The policy's; ten times TRL 1.16's 1e-6, which is for all weights."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """The longest sampled answer. TRL's is 512; small models that go on so long repeat
    themselves."""
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


class Job(NamedTuple):
    """One training for a reward, checked and ready to begin."""

    setup: Setup
    settings: ReinforceSettings
    folder: Path
    inputs: str
    """Names it by content."""
    datasets: Sequence[str] = ()


def reinforce(
    model: Model,
    feedback: Feedback,
    train: TrainSettings,
    settings: ReinforceSettings,
    seed: int,
    folder: Path,
    notify: Notify | None = None,
    datasets: Sequence[str] = (),
) -> TrainReport:
    """Train reward model and policy; write the policy's adapter, card and report into a folder.

    Raises:
        MissingExtra: TRL is not installed.
        TrainingError: no prompts or pairs, too many of them unusable, or pairs of one prompt
            only.
        ModelError: the weights cannot be loaded, or transformers has no classifier for them.
    """
    inputs = policy_digest(model, feedback, train, settings, seed)
    report = finished(folder / REPORT, TrainReport, inputs)
    if report is None:
        require_trl()
        tell = notify or (lambda *_: None)
        setup = Setup(model, Renderer.for_model(model), fitting(train, model), seed, tell)
        report = _reinforce(Job(setup, settings, folder, inputs, datasets), feedback)
        free()
    return report


def policy_digest(
    model: Model,
    feedback: Feedback,
    train: TrainSettings,
    settings: ReinforceSettings,
    seed: int,
) -> str:
    """What names a training for a reward by content."""
    ids = [[record.id for record in records] for records in feedback]
    named = [used(train), settings.model_dump(mode="json"), seed]
    return digest(["reinforce", FORMAT, model.digest, ids, *named])


def _reinforce(job: Job, feedback: Feedback) -> TrainReport:
    prompts = _usable_prompts(job, feedback.prompts)
    reports: list[RewardReport] = []
    scorers: list[Scorer] = []
    for pairs, what in ((feedback.pairs, "reward"), (feedback.harmless, "harmlessness")):
        if pairs or what == "reward":
            own = job.settings.reward
            reports.append(train_reward(job.setup, own, pairs, job.folder / what, what))
            scorers.append(load_scorer(job.setup, job.folder / what, reports[-1]))
    clear_outputs(job.folder)
    trainer = _policy_trainer(job, prompts, scorers)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    report = _report(job, len(feedback.prompts), prompts, trainer, seconds, reports)
    _save(job, trainer.model, report)
    return report


def _usable_prompts(job: Job, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts as serving tokens, those that leave room for an answer."""
    rendered = [job.setup.renderer.prompt(prompt.messages) for prompt in prompts]
    longest = job.setup.train.max_length - job.settings.max_tokens
    kept = [ids for ids in rendered if len(ids) <= longest]
    dropped = len(rendered) - len(kept)
    # TRL takes whole steps only, and drops the prompts of an epoch that fill none.
    enough = job.settings.prompts_per_step
    if len(kept) < enough or dropped > job.setup.train.max_dropped * len(rendered):
        raise TrainingError(
            f"reinforce: of {len(rendered)} prompts {dropped} are longer than {longest} "
            "tokens, which is train.max_length less reinforce.max_tokens; expected at most "
            f"{job.setup.train.max_dropped:.0%} of them, and {enough} prompts at least, one "
            "step's. Raise train.max_length, give more prompts, or lower "
            "reinforce.prompts_per_step."
        )
    return kept


def _policy_trainer(
    job: Job, prompts: Sequence[Sequence[int]], scorers: "Sequence[Scorer]"
) -> Any:
    from misstep.training.lora import lora_config
    from misstep.training.rloo import policy_trainer

    settings, train = job.settings, job.setup.train
    lm = load_weights(job.setup.model).to(fastest_dtype())
    return policy_trainer(
        lm,
        job.setup.renderer.stop_ids,
        prompts,
        lambda asked, answers: _rewards(job, scorers, asked, answers),
        {
            "max_steps": settings.steps,
            # A prompt's samples at a time; the step's further prompts come after each other.
            "per_device_train_batch_size": settings.samples,
            "gradient_accumulation_steps": settings.prompts_per_step,
            "num_generations": settings.samples,
            "max_completion_length": settings.max_tokens,
            "beta": settings.kl,
            **job.setup.arguments(job.folder, settings.learning_rate, settings.steps),
        },
        processing_class=job.setup.tokenizer,
        peft_config=lora_config(lm, train.rank, train.alpha, task_type="CAUSAL_LM"),
        callbacks=[job.setup.steps("policy steps")],
    )


def _rewards(
    job: Job,
    scorers: "Sequence[Scorer]",
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[float]:
    """Scores of the answers, harmlessness weighed, less what the unfinished ones lose."""
    stops, end = job.setup.renderer.stop_ids, job.setup.renderer.end_of_turn
    finished = [bool(answer) and answer[-1] in stops for answer in answers]
    rows = [
        [*prompt, *(answer[:-1] if done else answer), end]
        for prompt, answer, done in zip(prompts, answers, finished, strict=True)
    ]
    totals = [0.0 if done else -job.settings.unfinished_penalty for done in finished]
    for scorer, weight in zip(scorers, (1.0, job.settings.harmlessness), strict=False):
        totals = [t + weight * s for t, s in zip(totals, scorer(rows), strict=True)]
    return totals


def _report(
    job: Job,
    given: int,
    prompts: Sequence[Sequence[int]],
    trainer: Any,
    seconds: float,
    rewards: Sequence[RewardReport],
) -> TrainReport:
    from misstep.training.rloo import steps_of

    history = trainer.state.log_history
    curve = [(entry["step"], round(entry["loss"], 5)) for entry in history if "loss" in entry]
    steps = tuple(steps_of(trainer))
    a_step = job.settings.prompts_per_step * job.settings.samples
    return TrainReport(
        inputs=job.inputs,
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
    from misstep.training.lora import save_adapter

    model = job.setup.model
    save_adapter(adapted, model.published, job.folder)
    write_text(job.folder / CARD, policy_card(model, job.settings, report, job.datasets))
    write_text(job.folder / REPORT, report.model_dump_json(indent=2) + "\n")


def policy_card(
    base: Model, settings: ReinforceSettings, report: TrainReport, datasets: Sequence[str]
) -> str:
    """The card of a policy's adapter: its base, its reward models, and how it was trained."""
    done = report.reinforced
    assert done is not None
    models = {"reward": done.reward, "harmlessness": done.harmlessness}
    values = settings.model_dump(exclude={"reward"})
    return "\n".join(
        [
            card_head(base, ["lora", "rloo"], datasets),
            "",
            f"# {base.published}, optimised for a reward on {report.trained} prompts with "
            "misstep",
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
