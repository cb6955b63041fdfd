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


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="tests that need a GPU fail where they would be skipped",
    )


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not tf.config.list_physical_devices("GPU"):
        pytest.skip("needs a GPU, and TensorFlow sees none")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A run on a GPU machine must not pass by skipping, whatever the reason."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.get_closest_marker("gpu") and item.config.option.require_gpu:
        report.outcome, report.longrepr = "failed", f"{report.longrepr[2]}; --require-gpu"


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
    # By their last part alone, which is all that `ignore_patterns` looks at.
    ignored = [Path(line).name for line in (root / ".gitignore").read_text().splitlines()]
    copy = tmp_path / "repository"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    shutil.copytree(root / "tests" / "ops" / "probe", copy / "cuda_ops", dirs_exist_ok=True)
    return copy
