from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from misstep.comparison import load_cells
from misstep.config import MAIN_JOB, RunConfig, changed_keys, load_recipe
from misstep.errors import RecipeError
from misstep.methods.registry import METHODS
from misstep.study_config import load_study_recipe

RECIPE = """\
policy: goal-hijacking
seed: 3
mistakes:
  data: { suite: goal-hijacking, split: train, n: 20 }
ordinary: { path: pairs.jsonl }
train:
  epochs: 2
evaluate:
  tests:
    attacks: { suite: goal-hijacking, split: test, kinds: unseen }
    clean: { suite: goal-hijacking, split: test, part: clean }
  pools:
    all: [attacks, clean]
"""


def load(folder: Path, *overrides: str, recipe: str = RECIPE) -> RunConfig:
    path = folder / "trial.yaml"
    path.write_text(recipe, encoding="utf-8")
    return load_recipe(path, overrides)


def fault(folder: Path, *overrides: str, recipe: str = RECIPE) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, *overrides, recipe=recipe)
    return str(caught.value)


def test_a_recipe_is_named_by_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path).name == "trial"
    assert load(tmp_path, recipe="name: other\n" + RECIPE).name == "other"
    names = []
    for file in ("my run.yaml", "my-run.yaml", "攻击.yaml", "无害.yaml"):
        (tmp_path / file).write_text(RECIPE, encoding="utf-8")
        names.append(load_recipe(tmp_path / file, ()).name)
    assert len(set(names)) == 4, "two recipes in one directory would undo each other's work"
    assert names[1] == "my-run" and names[0].startswith("my-run-")


def test_the_main_job_is_run_unless_the_recipe_chooses(tmp_path: Path) -> None:
    assert load(tmp_path).methods == MAIN_JOB
    assert set(MAIN_JOB) < set(METHODS)
    assert load(tmp_path, "methods=[sft]").methods == ("sft",)


def test_all_sources_are_listed_by_their_keys(tmp_path: Path) -> None:
    found = load(tmp_path).sources()
    assert set(found) == {
        "mistakes.data",
        "ordinary",
        "evaluate.tests.attacks",
        "evaluate.tests.clean",
    }
    assert found["ordinary"].path == "pairs.jsonl"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=9", {"seed": 9}),
        ("train.epochs=0.5", {"train.epochs": 0.5}),
        ("train.rank=8", {"train.rank": 8}),
        ("mix.ordinary=2", {"mix.ordinary": 2.0}),
        ("respond.guided=[true]", {"respond.guided": [True]}),
        ("evaluate.tests.clean.n=5", {"evaluate.tests.clean.n": 5}),
        ("model=a=b", {"model": "a=b"}),
    ],
)
def test_an_override_changes_its_key_and_no_other(
    tmp_path: Path, override: str, value: dict[str, Any]
) -> None:
    before = load(tmp_path).model_dump(mode="json")
    after = load(tmp_path, override).model_dump(mode="json")
    assert changed_keys(before, after) == list(value)
    for key in next(iter(value)).split("."):
        after = after[key]
    assert after == next(iter(value.values()))


def test_an_override_of_an_alias_leaves_its_anchor_as_it_is(tmp_path: Path) -> None:
    recipe = RECIPE.replace("{ path: pairs", "&clean { path: pairs")
    recipe = recipe.replace("{ suite: goal-hijacking, split: test, part: clean }", "*clean")
    found = load(tmp_path, "evaluate.tests.clean.n=2", recipe=recipe)
    assert found.evaluate.tests["clean"].n == 2
    assert found.ordinary is not None and found.ordinary.n is None
    both = "evaluate.tests={a: &a { path: x.jsonl }, b: *a}"
    tests = load(tmp_path, both, "evaluate.pools={}", "evaluate.tests.a.n=2").evaluate.tests
    assert (tests["a"].n, tests["b"].n) == (2, None)
    assert "no valid YAML" in fault(tmp_path, "train=&a { x: *a }")


def test_the_last_override_holds(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").seed == 2


def test_a_section_without_keys_can_be_overridden(tmp_path: Path) -> None:
    recipe = RECIPE.replace("train:\n  epochs: 2\n", "train:\n")
    assert load(tmp_path, "train.epochs=4", recipe=recipe).train.epochs == 4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs: 2", "epoch: 2", "line 7: unknown key 'train.epoch'. Did you mean 'epochs'?"),
        ("seed: 3", "sede: 3", "line 2: unknown key 'sede'. Did you mean 'seed'?"),
        ("seed: 3", "seed: three", "line 2: 'seed': expected a whole number (found 'three')."),
        ("seed: 3", "seed: -1", "line 2: 'seed': expected 0 or more (found -1)."),
        ("epochs: 2", "epochs: 0", "line 7: 'train.epochs': expected more than 0 (found 0)."),
        ("seed: 3", "methods: [sft, stf]", "line 2: 'methods': no method 'stf'. Did you mean"),
        ("seed: 3", "methods: []", "line 2: 'methods': expected at least 1 of them"),
        ("seed: 3", "methods: sft", "line 2: 'methods': expected a list (found 'sft')."),
        ("seed: 3", "methods: [sft, sft]", "line 2: 'methods': expected each once; twice or"),
        (
            "seed: 3",
            "respond: {guided: []}",
            "'respond.guided': expected at least 1 of them",
        ),
        ("seed: 3", "respond: {guided: [true, true]}", "expected each once; twice or more: Tr"),
        ("{ path: pairs.jsonl }", "pairs.jsonl", "'ordinary': expected keys with values"),
        ("split: train", "split: tran", "line 4: 'mistakes.data': a suite needs split"),
        ("split: train", "split: train, kinds: unseen", "has no unseen kinds in its train"),
        ("split: train", "split: train, topics: unseen", "unseen topics in its test part"),
        (
            "suite: goal-hijacking, split: train",
            "split: train",
            "give either a suite or a path",
        ),
        (
            "path: pairs.jsonl",
            "path: p.csv, fields: {promt: q}",
            "unknown field 'promt'. Did you mean 'prompt'?",
        ),
        ("path: pairs.jsonl", "path: p.csv, target_pattern: 'no'", "needs a group"),
        ("path: pairs.jsonl", "path: p.csv, target_pattern: '('", "no valid regular expr"),
        ("path: pairs.jsonl", "path: p.csv, encoding: utf-9", "expected an encoding"),
        ("[attacks, clean]", "[attacks, other]", "pool 'all' needs a new name and known test"),
        ("all: [attacks", "clean: [attacks", "pool 'clean' needs a new name"),
        ("policy: goal-hijacking\n", "", "the key 'policy' is missing"),
    ],
)
def test_a_wrong_recipe_says_where_and_why(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in RECIPE
    found = fault(tmp_path, recipe=RECIPE.replace(old, new))
    assert said in found
    assert found.startswith(str(tmp_path / "trial.yaml"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs=many", "'train.epochs': expected a number (found 'many')."),
        ("train.epoch=3", "unknown key 'train.epoch'. Did you mean 'epochs'?"),
        ("trian.epochs=3", "unknown key 'trian'. Did you mean 'train'?"),
        ("seed", "--set seed: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("seed=[", "--set seed=[: the value is no valid YAML"),
        ("seed.inner=3", "--set seed.inner=3: 'seed' has no keys below it"),
        ("train={epochs: 2, rang: 3}", "unknown key 'train.rang'. Did you mean 'rank'?"),
        *(
            (f"{key}={2**32}", f"'{key}': expected less than 4294967296 (found 4294967296)")
            for key in ("seed", "train_seed")
        ),
        *(
            (f"{key}=.inf", f"'{key}': expected a finite number (found inf)")
            for key in (
                "train.learning_rate",
                "train.preferences.learning_rate",
                "reinforce.reward.learning_rate",
                "reinforce.kl",
                "mix.ordinary",
            )
        ),
        ("mistakes={source: origin}", "the key 'mistakes.data' is missing"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    found = fault(tmp_path, override)
    assert said in found
    assert found.startswith(f"--set {override}: ")
    # The fault is on the command line: no line of the file may be blamed for it.
    assert ", line" not in found


def test_an_override_inside_of_what_is_wrong_is_named_before_the_line(tmp_path: Path) -> None:
    override = "evaluate.pools={all: [attacks, other, more]}"
    found = fault(tmp_path, override)
    place = f"--set {override} over {tmp_path / 'trial.yaml'}, line 8: 'evaluate': "
    assert found.startswith(place)
    assert "unknown: more, other" in found
    # What the file itself has wrong elsewhere is still the file's.
    seed = fault(tmp_path, "train.epochs=3", recipe=RECIPE.replace("seed: 3", "seed: x"))
    assert seed.startswith(f"{tmp_path / 'trial.yaml'}, line 2: 'seed'")


def test_faults_of_file_and_command_line_are_named_together(tmp_path: Path) -> None:
    found = fault(tmp_path, "seed=x", recipe=RECIPE.replace("epochs", "epoch"))
    first, second = found.splitlines()
    assert first.startswith("--set seed=x: 'seed'")
    assert second.startswith(f"{tmp_path / 'trial.yaml'}, line 7: unknown key 'train.epoch'")


def test_a_fault_of_the_whole_shows_no_document(tmp_path: Path) -> None:
    found = fault(tmp_path, recipe=RECIPE.replace("ordinary: { path: pairs.jsonl }\n", ""))
    assert found.startswith(f"{tmp_path / 'trial.yaml'}: the key 'ordinary' is missing")
    assert "{" not in found


@pytest.mark.parametrize(
    ("load", "recipe", "command"),
    [
        (load_recipe, RECIPE + "seeds: [0, 1]\n", "compare"),
        (load_recipe, RECIPE + "sweep: {}\n", "compare"),
        (load_recipe, "models: [a]\nprompts: {}\n", "study"),
        (load_cells, "models: [a]\nprompts: {}\n", "study"),
        (load_study_recipe, RECIPE + "seeds: [0, 1]\n", "compare"),
        (load_study_recipe, RECIPE, "run"),
    ],
)
def test_a_recipe_of_another_command_is_sent_there(
    tmp_path: Path, load: Callable[[Path], object], recipe: str, command: str
) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text(recipe, encoding="utf-8")
    with pytest.raises(RecipeError, match=f"another command: misstep {command} {path}$"):
        load(path)


def test_a_resolved_recipe_loads_again_as_itself(tmp_path: Path) -> None:
    config = load(tmp_path, "seed=5")
    resolved = yaml.safe_dump(config.model_dump(mode="json"))
    assert load(tmp_path, recipe=resolved) == config


def test_changed_keys_are_dotted_and_complete() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": [1], "gone": 1}
    new = {"a": {"b": 1, "c": 3}, "d": [2], "new": {"x": 1}}
    assert changed_keys(old, new) == ["a.c", "d", "gone", "new"]
    assert changed_keys(old, old) == []


def test_sources_without_a_place_read_what_the_recipe_names(tmp_path: Path) -> None:
    text = (
        "policy: harmlessness\ndata: answers.csv\nmistakes: {source: origin, data: {n: 3}}\n"
        "ordinary: {path: other.csv}\n"
        "evaluate: {tests: {red: {n: 2}, own: {suite: goal-hijacking, split: test}}}\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    found = load_recipe(path, ["data=better.csv"]).sources()
    assert {key: source.path for key, source in found.items()} == {
        "mistakes.data": "better.csv",
        "ordinary": "other.csv",
        "evaluate.tests.red": "better.csv",
        "evaluate.tests.own": None,
    }
    path.write_text(text.replace("data: answers.csv\n", ""), encoding="utf-8")
    with pytest.raises(RecipeError, match="either a suite or a path"):
        load_recipe(path)


def test_a_file_of_another_kind_is_told_for_what_it_is(tmp_path: Path) -> None:
    policy = "name: mine\nmistake: It errs.\nguide: '{prompt}'\ngate: { names_fault: [x] }\n"
    assert "found a policy. Name it in a recipe: policy: " in fault(tmp_path, recipe=policy)
    strange = "a: 1\nbb: 2\nccc: 3\nmodel: x\n"
    said = fault(tmp_path, recipe=strange)
    assert "found mostly others: a, bb, ccc. It looks like another kind of file." in said
    # Keys that are nearly right are named one by one.
    said = fault(tmp_path, recipe=RECIPE.replace("ordinary:", "ordinery:") + "trian: {}\n")
    assert "Did you mean 'ordinary'?" in said and "Did you mean 'train'?" in said
    data = tmp_path / "failures.csv"
    data.write_text("prompt,response\nA,B\n")
    with pytest.raises(RecipeError, match=r"expected a recipe.*found a file of data"):
        load_recipe(data)


def test_a_rule_in_the_place_of_a_judges_name_is_sent_to_the_policy(tmp_path: Path) -> None:
    said = fault(tmp_path, "judge={patterns: [x]}")
    assert "'judge': expected text: a model, or a judge" in said
    assert "in the policy's file, under its key judge" in said


def test_a_test_set_without_a_name_is_told_that_it_needs_one(tmp_path: Path) -> None:
    said = fault(tmp_path, "evaluate.tests={path: held-out.csv}")
    assert "expected test sets by name, such as { held-out: { path: … } }" in said
