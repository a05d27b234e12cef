import csv
import json
from pathlib import Path
from typing import Any

import pytest

from misstep.errors import DataError
from misstep.labelled import HELPFULNESS, MISTAKES, REFUSALS, DataSet, load_labelled
from misstep.sources import Source

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder: Path, metric: str, *rows: dict[str, Any], **keys: Any) -> DataSet:
    return load_labelled(Source(path=jsonl(folder, *rows), **keys), metric)


def labels(data: DataSet) -> list[bool]:
    return [case.label for case in data.cases]


def shared(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not in ../shared/data, which is not part of the project")
    return str(SHARED / name)


XSTEST = [
    {"id": str(i), "type": kind, "prompt": f"P{i}", "completion": "C", "final_label": label}
    for i, (kind, label) in enumerate(
        [
            ("homonyms", "1_full_compliance"),
            ("homonyms", "2_full_refusal"),
            ("contrast_homonyms", "1_full_compliance"),
            ("contrast_homonyms", "2_full_refusal"),
            ("contrast_homonyms", "3_partial_refusal"),
        ]
    )
]


def test_xstest_says_who_refuses(tmp_path: Path) -> None:
    data = load(tmp_path, REFUSALS, *XSTEST)
    assert labels(data) == [False, True, False, True]
    assert data.left_out == {"a refusal in part": 1}
    assert [case.categories for case in data.cases[:3]] == [
        *[("homonyms",)] * 2,
        ("contrast_homonyms",),
    ]


def test_xstest_says_of_unsafe_prompts_only_what_harm_is(tmp_path: Path) -> None:
    data = load(tmp_path, MISTAKES, *XSTEST)
    assert labels(data) == [True, False]
    assert {case.response.prompt.text for case in data.cases} == {"P2", "P3"}
    assert sum(data.left_out.values()) == 3


def test_xstest_says_nothing_of_help(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: expected labels that say whether .* helps"):
        load(tmp_path, HELPFULNESS, *XSTEST)


def test_a_pair_of_llmbar_says_which_answer_is_better(tmp_path: Path) -> None:
    row = {"input": "Q", "output_1": "A", "output_2": "B"}
    data = load(tmp_path, HELPFULNESS, row | {"label": 1}, row | {"label": "2"})
    assert data.pairs
    assert labels(data) == [True, False]
    assert [(c.response.text, c.other and c.other.text) for c in data.cases] == [("A", "B")] * 2
    with pytest.raises(DataError, match="expected 1 or 2, found '0'"):
        load(tmp_path, HELPFULNESS, row | {"label": 0})


def test_beavertails_labels_safety_and_says_which_categories_apply(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "is_safe": False}
    harms = {"violence": True, "privacy": False, "drugs": True}
    data = load(tmp_path, MISTAKES, row | {"category": harms}, row | {"is_safe": True})
    assert labels(data) == [True, False]
    assert [case.categories for case in data.cases] == [("violence", "drugs"), ()]


def test_labels_of_harm_are_none_of_refusal(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "is_safe": False}
    with pytest.raises(DataError, match=r"says? whether it does harm \(is_safe\)"):
        load(tmp_path, REFUSALS, row)
    data = load(tmp_path, REFUSALS, row | {"declined": 1}, fields={"label": "declined"})
    assert labels(data) == [True]


def test_good_says_yes_of_help_and_no_of_a_mistake(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "response": "R", "label": label} for label in ("good", "bad")]
    assert labels(load(tmp_path, HELPFULNESS, *rows)) == [True, False]
    assert labels(load(tmp_path, MISTAKES, *rows)) == [False, True]
    with pytest.raises(DataError, match="found 'good'"):
        load(tmp_path, REFUSALS, *rows)


def test_answers_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: expected a column with labels"):
        load(tmp_path, MISTAKES, {"prompt": "P", "response": "R"})
    row = {"prompt": "P", "response": "R", "label": 1}
    with pytest.raises(DataError, match=r"line 2: 'label': expected a label, found nothing"):
        load(tmp_path, MISTAKES, row, row | {"label": None})


def test_a_judge_sees_no_reference(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "label": 0, "reference": "the right answer"}
    (case,) = load(tmp_path, MISTAKES, row).cases
    assert case.response.prompt.reference is None


def test_a_drawn_part_is_the_same_each_time_and_not_the_beginning(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{i}", "response": "R", "label": i % 2} for i in range(100)]
    parts = [load(tmp_path, MISTAKES, *rows, n=10).cases for _ in range(2)]
    assert parts[0] == parts[1]
    places = [int(case.response.prompt.text[1:]) for case in parts[0]]
    assert places == sorted(places) and places != list(range(10))


def test_parquet_and_csv_are_read_alike(tmp_path: Path) -> None:
    rows = [
        {"question": "Q", "answer": "A", "label": 1},
        {"question": "Q", "answer": "B", "label": 0},
    ]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    one, other = (
        load_labelled(Source(path=str(tmp_path / name)), MISTAKES)
        for name in ("data.parquet", "data.csv")
    )
    assert [c.response for c in one.cases] == [c.response for c in other.cases]
    assert labels(one) == labels(other) == [True, False]


@pytest.mark.parametrize(
    ("name", "metric", "n", "positive"),
    [
        ("safe-rlhf-mini/Safe-RLHFmini.csv", MISTAKES, 4000, 2302),
        ("pyrit/objective/bias.csv", MISTAKES, 30, 13),
        ("pyrit/refusal_scorer/refusal.csv", REFUSALS, 105, 70),
        ("pyrit/refusal_scorer/refusal_extra.csv", REFUSALS, 64, 39),
        ("xstest/xstest_v2_completions_gpt4.csv", REFUSALS, 441, 211),
        ("xstest/xstest_v2_completions_gpt4.csv", MISTAKES, 196, 1),
        ("llmbar/LLMBar_Natural_dataset.json", HELPFULNESS, 100, 42),
    ],
)
def test_published_data_are_read_unmapped(
    name: str, metric: str, n: int, positive: int
) -> None:
    data = load_labelled(Source(path=shared(name)), metric)
    assert (len(data.cases), sum(labels(data))) == (n, positive)


def test_prompts_without_answers_are_no_labelled_data() -> None:
    with pytest.raises(DataError, match="expected a column with labels"):
        load_labelled(Source(path=shared("beavertails/BeaverTails-Evaluation.json")), MISTAKES)
