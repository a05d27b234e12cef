"""The documents say what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
