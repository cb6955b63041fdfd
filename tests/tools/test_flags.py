"""What is no flag is refused by every tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tfmtseg.console import flags_only

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_stray_arguments(capsys):
    flags_only(["tool.py"])
    with pytest.raises(SystemExit, match="2"):
        flags_only(["tool.py", "1", "2"])
    assert "argument is '1 2', must be a flag" in capsys.readouterr().err


@pytest.mark.parametrize("tool", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_every_tool_looks(tool):
    """Those of absl; the others have a parser that refuses by itself."""
    source = (TOOLS / f"{tool}.py").read_text()
    if tool != "doctor" and "app.run(main)" in source:  # which may not import the package yet
        assert "    flags_only(argv)\n" in source


def test_a_list_with_spaces(tmp_path):
    command = [sys.executable, str(TOOLS / "check.py"), f"--data_dir={tmp_path}", "more"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "argument is 'more', must be a flag" in done.stderr
