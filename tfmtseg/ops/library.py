"""Finds, builds and loads the native op library.

`TFMTSEG_NATIVE_OPS` decides what may be done:

    unset       build the library on first use
    0           never build; load what `python -m tfmtseg.ops.build` has built
    a path      load this library, such as one that Bazel built

`TFMTSEG_INSTRUCTION_SET` chooses a lower instruction set than the processor's highest.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import tensorflow as tf

from tfmtseg.errors import NativeOpsError
from tfmtseg.ops.record import Record, read_record

IMPLEMENTATIONS = ("auto", "native", "reference")

_SETTING = "TFMTSEG_NATIVE_OPS"
_INSTRUCTION_SET = "TFMTSEG_INSTRUCTION_SET"
_lock = threading.RLock()
_loaded: tuple[ModuleType, Record] | None = None
_idle_gpu = False  # whether the loaded library has no kernels for some GPU that is here
_reason: str | None = None  # why `available` is False, once asked
_disabled = contextvars.ContextVar("disabled", default=False)


# AutoGraph would convert all that is called here, and warn where it finds no source.
@tf.autograph.experimental.do_not_convert
def choose(implementation: str = "auto") -> str:
    """`"native"` or `"reference"`: what `implementation` comes to here.

    Args:
        implementation: `"native"` is the op of `cuda_ops/`, built on first use;
            `"reference"` plain TensorFlow; `"auto"` native where it can be had, on the GPU
            if there is one, else reference with one warning.

    Raises:
        ValueError: If the name is unknown.
        NativeOpsError: If `"native"` is asked for and cannot be had.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: value is {implementation!r}, must be one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "native":
        if _disabled.get():
            raise NativeOpsError(
                "loading the native op library",
                "it is disabled here",
                'use implementation="auto", or leave tfmtseg.ops.library.disabled()',
            )
        load()
    elif implementation == "reference" or _disabled.get() or not available():
        return "reference"
    return "native"


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside, this thread takes plain TensorFlow where it may choose.

    For graphs that have to run without the library, or under XLA, which does not know
    its ops: trace them inside. What was traced before keeps its ops. The threads of a
    strategy's replicas are others: enter it within what they run.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def load() -> ModuleType:
    """The native ops as functions, built on first use and loaded once per process.

    Returns:
        What `tf.load_op_library` returns.

    Raises:
        NativeOpsError: If the library cannot be built or loaded.
    """
    return _load()[0]


def uses_gpu() -> bool:
    """Whether TensorFlow has a GPU to put ops on."""
    return bool(tf.config.get_visible_devices("GPU"))


def record() -> Record:
    """What the library says of itself; loads it as `load` does.

    Raises:
        NativeOpsError: If the library cannot be built or loaded.
    """
    return _load()[1]


def highest_instruction_set() -> str:
    """The highest that the ops on CPU may use, a name of `build.ISA_FLAGS`.

    The processor may have a lower one.

    Raises:
        NativeOpsError: If `TFMTSEG_INSTRUCTION_SET` names none.
    """
    from tfmtseg.ops import build

    names = list(build.ISA_FLAGS)
    chosen = os.environ.get(_INSTRUCTION_SET) or names[-1]
    if chosen not in names:
        raise NativeOpsError(
            "loading the native op library",
            f"{_INSTRUCTION_SET} is {chosen}, must be one of {', '.join(names)}",
            "set it to one of these, or unset it",
        )
    return chosen


def is_built() -> bool:
    """Whether `load` would build nothing: it takes what is there, or fails."""
    from tfmtseg.ops import build

    if os.environ.get(_SETTING):
        return True
    try:
        return build.plan().is_built()
    except NativeOpsError:
        return True


def available() -> bool:
    """Whether `load` works here, and GPUs are not left idle.

    The first `False` in a process warns with the reason.
    """
    global _reason
    with _lock:
        if _reason is None:
            try:
                _load()
                _reason = ""
            except NativeOpsError as error:
                _reason = str(error)
                warnings.warn(f"Native ops are not used. {error}", stacklevel=2)
        return not _reason and not _idle_gpu


def _load() -> tuple[ModuleType, Record]:
    # Imported here, so that `python -m tfmtseg.ops.build` is the first to import it.
    from tfmtseg.ops import build

    global _loaded, _idle_gpu
    with _lock:
        if _loaded is not None:
            return _loaded
        here = build.here(build.source_dir())
        gpus = build.visible_architectures()
        highest_instruction_set()  # the ops would not tell of a name that they do not know
        setting = os.environ.get(_SETTING, "")
        if setting in ("", "0"):
            path, module, found = _load_own(here, gpus, may_build=not setting)
        else:
            path, module, found = _load_file(Path(setting), here)
        has_sources = any(build.source_dir().glob("*_cuda.cu"))
        problem, fix = gpu_problem(found, gpus) if has_sources else ("", "")
        _idle_gpu = bool(problem)
        if problem:
            warnings.warn(f"{path}: {problem}. Fix: {fix}.", stacklevel=3)
        _loaded = module, found
        return _loaded


def gpu_problem(found: Record, gpus: Sequence[int]) -> tuple[str, str]:
    """Why a library leaves GPUs idle, and what to do about it; empty if it does not.

    Args:
        found: What the library says of itself.
        gpus: From `build.visible_architectures`.
    """
    from tfmtseg.ops import build

    if not build.serves(found.architectures, gpus):
        return (
            "it has no kernels for a GPU that is here (compute capability times 10: "
            f"{', '.join(map(str, gpus))}; built for "
            f"{', '.join(map(str, found.architectures)) or 'none'}), and plain TensorFlow takes "
            "the place of the native ops; where they are asked for, they "
            f"{'fail' if found.architectures else 'run on the CPU'}",
            "run python -m tfmtseg.ops.build --cuda, which needs nvcc, and a GPU of "
            f"{build.OLDEST_ARCHITECTURE} or newer",
        )
    release = re.search(r"release (\d+)\.(\d+)", found.nvcc)
    driver = _driver_cuda() if gpus and release else None
    if release and driver is not None:
        # Code for a GPU runs with older drivers of the same first number. What a driver has to
        # compile for a newer GPU (PTX) does not.
        compiled = int(release[1]), int(release[2])
        has_code = all(build.has_code(found.architectures, gpu) for gpu in gpus)
        if driver[0] < compiled[0] or (driver < compiled and not has_code):
            versions = [".".join(map(str, version)) for version in (compiled, driver)]
            return (
                f"it was compiled by CUDA {versions[0]}, and the GPU driver runs CUDA "
                f"{versions[1]} at most: plain TensorFlow takes the place of the native ops",
                f"update the driver, or build the library with nvcc of CUDA {versions[1]}",
            )
    return "", ""


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the GPU driver runs, if there is one."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else (version.value // 1000, version.value % 1000 // 10)


def _load_own(
    here: Record, gpus: Sequence[int], may_build: bool
) -> tuple[Path, ModuleType, Record]:
    """Loads the best library of the cache that can be loaded."""
    from tfmtseg.ops import build

    failures: list[NativeOpsError] = []
    for path in _candidates(here, gpus, may_build, failures):
        try:
            return _load_file(path, here)
        except NativeOpsError as error:  # perhaps another system's, with which a home is shared
            failures.append(error)
    if not failures:
        raise NativeOpsError(
            "loading the native op library",
            f"none is in {build.cache_dir()}, and {_SETTING}=0 forbids to build it",
            f"run python -m tfmtseg.ops.build where there is a compiler, or unset {_SETTING}",
        )
    if len(failures) == 1:
        raise failures[0]
    reasons = "\n".join(dict.fromkeys(map(str, failures)))
    raise NativeOpsError(
        "loading the native op library", f"nothing could be loaded\n{reasons}", failures[0].fix
    )


def _candidates(
    here: Record, gpus: Sequence[int], may_build: bool, failures: list[NativeOpsError]
) -> Iterator[Path]:
    """Libraries of the cache, the best first; one is built when needed and allowed.

    Why none could be built goes to `failures`.
    """
    from tfmtseg.ops import build

    ahead = _built_ahead(here, gpus)
    if may_build:
        try:
            plan = build.plan()
            if gpus and not plan.nvcc:  # built where nvcc was
                yield from (
                    path for record, path in ahead if build.serves(record.architectures, gpus)
                )
            yield build.make(plan)
        except NativeOpsError as error:
            failures.append(error)
    yield from (path for _, path in ahead)


def _built_ahead(here: Record, gpus: Sequence[int]) -> list[tuple[Record, Path]]:
    """The libraries in the cache that fit, whatever tools built them, the best first."""
    from tfmtseg.ops import build

    def suits(architectures: Sequence[int]) -> bool:
        return build.serves(architectures, gpus) if gpus else not architectures

    try:
        paths = list(build.cache_dir().glob(build.library_name(here.tensorflow, "*")))
    except OSError:  # of another user
        return []
    found = []
    for path in paths:
        try:
            record, built = read_record(path), path.stat().st_mtime
        except OSError:  # removed meanwhile, or of another user
            continue
        if record is not None and record.without_tools() == here:
            found.append((suits(record.architectures), built, record, path))
    found.sort(key=lambda each: each[:2], reverse=True)
    return [each[2:] for each in found]


def _load_file(path: Path, here: Record) -> tuple[Path, ModuleType, Record]:
    """Loads the library at `path`."""
    found = _accepted(path, here)
    try:
        return path, tf.load_op_library(str(path)), found
    except (tf.errors.OpError, OSError) as error:
        raise NativeOpsError(
            f"loading {path}",
            str(error),
            "remove this file, unless another machine needs it, and build the library anew",
        ) from error


def _accepted(path: Path, here: Record) -> Record:
    """The record of the library at `path`, which fits the running TensorFlow."""
    what = f"loading {path}"
    fix = f"unset {_SETTING}, so that tfmtseg builds its own"
    try:
        record = read_record(path)
    except OSError as error:
        raise NativeOpsError(what, str(error.strerror), fix) from error
    if record is None:
        raise NativeOpsError(what, "it is no native op library of tfmtseg", fix)
    if refusal := record.refusal(here):
        raise NativeOpsError(what, refusal, fix)
    return record
