"""The pages of docs/results say what the committed files beside them say."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from misstep.errors import DataError
from misstep.evidence.judge_card import JudgeCard
from misstep.evidence.results import Comparison, adjusted, read_results
from misstep.evidence.study_results import StudyModel, read_study
from misstep.records import read_json
from misstep.report import pages
from misstep.report.check_markdown import check_markdown
from misstep.report.check_words import caution, titles
from misstep.report.compared import write_picture
from misstep.report.judges_markdown import cards_markdown
from misstep.report.markdown import rows_table
from misstep.report.study import write_study_picture
from misstep.report.study_markdown import study_markdown
from misstep.report.words import gap, p_text, rate

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in (ROOT / "docs/results").glob("*/results.json"))

CLAIM = re.compile(
    r"([+−]?[\d.]+) points, ([+−]?[\d.]+) to ([+−]?[\d.]+), adjusted p (below )?(\d\.\d+)"
)
"""How the pages write a difference that they rest a claim on."""
MEANING = re.compile(r"^## What it means\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
PROSE = {run.parent / f"{run.name}.md": [run] for run in RUNS}
PROSE |= {ROOT / "docs/results/README.md": RUNS, ROOT / "README.md": RUNS}
"""Pages, and the results that they speak of."""
CARDS = [path for path in (ROOT / "docs/results").glob("judges") if path.is_dir()]
PICTURES = sorted((ROOT / "docs/results").glob("*/picture.svg"))
CHECKS = sorted(path.parent for path in (ROOT / "docs/results").glob("*/check.json"))
STUDIES = sorted(path.parent for path in (ROOT / "docs/results").glob("*/study.json"))


def by_hand(page: Path) -> str:
    """What was written by hand of a page; it stands before the tables."""
    found = MEANING.search(page.read_text(encoding="utf-8"))
    return found.group() if found else ""


def of_numbers(page: Path) -> str:
    """All else of it."""
    return MEANING.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_results_page_is_made_from_its_results(run: Path) -> None:
    page = ROOT / "docs/results" / f"{run.name}.md"
    assert pages.markdown(run) == of_numbers(page), (
        f"make it anew: misstep report --markdown docs/results/{run.name}"
    )


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.parent.name)
def test_a_picture_is_drawn_from_its_results(picture: Path, tmp_path: Path) -> None:
    folder = picture.parent
    is_study = folder in STUDIES
    name, draw = (
        ("study.json", write_study_picture) if is_study else ("results.json", write_picture)
    )
    shutil.copy(folder / name, tmp_path)
    drawn = draw(tmp_path).read_text(encoding="utf-8")
    assert picture.read_text(encoding="utf-8") == drawn, (
        f"make it anew: misstep report --picture docs/results/{folder.name}"
    )
    assert f"({folder.name}/picture.svg)" in (folder.parent / f"{folder.name}.md").read_text(
        "utf-8"
    )
    shown = (
        {model.model for model in read_study(tmp_path / name).models if decides(model)}
        if is_study
        else {p.setting.name for p in read_results(tmp_path / name).pooled}
    )
    assert shown and all(f">{title}" in drawn for title in shown)


def decides(model: StudyModel) -> bool:
    """Whether analyses of mistakes and of right answers have a verdict, asked in one way."""
    return any(
        all(
            model.metric("analysing", guided, kind).n for kind in ("sensitivity", "specificity")
        )
        for guided in (False, True)
    )


def test_settings_of_other_kinds_stand_in_one_table_and_bars_in_cells(tmp_path: Path) -> None:
    made = ROOT / "docs/results/compare-smoke"
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    data = json.loads((made / "results.json").read_text(encoding="utf-8"))
    first = data["kinds"][0]
    same = [of for of in data["kinds"] if of["kind"] == first["kind"]]
    assert len(same) > 1
    first["kind"] = "a|b"
    (tmp_path / "results.json").write_text(json.dumps(data), encoding="utf-8")
    page = pages.markdown(tmp_path)
    heads = next(line for line in page.splitlines() if "a\\|b" in line)
    table = page[page.index(heads) :].partition("\n\n")[0].splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
    assert len({len(line) for line in cells}) == 1 and len(cells) > 3
    column = [line[cells[0].index(f" a\\|b ({first['n']}) ")].strip() for line in cells[2:]]
    assert column[0] == rate(first["value"]) and set(column[1:]) == {"–"}
    html = pages.page(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Mistakes by kind of prompt</h2>" in html
    assert all(f'<th scope="col">{of["kind"]} (' in html for of in data["kinds"])


def test_a_copy_of_a_comparisons_files_is_shown_as_a_comparison(tmp_path: Path) -> None:
    made = ROOT / "docs/results/methods-135m"
    for name in ("results.json", "manifest.json"):
        shutil.copy(made / name, tmp_path)
    page = pages.page(tmp_path).read_text(encoding="utf-8")
    seeds = {row.seed for row in read_results(made / "results.json").rows}
    assert len(seeds) > 1
    assert f"training seeds {', '.join(map(str, sorted(seeds)))}" in page


def test_without_harm_and_help_there_is_nothing_to_draw(tmp_path: Path) -> None:
    results = ROOT / "docs/results/xsafety/results.json"
    shutil.copy(results, tmp_path)
    with pytest.raises(DataError, match="found none to draw"):
        write_picture(tmp_path)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_page_is_made_from_its_study(study: Path) -> None:
    page = ROOT / "docs/results" / f"{study.name}.md"
    assert study_markdown(study) == of_numbers(page), (
        f"make it anew: misstep report --markdown docs/results/{study.name}"
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_page_of_a_check_is_made_from_its_numbers(check: Path) -> None:
    assert check_markdown(check) == of_numbers(check.parent / f"{check.name}.md")


@pytest.mark.parametrize("cards", CARDS, ids=lambda cards: cards.name)
def test_the_page_of_judges_is_made_from_their_cards(cards: Path) -> None:
    assert cards_markdown(cards) == of_numbers(cards.with_suffix(".md")), (
        f"make it anew: misstep report --markdown docs/results/{cards.name}"
    )


def test_only_of_mistakes_an_error_is_called_safe() -> None:
    for metric, missed in (
        ("mistake_rate", "False-safe"),
        ("harmless_score", "False-safe"),
        ("over_refusal", "False negatives"),
        ("helpfulness", "False negatives"),
    ):
        assert titles(metric)["false_safe"].startswith(missed)
        assert f"{missed}: of the answers" in caution(metric)
    # Pairs have no such rates.
    assert "False" not in caution("win_rate", pairs=True)


def test_a_folder_of_trained_judges_shows_the_card_of_each(tmp_path: Path) -> None:
    judges = tmp_path / "judges"
    judges.mkdir()
    with pytest.raises(DataError, match="judges: expected cards of trained judges, found none"):
        pages.markdown(judges)
    for name in ("harm", "refusal"):
        (judges / name).mkdir()
        card = ROOT / f"docs/results/judges/{name}.json"
        shutil.copy(card, judges / name / "card.json")
    page = pages.markdown(judges)
    assert re.findall("^## (.*)", page, re.MULTILINE) == ["harm", "refusal"]


def test_the_table_of_aims_is_made_from_the_committed_files() -> None:
    readme = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    aims = runpy.run_path(str(ROOT / "docs/results/aims.py"))
    assert aims["page"](readme) == readme, "make it anew: make reference"


def test_every_aim_that_was_missed_has_a_reason() -> None:
    readme = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (yes|no|–) \| (.*) \|$", readme, re.MULTILINE)
    assert {met for met, _ in rows} == {"yes", "no", "–"}
    assert [row for row in rows if (row[0] == "yes") == bool(row[1].strip())] == []


def test_the_readme_shows_the_committed_quickstarts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"\[(\d\.\d %)\]\((docs/results/quickstart\S*)\.md\)", readme)
    assert len(shown) == 3
    for said, page in shown:
        rows = read_results(ROOT / page / "results.json").rows
        rates = {
            (row.method, row.guided): 100 * (row.metrics["mistake_rate"].value or 0)
            for row in rows
            if row.test_set == "attacks"
        }
        assert said == f"{rates['mistake_analysis', True]:.1f} %"
        assert round(rates["vanilla", False]) == 19 and "where it obeyed 19 %" in readme


def test_the_readmes_table_of_repairs_holds_the_committed_rates() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Which repair?")[1].split("**What was found**")[0]
    rows = re.findall(
        r"^\| .* \| (.*) \| \[(.*)\]\((.*)\.md\) \| (.*) \|$", table, re.MULTILINE
    )
    assert len(rows) == 6
    for trained, obeyed, page, answered in rows:
        pooled = read_results(ROOT / page / "results.json").pooled
        for metric, shown in (("mistake_rate", obeyed), ("helpfulness", answered)):
            found = {
                p.setting.method: f"{100 * p.value:.1f} %"
                for p in pooled
                if p.value is not None and (p.test_set, p.metric) == ("attacks", metric)
                if p.setting.guided == ("guided" in trained)
                and p.setting.variant in ("", "good_answers.source=self")
            }
            methods = re.findall(r"`([a-z_]+)`", trained)
            assert shown == ", ".join(found[method] for method in methods)


def test_without_a_manifest_the_page_says_nothing_of_it(tmp_path: Path) -> None:
    run = next(run for run in RUNS if not read_results(run / "results.json").pooled)
    shutil.copy(run / "results.json", tmp_path)
    page, whole = pages.markdown(tmp_path), pages.markdown(run)
    assert rows_table(read_results(run / "results.json")) in page
    assert "Machine:" in whole and "## Yields" in whole
    assert "Machine:" not in page and "## Yields" not in page


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "found what is no JSON"),
        ("[]", "found one without device"),
        ('{"recipe": {}}', "device"),
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str, why: str) -> None:
    shutil.copy(RUNS[0] / "results.json", tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json: expected the manifest.*{why}"):
        pages.markdown(tmp_path)


def test_a_run_that_has_not_ended_is_told_so(tmp_path: Path) -> None:
    shutil.copy(RUNS[0] / "manifest.json", tmp_path)
    with pytest.raises(
        DataError, match=r"finished run, found none yet\. Run the recipe to its"
    ):
        pages.markdown(tmp_path)


def test_a_run_of_one_setting_has_no_table_of_differences(tmp_path: Path) -> None:
    run = next(run for run in RUNS if not read_results(run / "results.json").pooled)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    alone = json.dumps(results | {"comparisons": []})
    (tmp_path / "results.json").write_text(alone, encoding="utf-8")
    assert "Paired differences" in pages.markdown(run)
    assert "Paired differences" not in pages.markdown(tmp_path)


def test_every_rate_stands_in_the_page() -> None:
    for run in RUNS:
        page, results = pages.markdown(run), read_results(run / "results.json")
        # Of several seeds the page has the rate over all, and the lowest and highest one.
        seeds = [(p.metric, p.by_seed.values()) for p in results.pooled if p.n]
        shown = [(metric, v) for metric, of in seeds for v in (min(of), max(of))]
        shown += [(p.metric, p.value) for p in results.pooled if p.value is not None]
        rows = [] if seeds else [item for row in results.rows for item in row.metrics.items()]
        shown += [(name, metric.value) for name, metric in rows if metric.value is not None]
        assert shown
        for name, value in shown:
            assert rate(value, name) in page


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_differences_in_prose_are_those_of_committed_results(page: Path) -> None:
    found = {
        said
        for run in PROSE[page]
        for comparison in adjusted(read_results(run / "results.json").comparisons)
        for said in _both_ways(comparison)
    }
    text = by_hand(page) or page.read_text(encoding="utf-8")
    assert [claim for claim in CLAIM.findall(text) if claim not in found] == []
    said = re.findall(r"(?<!each )adjusted p (?:below )?\d", text)
    assert len(said) == len(CLAIM.findall(text))


@pytest.mark.parametrize("page", [p for p in PROSE if p.stem != "README"], ids=lambda p: p.stem)
def test_rates_in_prose_stand_in_the_page_s_tables(page: Path) -> None:
    tables, prose = of_numbers(page), by_hand(page)
    # How often a judge is right stands where it was measured.
    tables += (ROOT / "docs/results/judges.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\d+\.\d(?=\s%)", tables))
    assert set(re.findall(r"\d+\.\d(?=\s%)", prose)) <= known


def _both_ways(c: Comparison) -> list[tuple[str, ...]]:
    """A comparison as prose writes it, a minus b and b minus a."""
    assert c.p_adjusted is not None
    p = ("below ", "0.001") if c.p_adjusted < 0.001 else ("", p_text(c.p_adjusted))
    return [
        (gap(c.difference), gap(c.low), gap(c.high), *p),
        (gap(-c.difference), gap(-c.high), gap(-c.low), *p),
    ]


def test_judges_of_one_metric_stand_side_by_side_on_what_two_were_measured_on(
    tmp_path: Path,
) -> None:
    judges = tmp_path / "judges"
    judges.mkdir()
    for name in ("harm", "harm-1.5b", "refusal"):
        shutil.copy(ROOT / f"docs/results/judges/{name}.json", judges)
    page = pages.markdown(judges)
    overview = page[: page.index("\n## ")]
    cards = {
        name: read_json(judges / f"{name}.json", JudgeCard) for name in ("harm", "harm-1.5b")
    }
    both = [name for name in cards["harm"].data if name in cards["harm-1.5b"].data]
    alone = cards["harm-1.5b"].data.keys() - set(both)
    (heads,) = [line for line in overview.splitlines() if line.startswith("| judge |")]
    assert heads == f"| judge | made of | {' | '.join(both)} |"
    assert alone and "refusal" not in overview
    for name, anchor in (("harm", "harm"), ("harm-1.5b", "harm-15b")):
        found = cards[name].data[both[0]]
        assert found.accuracy and found.auc
        values = f"{rate(found.accuracy.value)}, {rate(found.auc.value, 'auc')}"
        assert f"| [{name}](#{anchor}) | {cards[name].training.model} | {values} |" in overview
