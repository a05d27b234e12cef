"""One command at a time in one directory.

A command overwrites and clears away what stands in its directory as if nobody else were there,
so it claims the directory first. The claim is the kernel's lock on the file `.lock`: whatever
ends the process gives it back, and the file itself says nothing once it is free. Of several
processes of one training (`accelerate launch`) the leader alone runs commands, and so claims.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from misstep.errors import InputError

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Keep other commands out of a directory while the work inside goes on.

    Raises:
        InputError: another command is at work there, or the file system knows no locks.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            file.seek(0)
            raise InputError(
                f"{folder}: another command is at work in this directory ({file.read()}). "
                "Wait until it ends, or give this one a directory of its own: --out DIR."
            ) from fault
        except OSError as fault:
            raise InputError(
                f"{folder}: expected a folder on a file system with locks, so that no two "
                f"commands work in it at once ({fault.strerror}). Give another --out."
            ) from fault
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield folder
