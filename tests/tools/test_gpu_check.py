from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tfmtseg.ops import build

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


def test_sections_in_the_order_of_what_matters(tool):
    parts = tool.sections(emulate=False)
    accuracy = [*tool.ENGINES, "group_norm"]
    timings = ["time_info_nce", "time_group_norm"]
    sanitizers = ["memcheck", "racecheck", "synccheck"]
    assert list(parts) == ["build", *accuracy, *timings, *sanitizers]
    assert [name for name, part in parts.items() if part.must_end] == ["build", *accuracy]
    assert {name for name, part in parts.items() if part.tool} == set(sanitizers)
    assert list(tool.sections(emulate=True)) == ["build", *accuracy]
    assert {engine for engine, _ in tool.TOLERANCES} == set(tool.ENGINES)


def test_only_accuracy_has_to_be_finished(tool):
    parts = tool.sections(emulate=False)
    for name in ("split", "time_info_nce", "memcheck"):
        parts[name].stop_short("not finished in 50 s")
    assert parts["split"].problems == [f"* {parts['split'].title}: not finished in 50 s"]
    assert parts["time_info_nce"].problems == parts["memcheck"].problems == []
    assert parts["memcheck"].text() == "## compute-sanitizer memcheck\n\nNot finished in 50 s.\n"
    parts["memcheck"].take("* wrong")
    assert parts["memcheck"].text().endswith("\n\nNot finished in 50 s.\n\n* wrong\n")
    assert parts["racecheck"].text() == ""


def test_needs_no_tensorflow():
    program = (
        f"import runpy, sys; runpy.run_path({str(TOOL)!r}, run_name='tool'); "
        "assert not {'tensorflow', 'tfmtseg', 'keras', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_table_has_a_cell_for_every_column(tool):
    results = {"fused": (1.25, 3.0), "torch eager": "out of memory"}
    row = tool.timing_row(192, "float32", results)
    assert row.startswith("| 192 | float32 | 1.250 (3) |  | out of memory |")
    section = tool.sections(emulate=False)["time_info_nce"]
    for line in (row, "* wrong", "something that PyTorch says"):
        section.take(line)
    lines = section.text().splitlines()
    table = [line for line in lines if line.startswith(("| ", "|---"))]
    assert len(table) == 3
    assert {line.count("|") for line in table} == {len(tool.COLUMNS) + 3}
    assert lines[-2:] == ["", "* wrong"]


@pytest.mark.parametrize("mean", [0.0, 0.6])
def test_oracle_by_finite_differences(tool, mean):
    problem = tool.make_problem(12, 20, 3, mean, "float32", 0)
    gradients = tool.oracle(problem, tool.HostMemory())
    step = 1e-3
    for name in ("queries", "keys"):
        numeric = np.zeros(problem[name].shape)
        for index in np.ndindex(numeric.shape):
            totals = []
            for sign in (1, -1):
                moved = problem | {name: problem[name].astype(np.float64)}
                moved[name][index] += sign * step
                totals.append(tool.oracle(moved, tool.HostMemory())["loss"] @ moved["row_weights"])
            numeric[index] = (totals[0] - totals[1]) / (2 * step)
        # The third derivative at temperature 0.07: 14^3 * 1e-6.
        np.testing.assert_allclose(gradients[f"grad_{name}"], numeric, atol=5e-3)
        assert np.abs(numeric).max() > 1


def test_oracle_of_group_norm_by_finite_differences(tool):
    problem = tool.group_norm_problem(2, 5, 6, 3, "float32", 0)
    gradients = tool.group_norm_oracle(problem)
    for name in ("x", "gamma", "beta"):
        direction = np.random.default_rng(1).normal(size=problem[name].shape)
        totals = []
        for sign in (1, -1):
            moved = problem | {name: problem[name] + sign * 1e-6 * direction}
            totals.append(np.sum(tool.group_norm_oracle(moved)["y"] * problem["upstream"]))
        slope = (totals[0] - totals[1]) / 2e-6
        assert np.sum(gradients[f"grad_{name}"] * direction) == pytest.approx(slope, rel=1e-4)


def test_keys_that_share_a_mean(tool):
    problem = tool.make_problem(500, 400, 64, 0.9, "float32", 0)
    keys = problem["keys"]
    assert np.linalg.norm(keys.mean(0)) == pytest.approx(0.9, abs=0.02)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)
    assert (problem["row_weights"] > 0).all()
    assert (tool.make_problem(500, 400, 64, 0.0, "float32", 0)["row_weights"] != 0).all()


def test_an_engine_that_the_device_lacks_has_a_row(tool, monkeypatch):
    monkeypatch.setattr(tool, "TOLERANCES", {("split", "float32"): 3e-5})
    cuda = SimpleNamespace(device=lambda: {"compute_capability": (7, 5)})
    (row,) = tool.compare(cuda, tool.HostMemory(), "split", tool.SHAPES, tool.SEEDS)
    assert row == "| split | float32 | | 3e-05 | not supported by this device |"


def test_nvcc_is_looked_for_where_the_package_does(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for home in ("first", "second"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").touch(mode=0o755)
    for home, path in [(tmp_path / "first", "/nowhere"), ("", "/nowhere"),
                       (tmp_path / "first", tmp_path / "second" / "bin")]:  # fmt: skip
        monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setenv("PATH", str(path))
        assert tool.find("nvcc") == build.find_nvcc()
    assert tool.find("nvcc") == str(tmp_path / "second" / "bin" / "nvcc")


def test_what_hangs_is_ended_with_all_that_it_started(tool):
    program = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '1000']); "
        "print('| child |', child.pid, flush=True); time.sleep(1000)"
    )
    seen = []
    assert tool.watch([sys.executable, "-c", program], 10, seen.append) == "not finished in 10 s"
    child = Path("/proc", seen[0].split()[-1], "stat")
    for _ in range(100):
        if not child.exists() or ") Z " in child.read_text():  # nobody may have asked for its end
            return
        time.sleep(0.1)
    raise AssertionError("the child of what was ended goes on")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('| 1 |')", ""),
        ("print('| 1 |'); raise RuntimeError('no')", "exit status 1, RuntimeError: no"),
        ("print('| 1 |', flush=True); import os; os.abort()", "exit status -6, | 1 |"),
    ],
)
def test_why_a_section_failed_is_told(tool, program, reason):
    seen = []
    assert tool.watch([sys.executable, "-c", program], 60, seen.append) == reason
    assert seen[0] == "| 1 |"


# In the place of the kernels: those of one engine break off, and all others are wrong.
MODULE = """
import os

def device():
    return {"name": "a device", "compute_capability": (8, 0)}

class Call:
    def __init__(self, **arguments):
        self.engine = arguments.get("engine")
    def workspace_size(self, *arguments):
        return 1

class InfoNce(Call):
    def forward(self, **arguments):
        if self.engine == "split":
            raise RuntimeError("CUDA: an illegal memory access was encountered (error 700)")
    def backward(self, **arguments):
        pass
    forward_backward = backward

class GroupNorm(Call):
    def forward(self, **arguments):
        pass
    backward = forward
"""


def test_a_section_that_fails_does_not_end_the_others(tool, tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text(MODULE)
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncp {tmp_path}/module.py "${{last%%.*}}.py"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    output = tmp_path / "report.md"
    assert tool.main(["--emulate", "--output", str(output)]) == 1
    report = output.read_text()
    assert "| name | a device |" in report
    assert (
        "* Accuracy of InfoNCE, engine split: exit status 1, RuntimeError: CUDA: an illegal memory"
    ) in report
    assert "| scalar | bfloat16 | nan |" in report
    assert "* group_norm float32 (1, 1, 1, 1) seed 0 y: error nan" in report
    assert "| group_norm | bfloat16 | nan |" in report

    compiler.write_text("#!/bin/sh\nexit 7\n")
    assert tool.main(["--emulate", "--output", str(output)]) == 1
    assert "exit status 1, g++: exit status is 7, must be 0. Fix:" in output.read_text()


def test_without_nvcc_pytorch_or_a_gpu_one_line_tells(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "find", lambda program: None)
    with pytest.raises(SystemExit, match=r"nvcc: path is none, must be on PATH.* Fix: install"):
        tool.build(tmp_path, emulate=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"torch: import is .*, must work. Fix: .* pip install"):
        tool.architecture()
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with pytest.raises(SystemExit, match=r"PyTorch: GPU is none, must be one. Fix: look at"):
        tool.architecture()
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda: (9, 0)
    assert tool.architecture() == "sm_90"


def test_a_contender_that_fails_while_it_is_timed(tool, monkeypatch):
    """Whatever is left of it may not stand in the others' way."""
    nothing = SimpleNamespace(
        synchronize=lambda: None, memory_allocated=lambda: 0, max_memory_allocated=lambda: 2**20,
        reset_peak_memory_stats=lambda: None, empty_cache=lambda: None,
        OutOfMemoryError=MemoryError,
    )  # fmt: skip
    compiler = SimpleNamespace(reset=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=nothing, compiler=compiler))
    calls = dict.fromkeys(("sound", "greedy", "broken"), 0)

    def contender(name, error=None):
        def run():
            calls[name] += 1
            if calls[name] > 2 and error:
                raise error

        return lambda: run

    contenders = {
        "greedy": contender("greedy", MemoryError()),
        "broken": contender("broken", ValueError("a | b\nmore")),
        "sound": contender("sound"),
    }
    monkeypatch.setattr(tool, "Contenders", lambda *_: SimpleNamespace(all=lambda: contenders))

    def milliseconds(run, times):
        run()
        return 2.0

    monkeypatch.setattr(tool, "milliseconds", milliseconds)
    results = tool.time_one_size(None, 4096, "float32", time.monotonic() + 60)
    assert results == {
        "greedy": "out of memory",
        "broken": "ValueError: a / b",
        "sound": (2.0, 1.0),
    }
    assert calls["greedy"] == calls["broken"] == 3 < calls["sound"]

    monkeypatch.setattr(tool, "SIZES", (192, 1024))
    lines = list(tool.time_info_nce(None, time.monotonic() + 60))
    assert [line for line in lines if line.startswith("* ")] == []  # not ours
    contenders["fused"] = lambda: 1 / 0
    lines = list(tool.time_info_nce(None, time.monotonic() + 60))
    assert lines[:2] == [
        tool.timing_row(192, "float32", {"fused": "ZeroDivisionError: division by zero"}),
        "* 192 float32, timed: ZeroDivisionError: division by zero",
    ]
    assert len(lines) == 8  # the others come all the same
