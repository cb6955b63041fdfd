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
    patches = [tool.patches_mib((96,) * 3, 4, *counts) for counts in ((1, 1), (2, 8), (2, 64))]
    words = " ".join(text.split())
    assert f": {patches[0]:.0f} MiB for one of 96 x 96 x 96 with four modalities" in words
    assert f"so {patches[1] / 1024:.1f}".replace("0.", ".") + " GiB on each of 8 GPUs" in words
    assert f"{patches[2] / 1024:.1f} GiB on each of 64" in words
    # 18.8 million parameters, and half of the patches, which need no way back.
    mib = 4 * 18.8e6 / 2**20 + patches[2] / 2
    seconds = tool.exchange_s(mib * 2**20, tool.MACHINES, 100)
    assert f"| bcp | 18.8 | {mib:.0f} | {1e3 * seconds:.0f} | {0.1 / (0.1 + seconds):.0%} |" in text
