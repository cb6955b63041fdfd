"""nvcc compiles the CUDA kernels for every architecture, and they fit into the registers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tfmtseg import compat

SOURCES = Path(__file__).resolve().parents[2] / "cuda_ops"
NVCC = shutil.which("nvcc")
ARCHITECTURES = (75, 80, 86, 89, 90)

# Registers per thread that let the blocks a kernel was planned for be on one multiprocessor,
# of 65536 registers: two of 128 threads, two of 256 threads, four of 128, and of others eight of
# 128 or four of 256.
REGISTERS = {"TensorCoreSweepKernel": 255, "ScalarSweepKernel": 128, "GroupGradientsKernel": 128}
REGISTERS_OF_OTHERS = 64
SPILLED_BYTES = 0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not compat.KERAS_3, reason="as in the default environment: no TensorFlow"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[list[Path], str]:
    """The object files for all architectures, and what the assembler said."""
    if NVCC is None:
        pytest.skip("needs nvcc (CUDA toolkit) on PATH; there is none")
    folder = tmp_path_factory.mktemp("nvcc")
    codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in ARCHITECTURES]
    objects, log = [], ""
    for source in sorted(SOURCES.glob("*_cuda.cu")):
        objects.append(folder / f"{source.stem}.o")
        run = subprocess.run(
            [
                *(NVCC, "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"),
                *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *codes),
                *("-c", source, "-o", objects[-1]),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        log += run.stderr
    return objects, log


def resources(log: str) -> dict[tuple[str, int], tuple[int, int]]:
    """(kernel, architecture) -> registers, spilled bytes, of every kernel in the log."""
    pattern = re.compile(
        r"entry function '(?P<kernel>\w+)' for 'sm_(?P<code>\d+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        (found["kernel"], int(found["code"])): (
            int(found["registers"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in pattern.finditer(log)
    }


def test_kernels_fit_into_the_registers(compiled):
    found = resources(compiled[1])
    for code in ARCHITECTURES:
        kernels = [kernel for kernel, of in found if of == code]
        assert sum("TensorCoreSweepKernel" in kernel for kernel in kernels) == 9
        assert sum("ScalarSweepKernel" in kernel for kernel in kernels) == 4
        assert sum("ChunkGradientsKernel" in kernel for kernel in kernels) == 3
    too_much = {}
    for (kernel, code), (registers, spilled) in found.items():
        allowed = next(
            (most for name, most in REGISTERS.items() if name in kernel), REGISTERS_OF_OTHERS
        )
        if registers > allowed or spilled > SPILLED_BYTES:
            too_much[kernel, code] = (registers, spilled)
    assert too_much == {}


def test_the_log_of_the_assembler_is_understood():
    log = """ptxas info    : Compiling entry function '_Z3OneKernel' for 'sm_80'
ptxas info    : Function properties for _Z3OneKernel
    56 bytes stack frame, 192 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 464 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3TwoKernel' for 'sm_90'
ptxas info    : Function properties for _Z3TwoKernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""
    assert resources(log) == {("_Z3OneKernel", 80): (128, 284), ("_Z3TwoKernel", 90): (4, 0)}


def test_python_module_imports_without_a_gpu(compiled, tmp_path):
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, which is not installed")
    name = f"tfmtseg_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [
            *(NVCC, "-O0", "-std=c++17", "-shared", "-cudart", "static"),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
            *(SOURCES / "cuda_pybind.cc", *compiled[0], "-o", tmp_path / name),
        ],
        check=True,
    )
    program = """
import tfmtseg_cuda as cuda
try:
    print(cuda.device()["name"])
except RuntimeError as error:
    assert str(error).startswith("no CUDA device: "), error
    print(error)
arguments = dict(dtype="float32", n=2, m=2, d=2, temperature=0.1, queries=16, keys=16)
problem = cuda.InfoNce(**arguments, positives=16, engine="split")
assert problem.workspace_size(True) > problem.workspace_size(False) > 0
for wrong, message in [
    ({"positives": None}, "positives: is missing"),
    ({"positives": 16, "dtype": "int8"}, "dtype: is int8"),
    ({"positives": 16, "engine": "warp"}, "engine: is warp"),
]:
    try:
        cuda.InfoNce(**(arguments | wrong))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

class Array:
    def __init__(self, typestr, shape, strides=None):
        self.__cuda_array_interface__ = dict(
            version=3, data=(16, False), typestr=typestr, shape=shape, strides=strides
        )

positives = Array("<i4", (2,))
cuda.InfoNce(**arguments, positives=positives, key_mask=Array("|b1", (2,)))
cuda.InfoNce(**(arguments | {"queries": Array("<f4", (2, 2), (8, 4))}), positives=positives)
for wrong, kind, message in [
    ({"positives": "1"}, TypeError, "positives: expected __cuda_array_interface__"),
    ({"positives": Array("<i8", (2,))}, TypeError, "positives: type is <i8"),
    ({"positives": Array("<i4", (3,))}, ValueError, "positives: has 3 elements, must have 2"),
    ({"queries": Array("<f4", (2, 2), (4, 8))}, ValueError, "queries: must be contiguous"),
    ({"queries": Array("<f2", (2, 2))}, TypeError, "queries: type is <f2"),
]:
    try:
        cuda.InfoNce(**(arguments | {"positives": positives} | wrong))
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

volumes = dict(dtype="float32", n=2, voxels=5, channels=6, groups=3, x=16, gamma=16, beta=16)
assert cuda.GroupNorm(**volumes).workspace_size() > 0
assert cuda.GroupNorm(**(volumes | {"groups": 4})).workspace_size() == 0
for wrong, message in [
    ({"x": None}, "x: is missing"),
    ({"gamma": Array("<f4", (5,))}, "gamma: has 5 elements, must have 6"),
]:
    try:
        cuda.GroupNorm(**(volumes | wrong))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
