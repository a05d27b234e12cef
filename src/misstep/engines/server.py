"""A model server as a child process: started, waited for, stopped; never left behind.

It writes to a log of its own, and what it says last is in the error where it dies. This module
knows processes and one address to ask; it knows no engine and no server's options.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from misstep.engines import keeper
from misstep.errors import EngineError

SECONDS_TO_START = 1800.0
"""Large weights from a slow disk, compiled once."""
LAST_LINES = 15
PORT = "{port}"
"""Stands for the port in a command."""


class Server:
    """A server on a free port of this machine."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start it and wait until it answers.

        Args:
            command: the program and its options; `PORT` stands for the port.
            environment: its variables.

        Raises:
            EngineError: it ended, or did not answer in time.
        """
        self._folder = TemporaryDirectory(prefix="misstep-server-")
        self.log = Path(self._folder.name) / "server.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._name = Path(command[0]).name
        with self.log.open("wb") as log:
            self._keeper = subprocess.Popen(
                # Isolated: else the engines' folder would hide libraries of the same names.
                [sys.executable, "-I", keeper.__file__]
                + [part.replace(PORT, str(port)) for part in command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C is this process's to handle; the child is then stopped in order.
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def death(self) -> str | None:
        """How the server ended and what it said last; None while it lives."""
        status = self._keeper.poll()
        if status is None or not self.log.exists():
            return None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n  ".join(lines[-LAST_LINES:]) or "nothing"
        return f"{self._name} ended with status {status}; it said last:\n  {said}"

    def stop(self) -> None:
        """End the server and all that it started; wait until they are gone."""
        if self._keeper.stdin:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(keeper.SECONDS_TO_STOP + 10)
        except subprocess.TimeoutExpired:
            self._keeper.terminate()
        self._folder.cleanup()

    def _wait(self) -> None:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until:
            if death := self.death:
                raise EngineError(death)
            try:
                urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise EngineError(
            f"{self._name} did not answer within {SECONDS_TO_START:.0f} seconds of its start."
        )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
