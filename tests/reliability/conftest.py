"""The collection of bad inputs, written anew for each run of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "scripts" / "make_bad_inputs.py"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with the bad inputs and their `manifest.json`."""
    if not SCRIPT.is_file():  # no reason to skip: these tests carry the first promise
        pytest.fail(f"{SCRIPT}: script is missing, must be there. Fix: put ../shared in its place.")
    folder = tmp_path_factory.mktemp("bad") / "inputs"
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    return folder
