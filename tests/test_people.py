import csv
import json
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from made import answer_of

from misstep.errors import DataError, InputError
from misstep.evidence.ratings import QUESTIONS, Item, Key, paired_items, sheet_csv
from misstep.evidence.results import Setting
from misstep.judge_check import read_check_inputs
from misstep.people import import_sheets, write_sheet
from misstep.records import (
    Answer,
    Judgement,
    Message,
    Prompt,
    Response,
    Score,
    read_json,
    write_jsonl,
)
from misstep.report.sheet import write_sheet_page
from misstep.report.template import HERE

N = 12
SETTINGS = (("vanilla", False), ("mistake_analysis", True), ("sft", False))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three settings whose answers say which they are of, judged right except once."""
    answers, judgements = [], []
    for method, guided in SETTINGS:
        for i in range(N):
            prompt = Prompt.of(f"=Question {i}?", target="The moon is soup")
            text = f"{'BAD' if method == 'vanilla' else 'GOOD'} <b>{method[::-1]}</b> {i}"
            response = Response(prompt=prompt, text=text, guided=guided)
            answers.append(answer_of(response, method, "attacks"))
            value = float((method == "vanilla") != (method == "vanilla" and i == 0))
            score = Score(
                response_id=response.id, metric="mistake_rate", value=value, judge="j"
            )
            judgements.append(Judgement.of(answers[-1], score))
    folder = tmp_path / "run"
    write_jsonl(folder / "responses.jsonl", answers)
    write_jsonl(folder / "scores.jsonl", judgements)
    recipe = {"recipe": {"policy": "goal-hijacking"}, "device": "", "versions": {}}
    (folder / "manifest.json").write_text(json.dumps(recipe))
    return folder


def rows(sheet: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO((sheet / "sheet.csv").read_text("utf-8-sig"))))


def rate(sheet: Path, rater: str, wrong: int = 0) -> Path:
    """A rater who sees what is bad and prefers the other, save in the first so many lines."""
    filled = rows(sheet)
    for place, row in enumerate(filled):
        bad = ["BAD" in row[f"answer_{side}"] for side in (1, 2)]
        if place < wrong:
            bad = [not b for b in bad]
        row |= {
            f"mistake_{side}": "Yes" if b else "no" for side, b in zip((1, 2), bad, strict=True)
        }
        row["better"] = "2" if bad[0] else "1"
    return save(sheet.parent.parent / f"{rater}.csv", filled)


def save(path: Path, filled: list[dict[str, str]], **how: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(filled[0]), **how)  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(filled)
    return path


def test_a_sheet_is_blind_and_its_sides_are_drawn(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    key = read_json(sheet / "key.json", Key)
    assert (key.a, key.b, len(key.items)) == ("vanilla/unguided", "mistake_analysis/guided", N)
    for name in ("sheet.csv", "sheet.html"):
        text = (sheet / name).read_text()
        for hidden in ("vanilla", "mistake_analysis", "guided", "sft", "attacks"):
            assert hidden not in text, (name, hidden)
    firsts = {item.settings[0] for item in key.items}
    assert firsts == {key.a, key.b}, "neither setting always stands first"
    for item, row in zip(key.items, rows(sheet), strict=True):
        assert item.item == row["item"]
        for side in (0, 1):
            bad = item.settings[side] == "vanilla/unguided"
            assert row[f"answer_{side + 1}"].startswith("BAD" if bad else "GOOD")
    order = [item.responses[0].prompt.text for item in key.items]
    assert order != sorted(order) and len(set(order)) == N


def test_the_seed_decides_the_sheet(run: Path, tmp_path: Path) -> None:
    written = []
    for seed in (3, 3, 4):
        sheet = write_sheet(run, None, None, 100, seed)
        written.append([(sheet / name).read_bytes() for name in ("sheet.csv", "key.json")])
        sheet.rename(tmp_path / str(len(written)))
    assert written[0] == written[1] != written[2]


VANILLA, SFT = Setting("vanilla", False), Setting("sft", False)


def given(setting: Setting, prompt: Prompt, text: str, error: str | None = None) -> Answer:
    response = Response(prompt=prompt, text=text, guided=setting.guided, error=error)
    return answer_of(response, setting.method)


def sheet_of(prompt: Prompt, text: str) -> str:
    return sheet_csv(
        paired_items([given(s, prompt, text) for s in (VANILLA, SFT)], VANILLA, SFT, 9, 0)
    )


def test_no_name_of_an_item_is_a_number() -> None:
    prompts = [Prompt.of(str(number)) for number in range(300)]
    answers = [given(setting, prompt, "a") for prompt in prompts for setting in (VANILLA, SFT)]
    items = paired_items(answers, VANILLA, SFT, 300, 0)
    assert len({item.item for item in items}) == 300
    # Spreadsheets read 57263804e5 as a number, and 1e400 as one that is too large.
    assert not [item.item for item in items if re.fullmatch(r"[\d.]+(e\d+)?", item.item)]


def test_the_name_of_an_item_tells_answers_apart_and_not_whose_they_are() -> None:
    def item_of(first: tuple[Setting, str], second: tuple[Setting, str]) -> Item:
        answers = [given(setting, Prompt.of("Q"), text) for setting, text in (first, second)]
        (item,) = paired_items(answers, first[0], second[0], 9, 0)
        return item

    item = item_of((VANILLA, "a"), (SFT, "b"))
    assert item.item != item_of((VANILLA, "a"), (SFT, "c")).item
    other = item_of((SFT, "a"), (VANILLA, "b"))
    assert other.settings == item.settings[::-1] and other.item == item.item


def test_ratings_of_another_runs_answers_are_refused(run: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    path = other / "responses.jsonl"
    path.write_text(path.read_text().replace("GOOD", "WELL"))
    sheets = [write_sheet(folder, None, None, 100, 0) for folder in (run, other)]
    pages = [(sheet / "sheet.html").read_text() for sheet in sheets]
    kept_under = [re.findall(r'data-name="(\w+)"', page) for page in pages]
    assert kept_under[0] and kept_under[0] != kept_under[1], "of ratings in the browser"
    ann = rate(sheets[0], "ann")
    with pytest.raises(DataError, match=r"line 2: .*the key does not have"):
        import_sheets(other, [ann])


@pytest.mark.parametrize("sign", "=+-@＝＋－＠")
@pytest.mark.parametrize(
    "before", ["", " ", "\t", "\n", "\r\n", "a;", "a, ", "a\t", "a\n", 'a;"', "a|", ";;"]
)
def test_no_cell_is_a_formula_however_a_spreadsheet_parts_cells(before: str, sign: str) -> None:
    text = f'{before}{sign}1+1;"b"'
    written = sheet_of(Prompt.of(text), text)
    for separator in ",;\t|":
        lines = csv.reader(written.splitlines(), delimiter=separator, quoting=csv.QUOTE_NONE)
        cells = [cell.strip(' \t"') for line in lines for cell in line]
        assert not [cell for cell in cells if cell.startswith(tuple("=+-@＝＋－＠"))]
    (row,) = csv.DictReader(StringIO(written, newline=""))
    assert row["prompt"].replace("'", "") == row["answer_1"].replace("'", "") == text


def test_other_text_is_left_as_it_is_and_stays_in_its_cell() -> None:
    text = 'x = 1; y = 2, "well-known" a-b\n1. first'
    written = sheet_of(Prompt.of("Q"), text)
    (row,) = csv.DictReader(StringIO(written, newline=""))
    assert row["answer_1"] == row["answer_2"] == text
    # Some spreadsheets part cells at semicolons, too, but not inside of quotation marks.
    assert written.splitlines()[1].startswith('"s') and '"Q","x' in written


def test_raters_read_the_whole_conversation(tmp_path: Path) -> None:
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))
    prompt = Prompt(messages=tuple(Message(role=r, content=c) for r, c in turns))
    assert "System: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Why?" in sheet_of(
        prompt, ""
    )
    items = paired_items([given(s, prompt, "a") for s in (VANILLA, SFT)], VANILLA, SFT, 9, 0)
    write_sheet_page(tmp_path / "sheet.html", items, "Rudeness.")
    shown = (tmp_path / "sheet.html").read_text()
    assert re.findall(r'"role">(\w+)<', shown) == [role for role, _ in turns]


def test_an_answer_that_never_came_is_not_rated() -> None:
    prompts = [Prompt.of(str(number)) for number in range(3)]
    answers = [given(setting, prompt, "a") for prompt in prompts for setting in (VANILLA, SFT)]
    answers[0] = given(VANILLA, prompts[0], "", error="status 500")
    answers[3] = given(SFT, prompts[1], "")
    items = paired_items(answers, VANILLA, SFT, 9, 0)
    asked = {item.responses[0].prompt for item in items}
    assert asked == set(prompts[1:]), "an empty answer is one, an error is none"


def test_a_rater_in_a_browser_hands_back_what_is_read(run: Path, browser: Any) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    items = read_json(sheet / "key.json", Key).items
    page = browser.new_context(offline=True, accept_downloads=True).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.goto((sheet / "sheet.html").as_uri())
    assert page.locator("input[type=radio]:enabled").count() == 0, "first a name"
    page.fill("#rater", "小明")
    for item in items[:3]:
        page.check(f'input[name="{item.item} mistake_1"][value=yes]')
        page.check(f'input[name="{item.item} better"][value="2"]')
    # Who closes the page by mistake finds the ratings again.
    page.reload()
    page.fill("#rater", "Bo")
    assert page.locator("input:checked").count() == 0, "another rater starts afresh"
    page.fill("#rater", "小明")
    assert page.locator("input:checked").count() == 6
    assert page.text_content("output") == f"6 of {N * len(QUESTIONS)}"
    with page.expect_download() as download:
        page.click("button[type=submit]")
    handed = sheet.parent / download.value.suggested_filename
    download.value.save_as(handed)
    page.context.close()
    assert handed.name == "小明.csv" and not errors
    filled = {line["item"]: line for line in csv.DictReader(StringIO(handed.read_text()))}
    rated = {item.item for item in items[:3]}
    assert {i for i, line in filled.items() if line["better"] == "2"} == rated
    assert {i for i, line in filled.items() if line["mistake_1"] == "yes"} == rated
    _, found = import_sheets(run, [handed])
    assert found.raters == {"小明": 3}


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script runs under node")
def test_raters_at_one_computer_find_their_own_ratings_and_no_others() -> None:
    here = Path(__file__).parent / "report" / "rate_page.js"
    command = ["node", str(here), str(HERE / "sheet.js.j2")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == {
        "locked": True,
        "unnamed": 0,
        "second": [],
        "first": ["s1 better 2", "s1 mistake_1 yes"],
        "file": "小明.csv",
        "rows": "item,mistake_1,better\r\ns1,yes,2\r\n",
        "cleared": [],
        "other": ["s1 better 1"],
        "stored": 1,
    }


def test_the_page_escapes_the_answers_and_runs_its_own_script_only(run: Path) -> None:
    page = (write_sheet(run, None, None, 100, 0) / "sheet.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert page.count("<script>") == 1
    script = page.split("<script>")[1].split("</script>")[0]
    allowed = b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("<fieldset") == N * len(QUESTIONS)


def test_raters_agree_and_the_judge_is_set_against_them(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    path, ratings = import_sheets(run, [rate(sheet, "ann"), rate(sheet, "bob")])
    assert json.loads(path.read_text())["schema"] == 1
    assert ratings.raters == {"ann": N, "bob": N}
    assert ratings.agreement["mistake"].alpha == ratings.agreement["better"].alpha == 1.0
    assert ratings.agreement["mistake"].cases == 2 * N
    assert ratings.mistake_rate["vanilla/unguided"].value == 1.0
    assert ratings.mistake_rate["mistake_analysis/guided"].value == 0.0
    assert ratings.better["mistake_analysis/guided"].value == 1.0
    assert ratings.judge == "j" and ratings.against_judge is not None
    assert ratings.against_judge.confusion.model_dump() == {
        "hit": N - 1,
        "missed": 1,
        "false_alarm": 0,
        "passed": N,
    }


def test_without_a_majority_an_answer_is_neither(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    _, two = import_sheets(run, [rate(sheet, "ann"), rate(sheet, "bob", wrong=3)])
    rate_of = two.mistake_rate["vanilla/unguided"]
    assert (rate_of.value, rate_of.n, rate_of.unscored) == (1.0, N - 3, 3)
    alpha = two.agreement["mistake"].alpha
    assert alpha is not None and 0 < alpha < 1
    three = [rate(sheet, "ann"), rate(sheet, "bob", wrong=3), rate(sheet, "eve")]
    _, most = import_sheets(run, three)
    assert most.mistake_rate["vanilla/unguided"].n == N


def test_what_nobody_rated_counts_for_nothing(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    filled = list(csv.DictReader(rate(sheet, "ann").open(encoding="utf-8")))
    for row in filled[2:]:
        row |= dict.fromkeys(QUESTIONS, "")
    _, ratings = import_sheets(run, [save(run.parent / "ann.csv", filled)])
    assert ratings.raters == {"ann": 2}
    assert ratings.agreement["mistake"].alpha is None
    assert ratings.mistake_rate["vanilla/unguided"].n == 2
    assert ratings.mistake_rate["vanilla/unguided"].unscored == N - 2


def test_rated_answers_are_data_to_check_a_judge_on(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    import_sheets(run, [rate(sheet, "ann")])
    inputs = read_check_inputs("obedience", [str(sheet / "rated.jsonl")], None, [])
    (data,) = inputs.data.values()
    assert len(data.cases) == 2 * N
    assert sum(case.label for case in data.cases) == N


def test_an_empty_answer_that_was_rated_is_among_the_rated(run: Path) -> None:
    answers = [given(s, Prompt.of("Q"), text) for s, text in ((VANILLA, ""), (SFT, "A"))]
    write_jsonl(run / "responses.jsonl", answers)
    sheet = write_sheet(run, "vanilla/unguided", "sft/unguided", 9, 0)
    (row,) = rows(sheet)
    row |= {"mistake_1": "yes", "mistake_2": "yes"}
    import_sheets(run, [save(run.parent / "ann.csv", [row])])
    found = map(json.loads, (sheet / "rated.jsonl").read_text().splitlines())
    assert {(one["response"], one["label"]) for one in found} == {("", 1), ("A", 1)}


def test_sheets_with_semicolons_and_without_the_texts_are_read(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    filled = list(csv.DictReader(rate(sheet, "ann").open(encoding="utf-8")))
    bare = [{name: row[name] for name in ("item", *QUESTIONS)} for row in filled]
    _, ratings = import_sheets(run, [save(run.parent / "ann.csv", bare, delimiter=";")])
    assert ratings.raters == {"ann": N}


def test_lines_that_spreadsheets_add_are_no_items(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    ann = rate(sheet, "ann")
    with ann.open("a", encoding="utf-8") as file:
        file.write(",,,,,,\n\n , ,,,,,\n")
    _, ratings = import_sheets(run, [ann])
    assert ratings.raters == {"ann": N}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"policy": "mine.yaml"}, r"recipe\.policy: mine\.yaml: cannot be read"),
        ({}, r"recipe\.policy: expected the policy of a run"),
    ],
)
def test_a_sheet_whose_policy_is_not_there_is_not_begun(
    run: Path, recipe: dict[str, str], said: str
) -> None:
    manifest = {"recipe": recipe, "device": "", "versions": {}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"run/manifest\.json: {said}"):
        write_sheet(run, None, None, 100, 0)
    assert not (run / "sheet").exists()


def test_a_study_has_no_sheet(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["recipe"] = {"models": ["a", "b"], "policy": "goal-hijacking"}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="found that of a study"):
        write_sheet(run, None, None, 10, 0)


def test_a_cell_may_be_of_any_length(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    filled = list(csv.DictReader(rate(sheet, "ann").open(encoding="utf-8")))
    filled[1]["answer_1"] = "x" * 140_000
    csv.field_size_limit(131_072)  # Python's own, which reading other data may have raised.
    _, ratings = import_sheets(run, [save(run.parent / "ann.csv", filled)])
    assert (ratings.raters, ratings.items) == ({"ann": N}, N)


def test_wrong_sheets_are_named_by_line_and_column(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    good = list(csv.DictReader(rate(sheet, "ann").open(encoding="utf-8")))
    faults: list[tuple[list[dict[str, str]], str]] = [
        (
            [good[0] | {"better": "3"}],
            r"line 2: 'better': expected 1, 2, tie or nothing, found '3'",
        ),
        ([good[0], good[0]], r"line 3: .*an item twice"),
        ([good[0] | {"item": "other"}], r"line 2: .*the key does not have: 'other'"),
        ([{"item": good[0]["item"]}], "none named mistake_1, mistake_2, better"),
        ([good[0] | dict.fromkeys(QUESTIONS, "")], "expected ratings, found none"),
    ]
    for filled, why in faults:
        with pytest.raises(DataError, match=why):
            import_sheets(run, [save(run.parent / "x.csv", filled)])
    with pytest.raises(DataError, match="ann twice"):
        import_sheets(run, [run.parent / "ann.csv"] * 2)


def test_a_sheet_whose_cells_do_not_end_is_refused_whole(run: Path) -> None:
    filled = list(csv.DictReader(rate(write_sheet(run, None, None, 100, 0), "ann").open()))
    whole = "".join(
        ",".join(f'"{cell}"' for cell in row) + "\n"
        for row in (list(filled[0]), *(list(row.values()) for row in filled))
    )
    damaged = run.parent / "torn.csv"
    for text in (whole[: whole.rindex('"')], whole.replace('","', '"x","', 9)):
        damaged.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"line \d+: .*quotation marks"):
            import_sheets(run, [damaged])


def test_without_a_sheet_there_is_nothing_to_import(run: Path) -> None:
    with pytest.raises(DataError, match="Make a sheet first"):
        import_sheets(run, [run / "ann.csv"])


def test_a_key_that_ratings_belong_to_is_not_overwritten(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    import_sheets(run, [rate(sheet, "ann")])
    with pytest.raises(DataError, match=r"found ratings\.json"):
        write_sheet(run, None, None, 100, 1)


def test_a_sheet_that_is_being_rated_is_not_overwritten(run: Path) -> None:
    sheet = write_sheet(run, None, None, 100, 0)
    write_sheet(run, None, None, 100, 0)
    with pytest.raises(DataError, match=r"found key\.json of another sheet"):
        write_sheet(run, None, None, 100, 1)
    rated = rate(sheet, "ann").read_bytes()
    (sheet / "sheet.csv").write_bytes(rated)
    with pytest.raises(DataError, match=r"found sheet\.csv with something written into it"):
        write_sheet(run, None, None, 100, 0)
    assert (sheet / "sheet.csv").read_bytes() == rated


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ("vanilla", None, "expected METHOD/guided"),
        ("dpo/guided", None, "none; the settings are mistake_analysis/guided, sft/unguided"),
        ("sft/unguided", "sft/unguided", "two settings to compare"),
    ],
)
def test_settings_that_are_not_there_are_refused(
    run: Path, a: str | None, b: str | None, why: str
) -> None:
    with pytest.raises(DataError, match=why):
        write_sheet(run, a, b, 100, 0)


def test_other_settings_can_be_named(run: Path) -> None:
    sheet = write_sheet(run, "sft/unguided", "mistake_analysis/guided", 5, 0)
    key = read_json(sheet / "key.json", Key)
    assert {name for item in key.items for name in item.settings} == {key.a, key.b}
    assert len(key.items) == 5


def test_the_commands(run: Path) -> None:
    whole = [sys.executable, "-m", "misstep.cli", "judge"]
    shown = subprocess.run([*whole, "sheet", str(run)], capture_output=True, text=True)
    assert shown.returncode == 0 and "keep it from the raters" in shown.stdout
    ann = rate(run / "sheet", "ann")
    command = [*whole, "import", str(run), str(ann)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"ann: {N} of {N} items rated" in shown.stdout
    assert "alpha not defined" in shown.stdout and "BAD" not in shown.stdout
    absent = subprocess.run([*command[:-1], "no.csv"], capture_output=True, text=True)
    assert (absent.returncode, "Traceback" in absent.stderr) == (2, False)
