"""Compiles the native op library for the TensorFlow of the running interpreter.

An op library fits one TensorFlow only, so it is compiled where it is used: on first use,
or ahead by `python -m tfmtseg.ops.build`. The result stays in a folder of the user's.

The names of the sources say how each is compiled:

    *_ops.cc, *_op_kernels.cc   with TensorFlow's headers
    *_op_kernels_gpu.cc         the same, only in a build with CUDA
    *_cpu.cc                    without TensorFlow's headers
    *_cpu_<isa>.cc              the same for one instruction set, see `ISA_FLAGS`
    *_cuda.cu                   with nvcc, only in a build with CUDA
    *_pybind.cc                 not part of the library
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.errors import NativeOpsError
from tfmtseg.ops.record import Record, read_record

LIBRARY = "libtfmtseg_ops"
SUFFIXES = (".cc", ".h", ".cu", ".cuh")
FLAGS = (
    "-O3",
    "-DNDEBUG",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw")
ISA_FLAGS = {
    "generic": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
}
NVCC_FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden")
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic")
ARCHITECTURES = (80, 90)  # and PTX of the newest, for GPUs to come
OLDEST_ARCHITECTURE = 75  # the oldest that nvcc 13 knows
TENSOR_CORES = 80  # from here on, they multiply bfloat16

_REFERENCE = 'or use implementation="reference"'
_INSTALL_COMPILER = f"install g++ 10 or newer (Debian, Ubuntu: apt-get install g++), {_REFERENCE}"
_INSTALL_NVCC = (
    "install the CUDA toolkit, 12 or newer, with nvcc on PATH, or build without CUDA "
    "(python -m tfmtseg.ops.build --no-cuda, then set TFMTSEG_NATIVE_OPS=0)"
)
# What compilers, linkers and loaders say, and what to do about it.
_REMEDIES = {
    "No space left on device": (
        "make room on the disks of the cache and of temporary files, or set TFMTSEG_CACHE_DIR and "
        "TMPDIR to folders on others"
    ),
    "Killed signal|signal 9|status -9|out of memory|memory exhausted|Cannot allocate memory": (
        "make memory free, or compile one file at a time: taskset -c 0 python -m tfmtseg.ops.build"
    ),
    "failed to map segment": (
        "set TFMTSEG_CACHE_DIR to a folder on a disk that is not mounted noexec"
    ),
    r"fatal error: (tensorflow|tsl|xla|absl|Eigen)/|cannot find -l\S*tensorflow": (
        f"reinstall TensorFlow, of which files are missing, {_REFERENCE}"
    ),
}
_SECONDS = {"tensorflow": 15, "tensorflow_gpu": 15, "cpu": 3, "cuda": 60}  # one core, roughly


def source_dir() -> Path:
    """The folder with the op's sources: in an installed wheel, else in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "cuda_ops"
    return installed if installed.is_dir() else package.parent / "cuda_ops"


def cache_dir() -> Path:
    """The folder that keeps built libraries.

    `TFMTSEG_CACHE_DIR`, else `tfmtseg` in `XDG_CACHE_HOME`, else `~/.cache/tfmtseg`.

    Raises:
        NativeOpsError: If the user has no home.
    """
    if chosen := os.environ.get("TFMTSEG_CACHE_DIR"):
        return Path(chosen).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "tfmtseg"
    try:
        return Path.home() / ".cache" / "tfmtseg"
    except RuntimeError as error:
        raise NativeOpsError(
            "choosing the cache folder", str(error), "set TFMTSEG_CACHE_DIR to a folder"
        ) from error


def library_name(tensorflow: str, key: str) -> str:
    """File name of a library in the cache."""
    return f"{LIBRARY}-{tensorflow}-{key}.so"


def is_x86(machine: str) -> bool:
    """Whether `machine`, a name of `platform.machine()`, runs the AVX units."""
    return machine in ("x86_64", "AMD64")


def digest(sources: Path) -> str:
    """Tells apart all that this package puts into a library: sources and flags."""
    found = hashlib.sha256(repr((FLAGS, ISA_FLAGS, NVCC_FLAGS, LINK_FLAGS)).encode())
    for path in sorted(sources.glob("*")):
        if path.suffix in SUFFIXES and not path.name.endswith("_pybind.cc"):
            content = path.read_bytes()
            found.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def visible_architectures() -> list[int]:
    """Compute capabilities, times 10, of the GPUs that TensorFlow sees."""
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    capabilities = [each.get("compute_capability") for each in details]
    return sorted({10 * each[0] + each[1] for each in capabilities if each})


def serves(architectures: Sequence[int], gpus: Sequence[int]) -> bool:
    """Whether a library of these architectures has kernels for each of these GPUs.

    A kernel runs on GPUs of its generation that are not older. The newest is there as PTX
    too, which runs on all that are not older; but what was made for a GPU without tensor
    cores for bfloat16 (before 80) has no kernels for one that has them.
    """
    newest = max(architectures, default=0)
    return all(
        has_code(architectures, gpu)
        or (0 < newest <= gpu and (newest >= TENSOR_CORES or gpu < TENSOR_CORES))
        for gpu in gpus
    )


def has_code(architectures: Sequence[int], gpu: int) -> bool:
    """Whether kernels built for these GPUs run on another as they are, not compiled anew."""
    return any(built // 10 == gpu // 10 and built <= gpu for built in architectures)


def here(sources: Path) -> Record:
    """The record, without tools, of a library of these sources for the running TensorFlow."""
    version, git = compat.tensorflow_build()
    # The file is missing where TensorFlow is linked into one piece; the size is only a hint.
    framework = next(Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.so.2"), None)
    return Record(
        tensorflow=version,
        tensorflow_git=git,
        tensorflow_bytes=framework.stat().st_size if framework else 0,
        machine=platform.machine(),
        compiler="",
        nvcc="",
        architectures=(),
        sources=digest(sources),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A library to build: from what, with what, and where it will be.

    Args:
        sources: Folder with the sources.
        units: Names of the files to compile, each with its kind.
        compiler: The C++ compiler's command, as a shell reads it.
        nvcc: The CUDA compiler; `None` leaves CUDA out.
        record: What the library will say of itself.
    """

    sources: Path
    units: tuple[tuple[str, str], ...]
    compiler: str
    nvcc: str | None
    record: Record

    @property
    def library(self) -> Path:
        """Where the built library is kept."""
        return cache_dir() / library_name(self.record.tensorflow, self.record.key)

    def is_built(self) -> bool:
        """Whether the library is there, whole, and may be read."""
        try:
            return self.library.is_file() and read_record(self.library) == self.record
        except OSError:
            return False


def plan(
    sources: Path | None = None,
    cuda: bool | None = None,
    architectures: Sequence[int] | None = None,
) -> Plan:
    """Decides what `build` does with the same arguments, and compiles nothing.

    Args:
        sources: Folder with the sources. Defaults to those of this package.
        cuda: Whether to build the GPU kernels. Defaults to doing so if architectures are
            given, or nvcc is found, TensorFlow sees a GPU, and there are any.
        architectures: CUDA compute capabilities times 10. Defaults to `ARCHITECTURES` and
            any older ones that TensorFlow sees.

    Returns:
        The plan.

    Raises:
        NativeOpsError: If the compiler or the sources are missing.
    """
    what = "planning the native op library"
    if sys.platform != "linux":
        raise NativeOpsError(
            what, f"it is made for Linux, and this is {sys.platform}", _REFERENCE[3:]
        )
    sources = source_dir() if sources is None else sources
    machine = platform.machine()
    units = _units(sources, machine)
    compiler = _compiler()
    nvcc = find_nvcc()
    visible = visible_architectures() if cuda is not False else []
    visible = [each for each in visible if each >= OLDEST_ARCHITECTURE]
    if cuda is None:
        cuda = architectures is not None or bool(
            nvcc and visible and any(kind == "cuda" for _, kind in units)
        )
    if cuda and not nvcc:
        raise NativeOpsError(
            what,
            "CUDA was asked for, and nvcc is neither on PATH nor in CUDA_HOME or /usr/local/cuda",
            _INSTALL_NVCC,
        )
    if architectures is None:
        older = [each for each in visible if each < min(ARCHITECTURES)]
        architectures = (*older, *ARCHITECTURES)
    if not cuda:
        nvcc, architectures = None, ()
        units = [unit for unit in units if unit[1] not in ("cuda", "tensorflow_gpu")]
    record = dataclasses.replace(
        here(sources),
        compiler=_version(*shlex.split(compiler)),
        nvcc=_version(nvcc) if nvcc else "",
        architectures=tuple(sorted(set(architectures))),
    )
    return Plan(sources, tuple(units), compiler, nvcc, record)


def build(
    sources: Path | None = None,
    cuda: bool | None = None,
    architectures: Sequence[int] | None = None,
) -> Path:
    """Builds the native op library unless it is built already.

    Safe to call from several processes at once: one builds, the others wait for it.

    Args:
        sources: As for `plan`.
        cuda: As for `plan`.
        architectures: As for `plan`.

    Returns:
        The library's path in `cache_dir()`.

    Raises:
        NativeOpsError: If the library cannot be built.
    """
    return make(plan(sources, cuda, architectures))


def make(wanted: Plan) -> Path:
    """Builds what was planned, as `build` does.

    Args:
        wanted: From `plan`.

    Returns:
        The library's path.

    Raises:
        NativeOpsError: If the library cannot be built.
    """
    if wanted.is_built():
        return wanted.library
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache) as alone:
            if wanted.is_built():
                return wanted.library
            if alone:
                _remove_leftovers(cache)
            with tempfile.TemporaryDirectory(
                dir=cache,
                prefix=f"tmp-{os.getpid()}-",
                suffix=f"-{platform.node()}",
                ignore_cleanup_errors=True,
            ) as folder:
                built = _compile(wanted, Path(folder))
                _load_elsewhere(built)
                with open(built, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(built, wanted.library)
    except OSError as error:
        raise NativeOpsError(
            "building the native op library",
            str(error),
            "set TFMTSEG_CACHE_DIR to a folder on a disk with space that you may write to",
        ) from error
    return wanted.library


def _remove_leftovers(cache: Path) -> None:
    """Removes what killed processes of this machine left.

    Of other machines', which a lock may not reach, nothing is known.
    """
    own = str(os.getpid())  # in a container the number may be that of the one before
    for folder in cache.glob("tmp-*"):
        found = re.fullmatch(r"tmp-(\d+)-[^-]*-(.*)", folder.name)
        if not found or found[2] != platform.node():
            continue
        if found[1] == own or not Path("/proc", found[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def find_nvcc() -> str | None:
    """Path of nvcc: from PATH, `CUDA_HOME` or `/usr/local/cuda`."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [None, *(f"{home}/bin" for home in homes if home)]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def _compiler() -> str:
    """The command in `CXX`, such as `ccache g++`, or g++."""
    what = "planning the native op library"
    setting = os.environ.get("CXX", "")
    try:
        name, *arguments = shlex.split(setting) or ["g++"]
    except ValueError as error:
        raise NativeOpsError(
            what, f"CXX is {setting}, must be a command ({error})", "correct or unset CXX"
        ) from error
    found = shutil.which(name)
    if not found:
        origin = "the C++ compiler that CXX names" if setting.strip() else "a C++ compiler"
        raise NativeOpsError(
            what, f"{origin} is needed, and {name} is not found on PATH", _INSTALL_COMPILER
        )
    return shlex.join([found, *arguments])


def _version(*command: str) -> str:
    """A compiler's answer to --version, without its copyright, and its options."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if result.returncode:
        raise NativeOpsError(
            "planning the native op library",
            f"{shlex.join(command)} --version fails\n{_last_lines(result)}",
            _INSTALL_COMPILER,
        )
    said = [line for line in result.stdout.splitlines() if re.search(r"\d\.\d", line)]
    return " ".join([*said, *command[1:]])


def _units(sources: Path, machine: str) -> list[tuple[str, str]]:
    """Names of the files to compile, each with its kind."""
    what = f"looking for the op's sources in {sources}"
    units = []
    for path in sorted(sources.glob("*.c[cu]")):
        name = path.name
        isa = re.search(r"_cpu_(\w+)\.cc$", name)
        if name.endswith("_op_kernels_gpu.cc"):
            units.append((name, "tensorflow_gpu"))
        elif name.endswith(("_ops.cc", "_op_kernels.cc")):
            units.append((name, "tensorflow"))
        elif name.endswith("_cpu.cc"):
            units.append((name, "cpu"))
        elif isa and isa[1] in ISA_FLAGS:
            if isa[1] == "generic" or is_x86(machine):
                units.append((name, "cpu"))
        elif name.endswith("_cuda.cu"):
            units.append((name, "cuda"))
        elif not name.endswith("_pybind.cc"):
            raise NativeOpsError(
                what, f"{name} has no known ending", "name it as tfmtseg/ops/build.py says"
            )
    if not units:
        raise NativeOpsError(what, "there are none", f"reinstall tfmtseg, {_REFERENCE}")
    return units


def compile_flags(name: str, kind: str, machine: str) -> list[str]:
    """Flags of the C++ compiler for one unit, without folders.

    Args:
        name: The unit's file name.
        kind: Its kind.
        machine: A name of `platform.machine()`.
    """
    flags = [*FLAGS, f"-DTFMTSEG_X86={int(is_x86(machine))}"]
    if kind.startswith("tensorflow"):
        own = tf.sysconfig.get_compile_flags()
        return [*flags, *(flag for flag in own if not flag.startswith("-I"))]
    isa = re.search(r"_cpu_(\w+)\.cc$", name)
    return [*flags, *(ISA_FLAGS[isa[1]] if isa else ())]


def _command(wanted: Plan, name: str, kind: str, output: Path) -> list[str]:
    """The command that compiles one unit."""
    own = [f"-I{wanted.sources}", "-c", str(wanted.sources / name), "-o", str(output)]
    if kind == "cuda":
        newest = max(wanted.record.architectures)
        codes = [f"arch=compute_{a},code=sm_{a}" for a in wanted.record.architectures]
        codes.append(f"arch=compute_{newest},code=compute_{newest}")
        targets = [part for code in codes for part in ("-gencode", code)]
        # nvcc takes a program alone: neither its options nor what starts it, such as ccache.
        words = reversed(shlex.split(wanted.compiler))
        host = next(filter(None, map(shutil.which, words)), wanted.compiler)
        return [str(wanted.nvcc), "-ccbin", host, *NVCC_FLAGS, *targets, *own]
    flags = compile_flags(name, kind, wanted.record.machine)
    if kind.startswith("tensorflow"):
        flags += ["-isystem", tf.sysconfig.get_include()]
    return [*shlex.split(wanted.compiler), *flags, *own]


def _compile(wanted: Plan, folder: Path) -> Path:
    """Compiles and links in `folder`; returns the library there."""
    (folder / "record.cc").write_text(wanted.record.source_text())
    jobs = len(os.sched_getaffinity(0))
    seconds = 10 + sum(_SECONDS[kind] for _, kind in wanted.units) / jobs
    print(
        f"Building the native op library (once, about {math.ceil(seconds / 10) * 10} s)",
        file=sys.stderr,
    )
    commands = [
        _command(wanted, name, kind, folder / f"{name}.o")
        for name, kind in sorted(wanted.units, key=lambda unit: -_SECONDS[unit[1]])
    ]
    record = folder / "record.cc"
    compiler = shlex.split(wanted.compiler)
    commands.append([*compiler, *FLAGS, "-c", str(record), "-o", f"{record}.o"])
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run, command) for command in commands]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt ends it as well
            pool.shutdown(cancel_futures=True)
    for each in done:
        each.result()
    library = folder / f"{LIBRARY}.so"
    # The static CUDA runtime goes before TensorFlow: CUDA builds of TensorFlow export
    # cuda* stubs of their own, which the linker would take, and tensorflow-cpu has none.
    cuda = []
    if wanted.nvcc:
        cuda = ["-Wl,--exclude-libs,ALL", *_cuda_runtime(wanted.nvcc)]
    # Of a function that several instruction sets share, the linker takes the first: it has to
    # run everywhere.
    objects = sorted((c[-1] for c in commands), key=lambda name: "_cpu_generic." not in name)
    link = [*compiler, *LINK_FLAGS, *objects, *cuda, *tf.sysconfig.get_link_flags()]
    _run([*link, *(("-ldl", "-lrt", "-lpthread") if cuda else ()), "-o", str(library)])
    return library


def _cuda_runtime(nvcc: str) -> list[str]:
    """What to link for the static CUDA runtime; nvcc knows where it lies."""
    # A dry run reads no source.
    result = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True)
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", result.stderr, re.MULTILINE))
    top = settings.get("TOP", "").strip()
    folders = [part[2:] for part in shlex.split(settings.get("LIBRARIES", ""))]
    for folder in [*folders, f"{top}/lib64", f"{top}/lib"]:
        if (Path(folder) / "libcudart_static.a").is_file():
            return [str(Path(folder) / "libcudart_static.a")]
    raise NativeOpsError(
        "building the native op library",
        f"libcudart_static.a, which belongs to {nvcc}, is not found",
        _INSTALL_NVCC,
    )


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if result.returncode:
        program = Path(command[0]).name
        raise _failure(
            f"{program} fails with status {result.returncode}\n{shlex.join(command)}",
            result,
            _INSTALL_NVCC if program == "nvcc" else _INSTALL_COMPILER,
        )


def _failure(why: str, result: subprocess.CompletedProcess[str], fix: str) -> NativeOpsError:
    """The error of a command that failed; `fix` where what it says tells no other."""
    said = f"status {result.returncode}\n{result.stdout}{result.stderr}"
    found = (remedy for words, remedy in _REMEDIES.items() if re.search(words, said))
    return NativeOpsError(
        "building the native op library", f"{why}\n{_last_lines(result)}", next(found, fix)
    )


def _last_lines(result: subprocess.CompletedProcess[str], count: int = 20) -> str:
    return "\n".join((result.stdout + result.stderr).strip().splitlines()[-count:])


def _load_elsewhere(library: Path) -> None:
    """Loads the library in another process, so that a crash stays there."""
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, tensorflow; tensorflow.load_op_library(sys.argv[1])",
            str(library),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CUDA_VISIBLE_DEVICES": "-1",
        },
    )
    if result.returncode:
        raise _failure(
            f"TensorFlow cannot load it (status {result.returncode})",
            result,
            f"reinstall TensorFlow, {_REFERENCE}",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock; yields `False` where the file system has no locks.

    Without it two processes may build the same library, and the later one's stays.
    """
    import fcntl  # not everywhere where this module can be imported

    with open(folder / "lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for a process that builds the native op library", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: builds and prints the library's path.

    Args:
        arguments: Without the program's name. Defaults to those of the process.

    Returns:
        The exit status: 0, or 2 if the library cannot be built.
    """
    parser = argparse.ArgumentParser(prog="python -m tfmtseg.ops.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        help="build the GPU kernels (default: if nvcc and a GPU are there, or --architectures)",
    )
    parser.add_argument(
        "--architectures",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="80,90",
        help="CUDA compute capabilities times 10",
    )
    options = parser.parse_args(arguments)
    try:
        print(build(cuda=options.cuda, architectures=options.architectures))
    except NativeOpsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
