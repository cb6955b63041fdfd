"""The bad inputs, written anew for each run of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "scripts" / "make_bad_inputs.py"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with the bad inputs and their `manifest.json`."""
    if not SCRIPT.is_file():
        pytest.skip("needs the bad inputs of ../shared/scripts, which is not here")
    folder = tmp_path_factory.mktemp("bad") / "inputs"
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    return folder
