"""How much memory this process takes."""

from __future__ import annotations

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


def available_memory_gb() -> float:
    """What this process may still take, as the system says; unlimited where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024 / GB
