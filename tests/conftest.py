"""What all tests share."""

from __future__ import annotations

import inspect
import json
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def _through_json(values: Any) -> Any:
    return json.loads(json.dumps(values, default=float))  # Keras 2 has numbers of NumPy


def _survives_config(kind: type, **values: Any) -> Any:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert set(values) == set(defaults), "each argument needs a value"
    assert [name for name in values if values[name] == defaults[name]] == []
    again = kind.from_config(_through_json(kind(**values).get_config()))
    config = again.get_config()
    assert _through_json({name: config[name] for name in values}) == _through_json(values)
    return again


@pytest.fixture(scope="session")
def survives_config() -> Callable[..., Any]:
    """Checks that a configuration holds every argument of a layer, model or optimizer.

    A comparison of `get_config` with itself would not miss what it leaves out. Takes the class
    and a value for each argument, none of them the default; returns what was made again.
    """
    return _survives_config


@pytest.fixture(scope="session")
def starter() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a script by its path; see `tools/starter.py`."""
    path = Path(__file__).resolve().parent / "tools" / "starter.py"
    starter = runpy.run_path(str(path))["Starter"]()
    yield starter
    starter.end()


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
