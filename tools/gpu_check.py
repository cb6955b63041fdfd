"""Checks and times the CUDA kernels of the ops on a GPU machine, without TensorFlow.

    python3 tools/gpu_check.py --output gpu_check.md

needs nvcc, pybind11 and PyTorch and takes at most 8 minutes: builds the kernels, compares every
engine and type with float64, times forward and backward together against PyTorch, and runs
compute-sanitizer if there is one. Each of these is a process of its own with a time limit: one
that fails or hangs is told of, and the others go on. --output grows line by line.
Exit status 0 if all that could be done here agreed, else 1: what the device does not support, a
missing compute-sanitizer, and timings and sanitizers that were not finished are told alone.

It covers launchers and kernels. The TensorFlow ops on a GPU are `pytest -m gpu --require-gpu`.

    python3 tools/gpu_check.py --emulate

does the comparison alone, on the CPU, with kernels compiled by g++ (cuda_ops/cuda_emulation.h).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOURCES = Path(__file__).resolve().parents[1] / "cuda_ops"
MODULE = "tfmtseg_cuda"

ENGINES = ("split", "tensor_core", "scalar")
# ||error|| / ||reference|| against float64 on the rows as given.
TOLERANCES = {
    ("scalar", "float32"): 1e-5,
    ("split", "float32"): 3e-5,
    ("tensor_core", "float32"): 2e-2,  # rows of 17 features, rounded to bfloat16
    ("scalar", "float16"): 5e-3,
    ("scalar", "bfloat16"): 5e-3,
    ("tensor_core", "float16"): 5e-3,
    ("tensor_core", "bfloat16"): 5e-3,
    ("split", "float16"): 5e-3,
    ("split", "bfloat16"): 5e-3,
}
# Queries, keys, features, and the length of the mean that all keys share. With one, errors of sums
# over many rows do not cancel.
SHAPES = [
    (1, 1, 3, 0.0),
    (63, 65, 17, 0.0),
    (64, 64, 64, 0.9),
    (100, 200, 123, 0.0),
    (192, 192, 256, 0.0),
    (1000, 700, 128, 0.0),
    (70, 130, 300, 0.0),
    (16384, 16384, 256, 0.0),
    (16384, 16384, 256, 0.9),
]
SHAPES_EMULATED = [
    (1, 1, 3, 0.0),
    (63, 65, 17, 0.0),
    (70, 66, 64, 0.9),
    (100, 200, 123, 0.0),
    (66, 40, 300, 0.0),
]
MOST_ROWS = 1024  # of more, one seed, and the oracle is where the kernels are
SEEDS = (0, 1, 2)

# GroupNorm + ReLU: volumes, voxels, channels and groups; tolerances as above.
GROUP_NORM_TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3}
VOLUMES = [(1, 1, 1, 1), (2, 700, 7, 7), (2, 5000, 24, 8), (1, 90, 300, 4), (1, 64**3, 32, 8)]
VOLUMES_EMULATED = VOLUMES[:-1]
VOLUMES_TIMED = [
    (1, 64**3, 32, 8),
    (4, 40 * 56 * 40, 16, 8),
    (2, 128**3, 32, 8),
    (2, 16**3, 256, 8),
]

SIZES = (4096, 16384, 65536, 1024, 192)  # what says most first
FEATURES = 256
TEMPERATURE = 0.07
EPSILON = 1e-5


def find(program: str) -> str | None:
    """Path of one of the CUDA toolkit's programs.

    In the order of `tfmtseg.ops.build.find_nvcc`, which needs TensorFlow.
    """
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [None, *(f"{home}/bin" for home in homes if home)]
    return next(filter(None, (shutil.which(program, path=place) for place in places)), None)


def build(folder: Path, emulate: bool) -> Path:
    """Compiles the Python module and returns it; ends with one line where it cannot."""
    try:
        import pybind11
    except ImportError as error:
        sys.exit(missing("pybind11", error))
    path = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"-I{SOURCES}"]
    sources = [*sorted(SOURCES.glob("*_cuda.cu")), SOURCES / "cuda_pybind.cc"]
    if emulate:
        command = ["g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
        command += ["-Wno-unknown-pragmas", "-fvisibility=hidden", "-DTFMTSEG_CUDA_EMULATION"]
        command += [*includes, "-x", "c++", *sources, "-o", path]
    else:
        nvcc = find("nvcc")
        if nvcc is None:
            sys.exit(
                "nvcc: path is none, must be on PATH, in CUDA_HOME or in /usr/local/cuda. "
                "Fix: install the CUDA toolkit, 12 or newer."
            )
        command = [nvcc, "-O3", "-std=c++17", "-shared", "-cudart", "static"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f"-arch={architecture()}"]
        command += [*includes, *sources, "-o", path]
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        sys.exit(f"{command[0]}: start is {error}, must work. Fix: install it.")
    if status:
        sys.exit(f"{command[0]}: exit status is {status}, must be 0. Fix: see its words above.")
    return path


def architecture() -> str:
    """That of the device that PyTorch takes; `native` is not known to every nvcc."""
    try:
        import torch
    except ImportError as error:
        sys.exit(missing("torch", error))
    if not torch.cuda.is_available():
        sys.exit(
            "PyTorch: GPU is none, must be one. "
            "Fix: look at nvidia-smi, CUDA_VISIBLE_DEVICES and python3 -m torch.utils.collect_env."
        )
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def missing(package: str, error: ImportError) -> str:
    return (
        f"{package}: import is {error}, must work. Fix: {sys.executable} -m pip install {package}."
    )


def load(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))
    return __import__(MODULE)


class HostMemory:
    """Arrays where NumPy has them, for the emulated kernels."""

    library: Any = np

    def put(self, array: np.ndarray) -> np.ndarray:
        """Copies an array to where the kernels can read it."""
        # A device aligns what it allocates; the workspace relies on it.
        memory = np.empty(array.nbytes + 256, np.uint8)
        start = -memory.ctypes.data % 256
        placed = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def address(self, array: np.ndarray) -> int:
        """Where it is."""
        return array.ctypes.data

    def get(self, array: np.ndarray) -> np.ndarray:
        """Copies it back."""
        return array.copy()


class DeviceMemory:
    """Arrays on the GPU, held by PyTorch."""

    @functools.cached_property
    def library(self) -> Any:
        """What computes with them."""
        import torch

        return torch

    def put(self, array: np.ndarray) -> Any:
        """Copies an array to where the kernels can read it."""
        return self.library.from_numpy(np.ascontiguousarray(array)).cuda()

    def address(self, array: Any) -> int:
        """Where it is."""
        return array.data_ptr()

    def get(self, array: Any) -> np.ndarray:
        """Copies it back."""
        return array.cpu().numpy()


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """bfloat16 as its 16 bits, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).view(np.int16)


def decode(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int16:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def make_problem(n: int, m: int, d: int, mean: float, dtype: str, seed: int) -> dict[str, Any]:
    """Rows of length 1, each query near its positive; ids, a mask and rows without positive.

    If the keys share a mean, all weights are positive: nothing cancels.
    """
    random = np.random.default_rng(seed)
    keys, common = (random.normal(size=(rows, d)) for rows in (m, 1))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    keys = np.sqrt(1 - mean**2) * keys + mean * common / np.linalg.norm(common)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    positives = random.integers(m, size=n)
    queries = keys[positives] + 0.5 * random.normal(size=(n, d)) / np.sqrt(d)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    if n > 2:
        positives[::11] = -1
    weights = random.normal(size=n).astype(np.float32)
    return {
        "queries": encode(queries, dtype),
        "keys": encode(keys, dtype),
        "positives": positives.astype(np.int32),
        "query_ids": random.integers(-2, 9, size=n).astype(np.int32),
        "key_ids": random.integers(-2, 9, size=m).astype(np.int32),
        "key_mask": random.random(m) < 0.9 if m > 2 else np.ones(m, np.bool_),
        "row_weights": np.abs(weights) if mean else weights,
    }


def oracle(problem: dict[str, Any], memory: Any) -> dict[str, np.ndarray]:
    """Losses and gradients in float64, with all similarities in `memory`."""
    xp = memory.library
    queries, keys = (memory.put(decode(problem[name])) for name in ("queries", "keys"))
    names = ("positives", "query_ids", "key_ids", "row_weights")
    positives, query_ids, key_ids, weights = (
        memory.put(problem[name].astype(np.float64 if name == "row_weights" else np.int64))
        for name in names
    )
    mask = memory.put(problem["key_mask"])
    temperature = float(np.float32(TEMPERATURE))
    rows = memory.put(np.arange(len(queries)))
    similarity = queries @ keys.T / temperature
    has_positive = (positives >= 0) & mask[positives]
    positive = xp.where(has_positive, similarity[rows, positives], 0.0)
    keep = mask[None] & (query_ids[:, None] != key_ids[None])
    keep[rows[positives >= 0], positives[positives >= 0]] = False
    highest = xp.amax(similarity, 1)
    with np.errstate(divide="ignore"):  # without negatives log 0
        sums = xp.where(keep, xp.exp(similarity - highest[:, None]), 0.0).sum(1)
        negatives = highest + xp.log(sums)
    total = xp.logaddexp(negatives, positive)
    slopes = xp.where(keep, xp.exp(similarity - total[:, None]), 0.0)
    slopes[rows, positives] -= slopes.sum(1)
    slopes *= (weights * has_positive / temperature)[:, None]
    grad_queries = slopes @ keys
    temperature_gradients = -(queries * grad_queries).sum(1) / temperature
    losses = xp.logaddexp(xp.zeros_like(positive), negatives - positive)
    results = {
        "loss": xp.where(has_positive, losses, 0.0),
        "grad_queries": grad_queries,
        "grad_keys": slopes.T @ queries,
        "grad_temperature": temperature_gradients.sum().reshape(1),
        # Of both signs: their sum may be near 0 and is no measure of its error.
        "temperature_gradients": temperature_gradients,
    }
    return {name: memory.get(result) for name, result in results.items()}


def supports(cuda: ModuleType, engine: str, d: int) -> bool:
    """As info_nce_cuda.h says."""
    newer = tuple(cuda.device()["compute_capability"]) >= (8, 0)
    return engine == "scalar" or (newer and d <= 256)


def compute(
    cuda: ModuleType, memory: Any, problem: dict[str, Any], dtype: str, engine: str, at_once: bool
) -> dict[str, np.ndarray]:
    """What the kernels say, in outputs that were full of NaN."""
    n, d = problem["queries"].shape
    m = len(problem["keys"])
    arrays = {name: memory.put(array) for name, array in problem.items()}
    row_weights = arrays.pop("row_weights")
    addresses = {name: memory.address(array) for name, array in arrays.items()}
    call = cuda.InfoNce(
        dtype=dtype, n=n, m=m, d=d, temperature=TEMPERATURE, engine=engine, **addresses
    )
    rows = {"loss": n, "log_sum_exp": n, "positive_similarity": n, "grad_temperature": 1}
    outputs = {name: memory.put(np.full(size, np.nan, np.float32)) for name, size in rows.items()}
    for name, size in (("grad_queries", n), ("grad_keys", m)):
        outputs[name] = memory.put(encode(np.full((size, d), np.nan), dtype))
    workspace = memory.put(np.full(call.workspace_size(True), 0xFF, np.uint8))

    def of(*names: str) -> dict[str, int]:
        return {name: memory.address(outputs[name]) for name in names}

    statistics_of_rows = of("log_sum_exp", "positive_similarity")
    gradients = of("grad_queries", "grad_keys", "grad_temperature")
    weights, scratch = memory.address(row_weights), memory.address(workspace)
    if at_once:
        call.forward_backward(row_weights=weights, workspace=scratch, **of("loss"), **gradients)
    else:
        call.forward(workspace=scratch, **of("loss"), **statistics_of_rows)
        call.backward(row_gradients=weights, workspace=scratch, **statistics_of_rows, **gradients)
    return {name: memory.get(outputs[name]) for name in ("loss", *gradients)}


def compare(
    cuda: ModuleType,
    memory: Any,
    engine: str,
    shapes: list[tuple[int, int, int, float]],
    seeds: tuple[int, ...],
) -> Iterator[str]:
    """Table rows and complaints ("* ...") of all types of one engine."""
    types = {dtype: most for (of, dtype), most in TOLERANCES.items() if of == engine}
    for dtype, tolerance in types.items():
        worst, where = 0.0, ""
        supported = [shape for shape in shapes if supports(cuda, engine, shape[2])]
        if not supported:
            yield f"| {engine} | {dtype} | | {tolerance:.0e} | not supported by this device |"
            continue
        for shape in supported:
            large = max(shape[:2]) > MOST_ROWS
            for seed in seeds[:1] if large else seeds:
                problem = make_problem(*shape, dtype, seed)
                expected = oracle(problem, memory if large else HostMemory())
                scales = {output: np.linalg.norm(right) for output, right in expected.items()}
                by_rows = np.linalg.norm(expected.pop("temperature_gradients"))
                scales["grad_temperature"] = max(scales["grad_temperature"], by_rows)
                for at_once in (False, True):
                    first = compute(cuda, memory, problem, dtype, engine, at_once)
                    again = compute(cuda, memory, problem, dtype, engine, at_once)
                    name = f"{engine} {dtype} {shape} seed {seed} at_once={at_once}"
                    for output, right in expected.items():
                        if first[output].tobytes() != again[output].tobytes():
                            yield f"* {name} {output}: other bits the second time"
                        found = decode(first[output])
                        error = np.linalg.norm(found - right) / (scales[output] or 1.0)
                        if not error <= tolerance:
                            yield f"* {name} {output}: error {error:.2e}"
                        if not error <= worst:
                            worst, where = error, f"{output}, {shape}"
        yield f"| {engine} | {dtype} | {worst:.1e} | {tolerance:.0e} | {where} |"


def group_norm_problem(
    n: int, voxels: int, channels: int, groups: int, dtype: str, seed: int
) -> dict[str, Any]:
    """Volumes whose channels have means of their own."""
    random = np.random.default_rng(seed)
    x = random.normal(0.5, 1.5, (n, voxels, channels)) + random.normal(size=channels)
    return {
        "x": encode(x, dtype),
        "gamma": random.normal(1, 0.5, channels).astype(np.float32),
        "beta": random.normal(size=channels).astype(np.float32),
        "upstream": encode(random.normal(size=x.shape), dtype),
        "groups": groups,
    }


def group_norm_oracle(problem: dict[str, Any]) -> dict[str, np.ndarray]:
    """Results and gradients in float64."""
    x, upstream, groups = decode(problem["x"]), decode(problem["upstream"]), problem["groups"]
    n, _, channels = x.shape
    grouped = x.reshape(n, -1, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    rstd = 1 / np.sqrt(grouped.var((1, 3), keepdims=True) + np.float32(EPSILON))
    normal = (grouped - mean) * rstd
    gamma = problem["gamma"].astype(np.float64).reshape(groups, -1)
    before_relu = normal * gamma + problem["beta"].reshape(groups, -1)
    d = np.where(before_relu > 0, upstream.reshape(grouped.shape), 0)
    means = [(values * gamma).mean((1, 3), keepdims=True) for values in (d, d * normal)]
    return {
        "y": np.maximum(before_relu, 0).reshape(x.shape),
        "mean": mean.ravel(),
        "rstd": rstd.ravel(),
        "grad_x": (rstd * (d * gamma - means[0] - normal * means[1])).reshape(x.shape),
        "grad_gamma": (d * normal).sum((0, 1)).ravel(),
        "grad_beta": d.sum((0, 1)).ravel(),
    }


def compute_group_norm(
    cuda: ModuleType, memory: Any, problem: dict[str, Any], dtype: str
) -> dict[str, np.ndarray]:
    """What the kernels say, in outputs that were full of NaN."""
    n, voxels, channels = problem["x"].shape
    groups = problem["groups"]
    arrays = {name: memory.put(problem[name]) for name in ("x", "gamma", "beta", "upstream")}
    address = {name: memory.address(array) for name, array in arrays.items()}
    upstream = address.pop("upstream")
    call = cuda.GroupNorm(
        dtype=dtype, n=n, voxels=voxels, channels=channels, groups=groups, **address
    )
    volumes = encode(np.full(problem["x"].shape, np.nan), dtype)
    sizes = {"mean": n * groups, "rstd": n * groups, "grad_gamma": channels, "grad_beta": channels}
    outputs = {name: memory.put(np.full(size, np.nan, np.float32)) for name, size in sizes.items()}
    outputs |= {name: memory.put(volumes) for name in ("y", "grad_x")}
    workspace = memory.put(np.full(call.workspace_size(), 0xFF, np.uint8))

    def of(*names: str) -> dict[str, int]:
        return {name: memory.address(outputs[name]) for name in names}

    scratch = memory.address(workspace)
    call.forward(epsilon=EPSILON, workspace=scratch, **of("y", "mean", "rstd"))
    gradients = of("mean", "rstd", "grad_x", "grad_gamma", "grad_beta")
    call.backward(upstream=upstream, workspace=scratch, **gradients)
    return {name: memory.get(array) for name, array in outputs.items()}


def compare_group_norm(
    cuda: ModuleType, memory: Any, volumes: list[tuple[int, int, int, int]], seeds: tuple[int, ...]
) -> Iterator[str]:
    """As `compare`, for GroupNorm + ReLU."""
    for dtype, tolerance in GROUP_NORM_TOLERANCES.items():
        worst, where = 0.0, ""
        for shape in volumes:
            for seed in seeds:
                problem = group_norm_problem(*shape, dtype, seed)
                first, again = (compute_group_norm(cuda, memory, problem, dtype) for _ in range(2))
                for output, right in group_norm_oracle(problem).items():
                    name = f"group_norm {dtype} {shape} seed {seed} {output}"
                    if first[output].tobytes() != again[output].tobytes():
                        yield f"* {name}: other bits the second time"
                    # Of one number all gradients of x are 0, and what is left is rounding.
                    scale = max(np.linalg.norm(right), 1e-2)
                    error = np.linalg.norm(decode(first[output]).ravel() - right.ravel()) / scale
                    if not error <= tolerance:
                        yield f"* {name}: error {error:.2e}"
                    if not error <= worst:
                        worst, where = error, f"{output}, {shape}"
        yield f"| group_norm | {dtype} | {worst:.1e} | {tolerance:.0e} | {where} |"


def in_one_line(error: Exception) -> str:
    """What one contender failed of: a finding, not the end of the others."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:60].replace("|", "/")


def time_group_norm(cuda: ModuleType, deadline: float) -> Iterator[str]:
    """Table rows: milliseconds of forward and backward together, ours and PyTorch's."""
    for shape in VOLUMES_TIMED:
        for dtype in ("float32", "bfloat16"):
            cells = ["no time left"] * 2
            if time.monotonic() < deadline:
                try:
                    cells = time_volumes(cuda, *shape, dtype)
                except Exception as error:
                    cells = [in_one_line(error)] * 2
            name = " x ".join(map(str, shape[:3]))
            yield f"| {name} | {dtype} | {' | '.join(cells)} |"
            if ": " in cells[0]:  # an error, and ours
                yield f"* {name} {dtype}, timed: {cells[0]}"


def time_volumes(
    cuda: ModuleType, n: int, voxels: int, channels: int, groups: int, dtype: str
) -> list[str]:
    """Milliseconds of ours and PyTorch's, or why there are none."""
    import torch

    x = torch.randn(n, voxels, channels, device="cuda").to(getattr(torch, dtype))
    upstream, y = torch.randn_like(x), torch.empty_like(x)
    gamma, beta = (torch.ones(channels, device="cuda") for _ in range(2))
    mean, rstd = (torch.empty(n, groups, device="cuda") for _ in range(2))
    grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
    call = cuda.GroupNorm(
        dtype=dtype, n=n, voxels=voxels, channels=channels, groups=groups,
        x=x.data_ptr(), gamma=gamma.data_ptr(), beta=beta.data_ptr(),
    )  # fmt: skip
    memory = torch.empty(call.workspace_size(), dtype=torch.uint8, device="cuda")
    shared = {
        "mean": mean.data_ptr(), "rstd": rstd.data_ptr(), "workspace": memory.data_ptr(),
        "stream": torch.cuda.current_stream().cuda_stream,
    }  # fmt: skip

    def fused() -> None:
        call.forward(epsilon=EPSILON, y=y.data_ptr(), **shared)
        call.backward(
            upstream=upstream.data_ptr(), grad_x=y.data_ptr(),
            grad_gamma=grad_gamma.data_ptr(), grad_beta=grad_beta.data_ptr(), **shared,
        )  # fmt: skip

    # PyTorch's layout: channels first.
    values = [x.transpose(1, 2).contiguous(), gamma.to(x.dtype), beta.to(x.dtype)]
    values = [value.clone().requires_grad_() for value in values]
    above = upstream.transpose(1, 2).contiguous()

    def eager() -> None:
        normal = torch.nn.functional.group_norm(values[0], groups, *values[1:], EPSILON)
        torch.autograd.grad(torch.relu(normal), values, above)

    cells = []
    for run in (fused, eager):
        try:
            cells.append(f"{statistics.median(milliseconds(run, 1) for _ in range(20)):.3f}")
        except Exception as error:
            cells.append(in_one_line(error))
    return cells


class Contenders:
    """Ways to compute loss and gradients of one problem with N = M rows."""

    def __init__(self, cuda: ModuleType, n: int, dtype: str) -> None:
        import torch

        self.torch, self.cuda, self.n, self.dtype = torch, cuda, n, dtype
        self.type = getattr(torch, dtype)
        rows = [torch.randn(n, FEATURES, device="cuda") for _ in range(2)]
        self.queries, self.keys = (
            torch.nn.functional.normalize(row, dim=1).to(self.type) for row in rows
        )
        self.labels = torch.arange(n, device="cuda")

    def fused(self, engine: str) -> Callable[[], None]:
        """Losses and all gradients by our kernels."""
        torch = self.torch
        positives = self.labels.to(torch.int32)
        weights = torch.full((self.n,), 1.0 / self.n, device="cuda")
        call = self.cuda.InfoNce(
            dtype=self.dtype,
            n=self.n,
            m=self.n,
            d=FEATURES,
            temperature=TEMPERATURE,
            engine=engine,
            queries=self.queries.data_ptr(),
            keys=self.keys.data_ptr(),
            positives=positives.data_ptr(),
        )
        outputs = {
            "row_weights": weights,
            "loss": torch.empty(self.n, device="cuda"),
            "grad_queries": torch.empty_like(self.queries),
            "grad_keys": torch.empty_like(self.keys),
            "grad_temperature": torch.empty(1, device="cuda"),
            "workspace": torch.empty(call.workspace_size(True), dtype=torch.uint8, device="cuda"),
        }
        addresses = {name: array.data_ptr() for name, array in outputs.items()}
        addresses["stream"] = torch.cuda.current_stream().cuda_stream

        def run(keep: Any = (positives, outputs, call)) -> None:
            call.forward_backward(**addresses)

        return run

    def unfused(self, compiled: bool, tf32: bool = False) -> Callable[[], None]:
        """Mean loss and gradients of queries and keys by PyTorch."""
        torch = self.torch
        queries, keys = (rows.clone().requires_grad_() for rows in (self.queries, self.keys))

        def loss(queries: Any, keys: Any, labels: Any) -> Any:
            logits = queries @ keys.T / TEMPERATURE
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        function = torch.compile(loss, dynamic=False) if compiled else loss

        def run() -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.autograd.grad(function(queries, keys, self.labels), (queries, keys))
            torch.backends.cuda.matmul.allow_tf32 = False

        return run

    def floor(self) -> Callable[[], None]:
        """The three matrix products that nobody can do without, and nothing else."""
        torch = self.torch
        result = torch.empty_like(self.queries)

        def run() -> None:
            # Not kept: of 65536 rows it would push others out of memory.
            logits = torch.matmul(self.queries, self.keys.T)
            torch.matmul(logits, self.keys, out=result)
            torch.matmul(logits.T, self.queries, out=result)

        return run

    def all(self) -> dict[str, Callable[[], Callable[[], None]]]:
        """Name -> what makes the contender, to be called when it is its turn."""
        makers: dict[str, Callable[[], Callable[[], None]]] = {
            "fused": lambda: self.fused("auto"),
            "torch eager": lambda: self.unfused(False),
            "torch.compile": lambda: self.unfused(True),
            "three matmuls": self.floor,
        }
        if self.dtype == "float32":
            makers["fused scalar"] = lambda: self.fused("scalar")
            makers["torch.compile tf32"] = lambda: self.unfused(True, True)
        return makers


COLUMNS = [
    "fused",
    "fused scalar",
    "torch eager",
    "torch.compile",
    "torch.compile tf32",
    "three matmuls",
]


def milliseconds(run: Callable[[], None], times: int) -> float:
    """Of one call, the mean of several, after one that does not count."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def time_one_size(
    cuda: ModuleType, n: int, dtype: str, deadline: float
) -> dict[str, tuple[float, float] | str]:
    """Contender -> median milliseconds and peak MiB beyond its inputs, or why there is none."""
    import torch

    torch.compiler.reset()  # else it stops compiling after some sizes
    contenders = Contenders(cuda, n, dtype)
    results: dict[str, tuple[float, float] | str] = {}
    ready: dict[str, tuple[Callable[[], None], float]] = {}
    one_round = 0.0
    for name, make in contenders.all().items():
        if time.monotonic() + one_round > deadline:
            results[name] = "no time left"
            continue
        try:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            run = make()
            run()  # compiles and allocates
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            run()
            torch.cuda.synchronize()
            one_round += time.monotonic() - started
            ready[name] = (run, (torch.cuda.max_memory_allocated() - before) / 2**20)
        except torch.cuda.OutOfMemoryError:
            results[name] = "out of memory"
        except Exception as error:
            results[name] = in_one_line(error)
        run = None
        # What is kept between rounds is the contender's own, such as compiled code; what it
        # caches must not push the next one out of memory.
        torch.cuda.empty_cache()

    inner = 20 if n <= 1024 else 1
    wanted = max(3, min(25, int(6.0 / max(one_round * inner, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(wanted):
        if time.monotonic() + one_round * inner > deadline and all(times.values()):
            break
        for name in list(ready):
            try:
                times[name].append(milliseconds(ready[name][0], inner))
            except torch.cuda.OutOfMemoryError:
                results[name] = "out of memory"
            except Exception as error:
                results[name] = in_one_line(error)
            if name in results:
                del ready[name], times[name]
                torch.cuda.empty_cache()
    for name, (_, peak) in ready.items():
        results[name] = (statistics.median(times[name]), peak)
    return results


def time_info_nce(cuda: ModuleType, deadline: float) -> Iterator[str]:
    """Table rows: milliseconds (and MiB) of forward and backward together."""
    import torch

    for n in SIZES:
        for dtype in ("float32", "bfloat16"):
            results: dict[str, tuple[float, float] | str] = dict.fromkeys(COLUMNS, "no time left")
            if time.monotonic() < deadline:
                try:
                    results = time_one_size(cuda, n, dtype, deadline)
                except Exception as error:
                    results = dict.fromkeys(COLUMNS, in_one_line(error))
            yield timing_row(n, dtype, results)
            if ": " in str(results.get("fused")):  # an error, and ours
                yield f"* {n} {dtype}, timed: {results['fused']}"
            with contextlib.suppress(RuntimeError):  # what an earlier one left broken
                torch.cuda.empty_cache()


def timing_row(n: int, dtype: str, results: dict[str, tuple[float, float] | str]) -> str:
    cells = []
    for name in COLUMNS:
        value = results.get(name, "")
        cells.append(value if isinstance(value, str) else f"{value[0]:.3f} ({value[1]:.0f})")
    return f"| {n} | {dtype} | " + " | ".join(cells) + " |"


@functools.cache
def versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "numpy", "pybind11"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return found


@dataclass
class Section:
    """A part of the report, made by a process of its own.

    Of the lines that it writes, those with "| " are rows of its table, those with "* " say what is
    wrong, and the summary of compute-sanitizer is a row; others are for the terminal alone.

    Args:
        title: What it is about.
        head: What stands above its rows.
        seconds: The most it may take.
        must_end: Whether it is wrong not to be finished by then.
        tool: The tool of compute-sanitizer that it runs under, if any.
    """

    title: str
    head: list[str]
    seconds: float
    must_end: bool = True
    tool: str = ""
    rows: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remark: str = ""

    def take(self, line: str) -> None:
        """Keeps a line of its process, if it is for the report."""
        if line.startswith("| ") and not self.tool:
            self.rows.append(line)
        elif line.startswith("* "):
            self.problems.append(line)
        elif self.tool and " SUMMARY: " in line:
            self.rows.append(f"| {self.tool} | {line.strip('= ')} |")

    def stop_short(self, reason: str) -> None:
        """Notes that its time was up."""
        if self.must_end:
            self.problems.append(f"* {self.title}: {reason}")
        else:
            self.remark = f"{reason[0].upper()}{reason[1:]}."

    def text(self) -> str:
        """What there is of it, as Markdown; empty if there is nothing."""
        parts = [[*self.head, *self.rows] if self.rows else [], [self.remark], self.problems]
        blocks = ["\n".join(lines) for lines in parts if any(lines)]
        return "\n\n".join([f"## {self.title}", *blocks]) + "\n" if blocks else ""


ACCURACY = [
    f"||error|| / ||reference|| against float64, worst of {len(SEEDS)} seeds.",
    "",
    "| engine | type | error | allowed | where |",
    "|---|---|---|---|---|",
]


def sections(emulate: bool) -> dict[str, Section]:
    """All parts of the report by name, in their order."""
    found = {"build": Section("Device", ["| what | value |", "|---|---|"], 200)}
    for engine in ENGINES:
        found[engine] = Section(f"Accuracy of InfoNCE, engine {engine}", ACCURACY, 80)
    found["group_norm"] = Section("Accuracy of GroupNorm + ReLU", ACCURACY, 60)
    if emulate:
        return found
    found["time_info_nce"] = Section(
        "Time of InfoNCE and its gradients",
        [
            f"N = M, D = {FEATURES}. Median milliseconds (peak MiB beyond the inputs).",
            "",
            "| N | type | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ],
        200,
        must_end=False,
    )
    found["time_group_norm"] = Section(
        "Time of GroupNorm + ReLU and its gradients",
        [
            "Median milliseconds.",
            "",
            "| volumes x voxels x channels | type | fused | torch |",
            "|---|---|---|---|",
        ],
        40,
        must_end=False,
    )
    for tool in ("memcheck", "racecheck", "synccheck"):
        head = ["| tool | verdict |", "|---|---|"]
        found[tool] = Section(f"compute-sanitizer {tool}", head, 60, must_end=False, tool=tool)
    return found


def work(name: str, folder: Path, emulate: bool, seconds: float) -> Iterator[str]:
    """The lines of one section; runs in its process."""
    deadline = time.monotonic() + seconds
    if name == "build":
        started = time.monotonic()
        build(folder, emulate)
        yield f"| built in | {time.monotonic() - started:.0f} s |"
    cuda = load(folder / MODULE)
    memory = HostMemory() if emulate else DeviceMemory()
    if name == "build":
        for key, value in cuda.device().items():
            yield f"| {key} | {value} |"
    elif name in ENGINES:
        yield from compare(cuda, memory, name, SHAPES_EMULATED if emulate else SHAPES, SEEDS)
    elif name == "group_norm":
        volumes = VOLUMES_EMULATED if emulate else VOLUMES
        yield from compare_group_norm(cuda, memory, volumes, SEEDS)
    elif name == "time_group_norm":
        yield from time_group_norm(cuda, deadline)
    elif name == "time_info_nce":
        yield from time_info_nce(cuda, deadline)
    else:  # under compute-sanitizer, where all is slow
        for engine in ENGINES:
            yield from compare(cuda, memory, engine, SHAPES_EMULATED, SEEDS[:1])
        yield from compare_group_norm(cuda, memory, VOLUMES_EMULATED, SEEDS[:1])


NOT_FINISHED = "not finished in "


def watch(command: list[str], seconds: float, take: Callable[[str], None]) -> str:
    """Runs a command and passes its lines on as they come.

    Neither a crash nor a kernel that hangs reaches this process: the command has a group of
    processes of its own, of which nothing is left.

    Returns:
        Why it failed; empty if it did not.
    """
    ends = time.monotonic() + seconds
    with tempfile.NamedTemporaryFile() as log, open(log.name, errors="replace") as lines:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        last = part = ""
        running = True
        try:
            while running:
                status = process.poll()
                running = status is None and time.monotonic() < ends
                *whole, part = (part + lines.read()).split("\n")
                if part and not running:
                    whole.append(part)
                for line in whole:
                    print(line, flush=True)
                    take(line)
                    last = line.strip() or last
                if running:
                    time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    if status is None:
        return f"{NOT_FINISHED}{seconds:.0f} s"
    return f"exit status {status}, {last[:300]}" if status else ""


def save(path: Path | None, parts: dict[str, Section], emulate: bool) -> str:
    """Writes what there is so far, whole: it survives whatever comes."""
    facts = [*versions(), *(["emulated on the CPU"] if emulate else [])]
    shown = filter(None, (part.text() for part in parts.values()))
    text = "\n".join(["# The ops on a GPU\n", ", ".join(facts) + "\n", *shown])
    if path:
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(text, "utf-8")
        beside.replace(path)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, help="where to write the report (Markdown)")
    parser.add_argument("--seconds", type=float, help="when to stop (480; 3600 with --emulate)")
    parser.add_argument("--emulate", action="store_true", help="compare only, on the CPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    seconds = flags.seconds or (3600.0 if flags.emulate else 480.0)
    if flags.section:
        for line in work(flags.section, flags.folder, flags.emulate, seconds):
            print(line, flush=True)
        return 0

    ends = time.monotonic() + seconds
    parts = sections(flags.emulate)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            left = ends - time.monotonic()
            if left <= 0:
                part.stop_short("no time was left")
                continue
            limit = left if flags.emulate else min(part.seconds, left)
            # What is timed ends by itself before it is ended.
            arguments = ["--section", name, "--folder", folder, "--seconds", str(limit * 0.9)]
            command = [sys.executable, str(Path(__file__).resolve()), *arguments]
            if flags.emulate:
                command.append("--emulate")
            if part.tool:
                sanitizer = find("compute-sanitizer")
                if sanitizer is None:
                    part.rows.append(f"| {part.tool} | not done: compute-sanitizer is not here |")
                    continue
                # Each tensor is an allocation of its own, whose end memcheck knows; and what
                # PyTorch asks of the driver in vain is no error of ours.
                command = [
                    *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", part.tool),
                    *("--report-api-errors", "no", "--error-exitcode", "3", *command),
                ]

            def take(line: str, part: Section = part) -> None:
                part.take(line)
                save(flags.output, parts, flags.emulate)

            save(flags.output, parts, flags.emulate)
            failure = watch(command, limit, take)
            if failure.startswith(NOT_FINISHED):
                part.stop_short(failure)
            elif failure:
                take(f"* {part.title}: {failure}")
            if failure and name == "build":
                break
        print(save(flags.output, parts, flags.emulate))
    return int(any(part.problems for part in parts.values()))


if __name__ == "__main__":
    # Ended as by Ctrl-C, so that no section is left on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
