"""Runs a command and ends it, with all that it started, when standard input closes.

A pipe closes however its other end goes: orderly, by Ctrl-C, by SIGKILL. So a server that is
started through this script leaves no orphan. It is run by its path, isolated from the package,
and knows nothing but processes.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

SECONDS_TO_STOP = 20


def main() -> int:
    """Run the command in the arguments; give its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A group of its own, so that the server's own children end with it.
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: end(server.pid, signal.SIGTERM))
    threading.Thread(target=stop_at_end_of_input, args=(server,), daemon=True).start()
    status = server.wait()
    end(server.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def stop_at_end_of_input(server: "subprocess.Popen[bytes]") -> None:
    """Ask the group to end once nobody holds the other end of the pipe, then make it."""
    while os.read(0, 1024):
        pass
    end(server.pid, signal.SIGTERM)
    try:
        server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        end(server.pid, signal.SIGKILL)


def end(group: int, how: signal.Signals) -> None:
    """Signal a group, or what is left of it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, how)


if __name__ == "__main__":
    sys.exit(main())
