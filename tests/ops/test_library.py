from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.errors import NativeOpsError
from tfmtseg.ops import build, library
from tfmtseg.ops.record import read_record


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not loaded anything."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_reason", None)
    monkeypatch.setattr(library, "_idle_gpu", False)
    monkeypatch.delenv("TFMTSEG_NATIVE_OPS", raising=False)
    monkeypatch.delenv("TFMTSEG_INSTRUCTION_SET", raising=False)


@pytest.fixture
def probe(probe_library, probe_sources, monkeypatch) -> Path:
    """The probe is this package's op, and built already; there is no compiler."""
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(probe_library.parent))
    monkeypatch.setenv("CXX", "no-such-compiler")
    return probe_library


def fake(path: Path, **changes: object) -> Path:
    """A file with the record of a library for here, and nothing else."""
    record = replace(build.here(build.source_dir()), **changes)
    path.parent.mkdir(exist_ok=True)
    text = record.source_text().split('R"record(')[1].split(')record"')[0]
    path.write_bytes(b"\x7fELF\0" + text.encode() + b"\0")
    return path


@pytest.mark.usefixtures("probe")
def test_the_op_runs():
    x = np.arange(1000, dtype=np.float32)
    ops = library.load()
    twice, unit = ops.tfmtseg_probe(x)
    np.testing.assert_array_equal(twice, 2 * x)
    assert unit.numpy() in (b"generic", b"avx2", b"avx512")
    # The library with CUDA inside loads without a driver.
    assert bool(library.record().architectures) == (build.find_nvcc() is not None)


@pytest.mark.usefixtures("probe")
def test_loads_once_under_threads(monkeypatch):
    calls = []
    real = tf.load_op_library
    monkeypatch.setattr(tf, "load_op_library", lambda path: calls.append(path) or real(path))
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(loaded) == 8
    assert all(each is loaded[0] for each in loaded)


def test_builds_on_first_use(cache, plain_sources, compiler_log, monkeypatch):
    monkeypatch.setattr(build, "source_dir", lambda: plain_sources)
    library.load()
    assert len(list(cache.glob("*.so"))) == 1
    compiled = compiler_log.read_text()
    monkeypatch.setattr(library, "_loaded", None)
    library.load()
    assert compiler_log.read_text() == compiled


def test_may_not_build(cache, plain_sources, compiler_log, monkeypatch):
    monkeypatch.setattr(build, "source_dir", lambda: plain_sources)
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", "0")
    with pytest.raises(NativeOpsError, match="TFMTSEG_NATIVE_OPS=0 forbids to build it"):
        library.load()
    assert compiler_log.read_text() == ""
    assert not cache.exists()


def test_may_not_build_but_is_built(probe, monkeypatch):
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", "0")
    assert library.load().tfmtseg_probe([1.0]).twice.numpy() == [2]


def test_a_library_by_path(probe, tmp_path, monkeypatch):
    copy = tmp_path / "copy.so"
    copy.write_bytes(probe.read_bytes())
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(copy))
    monkeypatch.setattr(tf, "load_op_library", lambda path: path)  # its op is there already
    assert library.load() == str(copy)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"tensorflow": "{}"', '"tensorflow": "{}"', "was built for TensorFlow 9"),
        ('"sources": "{}"', '"sources": "{}"', "was built from other sources than"),
        ('"machine": "{}"', '"machine": "{}"', "was built for 9"),
        ("tfmtseg-native-ops:", "another-native-ops:", "it is no native op library"),
    ],
)
def test_what_does_not_fit_is_refused(probe, tmp_path, monkeypatch, old, new, reason):
    field = old.split('"')[1] if '"' in old else ""
    value = getattr(read_record(probe), field) if field else ""
    content = probe.read_bytes()
    old, new = old.format(value).encode(), new.format("9" + value[1:]).encode()
    assert content.count(old) == 1
    other = tmp_path / "other.so"
    other.write_bytes(content.replace(old, new))
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(other))
    with pytest.raises(NativeOpsError, match=reason) as caught:
        library.load()
    assert str(caught.value).startswith(f"loading {other}: it ")
    assert "Fix: unset TFMTSEG_NATIVE_OPS" in str(caught.value)


def test_a_missing_or_broken_file(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(tmp_path / "none.so"))
    with pytest.raises(NativeOpsError, match=r"none.so: No such file or directory. Fix: unset"):
        library.load()
    broken = fake(tmp_path / "broken.so")
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(broken))
    with pytest.raises(NativeOpsError, match=r"broken.so: .*Fix: remove this file"):
        library.load()


def test_the_next_library_where_one_cannot_be_loaded(probe, cache, monkeypatch):
    """In a home that machines with other systems share, the newest may be another's."""
    here = build.here(build.source_dir())
    name = "libtfmtseg_ops-" + here.tensorflow
    newest = [fake(cache / f"{name}-{number}.so", compiler=str(number)) for number in (1, 2)]
    working = cache / f"{name}-3.so"
    real = tf.load_op_library  # of which a copy cannot be loaded as well
    monkeypatch.setattr(
        tf, "load_op_library", lambda path: real(str(probe if path == str(working) else path))
    )
    for may_build in ("0", ""):  # there is no compiler
        monkeypatch.setenv("TFMTSEG_NATIVE_OPS", may_build)
        monkeypatch.setattr(library, "_loaded", None)
        with pytest.raises(NativeOpsError, match="nothing could be loaded") as caught:
            library.load()
        assert all(str(caught.value).count(f"loading {path}: ") == 1 for path in newest)
        assert ("no-such-compiler is not found" in str(caught.value)) == (may_build == "")

        working.write_bytes(probe.read_bytes())
        os.utime(working, (0, 0))  # the oldest
        assert library.load().tfmtseg_probe([1.0]).twice.numpy() == [2]
        working.unlink()


def test_an_instruction_set_that_there_is_not(probe, monkeypatch):
    monkeypatch.setenv("TFMTSEG_INSTRUCTION_SET", "avx512_bf16")
    error = (
        "TFMTSEG_INSTRUCTION_SET is avx512_bf16, must be one of generic, avx2, avx512, avx512bf16. "
        "Fix: set it"
    )
    with pytest.raises(NativeOpsError, match=error):
        library.load()
    with pytest.warns(UserWarning, match=error):
        assert library.choose() == "reference"
    for name in (*build.ISA_FLAGS, ""):
        monkeypatch.setenv("TFMTSEG_INSTRUCTION_SET", name)
        assert library.highest_instruction_set() == (name or "avx512bf16")


def test_the_best_built_ahead(cache, probe_sources, monkeypatch):
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "make", lambda plan: cache / "built")
    here = build.here(probe_sources)
    name = "libtfmtseg_ops-" + here.tensorflow
    fake(cache / f"{name}-0.so", tensorflow_git="another")
    fake(cache / f"{name}-1.so", tensorflow_bytes=1)
    fake(cache / f"{name}-2.so", sources="another")
    (cache / f"{name}-3.so").touch()
    with pytest.raises(NativeOpsError, match="forbids"):
        library._load_own(here, gpus=[80], may_build=False)

    def best(gpus: list[int], may_build: bool) -> Path:
        return next(library._candidates(here, gpus, may_build, []))

    cpu = fake(cache / f"{name}-4.so", compiler="another")
    assert best(gpus=[], may_build=False) == cpu
    assert best(gpus=[], may_build=True) == cache / "built"
    assert best(gpus=[80], may_build=True) == cache / "built"

    cuda = fake(cache / f"{name}-5.so", architectures=(80,))
    assert best(gpus=[], may_build=False) == cpu
    assert best(gpus=[80], may_build=False) == cuda
    assert best(gpus=[80], may_build=True) == cuda  # nvcc was elsewhere
    older = fake(cache / f"{name}-6.so", architectures=(70, 75))
    os.utime(older, (0, 0))
    assert best(gpus=[75], may_build=False) == older  # 80 does not serve it
    assert best(gpus=[86], may_build=True) == cuda
    assert best(gpus=[60], may_build=True) == cache / "built"  # nothing does
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert best(gpus=[], may_build=True) == cpu


def test_a_gpu_that_is_left_unused_is_told(cache, probe_sources, monkeypatch):
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setattr(build, "visible_architectures", lambda: [80])
    monkeypatch.setattr(tf, "load_op_library", lambda path: path)
    path = fake(cache / "some.so")
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(path))
    with pytest.warns(UserWarning, match="has no kernels for a GPU that is here") as caught:
        library.load()
    assert [each.filename for each in caught] == [__file__]
    assert library.load() == str(path)  # once
    assert library.choose() == "reference"
    assert library.choose("native") == "native"
    for gpu, used in ((80, "native"), (86, "native"), (120, "native"), (70, "reference")):
        monkeypatch.setattr(library, "_loaded", None)
        monkeypatch.setattr(build, "visible_architectures", lambda gpu=gpu: [gpu])
        fake(path, architectures=(80,))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            library.load()
        assert bool(told) == (used == "reference"), gpu
        assert library.choose() == used, gpu


def test_a_gpu_that_is_hidden_is_none(cache, probe_sources, monkeypatch):
    """By `tf.config.set_visible_devices([], "GPU")`: the op on CPU serves."""
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": (8, 0)}
    )
    monkeypatch.setattr(tf, "load_op_library", lambda path: path)
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(fake(cache / "some.so")))
    assert build.visible_architectures() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.choose() == "native"
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["GPU:0"])
    assert build.visible_architectures() == [80]


def test_a_driver_older_than_cuda_is_told(cache, probe_sources, monkeypatch):
    """Its kernels would fail at the first step of a training."""
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setattr(build, "visible_architectures", lambda: [80])
    monkeypatch.setattr(tf, "load_op_library", lambda path: path)
    path = fake(cache / "some.so", architectures=(80,), nvcc="Cuda release 13.0, V13.0.48")
    monkeypatch.setenv("TFMTSEG_NATIVE_OPS", str(path))
    drivers = {(13, 0): "native", (14, 1): "native", None: "native", (12, 9): "reference"}
    for driver, used in drivers.items():
        monkeypatch.setattr(library, "_loaded", None)
        monkeypatch.setattr(library, "_driver_cuda", lambda driver=driver: driver)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            library.load()
        assert library.choose() == used
        assert bool(told) == (used == "reference")
    assert "compiled by CUDA 13.0, and the GPU driver runs CUDA 12.9 at" in str(told[0].message)


@pytest.mark.parametrize(
    ("gpu", "driver", "fine"),
    [(90, (12, 4), True), (120, (12, 8), False), (120, (12, 9), True), (120, (13, 0), True)],
)
def test_a_gpu_newer_than_the_kernels_needs_a_driver_of_their_cuda(monkeypatch, gpu, driver, fine):
    """It compiles them anew, which a driver does for its own version and older ones alone."""
    monkeypatch.setattr(library, "_driver_cuda", lambda: driver)
    nvcc = "Cuda compilation tools, release 12.9, V12.9.41"
    found = replace(build.here(build.source_dir()), architectures=(80, 90), nvcc=nvcc)
    assert (library.gpu_problem(found, [gpu]) == ("", "")) == fine


def test_kernels_for_other_gpus_are_not_said_to_run_on_the_processor():
    found = build.here(build.source_dir())
    assert "run on the CPU" in library.gpu_problem(found, [75])[0]
    assert "they fail" in library.gpu_problem(replace(found, architectures=(80, 90)), [75])[0]


def test_the_driver_says_what_it_runs(monkeypatch):
    def answer(version):
        version._obj.value = 12040
        return 0

    driver = SimpleNamespace(cuDriverGetVersion=answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert library._driver_cuda() == (12, 4)

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert library._driver_cuda() is None


def test_a_cache_folder_that_cannot_be(probe_sources, monkeypatch, tmp_path):
    """The system refuses even to look, as it does for folders of other users."""
    monkeypatch.setattr(build, "source_dir", lambda: probe_sources)
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path / ("long" * 100)))
    with pytest.warns(UserWarning, match="Native ops are not used.*Fix: set TFMTSEG_CACHE_DIR"):
        assert library.choose() == "reference"
    assert not library.is_built()


def test_available_warns_once(cache, plain_sources, monkeypatch):
    monkeypatch.setattr(build, "source_dir", lambda: plain_sources)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="Native ops are not used") as caught:
        assert not library.available()
    assert len(caught) == 1
    assert str(caught[0].message).startswith("Native ops are not used. ")
    assert "no-such-compiler is not found on PATH. Fix: install g++" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.available()
    with pytest.raises(NativeOpsError):  # asking for it stays an error
        library.load()


@pytest.mark.usefixtures("probe")
def test_available():
    assert library.available()
    assert library.load().tfmtseg_probe([1.0]).twice.numpy() == [2]


@pytest.mark.usefixtures("probe")
def test_disabled_gives_way_to_plain_tensorflow():
    assert library.choose() == library.choose("native") == "native"
    with library.disabled():
        assert library.choose() == library.choose("reference") == "reference"
        with pytest.raises(NativeOpsError, match=r"it is disabled here. Fix: use implementation"):
            library.choose("native")
    assert library.choose() == "native"


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="implementation: value is 'cuda', must be one of auto"):
        library.choose("cuda")
