from __future__ import annotations

import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfmtseg.errors import NativeOpsError
from tfmtseg.ops import build
from tfmtseg.ops.record import read_record

REPOSITORY = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc, which is not here")


@pytest.fixture
def trusting(monkeypatch):
    """Skips the trial load, which takes TensorFlow's start in another process."""
    monkeypatch.setattr(build, "_load_elsewhere", lambda library: None)


def elsewhere(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python that runs `code` with the modules named here imported."""
    start = "import sys, time\nfrom pathlib import Path\nfrom tfmtseg.ops import build\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.mark.usefixtures("trusting")
def test_a_library_is_compiled_once(cache, plain_sources, compiler_log, capfd):
    first = build.build(plain_sources)
    assert first.parent == cache
    assert sorted(cache.iterdir()) == sorted([first, cache / "lock"])
    assert capfd.readouterr().err == "Building the native op library (once, about 20 s)\n"
    compiled = compiler_log.read_text().splitlines()
    assert len(compiled) == 2  # the source and the record
    assert f"-c {plain_sources}/plain_cpu.cc" in "".join(compiled)
    assert build.build(plain_sources) == first
    assert compiler_log.read_text().splitlines() == compiled
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("cache", "trusting", "compiler_log")
@pytest.mark.parametrize("name", ["plain_cpu.cc", "plain_cpu.h"])
def test_a_changed_source_is_another_library(plain_sources, name):
    first = build.build(plain_sources)
    with open(plain_sources / name, "a") as file:
        file.write("// changed\n")
    second = build.build(plain_sources)
    assert first != second
    assert read_record(first).sources != read_record(second).sources


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["plain_pybind.cc", "README.md"])
def test_what_is_no_part_of_the_library_changes_nothing(plain_sources, name):
    before = build.plan(plain_sources)
    (plain_sources / name).write_text("changed")
    assert build.plan(plain_sources) == before


@pytest.mark.usefixtures("cache")
def test_everything_that_matters_is_in_the_key(plain_sources, compiler_log, monkeypatch):
    keys = [build.plan(plain_sources).record.key]
    compiler = compiler_log.parent / "logging-g++"
    compiler.write_text("#!/bin/sh\necho 'g++ 99.1.0'\n")
    keys.append(build.plan(plain_sources).record.key)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    keys.append(build.plan(plain_sources).record.key)
    monkeypatch.setattr(build.compat, "tensorflow_build", lambda: ("9.9.0", "v9.9.0"))
    keys.append(build.plan(plain_sources).record.key)
    monkeypatch.setattr(build.compat, "tensorflow_build", lambda: ("9.9.0", "v9.9.0-rc1"))
    keys.append(build.plan(plain_sources).record.key)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(compiler))
    keys.append(build.plan(plain_sources, cuda=True).record.key)
    keys.append(build.plan(plain_sources, cuda=True, architectures=[90]).record.key)
    assert len(set(keys)) == len(keys) == 7


def test_two_processes_build_once(cache, plain_sources, compiler_log, tmp_path, capfd):
    code = (
        "Path(sys.argv[2]).write_text('ready')\n"
        "while not Path(sys.argv[3]).exists(): time.sleep(0.001)\n"
        "print(build.build(Path(sys.argv[1])))\n"
    )
    ready, go = tmp_path / "ready", tmp_path / "go"
    process = elsewhere(code, plain_sources, ready, go)
    wait_for(ready, process)
    go.touch()
    library = build.build(plain_sources)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output == f"{library}\n"
    assert sorted(cache.iterdir()) == sorted([library, cache / "lock"])
    assert len(compiler_log.read_text().splitlines()) == 2
    errors += capfd.readouterr().err
    assert errors.count("Building the native op library") == 1
    assert errors.count("Waiting for a process that builds the native op library") == 1


@pytest.mark.usefixtures("trusting")
def test_a_killed_build_is_mended(cache, plain_sources, tmp_path, monkeypatch):
    started = tmp_path / "started"
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        '#!/bin/bash\ncase "$*" in *" -c "*)\n'
        f'  echo half > "${{@: -1}}"; echo $$ >> {started}; exec sleep 60 ;; esac\n'
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    process = elsewhere("build.build(Path(sys.argv[1]))", plain_sources)
    wait_for(started, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for orphan in started.read_text().split():
        os.kill(int(orphan), signal.SIGKILL)
    assert len(list(cache.glob("tmp-*"))) == 1
    monkeypatch.delenv("CXX")
    library = build.build(plain_sources)
    assert read_record(library) is not None
    assert sorted(cache.iterdir()) == sorted([library, cache / "lock"])


@pytest.mark.usefixtures("trusting")
def test_only_what_dead_processes_of_this_machine_left_is_removed(
    cache, plain_sources, monkeypatch
):
    monkeypatch.setattr(platform, "node", lambda: "gpu")
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [
        f"tmp-{dead.pid}-abcd_123-gpu-2",  # of another machine
        f"tmp-{dead.pid}-abcd_123-2-gpu",
        f"tmp-{os.getppid()}-abcd_123-gpu",  # alive
        "tmp-gpu-2-abcd_123",  # not ours
    ]
    for name in (*kept, f"tmp-{dead.pid}-abcd_123-gpu"):
        (cache / name).mkdir(parents=True)
    build.build(plain_sources)
    assert sorted(path.name for path in cache.glob("tmp-*")) == sorted(kept)


@pytest.mark.usefixtures("cache", "trusting")
@pytest.mark.parametrize("size", [0, 1000])
def test_part_of_a_library_is_mended(plain_sources, size):
    library = build.build(plain_sources)
    whole = library.read_bytes()
    library.write_bytes(whole[:size])
    assert build.build(plain_sources) == library
    assert read_record(library) is not None


def test_a_failed_compilation(cache, plain_sources):
    (plain_sources / "wrong_cpu.cc").write_text("int Wrong() { return no_such_name; }\n")
    with pytest.raises(NativeOpsError) as caught:
        build.build(plain_sources)
    message = str(caught.value)
    assert message.startswith("building the native op library: g++ fails with status 1\n")
    assert f"-c {plain_sources}/wrong_cpu.cc -o " in message  # the command
    assert "error: 'no_such_name' was not declared in this scope" in message
    assert message.splitlines()[-1].startswith("Fix: install g++ 10 or newer (Debian, Ubuntu: apt-")
    assert list(cache.iterdir()) == [cache / "lock"]


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            "/tmp/a.s: Fatal error: can't write 184 bytes to section .text of a.o: "
            "'No space left on device'",
            "make room on the disks",
        ),
        ("g++: fatal error: Killed signal terminated program cc1plus", "make memory free"),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "make memory free"),
        ("cc1plus: out of memory allocating 65536 bytes after a total of 1", "make memory free"),
        (
            "info_nce_ops.cc:3:10: fatal error: tensorflow/core/framework/op.h: No such file or "
            "directory",
            "reinstall TensorFlow, of which files are missing",
        ),
        (
            "/usr/bin/ld: cannot find -l:libtensorflow_framework.so.2: No such file or directory",
            "reinstall TensorFlow, of which files are missing",
        ),
        ("cc1plus: error: unrecognized command-line option '-std=c++17'", "install g++ 10"),
        ("plain_cpu.cc:1:10: fatal error: plain_cpu.h: No such file", "install g++ 10"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_to_do_is_told_by_what_the_compiler_says(plain_sources, compiler_log, said, fix):
    (compiler_log.parent / "said").write_text(said + "\n" + "more\n" * 30)
    (compiler_log.parent / "logging-g++").write_text(
        '#!/bin/sh\ncase "$*" in *" -c "*) cat ' + f"{compiler_log.parent}/said >&2; exit 1 ;; "
        'esac\nexec g++ "$@"\n'
    )
    with pytest.raises(NativeOpsError) as caught:
        build.build(plain_sources)
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize(
    ("said", "status", "fix"),
    [
        (
            "tensorflow.python.framework.errors_impl.NotFoundError: /home/a/lib.so: failed to map "
            "segment from shared object",
            1,
            "set TFMTSEG_CACHE_DIR to a folder on a disk that is not mounted noexec",
        ),
        ("", -9, "make memory free"),
        ("/home/a/lib.so: undefined symbol: _ZN4absl", 1, "reinstall TensorFlow"),
    ],
)
def test_what_to_do_is_told_by_why_it_does_not_load(monkeypatch, tmp_path, said, status, fix):
    result = subprocess.CompletedProcess([], status, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    with pytest.raises(NativeOpsError, match="TensorFlow cannot load it") as caught:
        build._load_elsewhere(tmp_path)
    assert caught.value.fix.startswith(fix)


def test_a_library_that_does_not_load(cache, plain_sources):
    (plain_sources / "lost_cpu.cc").write_text(
        "int NoSuchFunction();\n"
        '__attribute__((visibility("default"))) int Lost() { return NoSuchFunction(); }\n'
        "int at_start = Lost();\n"
    )
    with pytest.raises(NativeOpsError, match="TensorFlow cannot load it") as caught:
        build.build(plain_sources)
    assert "undefined symbol: _Z14NoSuchFunctionv" in str(caught.value)
    assert list(cache.iterdir()) == [cache / "lock"]


def test_no_compiler(cache, plain_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeOpsError, match=r"g\+\+ is not found on PATH. Fix: install g"):
        build.build(plain_sources)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeOpsError, match="CXX names is needed, and no-such-compiler is"):
        build.build(plain_sources)
    monkeypatch.setenv("CXX", "g++ 'open")
    with pytest.raises(NativeOpsError, match=r"CXX is g.*, must be a command .* Fix: correct"):
        build.build(plain_sources)
    assert not cache.exists()


@pytest.mark.usefixtures("cache", "trusting")
def test_a_compiler_with_what_starts_it_and_options(plain_sources, compiler_log, monkeypatch):
    """Such as `CXX="ccache g++"`, or with a path that has a space."""
    starter = compiler_log.parent / "the starter"
    starter.write_text('#!/bin/sh\nexec "$@"\n')
    starter.chmod(0o755)
    compiler = compiler_log.parent / "logging-g++"
    monkeypatch.setenv("CXX", f"'{starter}' {compiler} -DGIVEN")
    plain = build.build(plain_sources)
    compiled = compiler_log.read_text().splitlines()
    assert len(compiled) == 2
    assert all(line.startswith("-DGIVEN ") for line in compiled)
    monkeypatch.setenv("CXX", f"'{starter}' {compiler}")
    assert build.plan(plain_sources).library != plain  # options are part of what it is

    monkeypatch.setattr(build, "find_nvcc", lambda: str(compiler))
    wanted = build.plan(plain_sources, cuda=True)
    command = build._command(wanted, "plain_cuda.cu", "cuda", Path("plain.o"))
    assert command[command.index("-ccbin") + 1] == str(compiler)


@pytest.mark.usefixtures("cache")
def test_no_nvcc(plain_sources, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(NativeOpsError, match=r"nvcc is neither .* Fix: install the CUDA toolkit"):
        build.plan(plain_sources, cuda=True)


@pytest.mark.usefixtures("cache")
def test_sources_that_cannot_be_used(plain_sources, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NativeOpsError, match=r"empty: there are none. Fix: reinstall tfmtseg"):
        build.plan(tmp_path / "empty")
    with pytest.raises(NativeOpsError, match="there are none"):
        build.plan(tmp_path / "missing")
    (plain_sources / "plain_cpu_sse9.cc").touch()
    with pytest.raises(NativeOpsError, match=r"plain_cpu_sse9.cc has no known ending"):
        build.plan(plain_sources)


def test_a_cache_that_cannot_be_written(plain_sources, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NativeOpsError, match="Fix: set TFMTSEG_CACHE_DIR to a folder"):
        build.build(plain_sources)


@pytest.mark.usefixtures("cache", "trusting")
def test_a_file_system_without_locks(plain_sources, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert build.build(plain_sources).is_file()


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("TFMTSEG_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_dir() == Path("/home/somebody/.cache/tfmtseg")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says its standard
    assert build.cache_dir() == Path("/home/somebody/.cache/tfmtseg")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert build.cache_dir() == Path("/scratch/tfmtseg")
    monkeypatch.setenv("TFMTSEG_CACHE_DIR", "here")
    assert build.cache_dir() == Path.cwd() / "here"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_avx_is_for_x86(probe_sources, machine, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    plan = build.plan(probe_sources, cuda=False)
    x86 = machine == "x86_64"
    expected = {"probe_ops.cc", "probe_op_kernels.cc", "probe_cpu.cc", "probe_cpu_generic.cc"}
    expected |= {"probe_cpu_avx2.cc", "probe_cpu_avx512.cc"} if x86 else set()
    assert {name for name, _ in plan.units} == expected
    assert f"-DTFMTSEG_X86={int(x86)}" in build.compile_flags("probe_cpu.cc", "cpu", machine)


@pytest.mark.usefixtures("cache")
def test_cuda_where_nvcc_and_a_gpu_are(probe_sources, plain_sources, compiler_log, monkeypatch):
    nvcc = str(compiler_log.parent / "logging-g++")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    gpu_units = {("probe_cuda.cu", "cuda"), ("probe_op_kernels_gpu.cc", "tensorflow_gpu")}

    assert build.plan(probe_sources).record.architectures == ()  # no GPU in the tests' machine
    assert not gpu_units & set(build.plan(probe_sources).units)
    asked = build.plan(probe_sources, cuda=True)
    assert asked.record.architectures == (80, 90)
    assert gpu_units <= set(asked.units)
    assert build.plan(probe_sources, True, [90, 75]).record.architectures == (75, 90)

    monkeypatch.setattr(build, "visible_architectures", lambda: [70])  # nvcc knows it no more
    assert build.plan(probe_sources).record.architectures == ()
    for visible, expected in [([75], (75, 80, 90)), ([89], (80, 90)), ([100], (80, 90))]:
        monkeypatch.setattr(build, "visible_architectures", lambda visible=visible: visible)
        assert build.plan(probe_sources).record.architectures == expected
        assert build.plan(probe_sources, cuda=False).record.architectures == ()
        assert build.plan(plain_sources).record.architectures == ()  # no kernels for it
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.plan(probe_sources).record.architectures == ()


@pytest.mark.parametrize(
    ("architectures", "gpus", "expected"),
    [
        ((80, 90), [], True),
        ((), [], True),
        ((), [80], False),
        ((80, 90), [80, 86, 90], True),  # 8.0 runs on 8.6
        ((86, 90), [80], False),  # not the other way round
        ((80, 90), [75], False),
        ((80, 90), [75, 90], False),
        ((80, 90), [120], True),  # by the PTX of 9.0
        ((80,), [90], True),
        ((75,), [80], False),  # its PTX has no kernels for tensor cores
        ((70,), [75], True),
    ],
)
def test_which_gpus_a_library_serves(architectures, gpus, expected):
    assert build.serves(architectures, gpus) == expected


INSTRUCTION_SETS = sorted(
    path.name
    for path in build.source_dir().glob("*_cpu_*.cc")
    if not path.stem.endswith("_generic")  # every processor may run it
)


def test_the_units_of_instruction_sets_are_there():
    assert {name.rpartition("_")[2] for name in INSTRUCTION_SETS} == {
        f"{name}.cc" for name in build.ISA_FLAGS if name != "generic"
    }


@pytest.mark.skipif(not build.is_x86(platform.machine()), reason="other processors have no AVX2")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_shares_no_function_with_others(name, tmp_path):
    """The linker keeps one copy of a shared function, and every processor would run it.

    Weak functions are those that several objects may define: templates and inline ones.
    """
    sources = build.source_dir()
    flags = build.compile_flags(name, "cpu", "x86_64")
    built = tmp_path / "built.o"
    subprocess.run(["g++", *flags, "-c", sources / name, "-o", built], check=True)
    lines = subprocess.run(
        ["nm", "-C", "--defined-only", built], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line for line in lines if re.match(r"\w* W ", line)]
    own = f"_{Path(name).stem.rpartition('_')[2]}::"
    assert [line for line in weak if own not in line] == []


def test_nvcc_is_found_beside_the_path(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)


def test_the_probe_says_what_it_is(probe_library, probe_sources):
    record = read_record(probe_library)
    assert record.without_tools() == build.here(probe_sources)
    assert record.compiler
    assert record.architectures == ((80, 90) if build.find_nvcc() else ())


def test_only_the_record_is_exported(probe_library):
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", probe_library], capture_output=True, text=True, check=True
    ).stdout.split()
    named = [name for name in symbols if "Twice" in name or "tfmtseg" in name.lower()]
    assert named == ["tfmtseg_native_ops_record"]


@needs_nvcc
def test_the_cuda_runtime_is_inside(probe_library):
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", probe_library], capture_output=True, text=True, check=True
    ).stdout
    assert "tensorflow" in undefined
    # TensorFlow exports stubs of these, and tensorflow-cpu does not.
    assert [line for line in undefined.splitlines() if "cuda" in line.lower()] == []


@pytest.mark.usefixtures("trusting")
def test_the_command_line(cache, plain_sources, monkeypatch, capsys):
    monkeypatch.setattr(build, "source_dir", lambda: plain_sources)
    assert build.main(["--no-cuda"]) == 0
    assert list(cache.glob("*.so")) == [Path(capsys.readouterr().out.strip())]
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.main(["--cuda", "--architectures=80,90"]) == 2
    assert "CUDA was asked for" in capsys.readouterr().err


def test_python_dash_m(cache, tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "tfmtseg.ops.build"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "Fix: " in result.stderr.splitlines()[-1]
    assert not cache.exists()
