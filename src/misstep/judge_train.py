"""A judge trained on labelled answers: read, part by question, train, calibrate, measure.

Equal questions are in one part, so no held-out question was trained or tuned on. An answer that
stands under several questions, as a stock refusal does, can be in two parts: the card counts
the held-out ones that were trained on. When to stop and the temperature are decided on the dev
part; the held-out part is only measured, by the judge as it was written. The same data, model,
seed and settings give the same parts; on the same machine and versions the same judge.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from misstep.claims import LOCK, claimed
from misstep.config import parse_override, put
from misstep.data.decoys import LEARNED, NAME, beside, with_decoys
from misstep.data.labelled import MISTAKES, Case, DataSet, Part, part_of
from misstep.data.sources import question_of
from misstep.documents import Seed, Settings, check
from misstep.errors import DataError, RecipeError
from misstep.evidence.check_results import JudgedCase, measure_data
from misstep.evidence.judge_card import (
    CARD,
    READS,
    JudgeCard,
    Parts,
    Tested,
    Training,
    is_trained_judge,
    read_card,
    unseen,
    write_card,
    write_seen,
)
from misstep.evidence.judge_card import Source as CardSource
from misstep.judge_check import judge_cases, labelled_sets
from misstep.judges.classifier import (
    ClassifierJudge,
    classifier_scorer,
    name_of,
    parts_of,
)
from misstep.machine import device_text, versions
from misstep.models.locate import Model, is_encoder, locate_any
from misstep.models.reading import Reader
from misstep.models.weights import load_weights
from misstep.progress import Progress
from misstep.records import digest
from misstep.run_folder import beside_runs, set_aside
from misstep.training import processes

if TYPE_CHECKING:
    from misstep.training.classifier import Fit
    from misstep.training.label_loss import EncoderLoss, Labelled, LabelLoss

PARTS: tuple[Part, ...] = ("train", "dev", "held_out")
LIBRARIES = ("torch", "transformers", "peft")
OWN = ("model.safetensors", "config.json", "tokenizer.json", CARD)
"""What a training overwrites; a folder that holds any of it and was no judge's is refused."""
TOGETHER = "all held-out questions"
"""How the data sets together are called on a card."""
UNREAD = "an answer of which the tokenizer makes nothing"
Share = Annotated[float, Field(ge=0, lt=1)]


class JudgeTraining(Settings):
    """How a judge is trained; few settings were tried, on dev parts of Safe-RLHFmini."""

    held_out: Share = 0.15
    """The share of the questions that only measure the judge."""
    dev: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share that decides when to stop, and the temperature."""
    seed: Seed = 0
    """The seed that parts the questions, and of training where `train_seed` is left out."""
    train_seed: Seed | None = None
    """The seed of the first weights, of the order of rows and of the decoys beside them: judges
    that differ in it alone have the same held-out questions, so that they can be members of one
    ensemble."""
    epochs: Annotated[float, Field(gt=0)] = 1.5
    """Passes over the data at most; training stops where the dev part no longer gains."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The adapter's and the head's; 5e-4 for an encoder."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Answers of one optimiser step."""
    max_tokens: Annotated[int, Field(ge=16)] = 256
    """The most of prompt and answer together; what lies beyond is cut."""
    layers: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    """The share of a language model's layers that is kept, from below; an encoder is kept
    whole."""
    adapted: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of a language model's kept layers, from above, that learn; what is below costs
    no more than reading."""
    rank: Annotated[int, Field(ge=1)] = 16
    """The rank of the adapter that is trained."""
    decoys: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The share of the training answers that a refusal, a harmless answer or a claim to be safe
    is put beside, labels kept, so that none of it passes a mistake off. Of mistakes only."""

    @property
    def of_training(self) -> int:
        """The seed of everything but the parts."""
        return self.seed if self.train_seed is None else self.train_seed


FOR_ENCODERS = {"layers": 1.0, "learning_rate": 5e-4}
"""What differs where an encoder is trained and nothing else is said."""
NOT_OF_MISTAKES = {"decoys": 0.0}
"""The same of other labels than mistakes: a refusal before an answer may well make one."""


class TrainInputs(NamedTuple):
    """All that a training reads, read before any model loads."""

    model: Model
    reader: Reader
    metric: str
    data: dict[str, DataSet]
    settings: JudgeTraining


def read_train_inputs(
    data: Sequence[str],
    model: str,
    metric: str,
    fields: Sequence[str],
    settings: Sequence[str] = (),
) -> TrainInputs:
    """Read and check everything that a training depends on.

    Raises:
        InputError: what is wrong with the settings, the model or the data.
    """
    if processes.count() > 1:
        raise RecipeError(
            f"judge train: expected one process, found {processes.count()}. Run it without "
            "`accelerate launch`."
        )
    base = locate_any(model)
    checked = _settings(settings, base, metric)
    reader = Reader.for_model(base)
    if is_encoder(base):
        _refuse_unfit(checked, base, reader.longest)
    if checked.held_out + checked.dev >= 1:
        raise RecipeError(
            "judge train: expected questions to train on, found none: held_out "
            f"{checked.held_out:g} and dev {checked.dev:g} leave nothing."
        )
    sets = labelled_sets(data, fields, metric)
    for name, found in sets.items():
        if found.pairs:
            raise DataError(f"{name}: expected single answers with labels, found pairs.")
    sets = {name: _readable(found, reader) for name, found in sets.items()}
    inputs = TrainInputs(base, reader, metric, sets, checked)
    _check_labels(inputs)
    return inputs


def _check_labels(inputs: TrainInputs) -> None:
    """Refuse data of which a part that is learned from has answers of one label alone."""
    cases = _parted(inputs)
    for part in ("train", "dev"):
        labels = {case.label for of in cases.values() for case in of[part]}
        if len(labels) < 2:
            seen = f"{int(labels.pop())} alone" if labels else "none"
            raise DataError(
                f"{', '.join(cases)}: expected answers of both labels in the {part} part, "
                f"found {seen}. Give more data, or another seed, dev or held_out."
            )


def _readable(data: DataSet, reader: Reader) -> DataSet:
    """A data set without the answers that the judge will leave unscored."""
    kept = [case for case in data.cases if reader.reads(case.response.text)]
    left_out = Counter(data.left_out)
    left_out[UNREAD] += len(data.cases) - len(kept)
    return data._replace(cases=kept, left_out=dict(+left_out))


def _settings(overrides: Sequence[str], model: Model, metric: str) -> JudgeTraining:
    given: dict[str, Any] = dict(FOR_ENCODERS) if is_encoder(model) else {}
    given |= {} if metric == MISTAKES else NOT_OF_MISTAKES
    for override in overrides:
        given = put(given, *parse_override(override), f"--set {override}")
    settings = check(JudgeTraining, given, RecipeError, "judge train")
    if settings.decoys and metric != MISTAKES:
        raise RecipeError(
            f"judge train: expected no `decoys` for {metric}, found {settings.decoys:g}. Only "
            "a mistake stays one whatever stands beside it: leave the key out."
        )
    return settings


def _refuse_unfit(settings: JudgeTraining, model: Model, longest: int) -> None:
    """Refuse what an encoder cannot do."""
    for key, value in (("layers", settings.layers), ("adapted", settings.adapted)):
        if value != 1:
            raise RecipeError(
                f"judge train: expected no `{key}` for {model.name}, found {value:g}. It is an "
                "encoder, which is kept whole and learns in all layers: leave the key out."
            )
    if settings.max_tokens > longest:
        raise RecipeError(
            f"judge train: expected max_tokens of {longest} at most, which {model.name} reads, "
            f"found {settings.max_tokens}."
        )


Parted = dict[str, dict[Part, list[Case]]]
"""Cases by data set and part."""


def _parted(inputs: TrainInputs) -> Parted:
    settings, found = inputs.settings, {}
    for name, data in inputs.data.items():
        of: dict[Part, list[Case]] = {part: [] for part in PARTS}
        for case in data.cases:
            question = question_of(case.response.prompt)
            of[part_of(question, settings.held_out, settings.dev, settings.seed)].append(case)
        found[name] = of
    return found


def train_judge(inputs: TrainInputs, out: Path, progress: Progress) -> Path:
    """Train a judge into a folder and measure it there on the held-out questions.

    A judge that the folder holds of the same data, model and settings stays as it is. Another
    one goes to a folder `former/N` in it, once the new one is trained.

    Raises:
        InputError: the folder cannot be written, or is no place for this model's classifier.
        RunError: the training failed.
    """
    with claimed(beside_runs(out, OWN)) as folder:
        if _is_made_of(folder, inputs):
            progress.say("The judge is trained already, of the same data and settings.")
        else:
            _train_into(folder, inputs, progress)
        _measure(folder, inputs, progress)
    return folder


def _is_made_of(folder: Path, inputs: TrainInputs) -> bool:
    """Whether a folder holds the judge that would come of the inputs."""
    if not all((folder / name).exists() for name in OWN):
        return False
    card, sets = read_card(folder), inputs.data.items()
    known = card.training
    return (card.metric, card.reads, known.digest, known.settings) == (
        inputs.metric,
        READS,
        inputs.model.digest,
        inputs.settings.model_dump(exclude_none=True),
    ) and [(of.name, of.digest) for of in known.data] == [(n, of.digest) for n, of in sets]


def _measure(folder: Path, inputs: TrainInputs, progress: Progress) -> None:
    """Put the held-out questions into the card, where they are not in it yet."""
    card, sets = read_card(folder), _held_out(inputs, folder)
    together = {TOGETHER} if sets and len(inputs.data) > 1 else set()
    # A check may have put a part of it into the card.
    if not {*sets, *together} <= set(card.data):
        tested = _tested(inputs, sets, folder, progress)
        write_card(folder, card.model_copy(update={"data": dict(card.data) | tested}))


def _held_out(inputs: TrainInputs, folder: Path) -> dict[str, DataSet]:
    """What the judge is measured on, by name: each set's held-out part, also with decoys."""
    found: dict[str, DataSet] = {}
    for name, of in _parted(inputs).items():
        if of["held_out"]:
            found[name] = left = unseen(inputs.data[name], folder)
            if inputs.metric == MISTAKES:
                found[NAME.format(name)] = beside(left)
    return found


def _train_into(folder: Path, inputs: TrainInputs, progress: Progress) -> None:
    cases = _parted(inputs)
    for name, of in cases.items():
        counts = ", ".join(f"{part} {len(of[part])}" for part in PARTS)
        progress.say(f"{name}: {counts}")
    learned, decided_by = (
        [case for of in cases.values() for case in of[part]] for part in ("train", "dev")
    )
    train, dev = _rows(inputs, _beside(inputs, learned)), _rows(inputs, decided_by)
    training = _trained(inputs, cases, (train, dev), folder, progress)
    card = _card(inputs, training, decided_by, folder)
    write_seen(
        folder,
        {
            question_of(case.response.prompt)
            for of in cases.values()
            for part in ("train", "dev")
            for case in of[part]
        },
    )
    write_card(folder, card)


class Rows(NamedTuple):
    """Answers as tokens, with their labels."""

    rows: "list[Labelled]"
    cut: int
    """Those that were too long."""


def _beside(inputs: TrainInputs, cases: Sequence[Case]) -> list[Case]:
    """The cases, a share of them with decoys; one that would then be cut stays as it is."""
    settings, reader = inputs.settings, inputs.reader
    draw = random.Random(f"beside {settings.of_training}")
    chosen = [draw.random() < settings.decoys for _ in cases]
    with_them = with_decoys(cases, LEARNED, settings.of_training)

    def fits(case: Case) -> bool:
        answer = case.response
        return not reader.read(answer.prompt.conversation, answer.text, settings.max_tokens).cut

    return [
        other if wanted and fits(other) else case
        for case, other, wanted in zip(cases, with_them, chosen, strict=True)
    ]


def _rows(inputs: TrainInputs, cases: Sequence[Case]) -> Rows:
    from misstep.training.label_loss import Labelled

    rows, cut = [], 0
    for case in cases:
        answer = case.response
        read = inputs.reader.read(
            answer.prompt.conversation, answer.text, inputs.settings.max_tokens
        )
        rows.append(Labelled(read.ids, case.label))
        cut += read.cut
    return Rows(rows, cut)


def _card(
    inputs: TrainInputs, training: Training, dev: Sequence[Case], folder: Path
) -> JudgeCard:
    """The card of a judge that was written, calibrated on the dev part as it was written."""
    from misstep.training.classifier import calibration

    reader, most = inputs.reader, inputs.settings.max_tokens
    scorer = classifier_scorer(folder, reader)
    parts = [parts_of(reader, case.response, most, inputs.metric) for case in dev]
    odds = iter(scorer([part.ids for of in parts for part in of]))
    worst = [max(next(odds) for _ in of) for of in parts]
    found = calibration(worst, [case.label for case in dev])
    heat, shift = round(found.temperature, 4), round(found.shift, 4)
    return JudgeCard(
        judge=name_of(folder, heat, shift, most),
        metric=inputs.metric,
        reads=READS,
        max_tokens=most,
        temperature=heat,
        shift=shift,
        training=training,
        data={},
    )


def _trained(
    inputs: TrainInputs,
    cases: Parted,
    rows: tuple[Rows, Rows],
    folder: Path,
    progress: Progress,
) -> Training:
    from misstep.training import classifier

    started, (train, dev) = time.monotonic(), rows
    loss = _label_loss(inputs, [row.label for row in train.rows])
    began = time.monotonic()
    losses = classifier.fit(loss, train.rows, dev.rows, _how(inputs.settings, folder, progress))
    model = classifier.finished(loss, inputs.reader.pad)
    fitting = time.monotonic() - began
    seen = losses[-1].epoch * sum(len(row.ids) for row in train.rows)
    # A folder without a card is no judge: whatever is killed from here on leaves none.
    if is_trained_judge(str(folder)):
        _set_aside(folder, progress)
    classifier.save_classifier(model, inputs.reader.tokenizer, folder)
    return Training(
        model=inputs.model.name if inputs.model.path is None else inputs.model.path.name,
        digest=inputs.model.digest,
        settings=inputs.settings.model_dump(exclude_none=True),
        data=_sources(inputs, cases),
        dev_loss=tuple((at.epoch, at.loss) for at in losses),
        cut=train.cut,
        seconds=round(time.monotonic() - started, 1),
        tokens_per_second=round(seen / fitting, 1),
        device=device_text(),
        versions=versions(LIBRARIES),
    )


def _how(settings: JudgeTraining, folder: Path, progress: Progress) -> "Fit":
    from misstep.models.precision import micro_tokens
    from misstep.training.classifier import Fit

    return Fit(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=settings.of_training,
        micro_tokens=micro_tokens(),
        checkpoints=folder / "checkpoints",
        notify=partial(progress.update, "training steps"),
    )


def _sources(inputs: TrainInputs, cases: Parted) -> tuple[CardSource, ...]:
    """The data sets as the card names them."""
    known = {case.response.text for of in cases.values() for case in of["train"]}
    return tuple(
        CardSource(
            name=name,
            digest=inputs.data[name].digest,
            answers=Parts(**{part: len(of[part]) for part in PARTS}),
            questions=Parts(
                **{p: len({question_of(c.response.prompt) for c in of[p]}) for p in PARTS}
            ),
            left_out=inputs.data[name].left_out,
            repeated=sum(case.response.text in known for case in of["held_out"]),
        )
        for name, of in cases.items()
    )


def _set_aside(folder: Path, progress: Progress) -> None:
    """Keep a judge of other inputs, with all files beside it."""
    files = [path.name for path in folder.iterdir() if path.is_file() and path.name != LOCK]
    # The card last: what is killed on the way is found, and the rest set aside, next time.
    place = set_aside(folder, sorted(files, key=lambda name: name == CARD))
    progress.say(f"The judge that was here is kept in {place}.")


def _label_loss(inputs: TrainInputs, labels: Sequence[bool]) -> "LabelLoss | EncoderLoss":
    """What is trained, made of the model that was named."""
    from misstep.training.classifier import keep_lower_layers, of_language_model
    from misstep.training.encoder import load_encoder, of_encoder

    settings, seed = inputs.settings, inputs.settings.of_training
    if is_encoder(inputs.model):
        encoder = load_encoder(inputs.model.files, seed)
        return of_encoder(encoder, inputs.reader.pad, labels, settings.rank, seed)
    lm = load_weights(inputs.model)
    keep_lower_layers(lm, settings.layers)
    return of_language_model(lm, labels, settings.rank, seed, settings.adapted)


def _tested(
    inputs: TrainInputs, sets: dict[str, DataSet], folder: Path, progress: Progress
) -> dict[str, Tested]:
    """The judge as written, on the held-out questions of each data set, and of all."""
    judge, found = ClassifierJudge(folder), {}
    together: list[JudgedCase] = []
    for name, data in sets.items():
        judged = judge_cases(judge, name, data, progress)
        checked = measure_data(name, data.digest, False, data.left_out, judged)
        found[name] = Tested.of(checked)
        together += [] if data.decoys else judged
    if len(inputs.data) > 1:
        whole = digest([data.digest for data in sets.values() if not data.decoys])
        found[TOGETHER] = Tested.of(measure_data(TOGETHER, whole, False, {}, together))
    return found
