import sys

import pytest

from misstep import pipeline
from misstep.cli import main


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its whole process is not set for the other tests."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr("gc.set_threshold", lambda _: None)


def test_an_interrupted_command_says_that_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["misstep", "run", "recipe.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert "Interrupted. Nothing that was finished is lost" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["no-command"], 2)])
def test_other_ends_are_no_interruptions(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
) -> None:
    monkeypatch.setattr(sys, "argv", ["misstep", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status
    assert "Interrupted" not in capsys.readouterr().err
