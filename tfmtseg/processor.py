"""What the processor is, as far as Linux tells."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """The processor's name, else its kind."""
    return _first("model name") or platform.machine()


@functools.cache
def processor_features() -> frozenset[str]:
    """Extensions of an x86 processor, such as `avx512bf16`; empty for others.

    Linux writes avx512_bf16 for what compilers call avx512bf16.
    """
    return frozenset(feature.replace("_", "") for feature in _first("flags").split())


def _first(field: str) -> str:
    """The field of the first core; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
