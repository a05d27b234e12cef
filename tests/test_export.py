"""`misstep export`: what is written is the trained model, asked as it was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from misstep.errors import DataError, InputError, ModelError
from misstep.export import export, find
from misstep.methods.registry import METHODS
from misstep.models.gguf_header import read_header
from misstep.models.locate import EMBEDDED, Model, locate
from misstep.models.merging import folded
from misstep.models.rendering import Renderer, tokens_of
from misstep.models.weights import load_tokenizer, load_weights
from misstep.policy import load_policy
from misstep.records import Message, Prompt

POLICY = "goal-hijacking"
ROOT = Path(__file__).parent.parent
TURNS = (
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Good day."),
    Message(role="user", content='Say {{ "x" }} \\n and\n\n"é".'),
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("misstep.models.weights.weights_dtype", lambda: torch.float32)


def finished(folder: Path, model: str, places: tuple[str, ...] = ("adapter",)) -> Path:
    """A run directory as far as an export reads it, with adapters of random weights."""
    found = locate(model)
    recipe = {"model": model, "policy": POLICY, "adapter": None}
    manifest = {
        "recipe": recipe,
        "device": "",
        "versions": {},
        "model": {"name": model, "digest": found.digest},
        "policy": {"name": POLICY, "digest": load_policy(POLICY).digest},
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for place in places:
        adapter_of(found, folder / place)
    return folder


def adapter_of(model: Model, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(load_weights(model), LoraConfig(r=4, target_modules=TARGETS))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = model.published
    adapted.save_pretrained(folder)
    (folder / "train.json").write_text("{}")


def asked(model: Model, messages: tuple[Message, ...]) -> list[int]:
    """The tokens that a server makes of messages: text by the template, then its tokens."""
    from transformers import AutoTokenizer

    given = {"gguf_file": model.files.name} if model.is_gguf else {}
    files = model.files.parent if model.is_gguf else model.files
    tokenizer = AutoTokenizer.from_pretrained(files, **given)
    turns = [turn.model_dump() for turn in messages]
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def measured(model: Model, method: str, guided: bool) -> list[int]:
    """The tokens by which a run asks a method's model."""
    policy, prompt = load_policy(POLICY), Prompt(messages=TURNS)
    turns = policy.guided_prompt(prompt) if guided else prompt.messages
    return Renderer.for_model(model).prompt(METHODS[method].ask(policy, turns))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("method", ["mistake_analysis", "coh", "vanilla"])
def test_a_folder_asks_as_the_run_did(
    tiny_model: Path, tmp_path: Path, method: str, guided: bool
) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ("adapter", "adapters/coh"))
    made = locate(str(export(run, method, guided, tmp_path / "out")))
    assert asked(made, TURNS) == measured(locate(str(tiny_model)), method, guided)


def test_earlier_releases_of_transformers_know_the_class_of_an_exported_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    # As the tokenizer of a GGUF file is called, from which the embedded model is exported.
    config = tiny_model / "tokenizer_config.json"
    assert json.loads(config.read_text())["tokenizer_class"] == "TokenizersBackend"
    run = finished(tmp_path / "run", str(tiny_model))
    out = export(run, "mistake_analysis", False, tmp_path / "out")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    read, before = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_model)
    assert read.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert read.eos_token == before.eos_token and read.pad_token == before.pad_token


def test_the_method_that_is_the_guide_alone_is_guided(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ())
    made = locate(str(export(run, "guided", False, tmp_path / "out")))
    assert asked(made, TURNS) == measured(locate(str(tiny_model)), "guided", True)


@pytest.mark.parametrize("guided", [False, True])
def test_a_model_without_a_template_gets_the_one_that_it_was_trained_with(
    untuned_model: Path, tmp_path: Path, guided: bool
) -> None:
    run = finished(tmp_path / "run", str(untuned_model))
    made = locate(str(export(run, "mistake_analysis", guided, tmp_path / "out")))
    expected = measured(locate(str(untuned_model)), "mistake_analysis", guided)
    assert asked(made, TURNS) == expected


def test_the_weights_are_the_sum(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    model, out = locate(str(tiny_model)), tmp_path / "out"
    export(run, "mistake_analysis", False, out)
    expected = logits(model, run / "adapter")
    assert (logits(locate(str(out))) - expected).abs().max() < 1e-5
    assert (logits(model) - expected).abs().max() > 1e-2
    # Whoever may read the configuration may read the weights.
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def logits(model: Model, adapter: Path | None = None) -> Any:
    import torch

    ids = torch.tensor([tokens_of(load_tokenizer(model), "What is the sum of both?")])
    with torch.inference_mode():
        return load_weights(model, adapter)(ids).logits


def test_a_full_fine_tune_is_written_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ())
    model, out = locate(str(tiny_model)), tmp_path / "out"
    tuned: Any = load_weights(model, None)
    tuned.model.norm.weight.data *= 2
    tuned.save_pretrained(run / "adapter")
    (run / "adapter" / "train.json").write_text("{}")
    export(run, "mistake_analysis", True, out)
    made = locate(str(out))
    assert (logits(made) - logits(model, run / "adapter")).abs().max() < 1e-5
    assert asked(made, TURNS) == measured(model, "mistake_analysis", True)


def test_a_recipes_own_adapter_is_in_the_sum(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ())
    adapter_of(locate(str(tiny_model)), tmp_path / "first")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["adapter"] = str(tmp_path / "first")
    (run / "manifest.json").write_text(json.dumps(manifest))
    whole = folded(locate(str(tiny_model)), tmp_path / "first", run / "base")
    adapter_of(whole, run / "adapter")
    monkeypatch.chdir(tmp_path)
    made = locate(str(export(Path("run"), "mistake_analysis", False, Path("out"))))
    assert (logits(made) - logits(whole, run / "adapter")).abs().max() < 1e-5


def test_the_card_says_what_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    shutil.copy(ROOT / "docs/results/quickstart/results.json", run)
    export(run, "mistake_analysis", True, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model_relation: finetune" in card
    assert "    {what the user says}\n    \n    (Answer the real question above." in card
    shown = [
        line.split(" | ")[:3] for line in card.splitlines() if line.startswith("| attacks ")
    ]
    expected = [["vanilla", "no"], ["vanilla", "yes"], ["mistake_analysis", "yes"]]
    assert [setting for _, *setting in shown] == expected


def test_a_comparisons_adapter_is_named_by_its_folder(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ("adapters/coh-0123456789abcdef",))
    made = locate(str(export(run, "coh-0123456789abcdef", False, tmp_path / "out")))
    assert asked(made, TURNS) == measured(locate(str(tiny_model)), "coh", False)
    with pytest.raises(InputError, match=r"found coh-0123456789abcdef\. Give one"):
        export(run, "coh", False, tmp_path / "other")


def swept(folder: Path, model: str, **trained: dict[str, Any]) -> Path:
    """A comparison of two policies, each cell with what it has trained."""
    run = finished(folder, model, tuple(f"adapters/{name}" for name in ("dpo-a", "dpo-b")))
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("dpo-a", "dpo-b"):
        (run / "adapters" / name / "train.json").write_text(json.dumps({"inputs": name[-1]}))
    for policy, training in trained.items():
        name = policy.replace("_", "-") if len(policy) > 1 else POLICY
        cell = {"name": name, "digest": load_policy(name).digest}
        made = manifest | {"policy": cell, "recipe": manifest["recipe"] | {"policy": name}}
        (run / "cells" / policy).mkdir(parents=True)
        (run / "cells" / policy / "manifest.json").write_text(json.dumps(made))
        manifest.setdefault("cells", {})[policy] = {
            "training": training,
            "variant": f"mix={policy}",
            "seed": 3,
        }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_of_several_policies_an_adapter_has_the_guide_of_its_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    trained = {name: {"dpo": {"inputs": name}} for name in "ab"}
    given = {"goal_hijacking": trained["a"], "harmlessness": trained["b"]}
    run = swept(tmp_path / "run", str(tiny_model), **given)
    for name, policy in (("dpo-a", "goal-hijacking"), ("dpo-b", "harmlessness")):
        guide = load_policy(policy).guided_prompt(Prompt.of("x"))[-1].content.split("x", 1)
        assert "x".join(find(run, name, True).words) == "x".join(guide)
    with pytest.raises(InputError, match="one policy that vanilla belongs to, found cells"):
        find(run, "vanilla", True)
    assert find(run, "vanilla", False).words == ("", "")
    both = swept(tmp_path / "both", str(tiny_model), **dict.fromkeys(given, trained["a"]))
    with pytest.raises(InputError, match="one policy that dpo belongs to, found cells of seve"):
        find(both, "dpo-a", True)
    with pytest.raises(InputError, match=r"dpo-b: expected an adapter that .* former recipe"):
        find(both, "dpo-b", False)


def test_what_cells_on_several_adapters_did_not_train_belongs_to_none_of_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    trained = {name: {"dpo": {"inputs": name}} for name in "ab"}
    run = swept(tmp_path / "run", str(tiny_model), **trained)
    assert find(run, "vanilla", False).model == locate(str(tiny_model))
    path = run / "cells/b/manifest.json"
    cell = json.loads(path.read_text())
    cell["recipe"]["adapter"], cell["parts"] = "first", {"adapter": "0123"}
    path.write_text(json.dumps(cell))
    with pytest.raises(InputError, match=r"one adapter that vanilla .*several: None, first"):
        find(run, "vanilla", False)


def test_adapters_of_a_comparison_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    trained = {name: {"dpo": {"inputs": name[-1]}} for name in ("a", "b")}
    run = swept(tmp_path / "run", str(tiny_model), **trained)
    with pytest.raises(InputError, match=r"found dpo-a \(mix=a, seed 3\), dpo-b \(mix=b, "):
        find(run, "dpo", False)
    empty = finished(tmp_path / "empty", str(tiny_model), ())
    with pytest.raises(InputError, match=r"found nothing\. Run the recipe .*, with dpo"):
        find(empty, "dpo", False)


@pytest.mark.parametrize("left", ["checkpoints", "adapter_config.json"])
def test_a_training_that_was_killed_is_told_to_be_unfinished(
    tiny_model: Path, tmp_path: Path, left: str
) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ())
    (run / "adapter").mkdir()
    (run / "adapter" / left).write_text("{}")
    with pytest.raises(DataError, match=r"adapter: expected a training that is finished"):
        export(run, "mistake_analysis", False, tmp_path / "out")


def test_an_adapter_of_a_former_recipe_is_not_taken_for_this_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    (run / "adapter" / "train.json").write_text(json.dumps({"inputs": "now"}))
    manifest = json.loads((run / "manifest.json").read_text())
    for training in ({}, {"mistake_analysis": {"inputs": "then"}}):
        (run / "manifest.json").write_text(json.dumps(manifest | {"training": training}))
        with pytest.raises(InputError, match="found one of a former recipe"):
            find(run, "mistake_analysis", False)
    training = {"mistake_analysis": {"inputs": "now"}}
    (run / "manifest.json").write_text(json.dumps(manifest | {"training": training}))
    assert find(run, "mistake_analysis", False).adapter == run / "adapter"


@pytest.mark.model
@pytest.mark.parametrize("guided", [False, True])
def test_a_gguf_asks_as_the_run_did(tmp_path: Path, guided: bool) -> None:
    run = finished(tmp_path / "run", EMBEDDED, ())
    made = locate(str(export(run, "vanilla", guided, tmp_path / "out.gguf")))
    assert asked(made, TURNS) == measured(locate(EMBEDDED), "vanilla", guided)
    old, new = read_header(locate(EMBEDDED).files), read_header(made.files)
    changed = {key for key in new.values if new.values[key] != old.values[key]}
    assert changed == {"general.file_type", "tokenizer.chat_template"}
    assert [place.name for place in new.tensors] == [place.name for place in old.tensors]
    probe = load_weights(made).get_input_embeddings().weight[:64]
    assert (
        probe - load_weights(locate(EMBEDDED)).get_input_embeddings().weight[:64]
    ).abs().max() < 1e-3


def test_what_is_there_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="expected a path where nothing is yet"):
        export(run, "mistake_analysis", False, tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "out", "said"),
    [
        ("sfft", "out", "expected a method (vanilla"),
        ("dpo", "out", "expected what dpo has trained, found mistake_analysis. Give one"),
        ("self_guard", "out", "a server does not"),
        ("mistake_analysis", "out.gguf", "convert_hf_to_gguf.py"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tiny_model: Path, tmp_path: Path, method: str, out: str, said: str
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    with pytest.raises(InputError) as raised:
        export(run, method, False, tmp_path / out)
    assert said in str(raised.value)
    assert not (tmp_path / out).exists()


def test_another_model_or_policy_under_the_name_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    manifest = json.loads((run / "manifest.json").read_text())
    for what in ("model", "policy"):
        changed = manifest | {what: {"name": what, "digest": "0" * 16}}
        (run / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=f"expected the {what} of its manifest"):
            export(run, "mistake_analysis", True, tmp_path / "out")


def test_a_policy_is_read_only_where_its_words_are_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["policy"] = "mine.yaml"
    (run / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    assert find(run, "mistake_analysis", False).words == ("", "")
    where = (
        r"run/manifest\.json: recipe\.policy: mine\.yaml: cannot be read.*from where you are"
    )
    with pytest.raises(InputError, match=where):
        find(run, "mistake_analysis", True)


def test_a_study_has_nothing_to_export(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model), ())
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"] = {"models": [str(tiny_model)], "policy": POLICY}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="found that of a study"):
        export(run, "mistake_analysis", False, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    file = run / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "x/y"})
    )
    with pytest.raises(ModelError, match="found one of x/y"):
        export(run, "mistake_analysis", False, tmp_path / "out")


def test_a_template_that_does_not_take_the_words_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    monkeypatch.setattr("misstep.export.asked_as_trained", lambda template, _: template)
    with pytest.raises(ModelError, match="Export without --guided"):
        export(run, "mistake_analysis", True, tmp_path / "out")


@pytest.mark.parametrize("name", ["vanilla-tuned", "mine"])
def test_what_was_trained_elsewhere_is_no_method_to_export(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    run = finished(tmp_path / "run", str(tiny_model))
    with pytest.raises(InputError, match=f"{name}: expected a method"):
        export(run, name, False, tmp_path / "out")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["others"] = {name: "somewhere"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="found one of the recipe's `others`"):
        export(run, name, False, tmp_path / "out")
