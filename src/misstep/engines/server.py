"""A model server as a child process: started, waited for, stopped; never left behind.

It writes to a log of its own. Where it dies, the error has the line that names the cause, or
else its last ones, and says where the log is kept. This module knows processes, one address to
ask, and how Python's errors look in a log; it knows no engine and no server's options.
"""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from urllib.request import ProxyHandler, build_opener

from misstep.engines import keeper
from misstep.errors import EngineError

SECONDS_TO_START = 1800.0
"""Large weights from a slow disk, compiled once."""
LAST_LINES = 15
CAUSE = re.compile(r"(?:^|[\])]:? )((?:\w+\.)*\w*Error: .+)")
"""The end of a traceback, after what a logger may put before it."""
WRAPPER = re.compile("Engine core initialization failed|stack trace")
"""Is in what vLLM raises after the error that it is about."""
MEMORY = re.compile("memory|KV cache", re.IGNORECASE)
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
        self.log = Path(mkdtemp(prefix="misstep-server-")) / "server.log"
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
        except BaseException as error:
            self.close(keep_log=isinstance(error, EngineError))
            raise

    @property
    def pid(self) -> int:
        """The process that keeps the server, of which the server is a child."""
        return self._keeper.pid

    @property
    def death(self) -> str | None:
        """How the server ended, why, and what to do; None while it lives."""
        status = self._keeper.poll()
        if status is None or not self.log.exists():
            return None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        cause = cause_in(lines)
        last = "\n  ".join(lines[-LAST_LINES:]) or "nothing"
        said = f": {cause}" if cause else f"; it said last:\n  {last}"
        return f"{self._name} ended with status {status}{said}\n{advice(cause)}{self._kept}"

    @property
    def _kept(self) -> str:
        return f"The server's log is kept: {self.log}"

    def close(self, keep_log: bool = False) -> None:
        """End the server and all that it started; wait until they are gone.

        The log of a server that ended by itself is kept in any case.
        """
        keep_log |= self._keeper.poll() is not None
        if self._keeper.stdin:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(keeper.SECONDS_TO_STOP + 10)
        except subprocess.TimeoutExpired:
            self._keeper.terminate()
        if not keep_log:
            rmtree(self.log.parent, ignore_errors=True)

    def _wait(self) -> None:
        until = time.monotonic() + SECONDS_TO_START
        # The address is this machine's: no proxy of the environment stands before it.
        opener = build_opener(ProxyHandler({}))
        while time.monotonic() < until:
            if death := self.death:
                raise EngineError(death)
            try:
                opener.open(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise EngineError(
            f"{self._name} did not answer within {SECONDS_TO_START:.0f} seconds of its start.\n"
            f"{self._kept}"
        )


def cause_in(lines: Sequence[str]) -> str | None:
    """The last error in a log that is no wrapper of another one."""
    found = [match[1] for line in lines if (match := CAUSE.search(line))]
    return next((cause for cause in reversed(found) if not WRAPPER.search(cause)), None)


def advice(cause: str | None) -> str:
    """What to do about it, on a line of its own, as far as that is known."""
    if cause is None or not MEMORY.search(cause):
        return ""
    return (
        "The memory does not suffice: see what else is in it (of a GPU: nvidia-smi) and end "
        "that, split the model over more GPUs, or take a smaller one.\n"
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
