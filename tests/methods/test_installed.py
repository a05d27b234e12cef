"""Methods of somebody else's package, installed and not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/methods/README.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PRINT = "from misstep.config import METHODS as m; print(list(m)[-1], m['guided_sft'].plain)"


def install(folder: Path, code: str) -> dict[str, str]:
    """What pip would write for a package with the page's entry point."""
    (point,) = re.findall(r"```toml\n.*?(guided_sft = \".*?\")\n```", PAGE, re.DOTALL)
    (folder / "my_methods.py").write_text(code, encoding="utf-8")
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[misstep.methods]\n{point.replace(chr(34), '')}\n")
    return {"PYTHONPATH": str(folder)}


def test_the_page_shows_a_method_that_a_package_adds(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", PRINT],
        env=install(tmp_path, CODE),
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["guided_sft", "True"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CODE.replace('"guided_sft"', '"sft"'), "a name of its own.*found 'sft'"),
        (
            CODE.replace('"guided_sft"', '"../sft"'),
            r"letters, digits and '_'; found '\.\./sft'",
        ),
        ("GuidedSFT = dict", "expected a Method, found dict"),
        ("import no_such_library", "cannot be loaded: No module named 'no_such_library'"),
    ],
)
def test_a_package_that_adds_none_is_named(tmp_path: Path, code: str, said: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "misstep", "run", str(ROOT / "recipes/quickstart.yaml")],
        env=install(tmp_path, code),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert found.returncode == 2, found.stderr
    assert re.search(rf"error: my_methods:GuidedSFT, .*{said}", found.stderr), found.stderr
