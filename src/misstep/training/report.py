"""What trainings report: losses, and of preferences rankings, rewards, distances.

This module knows numbers; it knows no model and no file.
"""

from misstep.records import Record


class RankReport(Record):
    """How a model ranks the two completions of pairs, before and after training on them."""

    likelier_before: dict[str, float]
    """The share of a few pairs of each kind whose chosen completion is the likelier one."""
    likelier_after: dict[str, float]
    """The same after training, on the same pairs."""
    gained: dict[str, float]
    """The share of them whose chosen completion gained on the rejected one."""
    gain: dict[str, float]
    """By how much it did on average, as a difference of log-probabilities."""
    reference_seconds: float
    """Of measuring all pairs before training, which `seconds` leaves out."""


class RewardReport(Record):
    """What a reward model was trained on, and how it ranks; `reward.json` holds it."""

    inputs: str
    """Names model, pairs, settings and seed by content."""
    pairs: int
    """Pairs that were trained on."""
    dropped: int
    truncated: int
    held_out: int
    """Pairs of other prompts, on which it was measured."""
    accuracy: float
    """The share of the pairs held out whose chosen completion has the higher score."""
    accuracy_trained: float
    """The same of the pairs that were trained on."""
    mean: float
    """Of the scores of all completions that were trained on."""
    deviation: float
    """Theirs; rewards are scores less the mean, in units of it."""
    loss_curve: tuple[tuple[int, float], ...]
    seconds: float


class ReinforceStep(Record):
    """One step of policy optimisation."""

    step: int
    reward: float
    """Mean reward of the step's samples, penalties for unfinished answers included."""
    kl: float
    """Mean log-ratio of policy and reference for a sampled token."""
    tokens: float
    """Mean length of the samples."""
    unfinished: float
    """The share of them that stopped at the token limit."""


class ReinforceReport(Record):
    """How rewards moved while a policy was optimised for them."""

    reward: RewardReport
    harmlessness: RewardReport | None
    """Of the second model, where pairs for one were given."""
    curve: tuple[ReinforceStep, ...]
    samples: int
    """Answers that were sampled and scored."""


class TrainReport(Record):
    """What was trained on, and what came of it; `train.json` holds it."""

    inputs: str
    """Names model, rows, settings and seed by content."""
    rows: int
    """Rows, or pairs, that were given."""
    trained: int
    """Rows that were trained on."""
    dropped: int
    """Rows with nothing to learn within `max_length`."""
    truncated: int
    """Rows that were trained on without the end of their completion."""
    tokens: int
    """Tokens of the rows that were trained on, once each."""
    completion_tokens: int
    """Those of them that are learned."""
    steps: int
    first_loss: float
    last_loss: float
    loss_curve: tuple[tuple[int, float], ...]
    """Mean loss of a completion token, or of a pair, step by step."""
    loss_before: dict[str, float]
    """The same on a few rows of each kind, before training."""
    loss_after: dict[str, float]
    """The same after training, on the same rows."""
    seconds: float
    """Of training, without loading; what was done before an interruption is counted."""
    tokens_per_second: float
    """Tokens of the rows, padding not counted, epochs counted."""
    peak_memory_mb: int
    """The largest resident memory of the process up to the end of training."""
    resumed_from: int
    """The step of the checkpoint that training went on from; 0 where it was not interrupted."""
    ranks: RankReport | None = None
    """Of training on pairs."""
    reinforced: ReinforceReport | None = None
    """Of training for a reward."""
