"""Our test sets under inspect_ai, and its logs read back."""

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from misstep.data.sources import Source, load_prompts
from misstep.engines.base import Request
from misstep.engines.cached import Chosen
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import DataError, InputError, RecipeError
from misstep.evidence.check_results import correction, read_check
from misstep.evidence.results import Row, read_results
from misstep.inspect_log import KEY, Asked, _answers, _refuse_several, import_logs
from misstep.judge_check import check_judge
from misstep.judges.choose import cost_judges, mistake_judge
from misstep.judges.rule import RefusalJudge
from misstep.judges.seats import Seat, seated
from misstep.policy import load_policy
from misstep.progress import Silent
from misstep.records import Answer, Prompt, Response, Score
from misstep.report import pages
from misstep.stages.evaluate import Table, judge_answers
from misstep.stages.respond import RespondSettings, respond

ATTACKS = {"suite": "goal-hijacking", "part": "attacks", "split": "test", "n": 12}
CLEAN = {"suite": "goal-hijacking", "part": "clean", "split": "test", "n": 8}
RECIPE = """
policy: goal-hijacking
mistakes: { source: induced, data: { suite: goal-hijacking, split: train, n: 4 } }
ordinary: { suite: goal-hijacking, part: clean, split: train }
evaluate:
  tests:
    attacks: { suite: goal-hijacking, part: attacks, split: test, n: 12 }
    clean: { suite: goal-hijacking, part: clean, split: test, n: 8 }
  pools: { both: [attacks, clean] }
respond: { max_tokens: 400 }
"""


PROMPTS = [
    prompt
    for source in (ATTACKS, CLEAN)
    for prompt in load_prompts(Source.model_validate(source), 0)
]


def answer(text: str) -> str:
    """Obeys an attack, does the task, or refuses, by the prompt's length."""
    prompt = next(p for p in PROMPTS if p.text in text)
    kinds = (prompt.target or "Well.", prompt.reference or "", "I'm sorry, I can't do that.")
    return kinds[len(prompt.text) % 3]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def evaluated(
    recipe: Path, tmp_path: Path, broken: str = "", epochs: int | None = None, **options: Any
) -> Path:
    """The log of inspect's own mock model that gives these answers."""
    inspect_ai = pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from misstep.inspect_task import recipe as task

    def reply(messages: Any, *_: Any) -> Any:
        text = messages[-1].text
        if broken and broken in text:
            raise ValueError("the server is down")
        output = ModelOutput.from_content("mockllm/model", answer(text))
        # The mock model counts tokens otherwise, with a vocabulary that it downloads.
        return output.model_copy(update={"usage": ModelUsage()})

    (log,) = inspect_ai.eval(
        task(str(recipe), **options),
        model=get_model("mockllm/model", custom_outputs=reply),
        log_dir=str(tmp_path / "logs"),
        display="none",
        fail_on_error=False,
        epochs=epochs,
    )
    return Path(log.location)


def ours(guided: bool = False) -> list[Row]:
    """What misstep itself makes of the same answers."""
    policy = load_policy("goal-hijacking")

    def script(request: Request) -> str:
        return answer(request.messages[-1].content)

    engine = ScriptedEngine(script)
    answers = [
        Answer(method="vanilla", guided=guided, test_set=name, seed=0, response=response)
        for name, source in (("attacks", ATTACKS), ("clean", CLEAN))
        for response in respond(
            [(p, guided) for p in load_prompts(Source.model_validate(source), 0)],
            policy,
            engine,
            RespondSettings(max_tokens=400),
            0,
        )
    ]
    judgements = judge_answers(
        answers, seated([mistake_judge(policy, engine), *cost_judges()], {})
    )
    nothing: dict[str, str | None] = {"mistake_source": None, "analysis_source": None}
    return Table(answers, judgements, {"both": ["attacks", "clean"]}, 0).rows(lambda _: nothing)


def metrics(rows: Any) -> dict[tuple[str, str], Any]:
    """Rates by test set."""
    return {
        (row.test_set, name): (m.value, m.low, m.high, m.n, m.unscored)
        for row in rows
        for name, m in row.metrics.items()
    }


@pytest.mark.parametrize("guided", [False, True])
def test_a_log_read_back_gives_our_own_rates(
    recipe: Path, tmp_path: Path, guided: bool
) -> None:
    log = evaluated(recipe, tmp_path, guided=guided)
    folder = import_logs([log], tmp_path / "out")
    found = read_results(folder / "results.json")
    assert metrics(found.rows) == metrics(ours(guided))
    assert pages.markdown(folder).startswith(
        "# out: goal-hijacking on mockllm/model\n\n## Rates"
    )
    assert found.model == "mockllm/model"
    assert {row.guided for row in found.rows} == {guided}
    rate = metrics(found.rows)["attacks", "mistake_rate"][0]
    assert 0 < rate < 1, "the test compares nothing where all answers are alike"


def test_two_logs_are_compared(recipe: Path, tmp_path: Path) -> None:
    logs = [
        evaluated(recipe, tmp_path, test_set="attacks", guided=guided)
        for guided in (False, True)
    ]
    found = read_results(import_logs(logs, tmp_path / "out") / "results.json")
    assert ("vanilla/guided", "vanilla/unguided") in {(c.a, c.b) for c in found.comparisons}
    with pytest.raises(DataError, match=r"the setting|another setting"):
        import_logs([logs[0], evaluated(recipe, tmp_path)], tmp_path / "twice")


@pytest.mark.parametrize("held", ["manifest.json", "results.json"])
def test_a_run_is_never_written_over(recipe: Path, tmp_path: Path, held: str) -> None:
    log, folder = evaluated(recipe, tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / held).write_text("mine")
    with pytest.raises(InputError, match=r"Give another --out"):
        import_logs([log], folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {held: "mine"}


def test_several_answers_to_a_prompt_are_refused(recipe: Path, tmp_path: Path) -> None:
    log = evaluated(recipe, tmp_path, test_set="clean", epochs=2)
    with pytest.raises(DataError, match=r"found 2 epochs.*--epochs 1"):
        import_logs([log], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_that_failed_is_unscored(recipe: Path, tmp_path: Path) -> None:
    whole = evaluated(recipe, tmp_path, test_set="clean")
    prompt = load_prompts(Source.model_validate(CLEAN), 0)[0].text
    part = evaluated(recipe, tmp_path, broken=prompt, test_set="clean")
    before, after = (
        read_results(import_logs([log], tmp_path / name) / "results.json").rows[0].metrics
        for name, log in (("whole", whole), ("part", part))
    )
    for name in ("helpfulness", "over_refusal"):
        assert (before[name].n, before[name].unscored) == (8, 0)
        assert (after[name].n, after[name].unscored) == (7, 1)
    assert after.keys() == before.keys(), "no rate of what the set is not about"


BARE = Asked(name="r", policy="p", method="vanilla", guided=False, seed=0, pools={}, judges={})


def test_a_judge_that_failed_is_unscored_beside_one_that_did_not() -> None:
    prompt = Prompt.of("Say no", target="no")
    response = Response(prompt=prompt, text="yes")
    judges = {"mistake_rate": "rule", "mistake_rate@guard": "guard"}
    asked = BARE.model_copy(update={"judges": judges})

    def sample(place: int, judges: tuple[str, ...], fault: str | None) -> Any:
        said = [
            Score(response_id=response.id, metric=metric, value=1.0, judge="j")
            for metric in judges
        ]
        judged = {"response": response.model_dump(), "scores": [s.model_dump() for s in said]}
        return SimpleNamespace(
            id=str(place),
            metadata={"test_set": "t", "prompt": prompt.model_dump()},
            scores={"misstep": SimpleNamespace(metadata={KEY: judged})},
            error=SimpleNamespace(message=fault) if fault else None,
        )

    whole = sample(0, ("mistake_rate", "mistake_rate@guard"), None)
    broken = sample(1, ("mistake_rate",), "the guard is away")
    log: Any = SimpleNamespace(samples=[whole, broken], status="success")
    (_, _), (answer, scores) = _answers(asked, log, Path("log"))
    assert answer.response.text == "yes"
    found = {score.metric: (score.value, score.reason) for score in scores}
    assert found["mistake_rate"] == (1.0, "")
    assert found["mistake_rate@guard"] == (None, "no judgement: the guard is away")


def test_a_failed_sample_leaves_each_judge_of_refusals_its_name() -> None:
    judges = {"over_refusal": "rule:refusal", "over_refusal@mine": "mine"}
    sample = SimpleNamespace(
        id="1",
        metadata={"test_set": "t", "prompt": Prompt.of("How?", unsafe=True).model_dump()},
        scores={},
        error=SimpleNamespace(message="the server is down"),
    )
    log: Any = SimpleNamespace(samples=[sample], status="success")
    ((_, scores),) = _answers(BARE.model_copy(update={"judges": judges}), log, Path("log"))
    assert {score.metric: score.judge for score in scores} == {
        "unsafe_refusal": "rule:refusal",
        "unsafe_refusal@mine": "mine",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"judges": {"mistake_rate": "rule:b"}},
            "one judge of mistake_rate, found rule:a, rule",
        ),
        ({"policy_digest": "two"}, r"one recipe, found r \(p, seed 0\), policy one, r \(p"),
        ({"seed": 1}, r"one recipe, found r \(p, seed 0\), r \(p, seed 1\)"),
    ],
)
def test_what_was_asked_or_judged_otherwise_is_not_compared(
    change: dict[str, Any], said: str
) -> None:
    judges = {"mistake_rate": "rule:a"}
    asked = BARE.model_copy(update={"judges": judges, "policy_digest": "one"})
    other = asked.model_copy(update={"guided": True})
    _refuse_several([asked, other, other.model_copy(update={"policy_digest": ""})])
    with pytest.raises(DataError, match=said):
        _refuse_several([asked, other.model_copy(update=change)])


def test_a_log_that_is_named_twice_is_counted_once(recipe: Path, tmp_path: Path) -> None:
    log = evaluated(recipe, tmp_path, test_set="clean")
    once = read_results(import_logs([log], tmp_path / "once") / "results.json")
    other = log.parent / "." / log.name
    twice = read_results(import_logs([log, other], tmp_path / "twice") / "results.json")
    assert once.rows == twice.rows


def test_further_judges_and_corrected_rates_are_as_in_a_run(
    recipe: Path, tmp_path: Path
) -> None:
    labels = Path(__file__).parent / "judges/obedience_labels.jsonl"
    given = (tmp_path / "check", None, ["label=obeyed"], Silent())
    check = check_judge("obedience", [str(labels)], *given) / "check.json"
    further = "evaluate:\n  judges: { again: obedience }\n  judge_check: " + f"[{check}]"
    recipe.write_text(RECIPE.replace("evaluate:", further))
    logs = [evaluated(recipe, tmp_path, test_set=name) for name in ("clean", "attacks")]
    found = read_results(import_logs(logs, tmp_path / "out") / "results.json")
    (row,) = (row for row in found.rows if row.test_set == "attacks")
    first, second = row.metrics["mistake_rate"], row.metrics["mistake_rate@again"]
    assert first.value == second.value
    assert first.corrected is not None
    wanted = correction(read_check(check))(first.model_copy(update={"corrected": None}))
    assert first.corrected == wanted
    assert [agreement.same.value for agreement in found.agreements] == [1.0]


def test_a_due_refusal_is_no_over_refusal_in_inspects_own_table() -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from misstep.inspect_task import _scored

    def judged(unsafe: bool) -> Any:
        response = Response(prompt=Prompt.of("How?", unsafe=unsafe), text="I'm sorry, no.")
        return _scored(Seat(RefusalJudge()), response)

    assert judged(unsafe=False).value == 1
    due = judged(unsafe=True)
    assert due.value != 1 and due.explanation == "counts as unsafe_refusal"
    kept = {score["metric"]: score["value"] for score in due.metadata["misstep"]["scores"]}
    assert kept["unsafe_refusal"] == kept["unsafe_full_refusal"] == 1


def test_the_method_that_is_guidance_is_asked_with_the_guide(recipe: Path) -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from misstep.inspect_task import recipe as task

    for options in ({}, {"guided": True}):
        assert task(str(recipe), method="guided", **options).metadata[KEY]["guided"]
    assert not task(str(recipe)).metadata[KEY]["guided"]


def test_the_policys_judge_is_answered_for_by_the_recipes_engine(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from misstep.inspect_task import recipe as task

    asked: list[str] = []

    def choose(kind: str, *_: object) -> Chosen:
        asked.append(kind)
        return Chosen("scripted", "", ScriptedEngine)

    monkeypatch.setattr("misstep.judging.choose", choose)
    recipe.write_text(RECIPE.replace("goal-hijacking\nm", "harmlessness\nengine: vllm:2\nm"))
    task(str(recipe))
    assert asked == ["vllm:2"]


@pytest.mark.parametrize("option", [{"test_set": "atacks"}, {"method": "vanila"}])
def test_a_name_that_is_none_is_refused(recipe: Path, option: dict[str, str]) -> None:
    pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from misstep.inspect_task import recipe as task

    with pytest.raises(RecipeError, match="Did you mean"):
        task(str(recipe), **option)


def test_a_foreign_log_is_refused(tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai", reason="needs the extra misstep[inspect]")
    from inspect_ai.dataset import Sample

    (log,) = inspect_ai.eval(
        inspect_ai.Task(dataset=[Sample(input="?")]),
        model="mockllm/model",
        fail_on_error=False,
        log_dir=str(tmp_path),
        display="none",
    )
    with pytest.raises(DataError, match="misstep/recipe"):
        import_logs([Path(log.location)], tmp_path / "out")
    (tmp_path / "no.eval").write_text("no log")
    with pytest.raises(DataError, match=r"no\.eval"):
        import_logs([tmp_path / "no.eval"], tmp_path / "out")


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(InputError, match=r"misstep\[inspect\]"):
        import_logs([tmp_path / "log.eval"], None)


def test_the_entry_point_names_the_module_of_the_task() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (module,) = tomllib.loads(text)["project"]["entry-points"]["inspect_ai"].values()
    assert module == "misstep.inspect_task"
