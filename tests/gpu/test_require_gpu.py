"""The switch by which a run on a GPU machine cannot pass by skipping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_tests_fail():
    """Without the switch they are skipped, as a run of all tests shows."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu",
            "--require-gpu", "tests/gpu/test_gpu.py", "-k", "test_group_norm_relu",
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "6 errors" in done.stdout
