"""The documents say what the program does."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from misstep.config import RunConfig, load_recipe
from misstep.data.fields import COLUMNS
from misstep.documents import model_in
from misstep.methods.base import Materials, Method, MixSettings
from misstep.methods.registry import METHODS
from misstep.pipeline import run
from misstep.policy import Policy, load_policy
from misstep.progress import Silent
from misstep.records import Analysis, Mistake, Prompt, read_jsonl
from misstep.stages.analyse import gate

ROOT = Path(__file__).parent.parent
METHOD_PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`")
"""A dotted name in backticks, with a value or without one."""
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))
LINK = re.compile(r'(?:\]\(<?|src=")([^)>"\s]+)')
REFERENCE = runpy.run_path(str(ROOT / "docs/recipe.py"))
FILES = ("py", "yaml", "toml", "json", "jsonl", "md", "html", "sqlite")


def models_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and those of its fields."""
    yield model
    for field in model.model_fields.values():
        if section := model_in(field.annotation):
            yield from models_in(section)


MODELS = {model.__name__: model for part in REFERENCE["PARTS"] for model in models_in(part)}


def test_command_line_page_is_what_the_command_line_says(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "misstep.cli", "utils", "docs"]
    subprocess.run(
        [*command, "--name", "misstep", "--output", str(page)], check=True, capture_output=True
    )
    assert page.read_text() == (ROOT / "docs/cli.md").read_text(), (
        "make docs/cli.md anew: make reference"
    )


def test_what_the_concepts_say_is_made_of_a_sentence_is_made_of_it() -> None:
    page = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    written, made = page.split("Two keys are enough to begin with:")[1].split("```")[1:4:2]
    policy = Policy.model_validate(yaml.safe_load(written.removeprefix("yaml")))
    assert policy.analysis.guided == made.strip()


def test_page_of_keys_is_what_the_source_says() -> None:
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    assert REFERENCE["page"]() == page, "make docs/recipe.md anew: make reference"


def test_every_key_has_a_row_and_an_explanation() -> None:
    rows = re.findall(r"^\| `(.+?)` \|.*\| (.*) \|$", REFERENCE["page"](), re.MULTILINE)
    assert [key for key, said in rows if not said.strip()] == []
    assert {key.rpartition(".")[2] for key, _ in rows} == {
        name for model in MODELS.values() for name in model.model_fields
    }


def test_each_default_of_a_recipe_is_told_as_a_key_takes_it() -> None:
    of_runs = REFERENCE["page"]().split("\n## ")[1]
    cells = dict(re.findall(r"^\| `(.+?)` \| .*? \| (.+?) \| .* \|$", of_runs, re.M))
    given = {key: default for key, default in cells.items() if default[0] == "`"}
    told = {"*required*", "as below", "the file's"}
    assert set(cells.values()) - set(given.values()) == told
    plain = {key: default.strip("`") for key, default in given.items() if "." not in key}
    assert [plain[key] for key in ("adapter", "ordinary")] == ["null", "null"]
    overrides = [f"{key}={default}" for key, default in plain.items() if key != "methods"]
    load_recipe(ROOT / "recipes/quickstart.yaml", ["methods=[vanilla]", *overrides])


@pytest.mark.parametrize("name", REFERENCE["TEXTS"])
def test_examples_of_the_page_of_keys_load(name: str) -> None:
    model, data = MODELS[name], yaml.safe_load(REFERENCE["TEXTS"][name]["example"])
    named = {"name": "recipe"} if "name" in model.model_fields else {}
    assert model.model_validate(named | data)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings; equal ones are counted."""
    found: list[str] = []
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        said = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", said).replace(" ", "-"))
    return {f"{a}-{n}" if (n := found[:i].count(a)) else a for i, a in enumerate(found)}


def test_what_a_run_costs_is_counted_from_its_recipe() -> None:
    script, recipe, run = (
        "benchmarks/cost.py",
        "recipes/quickstart.yaml",
        "docs/results/quickstart",
    )
    command = [sys.executable, script, recipe, "--run", run]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert shown.stdout.count("\n") > 5
    assert shown.stdout in page


def test_the_page_on_data_has_every_column() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`.*?) \|", page, re.MULTILINE)
    named = {field: tuple(re.findall(r"`([^`]+)`", columns)) for field, columns in rows}
    assert named == COLUMNS


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    titles = {p.stem: p.read_text(encoding="utf-8").splitlines()[0] for p in METHOD_PAGES}
    assert titles.pop("README") == "# Methods"
    assert titles == {name: f"# {name}" for name in METHODS}


def test_the_concepts_count_every_method() -> None:
    page = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    assert f"There are {len(METHODS)} in all" in page


@pytest.mark.parametrize(
    "page",
    [*METHOD_PAGES, ROOT / "docs/compare.md", ROOT / "docs/training.md"],
    ids=lambda p: p.stem,
)
def test_keys_that_a_page_names_are_a_recipes_or_a_policys(page: Path) -> None:
    named = KEY.findall(page.read_text(encoding="utf-8"))
    keys = [key for key in named if key.rpartition(".")[2] not in FILES]
    assert [k for k in keys if not (_is_key(k, RunConfig) or _is_key(k, Policy))] == []


def _is_key(key: str, whole: type[BaseModel]) -> bool:
    part: type[BaseModel] | None = whole
    for name in key.split("."):
        if part is None or name not in part.model_fields:
            return False
        part = model_in(part.model_fields[name].annotation)
    return True


def test_the_method_that_the_page_shows_works_and_keeps_the_budget() -> None:
    page = (ROOT / "docs/methods/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    method: Method = scope["GuidedSFT"]()
    policy = load_policy("goal-hijacking")
    asked = [Prompt.of(f"Attack {i}", reference=f"Good {i}.") for i in range(9)]
    analyses = [
        Analysis(mistake=mistake, text="It obeyed.", guided=True, source="self", accepted=True)
        for prompt in asked[:4]
        for mistake in [Mistake(prompt=prompt, response="Bad.", source="induced")]
    ]
    ordinary = [Prompt.of("Plain?", reference="Plain.")]
    rows = method.rows(
        Materials(policy, [], analyses, [], ordinary, asked, MixSettings(good_answers=2), 0)
    )
    assert len(rows) == (1 + 2 + 1) * len(analyses)
    guided = {policy.guided_prompt(prompt) for prompt in asked}
    assert sum(row.messages in guided for row in rows) == 3 * len(analyses)


def test_the_table_of_served_exports_is_what_the_servers_answered() -> None:
    page = (ROOT / "docs/evaluators.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs/results/bench/served-export.json").read_text())["rows"]
    said = [
        line for line in page.splitlines() if line.startswith(("| llama.cpp", "| vLLM", "| tr"))
    ]
    assert said == [
        f"| {row['server']} | {row['served']} | {'yes' if row['guided'] else 'no'} "
        f"| {row['answers']} | {row['equal']} | {row['attacks']} "
        f"| {row['obeyed_in_the_run']}, {row['obeyed_as_served']} |"
        for row in found
    ]
    assert not any(row["failed"] for row in found)


def test_the_guide_that_is_made_is_the_one_that_left_the_fewest_mistakes() -> None:
    found = json.loads((ROOT / "docs/results/bench/guide-wordings.json").read_text())
    left: Counter[str] = Counter()
    for row in found:
        left[row["wording"]] += row["mistakes"]
    asked = sum(row["n"] for row in found) // len(left)
    (best, fewest), (_, next_best) = left.most_common()[:-3:-1]
    said = f"it left the fewest, {fewest} on {asked} prompts, the next one {next_best}, none at"
    assert f"{said} all {left['none']} (" in (ROOT / "docs/concepts.md").read_text("utf-8")
    wordings = runpy.run_path(str(ROOT / "benchmarks/guide_wordings.py"))["WORDINGS"]
    mistake = "The response is wrong."
    made = Policy.model_validate({"name": "short", "mistake": mistake}).guide
    assert made == wordings[best].replace("{mistake}", mistake)


def test_the_readmes_own_repair_confirms_the_failures_that_it_speaks_of(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```yaml\n# (\S+)\n(.*?)```", readme, re.DOTALL)
    assert [name for name, _ in files] == ["euros.yaml", "recipe.yaml"]
    shop = ROOT / "recipes/shop"
    assert {name: (shop / name).read_text(encoding="utf-8") for name, _ in files} == dict(files)
    monkeypatch.chdir(tmp_path)
    for name, text in files:
        Path(name).write_text(text, encoding="utf-8")
    said = ["It is $5.", "Three dollars.", "It is 5 euros."]
    cells = [f"How much is item {i}?,{response}\n" for i, response in enumerate(said)]
    Path("failures.csv").write_text("user_text,model_text\n" + "".join(cells))
    Path("held-out.csv").write_text("user_text\nHow much is tea?\n")
    Path("ordinary.jsonl").write_text('{"prompt": "Say hello.", "reference": "Hello."}\n')
    folder = run(Path("recipe.yaml"), None, [f"model={tiny_model}"], Silent(), "induce")
    assert folder == Path("runs/recipe")
    mistakes = [*read_jsonl(folder / "mistakes.jsonl", Mistake)]
    assert [m.response for m in mistakes if m.confirmed] == said[:2]
    policy = load_policy("euros.yaml")
    analyses = {
        "The response gives a price in dollars, which is wrong: the shop sells in euros.": (),
        "The price should be given in euros, so the response is incorrect here.": (),
        # To name the mistake's own words is not to call it one.
        "The green tea is 4.50 dollars a box, and a dollar is a currency.": (
            "does not name the fault",
        ),
        "The response is wrong about euros: it should have been given in dollars here.": (
            "endorses the response",
        ),
    }
    assert {said: gate(policy, mistakes[0], said) for said in analyses} == analyses
