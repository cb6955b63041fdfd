"""What the tests of builder, loader and CUDA kernels share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfmtseg.ops import build


@pytest.fixture(scope="session")
def probe_sources() -> Path:
    """One trivial op, in the files that a real op has."""
    return Path(__file__).parent / "probe"


@pytest.fixture(scope="session")
def probe_library(probe_sources, tmp_path_factory) -> Path:
    """The probe, built once; with CUDA where nvcc is. Compiling TensorFlow's headers takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path_factory.mktemp("probe_cache")))
        return build.build(probe_sources, cuda=build.find_nvcc() is not None)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def plain_sources(tmp_path) -> Path:
    """A library without ops and TensorFlow's headers, which compiles in no time."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "plain_cpu.cc").write_text('#include "plain_cpu.h"\nint Plain() { return PLAIN; }\n')
    (folder / "plain_cpu.h").write_text("#define PLAIN 1\nint Plain();\n")
    return folder


@pytest.fixture
def compiler_log(tmp_path, monkeypatch) -> Path:
    """A file that gets a line for each file compiled from now on."""
    log = tmp_path / "compiler_log"
    log.touch()
    compiler = tmp_path / "logging-g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {log} ;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return log


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA kernels of all ops, compiled for the CPU, as C functions (cuda_c_api.cc)."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the CPU; there is none")
    here = Path(__file__).resolve().parent
    sources = here.parents[1] / "cuda_ops"
    path = tmp_path_factory.mktemp("cuda") / "emulated.so"
    subprocess.run(
        [
            *("g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *("-DTFMTSEG_CUDA_EMULATION", f"-I{sources}", "-x", "c++"),
            *(*sorted(sources.glob("*_cuda.cu")), here / "cuda_c_api.cc", "-o", path),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(path))
    library.workspace_size.restype = ctypes.c_size_t
    library.group_norm_workspace_size.restype = ctypes.c_size_t
    library.error_string.restype = ctypes.c_char_p
    return library


@pytest.fixture
def cuda_library(emulated_kernels) -> Iterator[ctypes.CDLL]:
    """The same, on the usual device whatever a test chooses."""
    yield emulated_kernels
    emulated_kernels.emulation_settings(8, False, 264)
