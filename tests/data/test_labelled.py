import csv
import json
from pathlib import Path
from typing import Any

import pytest

from misstep.data.labelled import (
    HELPFULNESS,
    MISTAKES,
    REFUSALS,
    WINS,
    DataSet,
    drawn,
    read_labelled,
)
from misstep.data.sources import Source, load_mistakes, load_prompts
from misstep.errors import DataError
from misstep.records import Prompt

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder: Path, metric: str, *rows: dict[str, Any], **keys: Any) -> DataSet:
    source = Source(path=jsonl(folder, *rows), **keys)
    return drawn(read_labelled(source, metric), source.n)


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


PROMPTS = {"prompt": "P", "type": "homonyms", "label": "safe", "focus": "kill"}


def test_a_label_of_the_prompt_is_none_of_the_answer(tmp_path: Path) -> None:
    rows = [PROMPTS | {"response": "R", "label": label} for label in ("safe", "unsafe")]
    for metric in (MISTAKES, REFUSALS, HELPFULNESS):
        with pytest.raises(DataError, match=r"line 1: .*says it of the prompt.*label=COLUMN"):
            load(tmp_path, metric, *rows)
    with pytest.raises(DataError, match=r"line 1: .*fields: \{label: COLUMN\}"):
        load_mistakes(Source(path=jsonl(tmp_path, *rows)), "origin", 0)
    own = [row | {"refused": refused} for row, refused in zip(rows, (1, 0), strict=True)]
    assert labels(load(tmp_path, REFUSALS, *own, fields={"label": "refused"})) == [True, False]
    assert labels(load(tmp_path, MISTAKES, rows[0] | {"is_bad": 1})) == [True]


def test_a_pair_of_llmbar_says_which_answer_is_better(tmp_path: Path) -> None:
    row = {"input": "Q", "output_1": "A", "output_2": "B"}
    data = load(tmp_path, HELPFULNESS, row | {"label": 1}, row | {"label": "2"})
    assert data.pairs
    assert labels(data) == [True, False]
    assert [(c.response.text, c.other and c.other.text) for c in data.cases] == [("A", "B")] * 2
    with pytest.raises(DataError, match="expected 1 or 2, found '0'"):
        load(tmp_path, HELPFULNESS, row | {"label": 0})
    assert labels(load(tmp_path, "win_rate", row | {"label": 1})) == [True]
    for metric in (MISTAKES, REFUSALS):
        with pytest.raises(DataError, match=r"line 1: expected labels that say .*LLMBar's"):
            load(tmp_path, metric, row | {"label": 1})


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.mark.parametrize("conversations", [False, True])
def test_a_pair_judge_reads_chosen_and_rejected(tmp_path: Path, conversations: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": chat("Q", f"good {i}"), "rejected": chat("Q", f"bad {i}")}
        if conversations
        else {"prompt": "Q", "chosen": f"good {i}", "rejected": f"bad {i}", "subset": "s"}
        for i in range(60)
    ]
    data = load(tmp_path, "win_rate", *rows)
    assert data.pairs and {case.response.prompt for case in data.cases} == {Prompt.of("Q")}
    for case in data.cases:
        assert case.other is not None
        texts = [case.response.text, case.other.text]
        assert texts[0].startswith("good") is case.label and len(set(texts)) == 2
    # Either side as often as not, and the same one wherever the row stands.
    assert 15 < sum(labels(data)) < 45
    again = load(tmp_path, "harmless_score", *reversed(rows))
    assert labels(again) == labels(data)[::-1]


def test_pairs_are_mapped_and_what_is_none_is_left_out(tmp_path: Path) -> None:
    fields = {"reference": "good", "response": "bad"}
    row = {"prompt": "Q", "good": "A", "bad": "B"}
    empty: dict[str, Any] = {"bad": ""}
    data = load(tmp_path, "win_rate", row, row | {"bad": "A"}, row | empty, fields=fields)
    (case,) = data.cases
    assert (case.response.text == "A") is case.label
    assert data.left_out == {"equal answers": 1, "no answer": 1}
    for other in (row, PKU_ROW, {"prompt": "P", "response": "R", "label": 1}):
        with pytest.raises(DataError, match=r"line 1: .*columns chosen and rejected.*LLMBar"):
            load(tmp_path, "win_rate", other)


def test_beavertails_labels_safety_and_says_which_categories_apply(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "is_safe": False}
    harms = {"violence": True, "privacy": False, "drugs": True}
    data = load(tmp_path, MISTAKES, row | {"category": harms}, row | {"is_safe": True})
    assert labels(data) == [True, False]
    assert [case.categories for case in data.cases] == [("violence", "drugs"), ()]


def test_categories_are_names_in_csv_too(tmp_path: Path) -> None:
    path = tmp_path / "beavertails.csv"
    rows = [("{'violence': True, 'privacy': False}", 0), ("{'violence': False}", 1), ("{x", 1)]
    cells = "".join(f'P,R{i},"{text}",{safe}\n' for i, (text, safe) in enumerate(rows))
    path.write_text(f"prompt,response,category,is_safe\n{cells}")
    data = read_labelled(Source(path=str(path)), MISTAKES)
    assert [case.categories for case in data.cases] == [("violence",), (), ("{x",)]


def test_each_answer_of_pku_has_categories_of_its_own(tmp_path: Path) -> None:
    harms = {"response_0_harm_category": {"fraud": False, "drugs": False}}
    harms |= {"response_1_harm_category": {"fraud": True, "drugs": False}}
    rows = [PKU_ROW | harms, PKU_ROW | {"category": "c"}]
    found = [case.categories for case in load(tmp_path, MISTAKES, *rows).cases]
    assert found == [(), ("fraud",), ("c",), ("c",)]
    mapped = load(tmp_path, MISTAKES, rows[0] | {"t": "mine"}, fields={"topic": "t"})
    assert {case.categories for case in mapped.cases} == {("mine",)}


def test_labels_of_harm_are_none_of_refusal(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "is_safe": False}
    with pytest.raises(DataError, match=r"found columns \(is_safe\) that say whether"):
        load(tmp_path, REFUSALS, row)
    data = load(tmp_path, REFUSALS, row | {"declined": 1}, fields={"label": "declined"})
    assert labels(data) == [True]


def test_is_bad_speaks_of_mistakes_alone(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "is_bad": 1}
    assert labels(load(tmp_path, MISTAKES, row)) == [True]
    for metric in (REFUSALS, HELPFULNESS, "politeness_score"):
        with pytest.raises(DataError, match=r"found columns \(is_bad\)"):
            load(tmp_path, metric, row)
    known: dict[str, Any] = {"fields": {"label": "is_bad"}, "labels": {"bad": [1], "good": [0]}}
    assert labels(load(tmp_path, HELPFULNESS, row, **known)) == [False]
    for other in (0, "good"):
        with pytest.raises(DataError, match="is_bad"):
            load(tmp_path, MISTAKES, row | {"label": other})


def test_a_mapped_label_is_read_where_a_reference_stands_beside_the_answer(
    tmp_path: Path,
) -> None:
    rows = [
        {"q": "P", "a": text, "gold": "G", "bad": bad} for text, bad in (("A", 0), ("B", 1))
    ]
    fields = {"prompt": "q", "response": "a", "reference": "gold", "label": "bad"}
    data = load(tmp_path, "harmless_score", *rows, fields=fields)
    assert (data.pairs, labels(data)) == (False, [False, True])
    del fields["label"]
    assert load(tmp_path, "harmless_score", *rows, fields=fields).pairs


def test_yes_and_no_are_words_of_a_label_as_yaml_reads_them(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "response": "R", "fine": word} for word in ("no", "Yes", True)]
    meant = {"bad": [False], "good": [True]}
    data = load(tmp_path, MISTAKES, *rows, fields={"label": "fine"}, labels=meant)
    assert labels(data) == [True, False, False]


def test_rows_of_published_pairs_that_lack_something_are_left_out(tmp_path: Path) -> None:
    lacks: list[dict[str, Any]] = [{"final_label": None}, {"completion": ""}, {"prompt": ""}]
    data = load(tmp_path, REFUSALS, *XSTEST, *(XSTEST[0] | nothing for nothing in lacks))
    assert data.left_out == {
        **dict.fromkeys(("no label", "no answer", "no prompt"), 1),
        "a refusal in part": 1,
    }
    row = {"input": "P", "output_1": "A", "output_2": "B", "label": 1}
    lacks = [{"label": None}, {"label": float("nan")}, {"output_1": ""}, {"input": " "}]
    data = load(tmp_path, WINS, row, row | {"label": 2.0}, *(row | of for of in lacks))
    assert labels(data) == [True, False]
    assert data.left_out == {"no label": 2, "no answer": 1, "no prompt": 1}


def test_the_names_of_a_set_have_one_order_and_words_of_no_apply_to_nothing(
    tmp_path: Path,
) -> None:
    row = {"prompt": "P", "response": "R", "label": 1}
    data = load(
        tmp_path,
        MISTAKES,
        row | {"category": "{'violence', 'crime', 'fraud'}"},
        row | {"category": {"a": "False", "b": "True", "c": 0, "d": None, "e": 1}},
    )
    assert [case.categories for case in data.cases] == [
        ("crime", "fraud", "violence"),
        ("b", "e"),
    ]


def test_good_says_yes_of_help_and_no_of_a_mistake(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "response": "R", "label": label} for label in ("good", "bad")]
    assert labels(load(tmp_path, HELPFULNESS, *rows)) == [True, False]
    assert labels(load(tmp_path, MISTAKES, *rows)) == [False, True]
    with pytest.raises(DataError, match="found 'good'"):
        load(tmp_path, REFUSALS, *rows)
    harmless = rows[0] | {"label": "safe"}
    with pytest.raises(DataError, match="found 'safe'"):
        load(tmp_path, HELPFULNESS, harmless)


def test_a_grade_is_measured_by_labels_of_what_it_grades(tmp_path: Path) -> None:
    harm = {"prompt": "P", "response": "R", "is_safe": False}
    good = {"prompt": "P", "response": "R", "label": "good"}
    assert labels(load(tmp_path, "harmless_score", harm, harm | {"is_safe": True})) == [
        True,
        False,
    ]
    assert labels(load(tmp_path, "politeness_score", good, good | {"label": "bad"})) == [
        True,
        False,
    ]
    with pytest.raises(DataError, match=r"found columns .is_safe. that say .* a mistake"):
        load(tmp_path, "politeness_score", harm)
    # Pairs are read as pairs: the better one should have the higher grade.
    pair = {"prompt": "P", "chosen": "A", "rejected": "B"}
    assert load(tmp_path, "harmless_score", pair).pairs


@pytest.mark.parametrize(
    ("metric", "says"), [(MISTAKES, True), (REFUSALS, True), (HELPFULNESS, False)]
)
def test_words_that_a_source_explains_are_labels_for_every_judge(
    tmp_path: Path, metric: str, says: bool
) -> None:
    rows = [{"prompt": "P", "response": "R", "label": label} for label in (3, "0", None)]
    meant = {"bad": [3], "good": ["0", "none"]}
    data = load(tmp_path, metric, *rows, labels=meant)
    assert labels(data) == [says, not says]
    # What is not there is no label, even where the word `none` is one.
    assert data.left_out == {"no label": 1}


MISSING = [float("nan"), "nan", "NaN", "N/A", "null", "None", []]


def test_what_stands_for_no_label_and_no_answer_is_none(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "P", "response": "R", "label": 1.0}
    data = load(
        tmp_path,
        MISTAKES,
        *(row | {"label": label} for label in MISSING),
        row | {"response": float("nan")},
        row | {"response": "nan"},
    )
    assert [case.response.text for case in data.cases] == ["nan"]
    assert data.left_out == {"no label": len(MISSING), "no answer": 1}


@pytest.mark.parametrize(
    ("votes", "says"),
    [
        ([1, 1, 0], True),
        ("[1, 0, 0]", False),
        ("['unsafe', 'Unsafe']", True),
        ([True, False, None, False], False),
        ([1], True),
    ],
)
def test_of_several_votes_the_majority_is_the_label(
    tmp_path: Path, votes: object, says: bool
) -> None:
    row = {"prompt": "P", "response": "R"}
    tie = {"label": [1, 0]}
    data = load(tmp_path, MISTAKES, row | {"label": votes}, row | tie)
    assert labels(data) == [says]
    assert data.left_out == {"no majority of votes": 1}


@pytest.mark.parametrize(
    ("metric", "labels_mean", "votes", "says"),
    [
        (MISTAKES, {"bad": [3, 4, 5], "good": [1, 2]}, [3, 4, 5], True),
        (HELPFULNESS, {"bad": [3, 4, 5], "good": [1, 2]}, [4, 5, 2], False),
        (MISTAKES, {"bad": [3, 4, 5], "good": [1, 2]}, [4, 2, 1], False),
        (MISTAKES, None, ["unsafe", "harmful", "safe"], True),
        (MISTAKES, None, ["unsafe", 1, "safe"], True),
        (REFUSALS, None, ["refusal", "refused", "compliance"], True),
        # Of help `bad` says no, whatever it says of mistakes.
        (HELPFULNESS, None, ["yes", "bad", "no"], False),
    ],
)
def test_votes_are_counted_by_what_they_mean(
    tmp_path: Path, metric: str, labels_mean: object, votes: object, says: bool
) -> None:
    row = {"prompt": "P", "response": "R", "label": votes}
    keys = {"labels": labels_mean} if labels_mean else {}
    assert labels(load(tmp_path, metric, row, **keys)) == [says]


@pytest.mark.parametrize("words", [("refusal", "compliance"), ("Refused", "complied")])
def test_refusal_and_compliance_say_what_an_answer_does(
    tmp_path: Path, words: tuple[str, str]
) -> None:
    rows = [{"prompt": "P", "response": "R", "response_refusal_label": w} for w in words]
    fields = {"label": "response_refusal_label"}
    assert labels(load(tmp_path, REFUSALS, *rows, fields=fields)) == [True, False]
    for metric in (MISTAKES, HELPFULNESS):
        with pytest.raises(DataError, match=f"found '{words[0].lower()}'"):
            load(tmp_path, metric, *rows, fields=fields)


PKU_ROW = {
    "prompt": "P",
    "response_0": "A",
    "response_1": "B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
LAYOUTS = {
    "xstest": XSTEST[3],
    "llmbar": {"input": "Q", "output_1": "A", "output_2": "B", "label": 1},
    "jade": {"question": "P", "violating_answer": "B", "safe_answer": "G"},
    "pku": PKU_ROW,
}


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mapped_topic_leaves_a_known_layout_as_it_is(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    metric = HELPFULNESS if "output_1" in row else MISTAKES
    plain = load(tmp_path, metric, row).cases
    mapped = load(tmp_path, metric, row | {"about": "t"}, fields={"topic": "about"}).cases
    assert [case._replace(categories=()) for case in mapped] == [
        case._replace(categories=()) for case in plain
    ]
    assert {case.categories for case in mapped} == {("t",)}


def test_a_mapped_answer_is_another_layout(tmp_path: Path) -> None:
    row = PKU_ROW | {"mine": "C", "bad": 1}
    fields = {"response": "mine", "label": "bad"}
    (case,) = load(tmp_path, MISTAKES, row, fields=fields).cases
    assert (case.response.text, case.label) == ("C", True)


def test_answers_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: expected a column with labels"):
        load(tmp_path, MISTAKES, {"prompt": "P", "response": "R"})


NOTHING: list[dict[str, Any]] = [
    {"label": None},
    {"label": " "},
    {"response": ""},
    {"response": None},
    {"prompt": ""},
]


@pytest.mark.parametrize("metric", [MISTAKES, REFUSALS, HELPFULNESS])
def test_rows_without_an_answer_or_a_label_are_left_out_and_counted(
    tmp_path: Path, metric: str
) -> None:
    row = {"prompt": "P", "response": "R", "label": 1}
    data = load(tmp_path, metric, row, *(row | nothing for nothing in NOTHING))
    assert labels(data) == [True]
    assert data.left_out == {"no label": 2, "no answer": 2, "no prompt": 1}
    with pytest.raises(DataError, match=r"found none \(1 left out: no label\)"):
        load(tmp_path, metric, row | {"label": None})


@pytest.mark.parametrize("column", ["label", "mine"])
def test_a_key_that_only_other_rows_have_is_an_empty_cell(tmp_path: Path, column: str) -> None:
    row = {"prompt": "P", "response": "R", column: 1}
    rows = [{name: row[name] for name in row if name != lacking} for lacking in (*row, "")]
    keys = {} if column == "label" else {"fields": {"label": column}}
    data = load(tmp_path, REFUSALS, *rows, **keys)
    assert labels(data) == [True]
    assert data.left_out == {"no prompt": 1, "no answer": 1, "no label": 1}
    for name, why in (("response", "'response' is missing"), (column, "label")):
        none = [{key: row[key] for key in row if key != name} for row in rows]
        with pytest.raises(DataError, match=why):
            load(tmp_path, REFUSALS, *none, **keys)


def test_of_a_pair_only_the_empty_side_is_left_out(tmp_path: Path) -> None:
    row = {
        "prompt": "P",
        "response_0": "A",
        "response_1": "",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    }
    blank: dict[str, Any] = {"response_1": "B", "is_response_0_safe": None}
    data = load(tmp_path, MISTAKES, row, row | blank)
    assert [(case.response.text, case.label) for case in data.cases] == [
        ("A", False),
        ("B", True),
    ]
    assert data.left_out == {"no answer": 1, "no label": 1}


PYRIT = {"objective": "P", "assistant_response": "R", "human_score": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (PYRIT, REFUSALS),
        (PYRIT | {"harm_category": "c"}, MISTAKES),
        ({"question": "P", "answer": "R", "label": 1}, MISTAKES),
    ],
    ids=["refusal", "objective", "safe-rlhf"],
)
def test_the_labels_of_known_sets_say_one_thing(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    label = "label" if "label" in row else "human_score"
    for metric in (MISTAKES, REFUSALS, HELPFULNESS):
        if metric == says:
            assert labels(load(tmp_path, metric, row)) == [True]
        else:
            with pytest.raises(DataError, match=r"line 1: expected labels that say"):
                load(tmp_path, metric, row)
        assert labels(load(tmp_path, metric, row, fields={"label": label})) == [True]


def test_a_mapped_safe_column_speaks_of_harm(tmp_path: Path) -> None:
    row = {"prompt": "P", "response": "R", "ok": True}
    assert labels(load(tmp_path, MISTAKES, row, fields={"safe": "ok"})) == [False]
    with pytest.raises(DataError, match=r"found columns \(ok\) that say whether"):
        load(tmp_path, REFUSALS, row, fields={"safe": "ok"})


@pytest.mark.parametrize(
    "names",
    [("question", "violating_answer", "safe_answer"), ("问题", "违规回答", "安全有用回答")],
    ids=["english", "chinese"],
)
def test_jade_gives_two_answers_a_row(tmp_path: Path, names: tuple[str, ...]) -> None:
    row, half = (
        dict(zip(names, cells, strict=True)) for cells in (("P", "B", "G"), ("Q", "", "H"))
    )
    data = load(tmp_path, MISTAKES, row, half)
    assert [(case.response.text, case.label) for case in data.cases] == [
        ("B", True),
        ("G", False),
        ("H", False),
    ]
    assert data.left_out == {"no answer": 1}
    with pytest.raises(DataError, match="expected labels that say whether the answer refuses"):
        load(tmp_path, REFUSALS, row)


def test_the_jade_line_of_the_measured_judge_can_be_repeated(tmp_path: Path) -> None:
    medium, hard = (
        Path(shared(f"jade/jade_alignment_{level}_zh.csv")).read_bytes()
        for level in ("medium", "hard")
    )
    path = tmp_path / "jade.csv"
    path.write_bytes(medium + hard.partition(b"\n")[2])
    data = drawn(read_labelled(Source(path=str(path), encoding="gb18030"), MISTAKES), 400)
    card = Path(__file__).parents[2] / "docs/results/judges/harm.json"
    line = json.loads(card.read_text())["data"]["jade"]
    counted = [line[rate]["n"] for rate in ("false_safe", "false_unsafe")]
    assert [sum(labels(data)), len(data.cases) - sum(labels(data))] == counted
    assert data.left_out == line["left_out"]


def test_a_logged_chat_is_labelled_at_its_end(tmp_path: Path) -> None:
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
    ]
    (case,) = load(tmp_path, MISTAKES, {"messages": chat, "label": 1}).cases
    assert case.response.text == "B" and len(case.response.prompt.messages) == 3


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
        read_labelled(Source(path=str(tmp_path / name)), MISTAKES)
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
    data = read_labelled(Source(path=shared(name)), metric)
    assert (len(data.cases), sum(labels(data))) == (n, positive)


def test_prompts_without_answers_are_no_labelled_data() -> None:
    with pytest.raises(DataError, match="expected a column with labels"):
        read_labelled(Source(path=shared("beavertails/BeaverTails-Evaluation.json")), MISTAKES)


def test_the_index_that_pandas_writes_is_no_field(tmp_path: Path) -> None:
    path = tmp_path / "indexed.csv"
    path.write_text(",prompt,response,label\n1,P,R,1\n0,Q,S,0\n")
    source = Source(path=str(path))
    assert labels(read_labelled(source, MISTAKES)) == [True, False]
    (mistake,) = load_mistakes(source, "origin", 0)
    for prompt in (mistake.prompt, *load_prompts(source, 0)):
        assert (prompt.reference, prompt.target, prompt.accept) == (None, None, ())
        assert (prompt.kind, prompt.topic, prompt.unsafe) == ("plain", "", None)
