import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from misstep.cli import report
from misstep.data.labelled import part_of
from misstep.data.sources import question_of
from misstep.engines import turns
from misstep.errors import EngineError, InputError
from misstep.evidence.check_results import read_check
from misstep.evidence.judge_card import SEEN, is_trained_judge, read_card, write_card
from misstep.judge_check import check_judge, read_check_inputs
from misstep.judge_config import load_judge, names_judge
from misstep.judge_train import PARTS, TOGETHER, _parted, read_train_inputs, train_judge
from misstep.judges.base import EMPTY
from misstep.judges.classifier import ClassifierJudge, classifier_scorer, probability
from misstep.judges.seats import Seat, seated
from misstep.judging import opened, read_judge
from misstep.models.locate import locate
from misstep.models.reading import Reader
from misstep.models.weights import load_weights
from misstep.policy import SHIPPED
from misstep.progress import Silent
from misstep.records import Prompt, Response, digest
from misstep.report.judges_markdown import cards_markdown
from misstep.training.classifier import (
    PATIENCE,
    Fit,
    calibration,
    finished,
    fit,
    keep_lower_layers,
    of_language_model,
)
from misstep.training.kernels import fast_layers
from misstep.training.label_loss import Labelled, LabelLoss, balance
from misstep.training.lora import adapted
from misstep.training.loss import mean_loss
from misstep.training.scoring import Scorer
from misstep.training.sharing import can_share

SETTINGS = ["epochs=6", "learning_rate=0.01", "held_out=0.25", "dev=0.2", "max_tokens=48"]


def labelled(folder: Path, name: str = "data.jsonl", n: int = 40) -> str:
    """Two answers to each question; the bad ones are full of one letter."""
    rows = [
        {"prompt": f"Q{i}", "response": text, "label": label}
        for i in range(n)
        for text, label in ((f"zzzzz zzzz {i}", 1), (f"all is well {i}", 0))
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    inputs = read_train_inputs(
        [labelled(folder)], str(tiny_model), "mistake_rate", [], SETTINGS
    )
    return train_judge(inputs, folder / "judge", Silent())


def answer(text: str, prompt: str = "Q") -> Response:
    return Response(prompt=Prompt.of(prompt), text=text)


def test_a_judge_learns_what_its_labels_say(trained: Path) -> None:
    card = read_card(trained)
    found, hard = card.data["data"], card.data["data with decoys"]
    assert hard.n == found.n and hard.digest != found.digest
    assert found.n > 10 and found.unscored == 0
    assert found.accuracy is not None and found.accuracy.value == 1.0
    assert found.auc is not None and found.auc.value == 1.0
    bad, good = ClassifierJudge(trained).score([answer("zzzz zzzzz"), answer("all is well")])
    assert bad.value is not None and good.value is not None
    assert bad.value > 0.5 > good.value
    assert bad.judge == card.judge and bad.metric == "mistake_rate"


def test_the_folder_holds_safetensors_and_is_read_by_transformers_alone(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert not [p for p in trained.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not (trained / "checkpoints").exists()
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert model.config.num_labels == 1
    # Two layers, of which two thirds are one.
    assert model.config.num_hidden_layers == len(model.model.layers) == 1


def test_no_question_is_in_two_parts(tmp_path: Path, tiny_model: Path) -> None:
    data = Path(labelled(tmp_path))
    again = data.with_name("again.jsonl")
    again.write_text(data.read_text().replace('"Q', '"  q').replace("zzzz", "yyyy"))
    inputs = read_train_inputs(
        [str(data), str(again)], str(tiny_model), "mistake_rate", [], SETTINGS
    )
    parted = _parted(inputs)
    parts = {
        part: {question_of(case.response.prompt) for of in parted.values() for case in of[part]}
        for part in PARTS
    }
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 40


def test_parts_have_their_shares() -> None:
    shares = dict.fromkeys(("train", "dev", "held_out"), 0)
    for number in range(2_000):
        shares[part_of(f"question {number}", 0.2, 0.1, seed=3)] += 1
    assert shares["held_out"] == pytest.approx(400, abs=60)
    assert shares["dev"] == pytest.approx(200, abs=45)
    assert {part_of("q", 0.2, 0.1, seed) for seed in range(60)} == set(shares)


def test_a_check_leaves_out_what_the_judge_has_seen(trained: Path, tmp_path: Path) -> None:
    card = read_card(trained)
    (source,) = card.training.data
    assert source.answers.train == 2 * source.questions.train
    # The same questions in other files and another spelling, and forty that are new.
    data = labelled(tmp_path, "again.jsonl", 80)
    again = Path(data)
    again.write_text(again.read_text().replace('"Q', '"  q'))
    folder = check_judge(str(trained), [data], tmp_path / "out", None, [], Silent())
    (found,) = read_check(folder / "check.json").data
    assert found.whole.n == source.answers.held_out + 80
    assert sum(found.left_out.values()) == source.answers.train + source.answers.dev
    entered = read_card(trained).data
    assert entered["again"].n == found.whole.n
    assert entered["data"] == card.data["data"], "what stood there stays"
    assert f"| again | {found.whole.n} | 0 |" in cards_markdown(trained)


def test_a_check_that_is_done_again_reads_no_answer_twice(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (labelled(tmp_path, f"{name}.jsonl", 60) for name in ("twice", "thrice"))
    given: tuple[Any, ...] = (tmp_path / "out", None, [], Silent())
    folder = check_judge(str(trained), [one], *given)
    first = (folder / "check.json").read_bytes()
    monkeypatch.setattr(ClassifierJudge, "_loaded", lambda _: pytest.fail("it loads again"))
    check_judge(str(trained), [one], *given)
    assert (folder / "check.json").read_bytes() == first
    # Equal answers in another file are equal answers.
    check_judge(str(trained), [one, other], *given)
    found, again = read_check(folder / "check.json").data
    assert found.whole == again.whole


def test_pairs_are_checked_and_are_not_on_the_card(tiny_model: Path, tmp_path: Path) -> None:
    # Of mistakes LLMBar's pairs say nothing.
    data, settings = [labelled(tmp_path)], [*SETTINGS, "epochs=1"]
    inputs = read_train_inputs(data, str(tiny_model), "helpfulness", [], settings)
    trained = train_judge(inputs, tmp_path / "judge", Silent())
    row = {"input": "A new question", "output_1": "well", "output_2": "very ill", "label": 1}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row]))
    before = read_card(trained)
    folder = check_judge(str(trained), [str(path)], tmp_path / "out", None, [], Silent())
    (found,) = read_check(folder / "check.json").data
    assert found.pairs and "length_bias" in found.whole.metrics
    assert read_card(trained) == before


def test_other_data_of_the_same_name_stand_beside_on_the_card(
    trained: Path, tmp_path: Path
) -> None:
    before, paths = set(read_card(trained).data), []
    for n in (60, 80, 60):
        (tmp_path / str(n)).mkdir(exist_ok=True)
        paths.append(labelled(tmp_path / str(n), "other.jsonl", n))
        check_judge(str(trained), paths[-1:], tmp_path / "out", None, [], Silent())
    entered = read_card(trained).data
    assert set(entered) - before == {"other", paths[1]}
    assert entered["other"].n == entered[paths[1]].n - 40


def test_the_card_counts_held_out_answers_that_were_trained_on(
    trained: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (source,) = read_card(trained).training.data
    assert source.repeated == 0, "each answer has its question's number"
    data = labelled(tmp_path)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    # Every good answer is the same one, whatever was asked; the bad ones stay apart.
    stock = [row if row["label"] else row | {"response": "all is well"} for row in rows]
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in stock))
    settings = [*SETTINGS[1:], "epochs=1"]
    inputs = read_train_inputs([data], str(tiny_model), "mistake_rate", [], settings)
    folder = train_judge(inputs, tmp_path / "judge", Silent())
    (source,) = read_card(folder).training.data
    assert source.repeated == source.answers.held_out / 2 > 0
    told = (
        f"Of {source.answers.held_out} held-out answers {source.repeated} stand word for word"
    )
    assert told in cards_markdown(folder)
    old = source.model_dump(exclude={"repeated"})
    assert type(source).model_validate(old).repeated is None


def test_data_of_one_name_are_apart_on_the_card_with_decoys_too(
    trained: Path, tmp_path: Path, tiny_model: Path
) -> None:
    for name, n in (("a", 40), ("b", 60)):
        (tmp_path / name).mkdir()
        labelled(tmp_path / name, n=n)
    paths = [str(tmp_path / name / "data.jsonl") for name in "ab"]
    settings = [*SETTINGS[1:], "epochs=0.5"]
    inputs = read_train_inputs(paths, str(tiny_model), "mistake_rate", [], settings)
    data = read_card(train_judge(inputs, tmp_path / "judge", Silent())).data
    assert {f"{path} with decoys" for path in paths} < set(data)
    assert all(data[f"{path} with decoys"].n == data[path].n for path in paths)
    # And a check with decoys puts both into the card of its judge.
    check_judge(str(trained), paths, tmp_path / "out", None, [], Silent(), decoys=True)
    assert {f"{path} with decoys" for path in paths} < set(read_card(trained).data)


def test_a_data_set_that_was_seen_whole_is_refused(trained: Path, tmp_path: Path) -> None:
    seen = set((trained / SEEN).read_text().split())
    known = [i for i in range(40) if digest(question_of(Prompt.of(f"Q{i}"))) in seen]
    path = tmp_path / "seen.jsonl"
    rows = [{"prompt": f"Q{i}", "response": "well", "label": i % 2} for i in known]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="was not trained on, found none"):
        read_check_inputs(str(trained), [str(path)], None, [])


@pytest.mark.parametrize("step", ["save_classifier", "_card", "write_seen", "write_card"])
def test_a_training_that_is_killed_leaves_no_judge_of_old_and_new(
    step: str, trained: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = shutil.copytree(trained, tmp_path / "judge")
    settings = [*SETTINGS, "seed=1", "epochs=0.1"]
    inputs = read_train_inputs(
        [labelled(tmp_path)], str(tiny_model), "mistake_rate", [], settings
    )
    of = "misstep.training.classifier" if step == "save_classifier" else "misstep.judge_train"
    monkeypatch.setattr(f"{of}.{step}", killed)
    with pytest.raises(KeyboardInterrupt):
        train_judge(inputs, folder, Silent())
    assert not is_trained_judge(str(folder))


def test_a_judge_of_the_same_inputs_is_not_trained_again(
    trained: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(trained, tmp_path / "judge")
    inputs = read_train_inputs(
        [labelled(trained.parent)], str(tiny_model), "mistake_rate", [], SETTINGS
    )

    def nothing(*_: object) -> None:
        raise AssertionError

    # As if it had been killed before it was measured.
    card = read_card(folder)
    write_card(folder, card.model_copy(update={"data": {}}))
    monkeypatch.setattr("misstep.training.classifier.fit", nothing)
    train_judge(inputs, folder, Silent())
    measured = read_card(folder)
    assert measured.data == {name: card.data[name] for name in ("data", "data with decoys")}
    monkeypatch.setattr("misstep.judge_train._tested", nothing)
    train_judge(inputs, folder, Silent())
    assert read_card(folder) == measured and not (folder / "former").exists()


@pytest.mark.parametrize("metric", ["mistake_rate", "over_refusal"])
def test_what_a_check_has_left_unmeasured_is_measured_by_training(
    metric: str,
    trained: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(trained, tmp_path / "judge")
    data = [labelled(tmp_path), labelled(tmp_path, "other.jsonl")]
    inputs = read_train_inputs(data, str(tiny_model), metric, [], SETTINGS)
    monkeypatch.setattr("misstep.judge_train._is_made_of", lambda *_: True)
    write_card(folder, read_card(folder).model_copy(update={"data": {}}))
    train_judge(inputs, folder, Silent())
    whole = read_card(folder)
    hard = {"data with decoys", "other with decoys"} if metric == "mistake_rate" else set()
    assert set(whole.data) == {"data", "other", TOGETHER, *hard}
    # As it was killed before it measured, and then checked on the same data.
    checked = {name: whole.data[name] for name in ("data", "other")}
    write_card(folder, whole.model_copy(update={"data": checked}))
    train_judge(inputs, folder, Silent())
    assert read_card(folder) == whole

    def nothing(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("misstep.judge_train._tested", nothing)
    train_judge(inputs, folder, Silent())


def test_a_judge_of_other_inputs_is_kept_beside_the_new_one(
    trained: Path, tmp_path: Path, tiny_model: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "judge")
    settings = [*SETTINGS, "seed=1", "epochs=0.1"]
    for number in (1, 2):
        settings[-1] = f"epochs=0.{number}"
        inputs = read_train_inputs(
            [labelled(tmp_path)], str(tiny_model), "mistake_rate", [], settings
        )
        train_judge(inputs, folder, Silent())
    former = [folder / "former" / name for name in "12"]
    assert ClassifierJudge(former[0]).name == ClassifierJudge(trained).name
    assert [read_card(of).training.settings["epochs"] for of in (former[1], folder)] == [
        0.1,
        0.2,
    ]


def test_judges_of_other_training_seeds_differ_and_have_seen_the_same_questions(
    trained: Path, tmp_path: Path, tiny_model: Path
) -> None:
    data, made = labelled(tmp_path), [trained]
    for settings in (["train_seed=0"], ["train_seed=1"]):
        inputs = read_train_inputs(
            [data], str(tiny_model), "mistake_rate", [], [*SETTINGS, *settings]
        )
        made.append(train_judge(inputs, tmp_path / settings[0], Silent()))
    same, other = (read_card(folder) for folder in made[1:])
    # The seed of the parts is that of training, where nothing else is said.
    assert same.judge == read_card(trained).judge != other.judge
    assert "train_seed" not in read_card(trained).training.settings
    assert len({(folder / "seen.txt").read_bytes() for folder in made}) == 1


def test_a_judge_is_never_written_over_something_else(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = {file: file.read_bytes() for file in model.iterdir()}
    inputs = read_train_inputs([labelled(tmp_path)], str(model), "mistake_rate", [], SETTINGS)
    with pytest.raises(InputError, match=r"expected an empty folder.*Give another --out"):
        train_judge(inputs, model, Silent())
    assert {file: file.read_bytes() for file in model.iterdir()} == before


def test_one_process_trains_a_judge(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected one process, found 2"):
        read_train_inputs([labelled(tmp_path)], str(tiny_model), "mistake_rate", [], SETTINGS)


def test_a_card_of_other_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "judge")
    assert ClassifierJudge(folder).name == ClassifierJudge(trained).name
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"card\.json: expected the card of the files beside"):
        read_check_inputs(str(folder), [labelled(tmp_path)], None, [])


def broken(judge: ClassifierJudge, odds: Callable[[Sequence[int]], float]) -> ClassifierJudge:
    def scorer(rows: Sequence[Sequence[int]]) -> list[float]:
        return [odds(row) for row in rows]

    judge._scorer = scorer  # type: ignore[assignment]
    return judge


def test_a_crash_or_no_number_is_unscored_and_moves_no_other_answer(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    texts = ["all is well", "zzzz zzzz", "some third"]
    rows = [answer(text) for text in texts]
    whole = ClassifierJudge(trained).score(rows)
    real, tokens = judge._loaded(), []

    def crash(row: Sequence[int]) -> float:
        tokens.append(row)
        if row == tokens[0]:
            raise RuntimeError("out of memory")
        return real([row])[0]

    found = broken(judge, crash).score(rows)
    assert found[0].value is None and "out of memory" in found[0].reason
    assert [s.value for s in found[1:]] == pytest.approx([s.value for s in whole[1:]], abs=0.02)
    for lost in (math.nan, math.inf, -math.inf):
        (score,) = broken(judge, lambda _, lost=lost: lost).score(rows[:1])  # type: ignore[misc]
        assert score.value is None and "no number" in score.reason


def test_weights_that_do_not_load_end_the_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def load(*_: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("misstep.judges.classifier.classifier_scorer", load)
    with pytest.raises(EngineError, match="do not load: CUDA out of memory") as raised:
        ClassifierJudge(trained).score([answer("all is well"), answer("zzzz")])
    assert len(tries) == 1 and "run the same command again" in str(raised.value)


def test_weights_go_with_the_judge_and_when_another_needs_the_gpu(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = [], classifier_scorer

    def load(folder: Path, reader: Reader) -> Scorer:
        loads.append(folder)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        scorer = real(folder, reader)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return scorer

    class Other:
        def give_up(self) -> None:
            given_up.append(1)

    given_up: list[int] = []
    monkeypatch.setattr("misstep.judges.classifier.classifier_scorer", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    turns.take(Other())
    with opened(read_judge(str(trained)), lambda _: pytest.fail("asks no model")) as judge:
        assert isinstance(judge, ClassifierJudge)
        first = judge.score([answer("all is well")])
        assert given_up == [1]
        turns.take(Other())
        assert judge._scorer is None
        assert judge.score([answer("all is well")]) == first
        assert len(loads) == 2
    assert judge._scorer is None


def test_answers_are_judged_alike_in_any_company_and_order(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    rows = [answer(f"{'z' * i} well {i}") for i in range(1, 20)]
    alone = [judge.score([row])[0].value for row in rows]
    together = [score.value for score in judge.score(rows[::-1])][::-1]
    assert together == pytest.approx(alone, abs=0.02)


def test_of_a_long_answer_the_worst_part_counts(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    texts = ("well", "all is well " * 20, "all is well " * 19 + "zzzzz zzzz")
    short, long, bad = judge.score([answer(text) for text in texts])
    assert (short.reason, long.reason) == ("", "read in 7 parts")
    assert short.value is not None and long.value is not None and bad.value is not None
    assert max(short.value, long.value) < 0.5 < bad.value
    (asked_long,) = judge.score([answer("well", prompt="Q" * 90)])
    assert asked_long.reason == "cut to 48 tokens"


def test_of_a_long_refusal_the_beginning_counts(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    judge.metric = "over_refusal"
    (score,) = judge.score([answer("all is well " * 19 + "zzzzz zzzz")])
    assert score.reason == "cut to 48 tokens"
    assert score.value is not None and score.value < 0.5


def test_in_a_run_the_probability_of_a_mistake_stands_beside_the_verdict(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    responses = [answer("", "nothing"), answer("fine"), answer("what a bad one")]
    for response, score in zip(responses, judge.score(responses), strict=True):
        verdict, graded = Seat(judge).told(response, score)
        assert verdict == score and graded.counted == graded.value == score.value
        assert graded.metric == "mistake_probability" and graded.reason == score.reason
        assert verdict.counted == (None if score.value is None else score.value >= 0.5)
    second = seated([judge], {"again": judge})[1]
    assert [s.metric for s in second.told(responses[1], score)] == [
        "mistake_rate@again",
        "mistake_probability@again",
    ]
    judge.metric = "over_refusal"
    (verdict,) = Seat(judge).told(responses[1], judge.score(responses)[1])
    assert verdict.metric == "refusal_rate"


def test_an_empty_answer_is_unscored_and_moves_no_other(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    scores = judge.score([answer(text) for text in ("zzzz zzzz", "", " \n", "all is well")])
    assert [score.reason for score in scores[1:3]] == [EMPTY] * 2
    bad, *nothing, good = [score.value for score in scores]
    assert nothing == [None, None]
    assert bad is not None and good is not None and bad > 0.5 > good


def test_a_long_answer_is_read_whole_and_every_part_after_the_prompt(tiny_model: Path) -> None:
    reader = Reader.for_model(locate(str(tiny_model)))
    letters = " ".join(map(str, range(10, 45)))
    parts = reader.read_whole("hm?", letters, 40)
    texts = [reader.tokenizer.decode(part.ids[:-1]).split("<|im_end|>") for part in parts]
    assert {asked for asked, _ in texts} == {"hm?"}
    assert not any(part.cut for part in parts)
    said = [answered for _, answered in texts]
    whole = said[0]
    for text in said[1:]:
        shared = next(n for n in range(len(text), 0, -1) if whole.endswith(text[:n]))
        assert shared >= 8, "a quarter of the part"
        whole += text[shared:]
    assert whole == letters
    assert reader.read("hm?", letters, 40) == parts[0]._replace(cut=True)


def test_a_judge_that_read_otherwise_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "judge")
    card = json.loads((folder / "card.json").read_text())
    del card["reads"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"of an earlier version.*Train the judge again"):
        ClassifierJudge(folder)


def test_prompts_keep_their_place_when_texts_are_cut(tiny_model: Path) -> None:
    reader = Reader.for_model(locate(str(tiny_model)))

    def read(prompt: str, text: str, most: int) -> tuple[str, bool]:
        found = reader.read(prompt, text, most)
        assert found.ids[-1] == 2 and len(found.ids) <= most
        return reader.tokenizer.decode(found.ids[:-1]), found.cut

    assert read("hm?", "yes", 99) == ("hm?<|im_end|>yes", False)
    assert read("hm?", "y" * 90, 14) == ("hm?<|im_end|>" + "y" * 9, True)
    assert read("h" * 90, "y" * 90, 22)[0] == "h" * 10 + "<|im_end|>" + "y" * 10
    assert read("h" * 90, "yes", 22)[0] == "h" * 17 + "<|im_end|>yes"


def test_a_text_cannot_spell_control_tokens(tiny_model: Path) -> None:
    reader = Reader.for_model(locate(str(tiny_model)))
    found = reader.read("<|im_start|>", "<|im_end|>\n<|pad|>", 200)
    assert [i for i in found.ids if i < 3] == [2, 2]


def test_calibration_undoes_a_scaling_and_a_shift() -> None:
    # Of ten cases with log-odds ln 4, eight are labelled 1.
    odds = [math.log(4)] * 10 + [-math.log(4)] * 10
    labels = [True] * 8 + [False] * 2 + [True] * 2 + [False] * 8
    assert calibration(odds, labels) == pytest.approx((1.0, 0.0), abs=1e-3)
    moved = [3 * value + 2 for value in odds]
    assert calibration(moved, labels) == pytest.approx((3.0, 2.0), rel=1e-3)


def test_scores_are_calibrated_as_the_card_says(trained: Path) -> None:
    judge, row = ClassifierJudge(trained), answer("some third")
    card = judge.card
    odds = judge._loaded()([judge._reader.read("Q", row.text, card.max_tokens).ids])[0]
    judge.card = card.model_copy(update={"temperature": 2.0, "shift": odds - 2 * math.log(3)})
    assert judge.score([row])[0].value == pytest.approx(0.75, abs=1e-3)


def test_no_probability_is_certain_and_none_overflows() -> None:
    low, middle, high = (probability(x) for x in (-2_000.0, 0.0, 2_000.0))
    assert 0 < low < 1e-5 and middle == 0.5 and 1 - 1e-5 < high < 1
    assert probability(1.5) + probability(-1.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["epoch=2"], "unknown key 'epoch'"),
        (["dev=0.6", "held_out=0.5"], "leave nothing"),
        (["seed=4294967296"], "less than 4294967296"),
        (["learning_rate=.inf"], "finite number"),
        (["epochs=0"], "more than 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(
    settings: list[str], why: str, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=why):
        read_train_inputs([labelled(tmp_path)], str(tiny_model), "mistake_rate", [], settings)


def test_one_label_is_nothing_to_learn(tmp_path: Path, tiny_model: Path) -> None:
    path = Path(labelled(tmp_path))
    path.write_text(path.read_text().replace('"label": 1', '"label": 0'))
    with pytest.raises(InputError, match="both labels in the train part"):
        read_train_inputs([str(path)], str(tiny_model), "mistake_rate", [], [])


def test_a_text_of_ones_own_is_named_by_its_kind_and_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(SHIPPED / "goal-hijacking.yaml", tmp_path / "own.yaml")
    for path in (f"{tmp_path}/own.yaml", "~/own.yaml"):
        assert load_judge(f"policy:{path}").policy == path
        assert read_judge(f"policy:{path}").probe().name == "rule:obedience/2"


def test_a_trained_judge_is_named_by_folder_or_file(trained: Path, tmp_path: Path) -> None:
    assert load_judge(str(trained), None).classifier == str(trained)
    path = tmp_path / "judge.yaml"
    path.write_text(f"classifier: {trained}\n")
    assert load_judge(str(path), None).classifier == str(trained)
    path.write_text(f"classifier: {tmp_path}\n")
    with pytest.raises(InputError, match=r"expected a folder with card\.json"):
        load_judge(str(path), None)
    with pytest.raises(InputError, match="asks no model"):
        load_judge(str(trained), "smollm2-135m")


def test_a_trained_judge_may_lie_in_the_users_own_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(trained.parent))
    written = f"~/{trained.name}"
    path = tmp_path / "judge.yaml"
    path.write_text(f"classifier: {written}\n")
    assert names_judge(written)
    for name in (written, str(path)):
        found = read_judge(name)
        assert found.trained() == [trained]
        assert found.probe().name == read_card(trained).judge


def test_a_judge_has_a_page_in_markdown_only(trained: Path) -> None:
    with pytest.raises(InputError, match=r"found a trained judge.* with --markdown"):
        report(trained)


def test_both_labels_weigh_the_same() -> None:
    labels = [True] * 9 + [False] * 3
    low, high = balance(labels)
    assert 9 * high == pytest.approx(3 * low) == pytest.approx(12 / 2)


def some_rows(reader: Reader) -> list[Labelled]:
    texts = [("zz zz", True), ("all well", False), ("z", True)] * 5
    return [Labelled(reader.read(f"{i}", t, 40).ids, k) for i, (t, k) in enumerate(texts)]


def label_loss(model: Path, rows: Sequence[Labelled]) -> LabelLoss:
    lm = load_weights(locate(str(model)))
    return of_language_model(lm, [row.label for row in rows], rank=4, seed=0)


def test_the_loss_is_that_of_the_labels_alone(tiny_model: Path) -> None:
    found = locate(str(tiny_model))
    rows = some_rows(Reader.for_model(found))
    lm = load_weights(found)
    loss = LabelLoss(adapted(lm, 4, 8, 0), lm, (0.5, 2.0))
    torch.nn.init.normal_(loss.score.weight)
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            hidden = lm.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
            odds = float(loss.score(hidden))
        expected += 2.0 * math.log1p(math.exp(-odds)) if row.label else 0.0
        expected += 0.0 if row.label else 0.5 * math.log1p(math.exp(odds))
    plain = mean_loss(loss, [row.row for row in rows], 4096)
    assert plain == pytest.approx(expected / len(rows), rel=0.02)
    with fast_layers(loss):
        fast = mean_loss(loss, [row.row for row in rows], 256)
    assert fast == pytest.approx(plain, rel=0.02)


def test_the_model_is_left_as_it_was_best_and_written_so(
    tiny_model: Path, tmp_path: Path
) -> None:
    reader = Reader.for_model(locate(str(tiny_model)))
    rows = some_rows(reader)
    # The dev part says the contrary, so each step makes it worse.
    dev = [Labelled(row.ids, not row.label) for row in rows[:6]]
    how = Fit(9, 0.01, 4, 0, 4096, tmp_path / "checkpoints", lambda *_: None)
    loss = label_loss(tiny_model, rows)
    measured = fit(loss, rows, dev, how)
    model = finished(loss, reader.pad)
    losses = [at.loss for at in measured]
    assert losses[0] == min(losses) and len(losses) == 1 + PATIENCE
    odds = Scorer(model.eval(), reader.pad, 4096)([row.ids for row in dev])
    low, high = balance([row.label for row in rows])
    lost = [
        high * math.log1p(math.exp(-x)) if row.label else low * math.log1p(math.exp(x))
        for x, row in zip(odds, dev, strict=True)
    ]
    assert fmean(lost) == pytest.approx(losses[0], rel=0.05)


def test_a_judge_is_trained_on_one_gpu_of_several(
    tiny_model: Path, tmp_path: Path, two_gpus: None
) -> None:
    rows = some_rows(Reader.for_model(locate(str(tiny_model))))
    how = Fit(1, 0.01, 4, 0, 4096, tmp_path / "checkpoints", lambda *_: None)
    assert fit(label_loss(tiny_model, rows), rows, rows[:6], how)


def test_layers_are_made_fast_where_they_are_trained(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, seen = some_rows(Reader.for_model(locate(str(tiny_model)))), []

    def look(loss: LabelLoss) -> None:
        seen.append((loss.lm.device.type, loss.score.weight.device.type, can_share(loss.lm)))
        raise KeyboardInterrupt

    # Trainer would move the model there later, when what is for processors is in it.
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    monkeypatch.setattr("misstep.training.classifier.fast_layers", look)
    how = Fit(1, 0.01, 4, 0, 4096, tmp_path / "checkpoints", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        fit(label_loss(tiny_model, rows), rows, rows[:6], how)
    assert seen == [("meta", "meta", False)]


def test_upper_layers_are_left_out(tiny_model: Path) -> None:
    lm = load_weights(locate(str(tiny_model)))
    kept = lm.model.layers[0]
    keep_lower_layers(lm, 0.5)
    assert list(lm.model.layers) == [kept] and lm.config.num_hidden_layers == 1


def test_layers_below_those_that_learn_stay_as_they_are(
    tiny_model: Path, tmp_path: Path
) -> None:
    found = locate(str(tiny_model))
    reader, lm = Reader.for_model(found), load_weights(found)
    rows = some_rows(reader)
    lower, upper = (dict(layer.state_dict()) for layer in load_weights(found).model.layers)
    loss = of_language_model(lm, [row.label for row in rows], rank=4, seed=0, share=0.5)
    learning = [name for name, p in loss.named_parameters() if p.requires_grad]
    assert all(".layers.1." in name or name == "score.weight" for name in learning)
    how = Fit(4, 0.01, 4, 0, 4096, tmp_path / "checkpoints", lambda *_: None)
    fit(loss, rows, rows, how)
    below, above = (layer.state_dict() for layer in finished(loss, reader.pad).model.layers)
    assert all(torch.equal(below[name], weight) for name, weight in lower.items())
    assert not all(torch.equal(above[name], weight) for name, weight in upper.items())


@pytest.mark.model
def test_the_embedded_model_makes_a_judge_by_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "misstep.cli", "judge", "train", labelled(tmp_path, n=60)]
    options = ["--out", str(tmp_path / "judge"), "--set", "epochs=2", "--set", "layers=0.2"]
    shown: Any = subprocess.run([*command, *options], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = read_card(tmp_path / "judge").data["data"]
    assert found.accuracy is not None and found.accuracy.value is not None
    assert found.accuracy.value > 0.9
