from pathlib import Path

import pytest

from misstep.evidence.results import Metric, Pooled, Results, Row, Setting, write_results
from misstep.methods.registry import METHODS
from misstep.report.compared import scatter
from misstep.report.headline import headline
from misstep.report.pictures import scale
from misstep.report.reading import read_run
from misstep.report.view import View, ends
from misstep.report.words import (
    brief,
    duration,
    gap,
    model_text,
    points,
    rate,
    what_stage_makes,
)


def test_after_is_trained_on_analyses_and_guided() -> None:
    base, guided = Setting("vanilla", False), Setting("vanilla", True)
    sft = Setting("sft", True)
    plain, best = (Setting("mistake_analysis", guided) for guided in (False, True))
    assert ends([base, guided, sft, plain, best]) == (base, best)
    assert ends([base, guided, sft, plain]) == (base, plain)
    assert ends([base, guided, sft]) == (base, sft)
    assert ends([base, guided]) == (base, guided)
    assert ends([base]) == (base, None)
    assert ends([sft]) == (None, sft)


def test_after_is_no_control_where_something_was_trained_on_mistakes() -> None:
    base, guide = Setting("vanilla", False), Setting("guided", True)
    ordinary, sft, dpo = (Setting(name, True) for name in ("ordinary", "sft", "dpo"))
    corrected = Setting("corrected_analysis", False)
    assert ends([base, ordinary, sft]) == (base, sft)
    assert ends([base, guide, dpo]) == (base, dpo)
    assert ends([base, ordinary, sft, corrected]) == (base, corrected)
    assert ends([base, guide, ordinary]) == (base, ordinary)
    assert ends([base, guide]) == (base, guide)


def viewed(folder: Path, *rows: tuple[str, str, float, int], method: str = "sft") -> View:
    """Of test set, metric, rate before and number of prompts; every rate halves."""
    settings = (("vanilla", False, 1.0), (method, True, 0.5))
    found = tuple(
        Row(
            method=name,
            guided=guided,
            seed=0,
            test_set=test_set,
            metrics={
                metric: Metric(value=value * share, low=0, high=1, n=n)
                for of, metric, value, n in rows
                if of == test_set
            },
        )
        for name, guided, share in settings
        for test_set in dict.fromkeys(of for of, *_ in rows)
    )
    write_results(folder / "results.json", Results(policy="p", model="m", rows=found))
    return View(read_run(folder))


def test_the_headline_counts_no_mistakes_in_ordinary_tasks(tmp_path: Path) -> None:
    harm, clean = ("harm", "mistake_rate", 0.6, 100), ("clean", "mistake_rate", 0.01, 300)
    refused = ("clean", "over_refusal", 0.1, 300)
    said = headline(viewed(tmp_path, harm, clean, refused))
    assert "on 100 held-out cases" in said.lower() and "60\u202f% before and 30\u202f%" in said
    # Where a test has no other set, its mistakes are what there is to tell.
    said = headline(viewed(tmp_path, clean, refused))
    assert "on 300 held-out cases" in said.lower()


def test_text_is_cut_by_characters_and_not_inside_one() -> None:
    assert model_text("汉字很多", 2) == ("汉字", "zh", 2)
    assert model_text("cafe\u0301!", 4).text == "caf"
    assert model_text("ab\U0001f468\u200d\U0001f469cd", 4).text == "ab"
    assert model_text("short", 900).cut == 0


def test_control_characters_are_made_showable() -> None:
    assert model_text("a\x00b\x1bc\n\td").text == "a\ufffdb\ufffdc\n\td"


def test_numbers_keep_what_a_reader_needs() -> None:
    assert [brief(v) for v in (0.0, 0.004, 0.214, 0.996, 1.0)] == [
        "0\u202f%",
        "0.4\u202f%",
        "21\u202f%",
        "99.6\u202f%",
        "100\u202f%",
    ]
    assert (rate(None), rate(0.2145)) == ("–", "21.4\u202f%")
    assert points(-0.172) == "\u221217.2\u202fpoints"
    assert (gap(0.0001), gap(0.25)) == ("0.0", "+25.0")


def test_a_stage_is_titled_by_what_it_makes() -> None:
    stages = ("induce", "analyse", "revise", "good answers", "respond", "induce, round 2")
    assert [what_stage_makes(stage) for stage in stages] == [
        *("Mistakes", "Analyses", "Revisions", "Good answers", "Answers to the tests"),
        "Mistakes, round 2",
    ]


def test_durations_are_in_the_unit_that_a_person_would_choose() -> None:
    found = [duration(seconds) for seconds in (4.24, 59.97, 61, 7384)]
    assert found == [
        "4.2\u202fs",
        "60.0\u202fs",
        "1\u202fmin 01\u202fs",
        "2\u202fh 03\u202fmin",
    ]


@pytest.mark.parametrize("largest", [0.0, 0.003, 0.37, 0.5, 1.0, 3.2, 9.1, 300.0])
def test_an_axis_holds_its_values(largest: float) -> None:
    axis = scale(largest, str)
    assert axis.at(0) == 0 and axis.at(largest) <= 100
    assert 2 <= len(axis.ticks) <= 6
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == (0, 100)
    for place, text in axis.ticks:
        assert axis.at(float(text)) == pytest.approx(place, abs=1e-3)


def pooled(test_set: str, metric: str, n: int) -> Pooled:
    return Pooled(
        method="vanilla",
        guided=False,
        test_set=test_set,
        metric=metric,
        value=0.5,
        low=0.4,
        high=0.6,
        n=n,
        by_seed={0: 0.5},
    )


def test_every_method_has_a_colour_of_its_own() -> None:
    found = scatter(
        [
            pooled(name, metric, 100).model_copy(update={"method": method})
            for method in METHODS
            for name, metric in (("attacks", "mistake_rate"), ("clean", "helpfulness"))
        ]
    )
    assert found is not None
    assert len({point.colour for point in found.points}) == len(METHODS)


def test_harm_is_drawn_on_attacks_and_help_on_ordinary_tasks() -> None:
    attacks = [pooled("attacks", "mistake_rate", 100), pooled("attacks", "helpfulness", 100)]
    attacks.append(pooled("few", "mistake_rate", 30))
    clean = [pooled("clean", "helpfulness", 150), pooled("clean", "over_refusal", 150)]
    # A judge by rubric looks for mistakes in answers to ordinary tasks, too.
    everywhere = [*attacks, *clean, pooled("clean", "mistake_rate", 150)]
    for found in (scatter([*attacks, *clean]), scatter(everywhere)):
        assert found is not None
        assert "mistake rate on attacks" in found.across_title
        assert "helpfulness on clean" in found.up_title
    assert scatter(clean) is None
    assert scatter([*attacks, pooled("clean", "mistake_rate", 150)]) is None
