"""The rules that hold for the package as a whole, each as a test."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import misstep
from misstep.comparison import load_cells
from misstep.config import RunConfig, load_recipe
from misstep.policy import load_policy, shipped
from misstep.study_config import StudyConfig, load_study_recipe

PACKAGE = Path(misstep.__file__).parent
ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEAVY = (
    "torch transformers trl peft numpy scipy openvino openvino_genai openai ray vllm datasets "
    "pyarrow jinja2"
)

LAYERS = [
    "misstep",
    "misstep.errors",
    "misstep.claims",
    "misstep.machine",
    "misstep.records",
    "misstep.documents",
    "misstep.policy_words",
    "misstep.policy",
    "misstep.rubric",
    "misstep.guard",
    "misstep.data.shelf",
    "misstep.data.suites",
    "misstep.data.tables",
    "misstep.data.labels",
    "misstep.data.fields",
    "misstep.data.row_labels",
    "misstep.data.columns",
    "misstep.data.sources",
    "misstep.data.held_out",
    "misstep.data.preferred",
    "misstep.data.labelled",
    "misstep.data*",
    "misstep.evidence.stats",
    "misstep.evidence.agreement",
    "misstep.evidence.results",
    "misstep.evidence.study_results",
    "misstep.evidence.check_results",
    "misstep.evidence*",
    "misstep.models.precision",
    "misstep.models.gguf_header",
    "misstep.models.unpacked",
    "misstep.models.endpoint",
    "misstep.models.locate",
    "misstep.models.adapter",
    "misstep.models.weights",
    "misstep.models.chat_template",
    "misstep.models.rendering",
    "misstep.models.gguf_merge",
    "misstep.models.openvino_export",
    "misstep.models*",
    "misstep.training*",
    "misstep.engines.base",
    "misstep.engines.pace",
    "misstep.engines.threads",
    "misstep.engines.turns",
    "misstep.engines.keeper",
    "misstep.engines.server",
    "misstep.engines.openai",
    "misstep.engines.store",
    "misstep.engines.cached",
    "misstep.engines*",
    "misstep.judges.base",
    "misstep.judges.asking",
    "misstep.judges.refusal",
    "misstep.judges*",
    "misstep.stages.base",
    "misstep.stages.train_settings",
    "misstep.stages.analyse",
    "misstep.stages.discriminate",
    "misstep.stages.fit",
    "misstep.stages.train",
    "misstep.stages.reward",
    "misstep.stages*",
    "misstep.methods.base",
    "misstep.methods*",
    "misstep.judge_config",
    "misstep.config",
    "misstep.study_config",
    "misstep.judging",
    "misstep.progress",
    "misstep.report*",
    "misstep.inputs",
    "misstep.run_folder",
    "misstep.pipeline",
    "misstep.comparison",
    "misstep.study",
    "misstep.judge_check",
    "misstep.judge_train",
    "misstep.people",
    "misstep.export",
    "misstep.inspect_log",
    "misstep.inspect_task",
    "misstep.summary",
    "misstep.bench*",
    "misstep.cli",
    "misstep.__main__",
]
"""From the ground up: a module imports from layers above its own line only."""
WHOLES = ("misstep.training", "misstep.report", "misstep.bench")
"""Packages that are one thing in several files: their files may import each other."""
GATHERERS = ("choose", "registry")
"""Modules that exist to know their siblings."""


class Import(NamedTuple):
    importer: str
    imported: str
    name: str | None
    """The name that is taken from the module; None where the module itself is."""


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(module: str) -> Iterator[Import]:
    """Every import of the package's own, TYPE_CHECKING and functions included."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "misstep":
                    yield Import(module, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            source = str(node.module)
            for alias in node.names if source.split(".")[0] == "misstep" else ():
                inner = f"{source}.{alias.name}"
                taken = (inner, None) if inner in MODULES else (source, alias.name)
                yield Import(module, *taken)


IMPORTS = [found for module in MODULES for found in imports(module)]


def layer(module: str) -> int:
    exact = [i for i, pattern in enumerate(LAYERS) if pattern == module]
    return next(iter(exact or [i for i, p in enumerate(LAYERS) if fnmatch(module, p)]), -1)


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module itself defines a name at its top level, and does not only import it."""
    imported = (ast.Import, ast.ImportFrom)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name == name:
                return True
        elif not isinstance(node, imported):
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            if any(n.id == name and isinstance(n.ctx, ast.Store) for n in stored):
                return True
    return False


def allowed(found: Import) -> bool:
    above, below = layer(found.imported), layer(found.importer)
    if above != below:
        return above < below
    package, _, leaf = found.importer.rpartition(".")
    whole = any(found.importer.startswith(w) and found.imported.startswith(w) for w in WHOLES)
    return whole or (leaf in GATHERERS and found.imported.startswith(package + "."))


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if layer(module) < 0] == []


def test_the_parts_in_the_concepts_are_the_layers_in_their_order() -> None:
    page = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    (_, parts) = page.split("## The parts")
    block = parts.split("```")[1].strip()
    listed = [
        line.split()[0].removesuffix("/").removesuffix(".py") for line in block.split("\n")
    ]
    tops = dict.fromkeys(name.split(".")[1].rstrip("*") for name in LAYERS if "." in name)
    assert listed == [top for top in tops if top != "__main__"]


def test_modules_import_from_layers_above_only() -> None:
    assert [f"{i.importer} imports {i.imported}" for i in IMPORTS if not allowed(i)] == []


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        graph[found.importer].add(found.imported)
    assert list(TopologicalSorter(graph).static_order())


def test_imports_name_the_defining_module() -> None:
    borrowed = [
        f"{i.importer} takes {i.name} from {i.imported}"
        for i in IMPORTS
        if i.imported not in MODULES or (i.name and not defines(MODULES[i.imported], i.name))
    ]
    assert borrowed == []


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []


@pytest.mark.parametrize(
    "module", ["misstep.cli", "misstep.config", "misstep.study_config", "misstep.judge_config"]
)
def test_the_command_starts_without_heavy_libraries(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(shown.stdout)}
    assert loaded & set(HEAVY.split()) == set()


@pytest.mark.parametrize("name", shipped())
def test_shipped_policies_load_under_their_file_names(name: str) -> None:
    assert load_policy(name).name == name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert all(load_policy(config.policy) for config in configs(path))


def configs(path: Path) -> list[RunConfig] | list[StudyConfig]:
    """What a recipe becomes; the keys of its own say of which kind it is."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    if "models" in keys:
        return [load_study_recipe(path)]
    if keys & {"seeds", "sweep"}:
        return [cell.config for cell in load_cells(path)]
    return [load_recipe(path)]
