"""What all tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tfmtseg  # noqa: F401  # isort: skip  before tensorflow, as users are asked to
import tensorflow as tf

# Says once that there is no GPU; not amid a test's output. Tests of replicas need two devices,
# which are made before TensorFlow starts.
(CPU,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared/data, which are not here")
    return SHARED / "data"


@pytest.fixture
def repository_copy(tmp_path) -> Path:
    """A copy of the repository, with the probe among the native ops, to build in."""
    root = Path(__file__).resolve().parents[1]
    ignored = [line.rstrip("/") for line in (root / ".gitignore").read_text().splitlines()]
    copy = tmp_path / "repository"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    shutil.copytree(root / "tests" / "ops" / "probe", copy / "cuda_ops", dirs_exist_ok=True)
    return copy
