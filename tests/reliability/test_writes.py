"""Promise: a killed or failed write leaves the old file or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("break_writes.py")


def test_kills_and_full_disks():
    rounds = 5
    done = subprocess.run(
        [sys.executable, SCRIPT, str(rounds), "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if " kills " in line]
    assert [line.split(":")[0] for line in lines] == ["cache", "prediction", "text"]
    for line in lines:
        assert line.startswith(f"{line.split(':')[0]}: {rounds} kills (")
        assert line.endswith(f"; {rounds} full disks, 0 partial files")
