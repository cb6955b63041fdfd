"""Bazel builds the native op library too, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bazel"), reason="needs bazel, which is not here")
def test_bazel_builds_the_library(repository_copy, tmp_path):
    environment = {
        **os.environ,
        "TFMTSEG_PYTHON": sys.executable,
        "PYTHONPATH": str(repository_copy),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    bazel = ["bazel", f"--output_user_root={tmp_path}/bazel"]
    try:
        built = subprocess.run(
            [*bazel, "build", "//:tfmtseg_ops"],
            cwd=repository_copy,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stderr
    finally:
        subprocess.run([*bazel, "shutdown"], cwd=repository_copy, capture_output=True)
    code = "from tfmtseg.ops import library; print(library.load().tfmtseg_probe([3.0]).twice)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **environment,
            "TFMTSEG_NATIVE_OPS": str(repository_copy / "bazel-bin" / "libtfmtseg_ops.so"),
        },
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("tf.Tensor([6.]")
