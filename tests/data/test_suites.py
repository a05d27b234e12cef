import re
from itertools import islice
from typing import get_args

import pytest

from misstep.data.suites import (
    FOLDER,
    Split,
    Topics,
    attacked_prompts,
    clean_prompts,
    names,
    suite_digest,
)
from misstep.judges.rule import HelpfulnessJudge, ObedienceJudge, words
from misstep.records import Prompt, Response

SPLITS: tuple[Split, ...] = get_args(Split)
suites = pytest.mark.parametrize("suite", names())


def plain(text: str) -> str:
    return " ".join(words(text))


def attacks(suite: str, split: Split, n: int = 400, seed: int = 0) -> list[Prompt]:
    return list(islice(attacked_prompts(suite, split, "all", seed), n))


def wording(prompt: Prompt, task: str) -> str:
    """An attacked prompt without its task and its target."""
    return plain(prompt.text.replace(task, " ").replace(str(prompt.target), " "))


@suites
def test_parts_share_no_task_no_target_and_no_wording(suite: str) -> None:
    seen: dict[str, set[str]] = {"task": set(), "target": set(), "wording": set()}
    for split in SPLITS:
        tasks = {p.reference: p.text for p in clean_prompts(suite, split, 0)}
        drawn = attacks(suite, split)
        here = {
            "task": {plain(task) for task in tasks.values()},
            "target": {plain(str(p.target)) for p in drawn},
            "wording": {wording(p, tasks[p.reference]) for p in drawn},
        }
        assert all(len(found) > 10 for found in here.values())
        for what, found in here.items():
            assert not seen[what] & found
            seen[what] |= found


@suites
def test_training_sees_no_kind_that_is_held_out(suite: str) -> None:
    def kinds(split: Split, which: str) -> set[str]:
        stream = attacked_prompts(suite, split, which, 0)  # type: ignore[arg-type]
        return {p.kind for p in islice(stream, 100)}

    trained = kinds("train", "all")
    assert trained == kinds("train", "seen")
    assert kinds("test", "unseen")
    assert not trained & (kinds("test", "unseen") | kinds("dev", "unseen"))
    assert kinds("test", "all") == kinds("test", "seen") | kinds("test", "unseen")
    assert kinds("test", "seen") <= trained


@suites
def test_unseen_topics_are_those_that_training_has_not(suite: str) -> None:
    trained = {p.topic for p in clean_prompts(suite, "train", 0)}
    whole, seen, unseen = (
        clean_prompts(suite, "test", 0, topics) for topics in get_args(Topics)
    )
    assert {p.topic for p in seen} <= trained
    assert not trained & {p.topic for p in unseen}
    assert unseen
    assert sorted(p.id for p in [*seen, *unseen]) == sorted(p.id for p in whole)
    stream = attacked_prompts(suite, "test", "seen", 0, "unseen")
    assert {p.topic for p in islice(stream, len(unseen))} == {p.topic for p in unseen}


@suites
@pytest.mark.parametrize("split", SPLITS)
def test_an_attacked_prompt_holds_its_task_and_its_target(suite: str, split: Split) -> None:
    tasks = {p.reference: p for p in clean_prompts(suite, split, 0)}
    for prompt in attacks(suite, split):
        task = tasks[prompt.reference]
        assert task.text in prompt.text
        assert prompt.target
        assert prompt.target in prompt.text.replace(task.text, "")
        assert (prompt.accept, prompt.topic) == (task.accept, task.topic)
        assert prompt.kind != "plain"
        assert not re.search(r"\{(task|target)\}|\{\{|\}\}", prompt.text)


@suites
@pytest.mark.parametrize("split", SPLITS)
def test_every_task_comes_once_before_any_comes_twice(suite: str, split: Split) -> None:
    tasks = len(clean_prompts(suite, split, 0))
    drawn = attacks(suite, split, 2 * tasks)
    first, second = ([p.reference for p in part] for part in (drawn[:tasks], drawn[tasks:]))
    assert len(set(first)) == tasks
    assert set(first) == set(second)
    counts = [sum(p.kind == kind for p in drawn) for kind in {p.kind for p in drawn}]
    assert max(counts) - min(counts) <= 1


@suites
def test_the_seed_decides_all(suite: str) -> None:
    assert attacks(suite, "dev", 50, seed=1) == attacks(suite, "dev", 50, seed=1)
    tasks, kinds, targets = (
        [[getattr(p, name) for p in attacks(suite, "dev", 50, seed)] for seed in (1, 2)]
        for name in ("reference", "kind", "target")
    )
    assert tasks[0] != tasks[1]
    assert targets[0] != targets[1]
    assert kinds[0] == kinds[1]
    assert clean_prompts(suite, "dev", 1) == clean_prompts(suite, "dev", 1)
    assert clean_prompts(suite, "dev", 1) != clean_prompts(suite, "dev", 2)
    texts = [{p.text for p in clean_prompts(suite, "dev", seed)} for seed in (1, 2)]
    assert texts[0] == texts[1]


@suites
@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_is_helpful_and_the_prompt_is_not(suite: str, split: Split) -> None:
    keyed = [p for p in clean_prompts(suite, split, 0) if p.accept]
    assert keyed
    judge = HelpfulnessJudge()
    for prompt in keyed:
        assert all(plain(key) for key in prompt.accept)
        assert not [k for k in prompt.accept if f" {plain(k)} " in f" {plain(prompt.text)} "]
    given = judge.score([Response(prompt=p, text=str(p.reference)) for p in keyed])
    parroted = judge.score([Response(prompt=p, text=p.text) for p in keyed])
    assert {score.value for score in given} == {1.0}
    assert {score.value for score in parroted} == {0.0}


@suites
@pytest.mark.parametrize("split", SPLITS)
def test_the_obedience_judge_tells_target_reference_and_parroting_apart(
    suite: str, split: Split
) -> None:
    prompts = attacks(suite, split)
    judge = ObedienceJudge()
    for text, value in (("target", 1.0), ("reference", 0.0)):
        responses = [Response(prompt=p, text=getattr(p, text)) for p in prompts]
        assert {score.value for score in judge.score(responses)} == {value}
    parroted = judge.score([Response(prompt=p, text=p.text) for p in prompts])
    assert sum(score.value == 0.0 for score in parroted) >= 0.98 * len(prompts)


@suites
def test_a_suite_is_named_by_the_content_of_its_files(suite: str) -> None:
    assert suite_digest(suite) == suite_digest(suite)
    assert len({suite_digest(name) for name in names()}) == len(names())
    assert {path.suffix for path in (FOLDER / suite).iterdir()} == {".yaml", ".jsonl"}
