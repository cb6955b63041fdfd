from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    lines = tool.report({"name": "none"}, [], ["wrong"], [], [row], []).splitlines()
    table = [line for line in lines if line.startswith(("| ", "|---"))][2:]  # the second one
    assert len(table) == 3
    assert {line.count("|") for line in table} == {len(tool.COLUMNS) + 3}
    assert "* wrong" in lines


def test_oracle_by_finite_differences(tool):
    problem = tool.make_problem(12, 20, 3, "float32", 0)
    gradients = tool.oracle(problem)
    step = 1e-3
    for name in ("queries", "keys"):
        numeric = np.zeros(problem[name].shape)
        for index in np.ndindex(numeric.shape):
            totals = []
            for sign in (1, -1):
                moved = problem | {name: problem[name].astype(np.float64)}
                moved[name][index] += sign * step
                totals.append(tool.oracle(moved)["loss"] @ moved["row_weights"])
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
