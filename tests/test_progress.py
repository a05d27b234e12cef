import pytest

from misstep.progress import (
    SECONDS_BETWEEN_LINES,
    Bars,
    Lines,
    Progress,
    Silent,
    progress,
)


def test_plain_lines_come_seldom_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = Lines()
    for done in range(1, 101):
        lines.update("answering", done, 100)
        now += 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "answering: 100 of 100" in shown.err.splitlines()[-1]
    assert 2 <= len(shown.err.splitlines()) <= 100 / SECONDS_BETWEEN_LINES + 1


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as shown:
        shown.say("[bold]as it is[/bold]")
        assert isinstance(shown, Lines)
    assert capsys.readouterr().err == "[bold]as it is[/bold]\n"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Silent, ""),
        (Lines, "  a: 0 of 0\n  b [x]: 2 of 2\ndone [/]\n"),
        (Bars, "done [/]\n"),
    ],
)
def test_all_kinds_take_the_same_calls(
    kind: type[Progress], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = kind()
    for what, done, total in (("a", 0, 0), ("b [x]", 1, 2), ("b [x]", 2, 2)):
        shown.update(what, done, total)
    shown.say("done [/]")
    assert capsys.readouterr() == ("", said)


def test_bars_know_each_piece_of_work() -> None:
    bars = Bars()
    bars.update("one", 1, 3)
    bars.update("two", 2, 4)
    bars.update("one", 3, 3)
    shown = {task.description: (task.completed, task.total) for task in bars.live.tasks}
    assert shown == {"one": (3, 3), "two": (2, 4)}


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Silent().say("x")
    Silent().update("x", 1, 1)
    assert capsys.readouterr() == ("", "")
