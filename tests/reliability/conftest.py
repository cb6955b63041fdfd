"""What the tests of the promises share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "scripts" / "make_bad_inputs.py"


@pytest.fixture
def short_form() -> Callable[..., str]:
    """Calls a script beside this file with the given arguments; returns its last line.

    `make torture` calls it with larger numbers, see `torture.py`.
    """

    def call(script: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, HERE / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.splitlines()[-1]

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with the bad inputs and their `manifest.json`."""
    if not SCRIPT.is_file():  # no reason to skip: these tests carry the first promise
        pytest.fail(f"{SCRIPT}: script is missing, must be there. Fix: put ../shared in its place.")
    folder = tmp_path_factory.mktemp("bad") / "inputs"
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    return folder
