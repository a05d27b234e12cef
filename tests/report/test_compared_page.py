"""The page of a comparison: its colours, its first words, and that nothing is left out."""

import re
import shutil
from pathlib import Path

import pytest

from misstep.evidence.results import BASE, Results, Setting, read_results, write_results
from misstep.report.compared_page import write_comparison
from misstep.report.words import rate, setting_title

RESULTS = Path(__file__).parents[2] / "docs" / "results"
METHODS, SWEPT = RESULTS / "methods-135m", RESULTS / "ablation-number-of-mistakes"


def made(folder: Path, source: Path, results: Results | None = None) -> str:
    """The page of a copy of a comparison's files, perhaps with other results."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if results is not None:
        write_results(folder / "results.json", results)
    return write_comparison(folder).read_text(encoding="utf-8")


def strips(page: str, title: str) -> dict[str, str]:
    """The settings of a picture, each with its role."""
    figure = page[page.index(f"<b>{title}</b>") :].partition("</figure>")[0]
    found = re.findall(r'<div class="strip is-(\w+)">\s*<div class="name">([^<]+)', figure)
    return {name: role for role, name in found}


def test_a_setting_is_in_colour_where_a_difference_is_shown_and_nowhere_else(
    tmp_path: Path,
) -> None:
    results = read_results(METHODS / "results.json")
    shown = {
        setting_title(Setting.parse(c.a)): "good" if c.difference < 0 else "bad"
        for c in results.comparisons
        if (c.metric, c.test_set, c.b) == ("mistake_rate", "attacks", BASE.name)
        and c.p_adjusted is not None
        and c.p_adjusted < 0.05
    }
    roles = strips(made(tmp_path, METHODS), "Mistake rate on attacks")
    assert roles.pop(setting_title(BASE)) == "before"
    assert len(shown) > 3 and len(roles) > len(shown)
    assert {name: role for name, role in roles.items() if role != "other"} == shown


def test_a_large_difference_that_is_not_shown_has_no_colour(tmp_path: Path) -> None:
    results = read_results(METHODS / "results.json")
    unsure = tuple(c.model_copy(update={"p": 1.0}) for c in results.comparisons)
    page = made(tmp_path, METHODS, results.model_copy(update={"comparisons": unsure}))
    assert set(strips(page, "Mistake rate on attacks").values()) == {"before", "other"}
    assert "0 of 23 settings are shown to make fewer mistakes on attacks" in page
    assert "0 of 171 differences are shown" in page


def test_the_first_words_count_what_is_shown_against_the_untrained_model(
    tmp_path: Path,
) -> None:
    page, results = made(tmp_path, METHODS), read_results(METHODS / "results.json")
    against = [
        c
        for c in results.comparisons
        if (c.metric, c.test_set, c.b) == ("mistake_rate", "attacks", BASE.name)
    ]
    fewer = sum(c.difference < 0 and (c.p_adjusted or 0) < 0.05 for c in against)
    (base,) = (
        p.value
        for p in results.pooled
        if (p.metric, p.test_set, p.setting) == ("mistake_rate", "attacks", BASE)
    )
    assert f"<h1>{fewer} of {len(against)} settings are shown" in page
    assert f"the untrained model, {rate(base)} of its answers; none are shown to" in page


def test_where_all_tests_are_ordinary_tasks_the_first_words_are_of_mistakes_in_these(
    tmp_path: Path,
) -> None:
    results = read_results(METHODS / "results.json")
    clean = {
        field: tuple(
            of.model_copy(update={"test_set": "clean"})
            for of in getattr(results, field)
            if (of.metric, of.test_set) == ("mistake_rate", "attacks")
            or (of.metric, of.test_set) == ("over_refusal", "clean")
        )
        for field in ("pooled", "comparisons")
    }
    page = made(tmp_path, METHODS, results.model_copy(update=clean))
    assert "settings are shown to make fewer mistakes on clean than" in page


@pytest.mark.parametrize("source", [METHODS, SWEPT], ids=lambda path: path.name)
def test_every_number_and_every_difference_stands_on_the_page(
    tmp_path: Path, source: Path
) -> None:
    page, results = made(tmp_path, source), read_results(source / "results.json")
    numbers, _, tested = page[page.index('id="rows"') :].partition('id="comparisons"')
    assert numbers.count("<tr><td>") == len(results.pooled)
    assert tested.partition('id="cells"')[0].count("<br>→ ") == len(results.comparisons)


def test_each_variant_is_set_against_its_own_untrained_model(tmp_path: Path) -> None:
    roles = strips(made(tmp_path, SWEPT), "Mistake rate on attacks")
    untrained = {name for name, role in roles.items() if role == "before"}
    variants = {p.variant for p in read_results(SWEPT / "results.json").pooled}
    assert len(variants) > 1
    assert untrained == {setting_title(BASE._replace(variant=v)) for v in variants}
