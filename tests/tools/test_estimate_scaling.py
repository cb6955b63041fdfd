from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "tools/estimate_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contrast_size_by_hand(tool):
    """A grid of 5 x 3 x 1: its halves have 2 and 1 layers, and the last axis has none."""
    queries = 2 * 2 * 3 * 1 + 2 * 5 * 1 * 1
    found = tool.contrast_size((96, 64, 16), (32, 32, 16), unlabeled=2, replicas=4, length=256)
    assert found == (2 * queries, 8 * 14 + 1, pytest.approx(8 * 15 / 1024))


def test_patches_by_hand(tool):
    """Three replicas with two patches of 4 x 4 x 4: 2 modalities and a label of 4 bytes each."""
    assert tool.patches_mib((4, 4, 4), 2, 2, 3) == 6 * 64 * 3 * 4 / 2**20


def test_exchange_by_hand(tool):
    """Two machines send half of the bytes each way, twice: all of them pass each card."""
    assert tool.exchange_s(12.5e9, machines=2, gbit_per_s=100) == pytest.approx(1)
    assert tool.exchange_s(12.5e9, machines=1, gbit_per_s=100) == 0


def test_the_docs_have_its_figures(tool):
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for replicas in tool.REPLICAS:
        queries, candidates, _ = tool.contrast_size((96,) * 3, (32,) * 3, 2, replicas, 256)
        assert f"| {replicas} | {queries} | {candidates} |" in text
