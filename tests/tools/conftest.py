"""Calls of the scripts of tools/ without the time they take to start."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def starter() -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Runs a script by its path; see `starter.py`."""
    starter = runpy.run_path(str(HERE / "starter.py"))["Starter"]()
    yield starter
    starter.end()


@pytest.fixture(scope="session")
def call(starter) -> Callable[..., CompletedProcess[str]]:
    """Runs a script of tools/ by its name."""
    return lambda tool, *flags: starter(HERE.parents[1] / "tools" / f"{tool}.py", *flags)
