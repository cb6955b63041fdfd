from __future__ import annotations

import sys

import pytest

from tfmtseg.console import command


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("tools/train.py", "python tools/evaluate.py"),
        ("/usr/local/bin/tfmtseg-train", "tfmtseg-evaluate"),
    ],
)
def test_the_next_command_is_called_like_this_one(called, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called, "--model_dir=RUN"])
    assert command("evaluate") == expected
