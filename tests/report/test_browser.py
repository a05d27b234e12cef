"""Every kind of page in a real browser, as a phone and a desk show it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from misstep.report import pages

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NARROW, WIDE = 360, 1280


@pytest.mark.parametrize(
    "name", ["quickstart", "methods-135m", "ablation-rounds", "study", "asked-harm", "llmbar"]
)
@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_the_screen_fetches_nothing_and_has_no_errors(
    browser: Any, tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    shutil.copytree(RESULTS / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "judged.jsonl").touch()  # Of a check the answers are not committed.
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages.page(tmp_path).as_uri())
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(beyond) == 0
    for picture in page.locator("main svg[role=img]").all():
        box = picture.bounding_box()
        assert box["width"] > 50 and box["height"] > 10
    for folded in page.locator("details").all():
        folded.evaluate("d => { d.open = true; }")
    assert page.evaluate(beyond) == 0, "wide tables scroll in themselves"
    ink, paper = page.evaluate(
        "['color', 'backgroundColor'].map(s => getComputedStyle(document.body)[s])"
    )
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")
    context.close()


def brightness(colour: str) -> int:
    """Of `rgb(…)`."""
    return sum(map(int, colour[4:-1].split(",")[:3]))
