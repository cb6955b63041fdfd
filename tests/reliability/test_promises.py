"""The checks of `torture.py`, one after the other, in short form."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
torture = runpy.run_path(str(Path(__file__).with_name("torture.py")))
SHORT = [command for promise in torture["PROMISES"].values() for command in promise.short]
(QUICK,) = (command for command in SHORT if "damage_cache.py" in command)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> Path:
    """Where runs that nothing interrupts are kept for later checks."""
    return tmp_path_factory.mktemp("whole_runs")


@pytest.mark.parametrize("command", SHORT)
def test_short_form(starter, whole_runs, command):
    """In copies of one process; each as `torture.py` has it but for that."""
    python, script, *arguments = shlex.split(command)
    assert python == "PYTHON"
    done = starter(ROOT / script, *arguments, RUNS_DIR=whole_runs)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.strip()


def test_as_torture_runs_it():
    holds, figure = torture["run"](QUICK, sys.executable)
    assert holds, figure
