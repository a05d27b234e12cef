from pathlib import Path

import pytest

from misstep.results import Metric, Results, Row, write_results
from misstep.summary import print_summary

NOTHING = Metric(value=None, low=None, high=None, n=0, unscored=6)
SOME = Metric(value=0.5, low=0.2, high=0.8, n=4, unscored=2)


def test_a_metric_without_any_score_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple(
        Row(method="vanilla", guided=guided, seed=0, test_set="t", metrics=metrics)
        for guided, metrics in (
            (False, {"mistake_rate": NOTHING, "helpfulness": NOTHING}),
            (True, {"mistake_rate": NOTHING, "helpfulness": SOME}),
        )
    )
    write_results(tmp_path / "results.json", Results(policy="p", model="m", rows=rows))
    print_summary(tmp_path)
    shown = capsys.readouterr().out
    assert "mistake_rate: no answer has a score" in shown
    assert "(judge)" in shown
    assert "helpfulness: no answer" not in shown
