"""The CUDA kernels of GroupNorm + ReLU, compiled for the CPU (cuda_ops/cuda_emulation.h)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import compat

pytestmark = pytest.mark.skipif(
    not compat.KERAS_3, reason="as in the default environment: no TensorFlow in the kernels"
)

TYPES = ["float32", "float16", "bfloat16"]  # in the order of DataType in cuda_types.h
INVALID_VALUE = 1

# Of the largest number of an array: sums in float32; results rounded to 2**-9 or less.
TOLERANCES = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 6e-3}

# n, voxels, channels, groups.
SIZES = [
    (1, 1, 1, 1),
    (2, 5, 6, 3),
    (1, 700, 7, 7),
    (3, 300, 24, 8),
    (2, 67, 96, 8),
    (1, 40, 300, 4),  # more channels than threads
]


class Arguments(ctypes.Structure):
    """GroupNormArguments of group_norm_cuda.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("voxels", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
    ]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(values).astype(tf.as_dtype(dtype).as_numpy_dtype)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Problem:
    """Arguments of one call, kept alive, and what float64 says about them."""

    def __init__(self, n, voxels, channels, groups, dtype="float32", mean=0.5, epsilon=1e-5):
        random = np.random.default_rng(0)
        self.dtype, self.groups, self.epsilon = dtype, groups, epsilon
        x = random.normal(mean, 1.5, (n, voxels, channels)) + random.normal(size=channels)
        self.x = encode(x, dtype)
        self.gamma = random.normal(1, 0.5, channels).astype(np.float32)
        self.beta = random.normal(size=channels).astype(np.float32)
        self.upstream = encode(random.normal(size=x.shape), dtype)

    def arguments(self, **changes) -> Arguments:
        n, voxels, channels = self.x.shape
        values = {
            "type": TYPES.index(self.dtype),
            "x": pointer(self.x),
            "gamma": pointer(self.gamma),
            "beta": pointer(self.beta),
            "n": n,
            "voxels": voxels,
            "channels": channels,
            "groups": self.groups,
        }
        return Arguments(**{**values, **changes})

    def workspace(self, library) -> tuple[np.ndarray, int]:
        size = library.group_norm_workspace_size(ctypes.byref(self.arguments()))
        # Poisoned, and aligned as memory on a device is.
        memory = np.full(size + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + size], size

    def poisoned(self, *shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    def run(self, library, in_place: bool = False) -> list[np.ndarray]:
        """y, mean, rstd and the gradients of x, gamma and beta."""
        n, _, channels = self.x.shape
        statistics = [self.poisoned(n, self.groups) for _ in range(2)]
        y = encode(self.poisoned(*self.x.shape), self.dtype)
        memory, size = self.workspace(library)
        status = library.group_norm_forward(
            ctypes.byref(self.arguments()),
            ctypes.c_float(self.epsilon),
            *map(pointer, (y, *statistics, memory)),
            ctypes.c_size_t(size),
        )
        assert status == 0
        upstream = self.upstream.copy()
        grad_x = upstream if in_place else encode(self.poisoned(*self.x.shape), self.dtype)
        vectors = [self.poisoned(channels) for _ in range(2)]
        memory, size = self.workspace(library)
        status = library.group_norm_backward(
            ctypes.byref(self.arguments()),
            *map(pointer, (upstream, *statistics, grad_x, *vectors, memory)),
            ctypes.c_size_t(size),
        )
        assert status == 0
        return [y, *statistics, grad_x, *vectors]

    def oracle(self) -> list[np.ndarray]:
        """As `run`, in float64."""
        x, upstream = self.x.astype(np.float64), self.upstream.astype(np.float64)
        n, _, channels = x.shape
        grouped = x.reshape(n, -1, self.groups, channels // self.groups)
        axes = (1, 3)
        mean = grouped.mean(axes, keepdims=True)
        rstd = 1 / np.sqrt(grouped.var(axes, keepdims=True) + np.float32(self.epsilon))
        normal = (grouped - mean) * rstd
        gamma = self.gamma.astype(np.float64).reshape(self.groups, -1)
        before_relu = normal * gamma + self.beta.reshape(self.groups, -1)
        d = np.where(before_relu > 0, upstream.reshape(grouped.shape), 0)
        e = d * gamma
        grad_x = rstd * (
            e - e.mean(axes, keepdims=True) - normal * (e * normal).mean(axes, keepdims=True)
        )
        return [
            np.maximum(before_relu, 0).reshape(x.shape),
            mean[:, 0, :, 0],
            rstd[:, 0, :, 0],
            grad_x.reshape(x.shape),
            (d * normal).sum((0, 1)).reshape(-1),
            d.sum((0, 1)).reshape(-1),
        ]


NAMES = ("y", "mean", "rstd", "grad_x", "grad_gamma", "grad_beta")


def check(library, problem: Problem, tolerance: float, **options) -> None:
    for name, value, expected in zip(
        NAMES, problem.run(library, **options), problem.oracle(), strict=True
    ):
        difference = np.abs(value.astype(np.float64) - expected).max(initial=0)
        assert difference <= tolerance * np.abs(expected).max(initial=1), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64(cuda_library, size, dtype):
    check(cuda_library, Problem(*size, dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("blocks", [1, 264])
def test_any_number_of_chunks(cuda_library, blocks):
    cuda_library.emulation_settings(8, False, blocks)
    check(cuda_library, Problem(2, 2000, 8, 4), 2e-5)


def test_a_large_mean_does_not_cancel(cuda_library):
    # x itself is rounded to 3e-5.
    problem = Problem(1, 2000, 8, 4, mean=1000.0)
    values, expected = problem.run(cuda_library), problem.oracle()
    np.testing.assert_allclose(values[2], expected[2], rtol=2e-5)  # rstd
    np.testing.assert_allclose(values[0], expected[0], atol=2e-4)  # y


def test_the_gradient_may_take_the_place_of_the_upstream_one(cuda_library):
    check(cuda_library, Problem(2, 67, 24, 8), 2e-5, in_place=True)


def test_the_order_of_threads_does_not_matter(cuda_library):
    problem = Problem(2, 300, 24, 8)
    first = problem.run(cuda_library)
    cuda_library.emulation_settings(8, True, 264)
    for one, other in zip(first, problem.run(cuda_library), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [(0, 5, 8, 4), (2, 0, 8, 4)])
def test_without_voxels(cuda_library, size):
    *_, grad_gamma, grad_beta = Problem(*size).run(cuda_library)
    np.testing.assert_array_equal([grad_gamma, grad_beta], np.zeros((2, 8)))


def test_nan_is_passed_on_within_its_group(cuda_library):
    problem = Problem(2, 9, 6, 3)
    problem.x[1, 4, 3] = np.nan
    expected = np.zeros(problem.x.shape, bool)
    expected[1, :, 2:4] = True
    y, _, _, grad_x, *_ = problem.run(cuda_library)
    np.testing.assert_array_equal(np.isnan(y), expected)
    np.testing.assert_array_equal(np.isnan(grad_x), expected)


@pytest.mark.parametrize(
    "wrong",
    [{"groups": 0}, {"groups": 5}, {"channels": 0}, {"n": -1}, {"voxels": -1}, {"type": 3},
     {"channels": 2**40, "groups": 1}, {"n": 2**33}],
)  # fmt: skip
def test_arguments_that_make_no_sense(cuda_library, wrong):
    problem = Problem(2, 5, 6, 3)
    memory, size = problem.workspace(cuda_library)
    arguments = problem.arguments(**wrong)
    if "type" not in wrong:
        assert cuda_library.group_norm_workspace_size(ctypes.byref(arguments)) == 0
    outputs = [problem.poisoned(2, 5, 6), problem.poisoned(2, 3), problem.poisoned(2, 3)]
    status = cuda_library.group_norm_forward(
        ctypes.byref(arguments),
        ctypes.c_float(1e-5),
        *map(pointer, (*outputs, memory)),
        ctypes.c_size_t(size),
    )
    assert status == INVALID_VALUE
    assert all(np.isnan(output).all() for output in outputs)


def test_workspace_too_small(cuda_library):
    problem = Problem(2, 5, 6, 3)
    memory, size = problem.workspace(cuda_library)
    y = problem.poisoned(2, 5, 6)
    status = cuda_library.group_norm_forward(
        ctypes.byref(problem.arguments()),
        ctypes.c_float(1e-5),
        *map(pointer, (y, problem.poisoned(2, 3), problem.poisoned(2, 3), memory)),
        ctypes.c_size_t(size - 1),
    )
    assert status == INVALID_VALUE
    assert np.isnan(y).all()
