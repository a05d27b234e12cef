"""Judges made of an encoder: read as pairs, trained by an adapter and a head, written plain."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_classifier import answer, labelled
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from misstep.errors import ModelError, RecipeError
from misstep.evidence.judge_card import read_card
from misstep.judge_train import UNREAD, read_train_inputs, train_judge
from misstep.judges.base import EMPTY
from misstep.judges.classifier import ClassifierJudge
from misstep.models.locate import (
    ENCODERS,
    is_encoder,
    locate,
    locate_any,
)
from misstep.models.reading import Reader
from misstep.models.weights import load_tokenizer, load_weights
from misstep.progress import Silent
from misstep.training.classifier import (
    Fit,
    finished,
    fit,
    load_classifier,
    save_classifier,
)
from misstep.training.encoder import load_encoder, of_encoder
from misstep.training.label_loss import Labelled, balance
from misstep.training.loss import mean_loss
from misstep.training.scoring import Scorer

SETTINGS = ["epochs=6", "learning_rate=0.01", "held_out=0.25", "dev=0.2", "max_tokens=48"]


def reader_of(folder: Path) -> Reader:
    return Reader.for_model(locate_any(str(folder)))


def how(folder: Path) -> Fit:
    return Fit(6, 0.003, 4, 0, 4096, folder / "checkpoints", lambda *_: None)


def rows_of(reader: Reader) -> list[Labelled]:
    texts = [("zz zz", True), ("all is well", False), ("z", True)] * 5
    return [Labelled(reader.read(f"{i}", t, 40).ids, k) for i, (t, k) in enumerate(texts)]


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    data = [labelled(folder)]
    inputs = read_train_inputs(data, str(tiny_encoder), "mistake_rate", [], SETTINGS)
    return train_judge(inputs, folder / "judge", Silent())


def test_an_encoder_is_told_from_a_language_model(
    tiny_encoder: Path, tiny_model: Path, trained: Path
) -> None:
    assert is_encoder(locate_any(str(tiny_encoder)))
    assert not is_encoder(locate_any(str(tiny_model)))
    assert is_encoder(locate_any(str(trained)))


def test_an_encoder_is_no_model_to_repair(tiny_encoder: Path) -> None:
    with pytest.raises(ModelError, match="expected a language model, found an encoder"):
        locate(str(tiny_encoder))
    with pytest.raises(ModelError, match="misstep judge train --model"):
        load_weights(locate_any(str(tiny_encoder)))


def test_an_encoder_reads_what_its_own_tokenizer_makes_of_a_pair(tiny_encoder: Path) -> None:
    reader = reader_of(tiny_encoder)
    pair = load_tokenizer(locate_any(str(tiny_encoder)))("a question", "an answer")
    assert list(reader.read("a question", "an answer", 48).ids) == pair["input_ids"]


def test_long_texts_are_cut_and_the_separators_stay(tiny_encoder: Path) -> None:
    reader = reader_of(tiny_encoder)
    ids, cut = reader.read("q" * 50, "a" * 50, 33)
    letters = {text: reader.read(text, "", 9).ids[1] for text in "qa"}
    q, a = letters["q"], letters["a"]
    assert cut and ids == (1, *[q] * 15, 2, *[a] * 15, 2)
    assert not reader.read("q", "a", 5).cut and reader.read("q", "aa", 5).cut


def test_a_text_cannot_spell_separators(tiny_encoder: Path) -> None:
    ids = reader_of(tiny_encoder).read("[SEP]", "[CLS] [PAD]", 64).ids
    assert [i for i in ids if i < 3] == [1, 2, 2]


def test_a_tokenizer_that_reads_no_pairs_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path, dirs_exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$B $B $A", special_tokens=[]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a tokenizer that reads a pair of texts"):
        reader_of(tmp_path)


def test_the_judge_learns_and_is_a_plain_classifier_of_transformers(trained: Path) -> None:
    card = read_card(trained)
    found = card.data["data"]
    assert found.accuracy is not None and found.accuracy.value == 1.0
    assert card.training.settings["layers"] == 1.0
    bad, good = ClassifierJudge(trained).score([answer("zzzz zzzzz"), answer("all is well")])
    assert bad.value is not None and good.value is not None
    assert bad.value > 0.5 > good.value
    model: Any = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    pair = load_tokenizer(locate_any(str(trained)))("Q", "zzzz zzzzz", return_tensors="pt")
    with torch.no_grad():
        odds = model(pair["input_ids"]).logits.item()
    calibrated = (odds - card.shift) / card.temperature
    assert bad.value == pytest.approx(1 / (1 + math.exp(-calibrated)), abs=1e-4)


def test_an_answer_of_which_the_tokenizer_makes_nothing_is_neither_scored_nor_learned(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_encoder, tmp_path / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    tokenizer.save_pretrained(base)
    data = Path(labelled(tmp_path))
    row = {"prompt": "Q" * 99, "response": "\u200b\u200b", "label": 0}
    data.write_text(data.read_text() + f"{json.dumps(row)}\n" * 9)
    inputs = read_train_inputs([str(data)], str(base), "mistake_rate", [], SETTINGS)
    judge = ClassifierJudge(train_judge(inputs, tmp_path / "judge", Silent()))
    assert judge.card.training.data[0].left_out == {UNREAD: 9}
    hidden = [answer("\u200b"), answer("\u200b", "Q" * 99)]
    *unread, read = judge.score([*hidden, answer("\u200bzz")])
    assert [(score.value, score.reason) for score in unread] == [(None, EMPTY)] * 2
    assert read.value is not None


def test_answers_are_judged_alike_in_any_company(trained: Path) -> None:
    judge = ClassifierJudge(trained)
    rows = [answer(f"{'z' * i} well {i}") for i in range(1, 20)]
    alone = [judge.score([row])[0].value for row in rows]
    assert [score.value for score in judge.score(rows)] == pytest.approx(alone, abs=1e-3)


def test_the_loss_is_that_of_the_labels_and_padding_is_unseen(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    reader = reader_of(tiny_encoder)
    rows = rows_of(reader)
    labels = [row.label for row in rows]
    loss = of_encoder(load_encoder(tiny_encoder), reader.pad, labels, 4, 0).eval()
    low, high = balance(labels)
    expected = 0.0
    for row in rows:
        with torch.no_grad():
            odds = loss.model(input_ids=torch.tensor([row.ids])).logits.item()
        expected += high * math.log1p(math.exp(-odds)) if row.label else 0.0
        expected += 0.0 if row.label else low * math.log1p(math.exp(odds))
    found = mean_loss(loss, [row.row for row in rows], 4096)
    assert found == pytest.approx(expected / len(rows), rel=1e-4)


def test_the_body_learns_by_an_adapter_and_the_head_whole(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    reader = reader_of(tiny_encoder)
    rows = rows_of(reader)
    encoder = load_encoder(tiny_encoder)
    # A masked language model's file has no pooler: it is new, as the classifier is.
    assert encoder.head == {
        f"{part}.{kind}"
        for part in ("bert.pooler.dense", "classifier")
        for kind in ("weight", "bias")
    }
    loss = of_encoder(encoder, reader.pad, [row.label for row in rows], 4, 0)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    fit(loss, rows, rows[:6], how(tmp_path))
    changed = {n for n, p in loss.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(
        "lora_" in name or "classifier" in name or "pooler" in name for name in changed
    )
    assert any("lora_" in name for name in changed)
    assert any(name.endswith("classifier.weight") for name in changed)


def test_products_in_bf16_leave_the_weights_in_fp32(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(tiny_encoder)
    rows = rows_of(reader)
    seen = set()

    def look(module: Any, given: Any, made: Any) -> None:
        # Measured on the dev part it computes in the type that it will judge in.
        if module.training:
            seen.add(made.dtype)

    monkeypatch.setattr("misstep.training.classifier.fastest_dtype", lambda: torch.bfloat16)
    loss = of_encoder(load_encoder(tiny_encoder), reader.pad, [row.label for row in rows], 4, 0)
    layer = loss.model.base_model.model.bert.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(look)
    before = mean_loss(loss, [row.row for row in rows], 4096)
    fit(loss, rows, rows, how(tmp_path))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in loss.parameters()} == {torch.float32}
    assert mean_loss(loss, [row.row for row in rows], 4096) < before


ENDS = {f"{end}_token_id": i for end, i in (("cls", 1), ("sep", 2), ("bos", 1), ("eos", 2))}
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 32},
    "ernie": {},
    "eurobert": {"num_key_value_heads": 2} | ENDS,
    "modernbert": {"local_attention": 8, "classifier_pooling": "mean"} | ENDS,
    "mpnet": {},
    "roberta": {},
    "xlm-roberta": {},
}


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoders_of_many_families_learn_and_are_written_as_they_were(
    family: str, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever this machine is fast at.
    monkeypatch.setattr("misstep.training.classifier.fastest_dtype", lambda: torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            # RoBERTa's positions begin behind its pad.
            "max_position_embeddings": 80,
            "pad_token_id": 0,
        }
        | FAMILIES[family],
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    reader = reader_of(tmp_path / "base")
    rows = rows_of(reader)
    loss = of_encoder(
        load_encoder(tmp_path / "base"), reader.pad, [row.label for row in rows], 4, 0
    )
    before = mean_loss(loss, [row.row for row in rows], 4096)
    fit(loss, rows, rows, how(tmp_path))
    assert mean_loss(loss, [row.row for row in rows], 4096) < before
    ids = [row.ids for row in rows]
    adapted = Scorer(loss.model, reader.pad, 4096)(ids)
    save_classifier(finished(loss, reader.pad), reader.tokenizer, tmp_path / "judge")
    written = Scorer(load_classifier(tmp_path / "judge"), reader.pad, 4096)(ids)
    assert written == pytest.approx(adapted, abs=1e-4)


def test_the_head_of_a_classifier_of_other_labels_is_drawn_anew(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    other = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=6)
    other.save_pretrained(tmp_path)
    load_tokenizer(locate_any(str(tiny_encoder))).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert is_encoder(locate_any(str(tmp_path)))
    assert encoder.model.classifier.weight.shape == (1, 32)
    # What it has learned of a text stays, and learns by an adapter.
    assert encoder.head == {"classifier.weight", "classifier.bias"}
    assert torch.equal(encoder.model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_no_body_is_drawn_at_random(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 are missing.* bert\.encoder\.layer\.1"):
        load_encoder(tmp_path)


def test_a_head_that_is_new_is_drawn_by_the_seed(tiny_encoder: Path) -> None:
    first, again, other = (
        load_encoder(tiny_encoder, seed).model.classifier.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["layers=0.5", "max_tokens=48"], "no `layers`.*found 0.5.*kept whole"),
        (["adapted=0.5", "max_tokens=48"], "no `adapted`.*found 0.5.*kept whole"),
        (["max_tokens=65"], "max_tokens of 64 at most.*found 65"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_before_it_loads(
    settings: list[str], why: str, tmp_path: Path, tiny_encoder: Path
) -> None:
    with pytest.raises(RecipeError, match=why):
        read_train_inputs([labelled(tmp_path)], str(tiny_encoder), "mistake_rate", [], settings)
