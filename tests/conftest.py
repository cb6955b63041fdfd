"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import tfmtseg  # noqa: F401  before any test imports tensorflow, as the README asks of users

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared/data, which are not here")
    return SHARED / "data"
