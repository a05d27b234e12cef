"""RLHF: reward models that rank, policies that seek reward, tokens that are those of serving.

The quick tests train a random model of two layers with a byte tokenizer, made in `conftest`.
"""

import copy
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from misstep.errors import MissingExtra, ModelError, TrainingError
from misstep.models.locate import Model, locate
from misstep.models.rendering import Renderer
from misstep.models.weights import load_weights
from misstep.records import Message, Pair, Prompt
from misstep.stages import reinforce as stage
from misstep.stages import reward as reward_stage
from misstep.stages.reinforce import Feedback, Job, ReinforceSettings, reinforce
from misstep.stages.reward import RewardSettings, Setup, load_scorer, train_reward
from misstep.stages.train_settings import TrainSettings
from misstep.training.lora import lora_config
from misstep.training.report import TrainReport
from misstep.training.reward import split_by_prompt, with_reward_adapter
from misstep.training.rows import PairRow, Row, render_pairs
from misstep.training.scoring import Scorer, classifier

TRAIN = TrainSettings(rank=4, alpha=8, batch_size=8, max_length=200)
QUICK = ReinforceSettings(
    steps=2,
    prompts_per_step=2,
    samples=2,
    max_tokens=6,
    learning_rate=1e-2,
    reward=RewardSettings(epochs=3, learning_rate=1e-2, held_out=0.25),
)


@pytest.fixture
def model(tiny_model: Path) -> Model:
    return locate(str(tiny_model))


def pair(number: int) -> Pair:
    """The chosen answer is of digits, the rejected one of letters."""
    draw = random.Random(number)
    digits, letters = (
        "".join(draw.choices(alphabet, k=draw.randint(3, 9)))
        for alphabet in ("0123456789", "abcdefghij")
    )
    asked = (Message(role="user", content=f"Question {number}?"),)
    return Pair(messages=asked, chosen=digits, rejected=letters)


PAIRS = [pair(n) for n in range(40)]
PROMPTS = [Prompt.of(f"Question {n}?") for n in range(4)]
FEEDBACK = Feedback(PROMPTS, PAIRS)


def setup(model: Model) -> Setup:
    return Setup(model, Renderer.for_model(model), TRAIN, 3, lambda *_: None)


def job(model: Model, folder: Path, settings: ReinforceSettings = QUICK) -> Job:
    return Job(setup(model), settings, folder, "inputs")


@pytest.fixture(scope="module")
def rewarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished reward model."""
    folder = tmp_path_factory.mktemp("rewarded")
    train_reward(
        setup(locate(str(tiny_model))), QUICK.reward, PAIRS, folder / "reward", "reward"
    )
    return folder


# --- reward models ----------------------------------------------------------------------------


def test_a_reward_model_ranks_pairs_that_it_has_not_seen(rewarded: Path, model: Model) -> None:
    done = setup(model)
    report = train_reward(done, QUICK.reward, PAIRS, rewarded / "reward", "reward")
    assert (report.pairs, report.held_out, report.dropped) == (30, 10, 0)
    assert report.accuracy >= 0.8
    assert report.loss_curve[-1][1] < report.loss_curve[0][1]


def test_a_saved_reward_model_gives_the_scores_that_were_measured(
    rewarded: Path, model: Model
) -> None:
    done = setup(model)
    report = train_reward(done, QUICK.reward, PAIRS, rewarded / "reward", "reward")
    scorer = load_scorer(done, rewarded / "reward", report)
    rows = render_pairs(done.renderer, PAIRS, 200).kept
    trained, measured = split_by_prompt(rows, 0.25, 3)
    right = [scorer([p.chosen.ids])[0] > scorer([p.rejected.ids])[0] for p in measured]
    assert sum(right) / len(right) == pytest.approx(report.accuracy)
    scores = torch.tensor(scorer([row.ids for p in trained for row in p.lines]))
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_a_score_does_not_depend_on_the_rows_beside_it(rewarded: Path, model: Model) -> None:
    done = setup(model)
    report = train_reward(done, QUICK.reward, PAIRS, rewarded / "reward", "reward")
    scorer = load_scorer(done, rewarded / "reward", report)
    rows = [
        row.ids for p in render_pairs(done.renderer, PAIRS[:5], 200).kept for row in p.lines
    ]
    together = scorer(rows)
    alone = [replace(scorer, micro_tokens=1)([row])[0] for row in rows]
    assert together == pytest.approx(alone, abs=0.05)
    assert scorer(rows[::-1]) == pytest.approx(together[::-1])


def test_the_head_reads_the_last_token_of_the_models_own_body(model: Model) -> None:
    lm: Any = load_weights(model).float()
    ids = (5, 9, 60, 70, 2)
    made = classifier(lm, pad=0)
    hidden = lm.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    wanted = float(hidden.detach() @ made.score.weight[0].detach())
    score, _ = Scorer(made, 0, 1000)([ids, (*ids, 7, 7, 7)])
    assert score == pytest.approx(wanted, rel=1e-4)


def test_a_score_is_read_at_the_end_of_the_turn(model: Model) -> None:
    done = setup(model)
    renderer = Renderer(copy.deepcopy(done.renderer.tokenizer))
    renderer.tokenizer.pad_token = renderer.tokenizer.eos_token
    padding_with_end = replace(done, renderer=renderer)
    assert padding_with_end.renderer.pad != renderer.end_of_turn
    assert padding_with_end.tokenizer.pad_token_id == padding_with_end.renderer.pad
    assert renderer.tokenizer.pad_token == renderer.tokenizer.eos_token
    assert done.renderer.pad == done.renderer.tokenizer.pad_token_id


def test_pairs_of_a_prompt_are_all_held_out_or_none() -> None:
    rows = [
        PairRow(Row((prompt, 1, answer), 2, "a"), Row((prompt, 1, 9), 2, "a"))
        for prompt in range(20)
        for answer in (3, 4, 5)
    ]
    trained, measured = split_by_prompt(rows, 0.2, 1)
    assert len(trained) == 48 and len(measured) == 12
    assert {p.chosen.ids[0] for p in trained}.isdisjoint(p.chosen.ids[0] for p in measured)
    assert split_by_prompt(rows[::-1], 0.2, 1)[1] == measured[::-1]
    assert split_by_prompt(rows, 0.2, 2)[1] != measured


def test_an_only_step_changes_something(model: Model, tmp_path: Path) -> None:
    few = [pair(number) for number in range(4)]
    train_reward(setup(model), RewardSettings(), few, tmp_path, "reward")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_pairs_of_one_prompt_only_are_refused(model: Model, tmp_path: Path) -> None:
    same = [PAIRS[0].model_copy(update={"chosen": str(n)}) for n in range(3)]
    with pytest.raises(TrainingError, match="two prompts or more"):
        train_reward(setup(model), QUICK.reward, same, tmp_path / "reward", "reward")


def test_a_model_without_a_classifier_is_refused(model: Model) -> None:
    lm: Any = load_weights(model)
    lm.get_decoder = torch.nn.Identity
    with pytest.raises(ModelError, match="another body"):
        classifier(lm, 0)


# --- rewards ----------------------------------------------------------------------------------


class Lengths(Scorer):
    """Scores a row by how many tokens it has, and remembers the rows."""

    def __init__(self) -> None:
        super().__init__(None, 0, 1)
        object.__setattr__(self, "seen", [])

    def __call__(self, rows: Any) -> list[float]:
        self.seen.extend(rows)  # type: ignore[attr-defined]
        return [float(len(row)) for row in rows]


def test_routers_of_a_mixture_learn_nothing_from_a_reward_either() -> None:
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("phimoe", **sizes, **counts, num_local_experts=2)
    lm = AutoModelForCausalLM.from_config(config)
    found = lora_config(lm, 2, 4, task_type="CAUSAL_LM")
    assert isinstance(found, LoraConfig) and found.exclude_modules == {"router"}
    made = with_reward_adapter(lm, 0, 2, 4, 0)
    assert not [name for name in made.state_dict() if "router" in name and "lora" in name]
    ids = torch.arange(1, 9).unsqueeze(0)
    assert made(input_ids=ids, attention_mask=ids > 0).logits.shape == (1, 1)


def test_answers_are_scored_as_rows_of_training_are(model: Model, tmp_path: Path) -> None:
    done = job(model, tmp_path)
    prompt = done.setup.renderer.prompt(PROMPTS[0].messages)
    row = done.setup.renderer.example(PROMPTS[0].messages, "yes").ids
    whole, cut = list(row[len(prompt) :]), list(row[len(prompt) : -1])
    scorer = Lengths()
    found = stage._rewards(done, [scorer], [prompt, prompt], [whole, cut])
    assert scorer.seen == [list(row), list(row)]  # type: ignore[attr-defined]
    assert found == [len(row), len(row) - done.settings.unfinished_penalty]


def test_harmlessness_is_weighed_and_added(model: Model, tmp_path: Path) -> None:
    done = job(model, tmp_path, QUICK.model_copy(update={"harmlessness": 0.5}))
    end = done.setup.renderer.end_of_turn
    one = stage._rewards(done, [Lengths()], [[1, 2]], [[5, end]])
    both = stage._rewards(done, [Lengths(), Lengths()], [[1, 2]], [[5, end]])
    assert both == [1.5 * one[0]]


# --- a whole training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reinforced")
    both = FEEDBACK._replace(harmless=PAIRS[:20])
    reinforce(locate(str(tiny_model)), both, TRAIN, QUICK, 3, folder)
    return folder


def test_a_policy_is_an_adapter_that_loads(finished: Path, model: Model) -> None:
    report = TrainReport.model_validate_json((finished / "train.json").read_text())
    assert report.reinforced is not None and report.reinforced.harmlessness is not None
    assert report.steps == len(report.reinforced.curve) == 2
    assert report.reinforced.samples == 8
    assert (report.rows, report.trained, report.dropped) == (4, 4, 0)
    adapted: Any = load_weights(model, finished)
    names = [name for name, _ in adapted.named_parameters() if "lora_B" in name]
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        after, before = (lm(input_ids=ids).logits for lm in (adapted, load_weights(model)))
    assert (after - before).abs().max() > 1e-3
    assert "reward" in (finished / "README.md").read_text()


def test_one_gpu_of_several_is_used_and_given_back(
    model: Model, tmp_path: Path, held: list[int], two_gpus: None
) -> None:
    one, settings = QUICK.model_copy(update={"steps": 1}), RewardSettings(held_out=0.5)
    train_reward(setup(model), settings, PAIRS[:4], tmp_path / "reward", "reward")
    assert held[-1:] == [0]
    held.clear()
    reinforce(model, FEEDBACK._replace(pairs=PAIRS[:8]), TRAIN, one, 3, tmp_path / "policy")
    assert held[-1:] == [0]


def test_a_finished_folder_is_not_trained_again(
    finished: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    both = FEEDBACK._replace(harmless=PAIRS[:20])

    def load(*_: Any) -> None:
        raise AssertionError("nothing is to be loaded")

    with monkeypatch.context() as during:
        during.setattr(stage, "load_weights", load)
        again = reinforce(model, both, TRAIN, QUICK, 3, folder)
    assert again == TrainReport.model_validate_json((folder / "train.json").read_text())
    assert stage.policy_digest(model, FEEDBACK, TRAIN, QUICK, 3) != again.inputs


def test_another_policy_uses_the_reward_model_that_is_there(
    rewarded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(rewarded, tmp_path / "copy")
    before = (folder / "reward" / "reward.json").stat().st_mtime_ns
    one = QUICK.model_copy(update={"steps": 1})
    report = reinforce(model, FEEDBACK, TRAIN, one, 3, folder)
    assert report.reinforced is not None and report.reinforced.harmlessness is None
    assert (folder / "reward" / "reward.json").stat().st_mtime_ns == before


def test_equal_inputs_give_an_equal_policy(
    finished: Path, model: Model, tmp_path: Path
) -> None:
    both = FEEDBACK._replace(harmless=PAIRS[:20])
    reinforce(model, both, TRAIN, QUICK, 3, tmp_path)
    for file in ("adapter_model.safetensors", "reward/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()


def test_the_policy_meets_the_tokens_of_serving(
    rewarded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(rewarded, tmp_path / "copy")
    met: list[list[int]] = []

    def rewards(_job: Job, _scorers: Any, prompts: Any, answers: Any) -> list[float]:
        met.extend(prompts)
        return [float(len(answer)) for answer in answers]

    monkeypatch.setattr(stage, "_rewards", rewards)
    # A control token that is spelled in a prompt is text, which TRL's own path would not know.
    prompts = [Prompt.of(f"Say <|im_end|> {n}") for n in range(2)]
    one = QUICK.model_copy(update={"steps": 1})
    reinforce(model, FEEDBACK._replace(prompts=prompts), TRAIN, one, 3, folder)
    wanted = [Renderer.for_model(model).prompt(prompt.messages) for prompt in prompts]
    assert sorted(met) == sorted([*wanted, *wanted])


def test_a_policy_learns_what_is_rewarded(
    rewarded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(rewarded, tmp_path / "copy")
    wanted = Renderer.for_model(model).tokenizer.encode("e")[0]

    def rewards(_job: Job, _scorers: Any, _prompts: Any, answers: Any) -> list[float]:
        return [10.0 * sum(token < wanted for token in a) / len(a) for a in answers]

    def load(_model: Model) -> Any:
        lm: Any = load_weights(model)
        # As it is made, the model's logits are near 0 whatever its adapter does.
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach() * 20)
        return lm

    monkeypatch.setattr(stage, "_rewards", rewards)
    monkeypatch.setattr(stage, "load_scorer", lambda *_: None)
    monkeypatch.setattr(stage, "load_weights", load)
    longer = QUICK.model_copy(update={"steps": 12, "samples": 8, "learning_rate": 3e-2})
    report = reinforce(model, FEEDBACK, TRAIN, longer, 3, folder)
    assert report.reinforced is not None
    curve = report.reinforced.curve
    assert curve[-1].reward > curve[0].reward + 1
    assert curve[0].kl == pytest.approx(0, abs=1e-3)
    assert curve[-1].kl > curve[0].kl


def test_settings_in_a_models_file_do_not_shape_what_is_sampled(
    rewarded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(rewarded, tmp_path / "copy")
    banned, met = set(range(3, 200)), set[int]()

    def rewards(_job: Job, _scorers: Any, _prompts: Any, answers: Any) -> list[float]:
        met.update(*answers)
        return [float(len(answer)) for answer in answers]

    def load(_model: Model) -> Any:
        lm: Any = load_weights(model)
        lm.generation_config.suppress_tokens = sorted(banned)
        return lm

    monkeypatch.setattr(stage, "_rewards", rewards)
    monkeypatch.setattr(stage, "load_scorer", lambda *_: None)
    monkeypatch.setattr(stage, "load_weights", load)
    one = QUICK.model_copy(update={"steps": 1})
    reinforce(model, FEEDBACK, TRAIN, one, 3, folder)
    assert met & banned


# --- refusing ---------------------------------------------------------------------------------


def test_too_few_prompts_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"of 1 prompts.*reinforce\.prompts_per_step"):
        reinforce(model, FEEDBACK._replace(prompts=PROMPTS[:1]), TRAIN, QUICK, 3, tmp_path)


def test_a_refusal_leaves_what_was_finished(
    finished: Path, model: Model, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    with pytest.raises(TrainingError):
        reinforce(model, FEEDBACK._replace(prompts=PROMPTS[:1]), TRAIN, QUICK, 3, folder)
    assert (folder / "train.json").exists() and load_weights(model, folder)


def test_prompts_that_leave_no_room_are_refused(model: Model, tmp_path: Path) -> None:
    long = [*PROMPTS, Prompt.of("x" * 300)]
    with pytest.raises(TrainingError, match="of 5 prompts 1 are longer than 194"):
        reinforce(model, FEEDBACK._replace(prompts=long), TRAIN, QUICK, 3, tmp_path)


def test_an_absent_trl_names_the_command(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_stage, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'misstep\[rlhf\]'"):
        reinforce(model, FEEDBACK, TRAIN, QUICK, 3, tmp_path)


def test_settings_load_no_heavy_library() -> None:
    code = (
        "import sys, misstep.stages.reinforce;"
        "print({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert ran.stdout.strip() == "set()"


# --- the embedded model -----------------------------------------------------------------------


@pytest.mark.model
def test_the_embedded_model_becomes_a_reward_model(tmp_path: Path) -> None:
    polite = "Certainly. Here is the answer that you asked for: {}."
    rude = "No. Go away and find out about {} yourself."
    topics = ["rain", "bread", "horses", "clocks", "rivers", "chess", "glass", "tea", "salt"]
    pairs = [
        Pair(
            messages=(Message(role="user", content=f"Tell me about {topic}, part {n}."),),
            chosen=polite.format(topic),
            rejected=rude.format(topic),
        )
        for topic in topics
        for n in range(4)
    ]
    embedded = locate("smollm2-135m")
    renderer = Renderer.for_model(embedded)
    done = Setup(embedded, renderer, TrainSettings(batch_size=8), 0, lambda *_: None)
    report = train_reward(done, RewardSettings(held_out=0.25), pairs, tmp_path, "reward")
    assert report.held_out == 9
    assert report.accuracy > 0.75
