import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from misstep import pipeline
from misstep.cli import main
from misstep.errors import EngineError, MisstepError, NothingKept, RecipeError


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its whole process is not set for the other tests."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)


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


def test_a_full_disk_is_called_one_and_where_room_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("more than nothing")

    monkeypatch.setattr(pipeline, "run", full)
    monkeypatch.setattr(sys, "argv", ["misstep", "run", "recipe.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "error: a file: not written whole (No space left on device)" in said
    assert "the same command goes on from there. Make room" in said


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (NothingKept("none"), "change the recipe and run it again"),
        (EngineError("gone"), "the same command goes on from there"),
        (RecipeError("wrong"), None),
    ],
)
def test_what_to_do_next_follows_from_what_failed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: MisstepError,
    advice: str | None,
) -> None:
    def failed(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", failed)
    monkeypatch.setattr(sys, "argv", ["misstep", "run", "recipe.yaml"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {error}"
    assert [advice] * bool(advice) == [
        line.partition(": ")[2].rstrip(".") for line in lines[1:]
    ]


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


def test_a_command_that_is_asked_to_end_takes_its_children_with_it(tmp_path: Path) -> None:
    words = ["bench", "overhead", "--records", "1000000", "--out", str(tmp_path / "o.json")]
    command = [sys.executable, "-m", "misstep", *words]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as run:
        # What the child works in is there as soon as it works.
        until = time.monotonic() + 60
        while not [*tmp_path.glob("misstep-overhead-*")] and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "Interrupted. Nothing that was finished is lost" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def said_at_status_2(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["misstep", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *("run recipe.yaml", "compare recipe.yaml", "train recipe.yaml", "study recipe.yaml"),
        *("export runs/own", "judge check refusal a.csv", "judge train a.csv"),
        *("import-inspect a.eval", "bench train", "bench overhead"),
    ],
)
def test_an_empty_out_is_refused(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said = said_at_status_2([*command.split(), "--out", ""], monkeypatch, capsys)
    assert "--out: expected a path, found nothing" in said
    assert not [*tmp_path.iterdir()]


def test_rows_without_a_mask_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "masked_rows", lambda *_: [])
    words = ["train", "mine.yaml", "--show-mask", "2"]
    said = said_at_status_2(words, monkeypatch, capsys)
    assert "mine.yaml: methods: expected rows of one answer each" in said


def test_a_page_that_lacks_a_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("garbage")
    monkeypatch.setattr(sys, "argv", ["misstep", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert end.value.code == 0
    assert shown.out.strip() == str(tmp_path / "report.html")
    assert "results.json is unreadable: no rates" in shown.err
