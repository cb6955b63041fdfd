"""The checks of `torture.py`, one after the other, in short form."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

torture = runpy.run_path(str(Path(__file__).with_name("torture.py")))
SHORT = [command for promise in torture["PROMISES"].values() for command in promise.short]


@pytest.mark.parametrize("command", SHORT)
def test_short_form(command):
    holds, figure = torture["run"](command, sys.executable)
    assert holds, figure
