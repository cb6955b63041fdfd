"""The doctor sees what is wrong and says what to do; each illness is brought about."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tfmtseg import compat, doctor
from tfmtseg.doctor import Finding, examine, table
from tfmtseg.ops import build, library

TOOL = Path(__file__).resolve().parents[1] / "tools" / "doctor.py"


def find(name: str) -> Finding:
    (found,) = (finding for finding in examine() if finding.name.strip() == name)
    return found


@pytest.fixture
def not_loaded(monkeypatch):
    """As in a process that has not used the native ops yet."""
    monkeypatch.setattr(library, "_loaded", None)


def test_what_runs_is_named():
    running = compat.versions()
    assert find("TensorFlow").value.startswith(running["tensorflow"])
    assert find("Keras") == Finding("Keras", running["keras"], "", find("Keras").fix)


def test_a_library_that_is_loaded_is_described():
    library.load()
    version, git = compat.tensorflow_build()
    assert find("native ops").value == f"for TensorFlow {version} ({git}), loaded"
    assert find("instructions").value in build.ISA_FLAGS


def test_an_instruction_set_that_was_chosen(monkeypatch):
    monkeypatch.setenv("TFMTSEG_INSTRUCTION_SET", "generic")
    flags = {"generic": (), "avx2": ()}  # every processor has them
    monkeypatch.setattr(build, "ISA_FLAGS", flags)
    expected = "generic, by TFMTSEG_INSTRUCTION_SET; avx2 is here"
    assert doctor._instruction_set("x86_64") == expected
    monkeypatch.setenv("TFMTSEG_INSTRUCTION_SET", "sse9")
    found = find("native ops")
    assert found.problem == "TFMTSEG_INSTRUCTION_SET is sse9, must be one of generic, avx2"
    assert "unset it" in found.fix


@pytest.mark.parametrize(
    ("record", "gpus", "problem"),
    [
        ({"architectures": (80,), "nvcc": "release 13.0"}, [80], "driver runs CUDA 12.4 at most"),
        ({"architectures": (80,), "nvcc": "release 12.4"}, [80], ""),
        ({"architectures": (80,), "nvcc": "release 12.4"}, [75], "no kernels for a GPU"),
        ({"architectures": (), "nvcc": ""}, [80], "no kernels for a GPU"),
        ({"architectures": (), "nvcc": ""}, [], ""),
    ],
)
def test_a_gpu_that_the_ops_leave_idle(monkeypatch, record, gpus, problem):
    record = replace(library.record(), **record)
    monkeypatch.setattr(library, "is_built", lambda: True)  # without CUDA, here
    monkeypatch.setattr(library, "record", lambda: record)
    monkeypatch.setattr(library, "_driver_cuda", lambda: (12, 4))
    monkeypatch.setattr(build, "visible_architectures", lambda: gpus)
    found = find("CUDA")
    assert problem in found.problem
    assert bool(found.problem) == bool(found.fix) == bool(problem)


def test_nothing_is_built(not_loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path / "empty"))
    found = find("native ops")
    assert "not built yet" in found.value
    assert not found.problem
    assert not (tmp_path / "empty").exists()


def test_no_compiler_and_no_library(not_loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name in ("C++ compiler", "native ops"):
        found = find(name)
        assert "no-such-compiler is not found" in found.problem
        assert "install g++" in found.fix


def test_a_library_that_is_not_there(not_loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(tmp_path / "none.so"))
    found = find("native ops")
    assert found.problem == "No such file or directory"
    assert "unset TFMTSEG_NATIVE_OPS" in found.fix


def test_a_processor_without_avx_512(monkeypatch):
    flags = {"generic": (), "avx2": ("-mfma",), "avx512": ("-mno_processor_has_this",)}
    monkeypatch.setattr(build, "ISA_FLAGS", flags)
    assert doctor._instruction_set("x86_64") in ("generic", "avx2")
    assert doctor._instruction_set("aarch64") == "generic"


@pytest.mark.parametrize(
    ("name", "target", "value", "problem"),
    [
        ("Keras", "tfmtseg.compat.tensorflow_fits_keras", lambda: False, "another TensorFlow"),
        ("memory", "tfmtseg.doctor.LEAST_MEMORY_GB", 10**6, "too little"),
        ("disk", "tfmtseg.doctor.LEAST_DISK_GB", 10**6, "too little"),
        ("disk", "os.access", lambda *arguments: False, "cannot be written to"),
    ],
)
def test_problems(monkeypatch, name, target, value, problem):
    monkeypatch.setattr(target, value)
    found = find(name)
    assert problem in found.problem
    assert found.fix


@pytest.mark.parametrize("cache", ["long" * 100, None], ids=["unreadable", "no home"])
def test_a_cache_folder_that_cannot_be(monkeypatch, tmp_path, cache):
    def home():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TFMTSEG_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", home)
    if cache:  # `stat` refuses, as for folders of other users
        monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path / cache / "inside"))
        exists = Path.exists
        monkeypatch.setattr(
            Path, "exists", lambda path: path.stat() if cache in str(path) else exists(path)
        )
    found = find("disk of the cache")
    assert found.problem
    assert "TFMTSEG_CACHE_DIR" in found.fix


def test_a_system_without_proc(monkeypatch):
    monkeypatch.setattr("tfmtseg.doctor.available_memory_gb", lambda: math.inf)
    found = find("memory")
    assert found.value == "unknown on this system"
    assert not found.problem


def test_onednn_turned_off(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert "slower" in find("oneDNN").problem


def test_addons_that_cannot_be_imported(monkeypatch, tmp_path):
    """As with TensorFlow 2.16 and newer."""
    (tmp_path / "tensorflow_addons.py").write_text("import keras.no_such_module")
    (tmp_path / "tensorflow_addons-9.dist-info").mkdir()
    (tmp_path / "tensorflow_addons-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tensorflow-addons\nVersion: 9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorflow_addons", raising=False)
    found = find("TensorFlow Addons")
    assert found.value == "9"
    assert "no_such_module" in found.problem
    assert "pip uninstall" in found.fix


def test_gpus(monkeypatch):
    """Two of them, and neither nvcc nor kernels of ours."""
    device = namedtuple("device", "name")("GPU:0")
    for function in ("list_physical_devices", "get_visible_devices"):
        monkeypatch.setattr(
            f"tensorflow.config.{function}", lambda kind: [device] * (kind == "GPU")
        )
    details = {"device_name": "A card", "compute_capability": (8, 6)}
    monkeypatch.setattr("tensorflow.config.experimental.get_device_details", lambda device: details)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert find("GPU").value == "A card, compute capability 8.6"
    assert "there is a GPU" in find("CUDA compiler").problem


def test_table():
    text = table([Finding("a", "fine"), Finding("longer", "bad", "it broke", "mend it")])
    assert text.splitlines() == [
        "a       fine",
        "longer  bad",
        "        PROBLEM: it broke.",
        "        Fix: mend it.",
        "1 problem found.",
    ]
    assert table([Finding("a", "fine")]).endswith("No problems found.")


def test_exit_status(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("doctor_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for problem, status in (("", 0), ("it broke", 1)):
        monkeypatch.setattr(doctor, "examine", lambda problem=problem: [Finding("a", "b", problem)])
        assert tool.main(["doctor"]) == status
    assert "PROBLEM: it broke." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("illness", "told"),
    [
        ("sys.modules['tensorflow'] = None", "ModuleNotFoundError ("),
        # The Python of the system, which has no package at all.
        ("sys.modules['absl'] = sys.modules['tensorflow'] = None", "ModuleNotFoundError ("),
        # As of a protobuf that does not fit, or of NumPy 2 with a TensorFlow for NumPy 1.
        ("sys.modules['tensorflow'] = Broken('tensorflow')", "TypeError (Descriptors cannot be"),
    ],
)
def test_without_tensorflow(illness, told):
    """What makes the doctor needed most must not stop it."""
    done = subprocess.run(
        [sys.executable, "-c", f"""
import runpy, sys, types
class Broken(types.ModuleType):
    def __getattr__(self, name):
        raise TypeError("Descriptors cannot be created directly.")
{illness}
sys.argv = ["doctor"]
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"import of tfmtseg is {told}" in done.stderr
    assert "Fix:" in done.stderr
