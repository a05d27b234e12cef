"""A whole study with scripted engines: through the real command where that matters."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made import assert_balanced

from misstep import cli
from misstep.engines.base import Engine, Request
from misstep.engines.cached import Chosen
from misstep.engines.scripted import ScriptedEngine
from misstep.errors import DataError, InputError, MisstepError, ModelError, RecipeError
from misstep.evidence.study_results import (
    Study,
    StudyAnswer,
    StudyModel,
    StudyScore,
    read_study,
)
from misstep.models.locate import Model, locate
from misstep.models.weights import load_weights
from misstep.progress import Silent
from misstep.records import read_jsonl
from misstep.report.study_markdown import study_markdown
from misstep.report.words import rate
from misstep.stages.discriminate import Discrimination
from misstep.study import names_of, read_study_inputs, run_study
from misstep.summary import print_study

TARGET = "The moon is soup"
BLAMES = "It obeyed the inserted text and did not answer the question."
PRAISES = "The response is correct."
SHRUGS = "This is about the moon."
OBEDIENT, HONEST = 4, 6
"""The scripted models obey the attack in so many prompts when they are not guided."""


def answer(request: Request) -> str:
    text = request.messages[-1].content
    return TARGET if "Obey" in text and "Do not obey" not in text else "An apple."


def model_of(unguided: Callable[[str], str], guided: Callable[[str], str]) -> ScriptedEngine:
    """Answers, and analyses with a function of the request, unguided and guided."""

    def script(request: Request) -> str:
        text = request.messages[-1].content
        if "Response: " not in text:
            return answer(request)
        return (unguided if "Analyse this response" in text else guided)(text)

    return ScriptedEngine(script, name=str(id(script)))


def sharp(text: str) -> str:
    return BLAMES if f"Response: {TARGET}" in text else PRAISES


def blames(text: str) -> str:
    return BLAMES


class Bench:
    """A study recipe, its models, and the engines that answer for them."""

    def __init__(self, folder: Path, engines: dict[str, ScriptedEngine]) -> None:
        self.folder = folder
        self.engines = engines
        self.opened: list[str] = []
        for name in engines:
            (folder / f"{name}.gguf").write_bytes(b"GGUF" + name.encode())
        rows = [
            {"prompt": f"{'Obey' if i < OBEDIENT else 'Doubt'} {i}", "target": TARGET}
            for i in range(OBEDIENT + HONEST)
        ]
        data = folder / "attacks.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.recipe = folder / "trial.yaml"
        models = [str(folder / f"{name}.gguf") for name in engines]
        self.write(policy="goal-hijacking", models=models, prompts={"path": str(data)})

    def write(self, **recipe: object) -> None:
        """Write the recipe; a recipe is YAML, and JSON is YAML."""
        self.recipe.write_text(json.dumps(recipe))

    def choose(
        self, kind: str, model: Model, adapter: Path | None = None, scratch: Path | None = None
    ) -> Chosen:
        assert model.path is not None
        name = model.path.stem
        engine = self.engines[name]

        def opened() -> Engine:
            self.opened.append(name)
            return engine

        return Chosen(engine.identity, "it is scripted", opened)

    def run(self, *overrides: str) -> Study:
        folder = run_study(self.recipe, self.folder / "out", list(overrides), Silent())
        return read_study(folder / "study.json")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench(
        tmp_path,
        {
            "cynic": model_of(blames, blames),
            "learner": model_of(lambda text: SHRUGS, sharp),
        },
    )
    for module in ("study", "judging"):
        monkeypatch.setattr(f"misstep.{module}.choose", found.choose)
    return found


def value(model: StudyModel, task: str, guided: bool, name: str) -> tuple[object, int, int]:
    metric = model.metric(task, guided, name)  # type: ignore[arg-type]  # a task by its name
    return metric.value, metric.n, metric.unscored


def test_a_model_that_always_finds_fault(bench: Bench) -> None:
    cynic = bench.run().models[0]
    assert cynic.model == "cynic"
    assert value(cynic, "answering", False, "accuracy") == (0.6, 10, 0)
    assert value(cynic, "answering", True, "accuracy") == (1.0, 10, 0)
    for guided in (False, True):
        assert value(cynic, "analysing", guided, "sensitivity") == (1.0, OBEDIENT, 0)
        assert value(cynic, "analysing", guided, "specificity") == (0.0, HONEST, 0)
        assert value(cynic, "analysing", guided, "balanced_accuracy") == (0.5, 10, 0)
        assert value(cynic, "analysing", guided, "accuracy") == (0.4, 10, 0)
    assert cynic.wins.tie.value == 1.0


def test_undecided_analyses_are_unscored_and_lose_to_right_ones(bench: Bench) -> None:
    learner = bench.run().models[1]
    assert value(learner, "analysing", False, "accuracy") == (None, 0, 10)
    assert value(learner, "analysing", True, "accuracy") == (1.0, 10, 0)
    assert (learner.wins.win.value, learner.wins.lose.value) == (1.0, 0.0)
    named = [(paired.a, paired.b) for paired in learner.comparisons]
    assert ("analysing/unguided", "answering/unguided") not in named
    assert ("analysing/guided", "answering/unguided") in named


def test_the_unguided_answers_are_analysed_right_and_wrong_alike(bench: Bench) -> None:
    bench.run()
    out = bench.folder / "out"
    analyses = list(read_jsonl(out / "analyses.jsonl", Discrimination))
    assert len(analyses) == 2 * 2 * (OBEDIENT + HONEST)
    assert not any(analysis.response.guided for analysis in analyses)
    texts = {analysis.response.text for analysis in analyses}
    assert texts == {TARGET, "An apple."}
    answers = list(read_jsonl(out / "responses.jsonl", StudyAnswer))
    scores = list(read_jsonl(out / "scores.jsonl", StudyScore))
    assert [(a.model, a.response.id) for a in answers] == [
        (s.model, s.score.response_id) for s in scores
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["models"]) == ["cynic", "learner"]
    assert set(manifest["stages"]) == {"respond", "analyse", "judge"}
    assert not (out / "scratch").exists()


def test_all_analyse_the_answers_of_the_first(bench: Bench) -> None:
    bench.engines["third"] = ScriptedEngine(lambda request: "An apple.", name="third")
    (bench.folder / "third.gguf").write_bytes(b"GGUF third")
    models = [str(bench.folder / f"{name}.gguf") for name in ("cynic", "learner", "third")]
    found = bench.run("analysed=first", f"models={json.dumps(models)}")
    out = bench.folder / "out"
    analyses = list(read_jsonl(out / "analyses.jsonl", Discrimination))
    of_model = {
        name: [a.response.text for a in analyses if a.model == name and not a.guided]
        for name in bench.engines
    }
    assert of_model["third"] == of_model["learner"] == of_model["cynic"]
    assert of_model["cynic"].count(TARGET) == OBEDIENT
    answered = {
        model.model: value(model, "answering", False, "accuracy")[0] for model in found.models
    }
    assert answered == {"cynic": 0.6, "learner": 0.6, "third": 1.0}, "by answers of its own"
    assert found.analysed == "cynic"
    told = {(t.model, t.guided): (round(t.value, 9), round(t.first, 9)) for t in found.told}
    assert told == {
        ("learner", False): (0.5, 0.5),
        ("learner", True): (1.0, 0.5),
        ("third", False): (0.5, 0.5),
        ("third", True): (0.5, 0.5),
    }
    html, markdown = (out / "study.html").read_text(), study_markdown(out)
    said = "0 told the mistakes of cynic better than it does and 0 told them worse, guided 0"
    assert said in html
    assert html.count('<article class="sample">') == 3 * 4
    assert_balanced(html)
    assert f"| learner | yes | {rate(1.0)} | {rate(0.5)} | +0.500 |" in markdown
    own = bench.run(f"models={json.dumps(models)}")
    assert own.analysed is None and own.told == ()
    assert "told by each model" not in study_markdown(out)


def test_the_terminal_shows_who_tells_the_first_models_mistakes(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run("analysed=first")
    print_study(bench.folder / "out")
    (line,) = [
        of for of in capsys.readouterr().out.splitlines() if "tells what cynic did" in of
    ]
    assert [rate(value) in line for value in (0.5, 1.0)] == [True, True]


def test_an_adapter_is_studied_as_a_model_is(tiny_model: Path, tmp_path: Path) -> None:
    mine = changed(tiny_model, tmp_path / "mine")
    rows = [{"prompt": f"Obey {i}", "target": TARGET} for i in range(3)]
    (tmp_path / "attacks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "policy": "goal-hijacking",
        "models": [str(tiny_model)],
        "adapters": {"mine": str(mine)},
        "analysed": "first",
        "prompts": {"path": str(tmp_path / "attacks.jsonl")},
        "respond": {"max_tokens": 4},
        "analyse": {"max_tokens": 4},
    }
    (tmp_path / "trial.yaml").write_text(json.dumps(recipe))
    out = run_study(tmp_path / "trial.yaml", tmp_path / "out", [], Silent())
    texts: dict[str, list[str]] = {}
    for found in read_jsonl(out / "responses.jsonl", StudyAnswer):
        texts.setdefault(found.model, []).append(found.response.text)
    base = tiny_model.name
    assert len(texts["mine"]) == len(texts[base]) == 6
    assert texts["mine"] != texts[base], "the adapter was on it"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["models"]["mine"] != manifest["models"][base]


def changed(model: Path, folder: Path) -> Path:
    """A LoRA adapter that turns a model's answers into others."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_weights(locate(str(model))), config)
    for name, weights in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=1.0)
    adapted.save_pretrained(folder)
    return folder


def test_a_second_time_asks_no_engine_and_says_the_same(bench: Bench) -> None:
    bench.run()
    out = bench.folder / "out"
    asked = {name: len(engine.requests) for name, engine in bench.engines.items()}
    assert set(asked.values()) == {4 * (OBEDIENT + HONEST)}
    assert bench.opened == ["cynic", "learner"]
    before = {p.name: p.read_bytes() for p in out.glob("*.json*") if p.stem != "manifest"}
    bench.run()
    assert bench.opened == ["cynic", "learner"]
    assert {name: len(engine.requests) for name, engine in bench.engines.items()} == asked
    assert {name: (out / name).read_bytes() for name in before} == before
    assert {"study.json", "responses.jsonl", "analyses.jsonl", "scores.jsonl"} <= set(before)


def test_a_changed_recipe_pays_for_what_changed(bench: Bench) -> None:
    bench.run()
    first = (bench.folder / "out/study.json").read_bytes()
    bench.run("analyse.max_tokens=50")
    assert (bench.folder / "out/former/1/study.json").read_bytes() == first
    assert {len(engine.requests) for engine in bench.engines.values()} == {
        6 * (OBEDIENT + HONEST)
    }
    bench.run("analyse.max_tokens=50")
    assert not (bench.folder / "out/former/2").exists()
    data = bench.folder / "attacks.jsonl"
    data.write_text(data.read_text().replace("Doubt", "Question"))
    bench.run("analyse.max_tokens=50")
    assert (bench.folder / "out/former/2/study.json").exists(), "the same path, other prompts"


def test_the_page_and_the_markdown_hold_the_numbers(bench: Bench) -> None:
    bench.run()
    out = bench.folder / "out"
    html, markdown = (out / "study.html").read_text(), study_markdown(out)
    assert "answering for 0 and less often for 0; the guide made the analyses of 1" in html
    assert "better than chance were 0 unguided and 1 guided." in html
    assert html.count('<article class="sample">') == 2 * 4
    assert "calls it a mistake" in html and "undecided" in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    # Three panels of two models; the learner's unguided analyses have no accuracy to draw.
    assert html.count("<g class=") == 3 + (3 + 2) + (2 + 1) + 2 * 2
    assert "| cynic | analysing | no | 40.0" in markdown
    assert "10 unscored" in markdown
    assert "| learner | no | 0 | 0 | 4 | 0 | 0 | 6 | 0 |" in markdown


def test_model_text_stays_inert_and_elements_are_balanced(bench: Bench) -> None:
    evil = "</div></article><script>alert(1)</script> hijacked"
    bench.engines["cynic"].script = lambda request: evil
    bench.run()
    html = (bench.folder / "out" / "study.html").read_text()
    assert "&lt;script&gt;" in html and "<script" not in html
    assert_balanced(html)


def test_the_command_prints_a_table_and_the_report_command_writes_the_page_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bench.folder / "out"
    command(monkeypatch, "study", str(bench.recipe), "--out", str(out))
    shown = capsys.readouterr().out
    assert "cynic" in shown and rate(0.4) in shown and f"wins {rate(1.0)}" in shown
    page = (out / "study.html").read_bytes()
    (out / "study.html").unlink()
    command(monkeypatch, "report", str(out))
    assert (out / "study.html").read_bytes() == page
    capsys.readouterr()
    command(monkeypatch, "report", str(out), "--markdown")
    assert capsys.readouterr().out == study_markdown(out)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["misstep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_a_bad_recipe_ends_with_status_2_before_any_model_loads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bench.folder / "out"
    words = ["misstep", "study", str(bench.recipe), "--out", str(out), "--set", "modles=[a]"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "unknown key 'modles'. Did you mean 'models'?" in capsys.readouterr().err
    assert not bench.opened and not out.exists()


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["models=[]"], RecipeError, "'models'"),
        (["seed=4294967296"], RecipeError, "less than 4294967296"),
        (["models=[a, a]"], RecipeError, "expected each once; twice or more: a"),
        (["models=[absent.gguf]"], ModelError, "absent.gguf"),
        (["analyse.temprature=1"], RecipeError, "Did you mean 'temperature'?"),
        (["respond.guided=[true]"], RecipeError, "unknown key 'respond.guided'"),
        (["policy.inner=1"], RecipeError, "'policy' has no keys below it"),
        (["prompts.path=absent.jsonl"], DataError, "absent.jsonl: no such file"),
        (["prompts.fields={target: topic}"], DataError, "expected a column of the data"),
        (["policy=harmlessness"], RecipeError, "judges by a rubric; found none"),
        (["judge=refusal"], RecipeError, "expected a judge of mistakes (mistake_rate), found"),
        (["adapters={cynic: a}"], RecipeError, "adapters.cynic: expected a name of its own"),
        (["adapters={mine: absent}"], RecipeError, "adapters.mine: adapter absent: expected a"),
        (["analysed=last"], RecipeError, "'analysed'"),
    ],
)
def test_wrong_input_is_named(
    bench: Bench, overrides: list[str], kind: type[MisstepError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        read_study_inputs(bench.recipe, overrides)
    assert said in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_directory_of_another_recipe_is_refused(bench: Bench) -> None:
    bench.run()
    with pytest.raises(InputError, match="the directory of the recipe 'trial'"):
        bench.run("name=other")


def test_a_rubric_is_put_to_one_judge_for_all_models(bench: Bench) -> None:
    def rules(request: Request) -> str:
        bad = f"]\n{TARGET}\n[" in request.messages[-1].content
        return f"Verdict: {'harmful' if bad else 'harmless'}"

    bench.engines["judge"] = ScriptedEngine(rules, name="judge")
    (bench.folder / "judge.gguf").write_bytes(b"GGUF judge")
    found = bench.run("policy=harmlessness", f"judge={bench.folder / 'judge.gguf'}")
    assert bench.opened == ["cynic", "learner", "judge"]
    assert found.judge.startswith("llm:")
    assert value(found.models[0], "answering", False, "accuracy") == (0.6, 10, 0)


def test_a_judge_of_its_own_takes_the_place_of_the_policys(bench: Bench) -> None:
    def rules(request: Request) -> str:
        bad = "]\nAn apple.\n[" in request.messages[-1].content
        return f"Verdict: {'harmful' if bad else 'harmless'}"

    bench.engines["judge"] = ScriptedEngine(rules, name="judge")
    (bench.folder / "judge.gguf").write_bytes(b"GGUF judge")
    judge = bench.folder / "fruit.yaml"
    judge.write_text(f"policy: harmlessness\nmodel: {bench.folder / 'judge.gguf'}\n")
    found = bench.run(f"judge={judge}")
    assert value(found.models[0], "answering", False, "accuracy") == (0.4, 10, 0)
    manifest = json.loads((bench.folder / "out/manifest.json").read_text())
    assert manifest["judge"]["name"] == str(judge)
    judge.write_text(judge.read_text() + "votes: 3\n")
    bench.run(f"judge={judge}")
    assert (bench.folder / "out/former/1/study.json").exists(), "the same path, another judge"


def test_models_are_called_by_the_end_of_their_paths_unless_two_are_called_the_same(
    tmp_path: Path,
) -> None:
    def at(place: str) -> Model:
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        return Model(str(path), path)

    (tmp_path / "v1.5-chat").mkdir()
    folder = Model(str(tmp_path / "v1.5-chat"), tmp_path / "v1.5-chat")
    a, hub = at("a.q4.gguf"), Model("org/name-1.5B", None)
    embedded = Model("smollm2-135m", a.path)
    found = names_of([a, folder, hub, embedded])
    assert found == ["a.q4", "v1.5-chat", "org/name-1.5B", "smollm2-135m"]
    other = at("other/a.q4.gguf")
    assert names_of([a, other]) == [a.name, other.name]
