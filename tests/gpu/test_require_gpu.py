"""The switch by which a run on a GPU machine cannot pass by skipping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "status", "words"), [([], 0, "6 skipped"), (["--require-gpu"], 1, "6 errors")]
)
def test_without_a_gpu(options, status, words):
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", *options,
            "tests/gpu/test_gpu.py", "-k", "test_group_norm_relu",
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    assert words in done.stdout
