"""How much memory this process takes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

GB = 1e9


def peak_memory_gb() -> float:
    """The most memory that this process has had at a time (resident set), in 10^9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but on macOS bytes
    return peak * (1 if sys.platform == "darwin" else 1024) / GB


def resident_memory_gb() -> float:
    """The memory that this process has now; its peak so far where Linux' /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_gb()
    return pages * resource.getpagesize() / GB


# Control groups of version 2 and 1: folder, limit, use, and what of the use would give way.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_memory_gb() -> float:
    """What this process may still take, as the system says; unlimited where it does not.

    Of machine and container, the one that has less.
    """
    available = [float("inf")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        available.append(kib * 1024)
    for folder, limit, used, gives_way in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit
            files = [Path(folder, name).read_text(encoding="ascii") for name in (limit, used)]
            lines = Path(folder, "memory.stat").read_text(encoding="ascii").splitlines()
            statistics = dict(line.split() for line in lines)
            available.append(int(files[0]) - int(files[1]) + int(statistics[gives_way]))
    return max(0.0, min(available) / GB)
