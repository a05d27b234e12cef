"""The documents say what the program does."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from misstep.config import RunConfig
from misstep.methods.base import Materials, Method, MixSettings
from misstep.methods.registry import METHODS
from misstep.policy import load_policy
from misstep.records import Analysis, Mistake, Prompt

ROOT = Path(__file__).parent.parent
METHOD_PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`")
"""A dotted name in backticks, with a value or without one."""
FILES = ("py", "yaml", "json", "jsonl", "md", "html", "sqlite")


def test_command_line_page_is_what_the_command_line_says(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "misstep.cli", "utils", "docs"]
    subprocess.run(
        [*command, "--name", "misstep", "--output", str(page)], check=True, capture_output=True
    )
    assert page.read_text() == (ROOT / "docs/cli.md").read_text(), (
        "make docs/cli.md anew: python -m typer misstep.cli utils docs --name misstep "
        "--output docs/cli.md"
    )


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


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


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    titles = {p.stem: p.read_text(encoding="utf-8").splitlines()[0] for p in METHOD_PAGES}
    assert titles.pop("README") == "# Methods"
    assert titles == {name: f"# {name}" for name in METHODS}


@pytest.mark.parametrize(
    "page",
    [*METHOD_PAGES, ROOT / "docs/compare.md", ROOT / "docs/training.md"],
    ids=lambda p: p.stem,
)
def test_recipe_keys_that_a_page_names_exist(page: Path) -> None:
    named = KEY.findall(page.read_text(encoding="utf-8"))
    keys = [key for key in named if key.rpartition(".")[2] not in FILES]
    assert [key for key in keys if not _is_key(key)] == []


def _is_key(key: str) -> bool:
    part: Any = RunConfig
    for name in key.split("."):
        fields = part.model_fields if _is_section(part) else {}
        if name not in fields:
            return False
        part = fields[name].annotation
    return True


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


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
