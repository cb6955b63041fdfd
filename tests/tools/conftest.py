"""Calls of the scripts of tools/ without the time they take to start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def call(starter) -> Callable[..., CompletedProcess[str]]:
    """Runs a script of tools/ by its name."""
    return lambda tool, *flags: starter(HERE.parents[1] / "tools" / f"{tool}.py", *flags)
