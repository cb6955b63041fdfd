"""The version, readable without importing TensorFlow."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def code_version() -> str:
    """What the results of this code are filed under.

    Returns:
        In a git checkout, the commit that last changed the package or its native ops,
        with `-dirty` if they have been changed since; elsewhere the version.
    """
    commit = _git("log", "-1", "--format=%h")
    if not commit:
        return __version__
    return commit + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    """What git says of the package; nothing without git, or if it does not know the files."""
    package = Path(__file__).resolve().parent
    command = ["git", "-C", str(package), *arguments, "--", ".", "../cuda_ops"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
