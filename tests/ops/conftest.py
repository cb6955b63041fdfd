"""A native op library to test the builder and the loader with."""

from __future__ import annotations

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
