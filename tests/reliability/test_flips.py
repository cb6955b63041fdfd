"""Promise: a flipped bit never becomes a prediction."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tfmtseg.data import nifti

flip = runpy.run_path(str(Path(__file__).with_name("flip_bits.py")))["flip"]
pytestmark = pytest.mark.filterwarnings("ignore::tfmtseg.errors.InputWarning")


def test_no_flip_gives_a_wrong_volume(tmp_path):
    counts = flip(1000, 7, tmp_path)
    assert counts["wrong"] == 0
    # Half of the flips are in the 10 + 8 bytes of gzip's header and trailer, where 6
    # bytes (time, system, level) mean nothing; nearly all others must be found.
    assert counts["refused"] > 750


def test_only_the_end_of_the_stream_tells(tmp_path, monkeypatch):
    """Without reading to the end, the same flips are voxels: the test above can fail."""
    monkeypatch.setattr(nifti, "_drain", lambda path, stream: None)
    assert flip(300, 7, tmp_path)["wrong"] > 10
