"""Cards of trained judges as a Markdown page: numbers only, no text of the data.

Made from the cards alone, which lie in the judges' folders or are files named after them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from misstep.errors import DataError
from misstep.evidence.check_results import CalibrationBin
from misstep.evidence.judge_card import CARD, JudgeCard, Tested, is_trained_judge
from misstep.records import read_json
from misstep.report.check import number
from misstep.report.check_markdown import number_cell, plain
from misstep.report.check_words import caution, titles
from misstep.report.markdown import line, table
from misstep.report.words import duration

JUDGES = "judges"


def holds_cards(folder: Path) -> bool:
    """Whether this is a trained judge, or a folder of the cards of several."""
    return is_trained_judge(str(folder)) or folder.name == JUDGES


def cards_markdown(folder: Path) -> str:
    """The page of a judge's folder, or of a folder of cards.

    Raises:
        DataError: there is no card, or one is unreadable.
    """
    own = folder / CARD
    found = [own] if own.is_file() else [*folder.glob("*.json"), *folder.glob(f"*/{CARD}")]
    if not found:
        raise DataError(
            f"{folder}: expected cards of trained judges, found none. Give the folder of a "
            "judge that `misstep judge train` wrote, or one that holds such folders."
        )
    cards = {
        path.parent.name if path.name == CARD else path.stem: read_json(path, JudgeCard)
        for path in sorted(found)
    }
    parts = [
        "# Trained judges, measured against labels",
        "Each judge on the questions of each data set that it was neither trained nor tuned "
        "on. Where a line says how many were left out, the set was trained on in part, or has "
        "rows without a label of this kind.",
    ]
    for metric in dict.fromkeys(card.metric for card in cards.values()):
        parts += _overview({n: card for n, card in cards.items() if card.metric == metric})
    for name, card in cards.items():
        parts += [f"## {name}", *_training(card), "\n".join(_tested(card))]
        parts += [caution(card.metric), *_calibration(card.data)]
    return "\n\n".join(parts) + "\n"


def _overview(cards: Mapping[str, JudgeCard]) -> Iterator[str]:
    """Judges of one metric side by side, on what two of them at least were measured on."""
    counts = Counter(name for card in cards.values() for name in card.data)
    sets = [name for name, judges in counts.items() if judges > 1]
    if not sets:
        return
    (metric,) = {card.metric for card in cards.values()}
    yield f"Judges of `{metric}`: accuracy and AUC. The intervals stand below."
    lines = table(["judge", "made of", *map(plain, sets)])
    for name, card in cards.items():
        cells = [_in_short(card.data.get(data)) for data in sets]
        lines.append(line([f"[{name}](#{name.replace('.', '')})", card.training.model, *cells]))
    yield "\n".join(lines)


def _in_short(found: Tested | None) -> str:
    if found is None:
        return "–"
    both = (("accuracy", found.accuracy), ("auc", found.auc))
    return ", ".join(number(metric, name)[0] for name, metric in both)


def _training(card: JudgeCard) -> Iterator[str]:
    made = card.training
    settings = ", ".join(f"`{key}` {value:.4g}" for key, value in made.settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in made.versions.items())
    losses = ", ".join(f"{loss:.3f} ({epoch:g})" for epoch, loss in made.dev_loss)
    spent = f"{duration(made.seconds)}, {made.tokens_per_second:.0f} tokens/s in training"
    yield (
        f"Judge `{card.judge}`, metric `{card.metric}`, made of `{made.model}`. {settings}.\n"
        f"Loss on the dev part, by epochs: {losses}. Temperature {card.temperature:.3f}, shift "
        f"{card.shift:.3f}. Texts cut: {made.cut}. {spent}. Machine: {made.device}. {versions}."
    )
    lines = table(["trained on", "answers", "questions", "dev", "held out"])
    for data in made.data:
        answers, questions = data.answers, data.questions
        counts = (answers.train, questions.train, questions.dev, questions.held_out)
        lines.append(line([plain(data.name), *map(str, counts)]))
    yield "\n".join(lines)
    repeated = [data.repeated for data in made.data if data.repeated is not None]
    if repeated:
        held_out = sum(data.answers.held_out for data in made.data if data.repeated is not None)
        yield (
            f"Of {held_out} held-out answers {sum(repeated)} stand word for word in the "
            "training part, under other questions."
        )


def _tested(card: JudgeCard) -> Iterator[str]:
    # A trained judge has no votes.
    shown = {n: title for n, title in titles(card.metric).items() if n in Tested.model_fields}
    yield from table(["data", "n", "unscored", "left out", *shown.values()])
    for name, found in card.data.items():
        counts = (found.n, found.unscored, sum(found.left_out.values()))
        cells = [number_cell(getattr(found, metric), metric) for metric in shown]
        yield line([plain(name), *map(str, counts), *cells])


def _calibration(data: Mapping[str, Tested]) -> Iterator[str]:
    curves = {name: found.calibration for name, found in data.items() if found.calibration}
    if not curves:
        return
    yield "Calibration: the share labelled 1 among answers with like scores, and how many."
    lines = table(["score", *map(plain, curves)])
    for place in range(10):
        bins = [_bin(curve, place / 10) for curve in curves.values()]
        cells = [f"{b.share:.2f} ({b.n})" if b else "–" for b in bins]
        lines.append(line([f"{place / 10:.1f} to {place / 10 + 0.1:.1f}", *cells]))
    yield "\n".join(lines)


def _bin(curve: tuple[CalibrationBin, ...], low: float) -> CalibrationBin | None:
    return next((found for found in curve if abs(found.low - low) < 0.05), None)
