"""This machine and what is installed on it, as manifests, cards and benchmarks name them.

Knows processors, drivers and packages; loads none of them.
"""

import os
import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from misstep import __version__

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "openvino-genai", "openai")


def device_text() -> str:
    """What models are computed on here, in a few words."""
    counts = Counter(gpus()).items()
    found = (f"{count} x {name}" if count > 1 else name for name, count in counts)
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *found])


def gpus() -> list[str]:
    """The names of the GPUs, as their driver says them; none where there is no driver."""
    asked = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return shown.stdout.split("\n")[:-1]


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Of misstep, and of those of the libraries that are installed."""
    found = {"misstep": __version__}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mb(process: str = "self") -> int:
    """The most memory that a process has held.

    Linux is asked for the peak of this program: that of `getrusage` begins with what the
    process that started this one held.
    """
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 2**20 if sys.platform == "darwin" else peak // 2**10
    lines = status.read_text().splitlines()
    # One that has ended and is not waited for yet holds none.
    held = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return next(held, 0) // 2**10
