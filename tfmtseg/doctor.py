"""What this machine and this environment offer, what is wrong, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.errors import NativeOpsError
from tfmtseg.memory import GB, available_memory_gb
from tfmtseg.ops import build, library
from tfmtseg.processor import processor_features
from tfmtseg.version import __version__

LEAST_MEMORY_GB = 4  # TensorFlow with a training of small crops
LEAST_DISK_GB = 2  # a cache, some checkpoints


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        name: What was looked at.
        value: What was found.
        problem: What is wrong with it; empty if nothing is.
        fix: What to do about the problem.
    """

    name: str
    value: str
    problem: str = ""
    fix: str = ""


def examine() -> list[Finding]:
    """Looks at everything; builds and changes nothing."""
    parts: list[Callable[[], Iterator[Finding]]] = [
        _versions, _gpus, _onednn, _compilers, _native_ops, _memory, _disk, _addons
    ]  # fmt: skip
    return [finding for part in parts for finding in part()]


def table(findings: list[Finding]) -> str:
    """The findings as lines to read, problems below what they concern."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:{width}}  {finding.value}")
        if finding.problem:
            indent = " " * (width + 2)
            lines += [f"{indent}PROBLEM: {finding.problem}.", f"{indent}Fix: {finding.fix}."]
    count = sum(bool(finding.problem) for finding in findings)
    lines.append(f"{count or 'No'} problem{'' if count == 1 else 's'} found.")
    return "\n".join(lines)


def _versions() -> Iterator[Finding]:
    yield Finding("tfmtseg", f"{__version__}, Python {platform.python_version()}")
    version, git = compat.tensorflow_build()
    yield Finding("TensorFlow", f"{version} ({git}), {Path(tf.__file__).parent}")
    fits = compat.tensorflow_fits_keras()
    yield Finding(
        "Keras",
        compat.versions()["keras"],
        "" if fits else "it belongs to another TensorFlow",
        "install TensorFlow 2.15 with Keras 2.15 (pip install '.[addons]' in a checkout), or a "
        "newer TensorFlow with Keras 3",
    )


def _gpus() -> Iterator[Finding]:
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("?",))))
        name = details.get("device_name", gpu.name)
        yield Finding("GPU", f"{name}, compute capability {capability}")
    if gpus:
        return
    driver = Path("/proc/driver/nvidia/version").exists()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    yield Finding(
        "GPU",
        "hidden by CUDA_VISIBLE_DEVICES" if hidden else "none",
        "there is an NVIDIA driver, and TensorFlow sees no GPU" if driver and not hidden else "",
        "pip install 'tensorflow[and-cuda]' in the version above, and look at the first lines that "
        "python -c 'import tensorflow' prints with TF_CPP_MIN_LOG_LEVEL=0",
    )


def _onednn() -> Iterator[Finding]:
    on = os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "1"  # `compat` sets it where it is not
    yield Finding(
        "oneDNN",
        "on" if on else "off, by TF_ENABLE_ONEDNN_OPTS",
        "" if on else "3D convolutions on CPU are several times slower without it",
        "unset TF_ENABLE_ONEDNN_OPTS",
    )


def _compilers() -> Iterator[Finding]:
    try:
        plan = build.plan(cuda=False)
        yield Finding("C++ compiler", f"{plan.record.compiler}, {plan.compiler}")
    except NativeOpsError as error:
        yield Finding("C++ compiler", "none that works", error.why, error.fix)
    nvcc = build.find_nvcc()
    gpus = build.visible_architectures()
    missing = nvcc is None and any(gpu >= build.OLDEST_ARCHITECTURE for gpu in gpus)
    yield Finding(
        "CUDA compiler",
        nvcc or "none",
        "there is a GPU, and the native ops cannot be built for it" if missing else "",
        "install the CUDA toolkit, 12 or newer, with nvcc on PATH",
    )


def _native_ops() -> Iterator[Finding]:
    try:
        library.highest_instruction_set()
        if not library.is_built():
            yield Finding("native ops", "not built yet; the first use builds them, in a minute")
            return
        record = library.record()
    except NativeOpsError as error:
        yield Finding(
            "native ops", "none: plain TensorFlow takes their place", error.why, error.fix
        )
        return
    yield Finding(
        "native ops", f"for TensorFlow {record.tensorflow} ({record.tensorflow_git}), loaded"
    )
    yield Finding("  instructions", _instruction_set(record.machine))
    yield Finding(
        "  CUDA",
        ", ".join(f"sm_{each}" for each in record.architectures) or "no",
        *library.gpu_problem(record, build.visible_architectures()),
    )


def _instruction_set(machine: str) -> str:
    """The one that runs: this processor's highest, or a lower one that was chosen."""
    if not build.is_x86(machine):
        return "generic"
    here = [
        name
        for name, options in build.ISA_FLAGS.items()
        if {option.removeprefix("-m") for option in options} <= processor_features()
    ]
    names = list(build.ISA_FLAGS)
    highest = names.index(library.highest_instruction_set())
    used = [name for name in here if names.index(name) <= highest][-1]
    return used if used == here[-1] else f"{used}, by TFMTSEG_INSTRUCTION_SET; {here[-1]} is here"


def _memory() -> Iterator[Finding]:
    available = available_memory_gb()
    yield Finding(
        "memory",
        f"{available:.1f} GB available" if math.isfinite(available) else "unknown on this system",
        "" if available >= LEAST_MEMORY_GB else "too little for most trainings",
        "close other programs, or train with smaller --crop and --width",
    )


def _disk() -> Iterator[Finding]:
    for name, choose in (("disk", Path.cwd), ("disk of the cache", build.cache_dir)):
        try:
            folder = choose()
            while not folder.exists():
                folder = folder.parent
        except (NativeOpsError, OSError) as error:
            yield Finding(name, "unknown", str(error), "set TFMTSEG_CACHE_DIR to a folder of yours")
            continue
        free = shutil.disk_usage(folder).free / GB
        writable = os.access(folder, os.W_OK)
        problem = "" if free >= LEAST_DISK_GB else "too little for a cache and checkpoints"
        yield Finding(
            name,
            f"{free:.1f} GB free in {folder}",
            problem if writable else f"{folder} cannot be written to",
            "make room, or work in another folder (the cache: TFMTSEG_CACHE_DIR)",
        )


def _addons() -> Iterator[Finding]:
    name = "TensorFlow Addons"
    if importlib.util.find_spec("tensorflow_addons") is None:
        yield Finding(name, "not installed; optional")
        return
    version = importlib.metadata.version("tensorflow-addons")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each import tells of its end of life
            importlib.import_module("tensorflow_addons")
    except (ImportError, AttributeError) as error:
        yield Finding(
            name, version, f"it cannot be imported ({error})",
            "pip uninstall tensorflow-addons; it works with TensorFlow 2.15 and no newer one",
        )  # fmt: skip
        return
    yield Finding(name, version)
