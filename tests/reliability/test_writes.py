"""Promise: a killed or failed write leaves the old file or none."""

from __future__ import annotations

import re


def test_kills_and_full_disks(short_form):
    answer = short_form("break_writes.py", 5, 3)
    inside = r"\w+ \((\d) inside a write\)"
    found = re.fullmatch(f"5 kills and 5 full disks each, {inside}, {inside}, {inside}: .*", answer)
    assert found, answer
    assert any(int(count) for count in found.groups())
