"""The CUDA kernels of InfoNCE, compiled for the CPU (cuda_ops/cuda_emulation.h)."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction

import numpy as np
import pytest

from tfmtseg import compat

pytestmark = pytest.mark.skipif(
    not compat.KERAS_3, reason="as in the default environment: no TensorFlow"
)

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
AUTO, SCALAR, TENSOR_CORE, SPLIT = 0, 1, 2, 3
INVALID_VALUE, NOT_SUPPORTED = 1, 801

# ||error|| / ||reference|| against float64 on the same (rounded) rows.
FLOAT32_TOLERANCE = 1e-5
# Two bfloat16 say 16 to 17 bits of a number: similarities near 10 are off by 1e-5, and a small
# loss is off by that relative to itself.
SPLIT_TOLERANCE = 2e-5
# Weights and gradients rounded to half precision.
HALF_TOLERANCE = 5e-3
# Rows of float32 that the engine rounds to bfloat16 itself.
ROUNDED_ROWS_TOLERANCE = 1e-2

TOLERANCES = {
    (SCALAR, FLOAT32): FLOAT32_TOLERANCE,
    (SPLIT, FLOAT32): SPLIT_TOLERANCE,
    (TENSOR_CORE, FLOAT32): ROUNDED_ROWS_TOLERANCE,
}

EXACT_ENGINES = [(SCALAR, FLOAT32), (SPLIT, FLOAT32)]
ENGINES = [
    *EXACT_ENGINES,
    (SCALAR, FLOAT16),
    (SCALAR, BFLOAT16),
    (TENSOR_CORE, FLOAT16),
    (TENSOR_CORE, BFLOAT16),
    (SPLIT, FLOAT16),
    (SPLIT, BFLOAT16),
]


class Arguments(ctypes.Structure):
    """InfoNceArguments of info_nce_cuda.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("queries", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("positives", ctypes.c_void_p),
        ("query_ids", ctypes.c_void_p),
        ("key_ids", ctypes.c_void_p),
        ("key_mask", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("temperature", ctypes.c_float),
        ("engine", ctypes.c_int),
    ]


@pytest.fixture
def library(cuda_library) -> ctypes.CDLL:
    return cuda_library


def device(library, *, major=8, reversed_order=False, blocks=264) -> None:
    """The emulated device; with 1 block wanted, a block does its whole row of tiles."""
    library.emulation_settings(major, reversed_order, blocks)


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """As the library wants it; bfloat16 as its 16 bits, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == FLOAT32:
        return values.copy()
    if dtype == FLOAT16:
        return values.astype(np.float16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def poisoned(shape, dtype: int = FLOAT32) -> np.ndarray:
    return encode(np.full(shape, np.nan, np.float32), dtype)


class Problem:
    """Arguments of one call, kept alive, and what float64 says about them."""

    def __init__(
        self,
        queries,
        keys,
        positives,
        *,
        temperature=0.1,
        query_ids=None,
        key_ids=None,
        key_mask=None,
        weights=None,
        engine=SCALAR,
        dtype=FLOAT32,
    ):
        self.dtype, self.engine = dtype, engine
        self.queries, self.keys = encode(queries, dtype), encode(keys, dtype)
        self.n, self.d = self.queries.shape
        self.m = len(self.keys)
        self.positives = np.ascontiguousarray(positives, np.int32)
        self.temperature = temperature
        self.query_ids = None if query_ids is None else np.ascontiguousarray(query_ids, np.int32)
        self.key_ids = None if key_ids is None else np.ascontiguousarray(key_ids, np.int32)
        self.key_mask = None if key_mask is None else np.ascontiguousarray(key_mask, np.bool_)
        if weights is None:
            weights = np.random.default_rng(7).normal(size=self.n)
        self.weights = np.ascontiguousarray(weights, np.float32)

    def arguments(self) -> Arguments:
        arrays = (self.queries, self.keys, self.positives)
        optional = (self.query_ids, self.key_ids, self.key_mask)
        return Arguments(
            self.dtype,
            *(pointer(array) for array in (*arrays, *optional)),
            self.n,
            self.m,
            self.d,
            self.temperature,
            self.engine,
        )

    def workspace(self, library, with_gradients: bool) -> tuple[np.ndarray, int]:
        arguments = self.arguments()
        size = library.workspace_size(ctypes.byref(arguments), with_gradients)
        # Poisoned, and aligned as memory on a device is.
        memory = np.full(size + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + size], size

    def gradients(self) -> list[np.ndarray]:
        return [
            poisoned((self.n, self.d), self.dtype),
            poisoned((self.m, self.d), self.dtype),
            poisoned(1),
        ]

    def call(self, function, inputs, outputs, workspace, size) -> int:
        arguments = self.arguments()
        return function(
            ctypes.byref(arguments),
            *(pointer(array) for array in (*inputs, *outputs, workspace)),
            ctypes.c_size_t(size),
        )

    def forward(self, library) -> list[np.ndarray]:
        """Loss, log-sum-exp and positive similarity."""
        outputs = [poisoned(self.n) for _ in range(3)]
        self.memory, size = self.workspace(library, False)
        assert self.call(library.forward, [], outputs, self.memory, size) == 0
        return outputs

    def backward(self, library, wanted=(True, True, True)) -> list[np.ndarray | None]:
        _, log_sum_exp, positive = self.forward(library)
        outputs = [g if w else None for g, w in zip(self.gradients(), wanted, strict=True)]
        self.memory, size = self.workspace(library, True)
        inputs = [self.weights, log_sum_exp, positive]
        assert self.call(library.backward, inputs, outputs, self.memory, size) == 0
        return outputs

    def forward_backward(self, library) -> list[np.ndarray]:
        """Loss, log-sum-exp, positive similarity and the three gradients."""
        outputs = [*(poisoned(self.n) for _ in range(3)), *self.gradients()]
        self.memory, size = self.workspace(library, True)
        status = self.call(library.forward_backward, [self.weights], outputs, self.memory, size)
        assert status == 0
        return outputs

    def error_flag(self) -> int:
        return int(self.memory[:4].view(np.int32)[0])

    def oracle(self) -> list[np.ndarray]:
        """As `forward_backward`, row by row in float64."""
        queries, keys = decode(self.queries), decode(self.keys)
        temperature = float(np.float32(self.temperature))
        losses, sums, similarities = (np.zeros(self.n) for _ in range(3))
        grad_queries, grad_keys = np.zeros_like(queries), np.zeros_like(keys)
        grad_temperature = 0.0
        for i, positive in enumerate(self.positives):
            keep = np.ones(self.m, bool) if self.key_mask is None else self.key_mask.copy()
            has_positive = 0 <= positive < self.m and keep[positive]
            if self.query_ids is not None:
                keep &= self.key_ids != self.query_ids[i]
            if has_positive:
                keep[positive] = False
            negatives = np.flatnonzero(keep)
            logits = keys[negatives] @ queries[i] / temperature
            sums[i] = np.logaddexp.reduce(logits) if len(negatives) else -np.inf
            if not has_positive:
                continue
            similarities[i] = keys[positive] @ queries[i] / temperature
            if not len(negatives):
                continue
            losses[i] = np.logaddexp(0.0, sums[i] - similarities[i])
            shares = np.exp(logits - np.logaddexp(sums[i], similarities[i]))
            weight = float(self.weights[i])
            slopes = np.append(shares, -shares.sum()) * weight / temperature
            rows = np.append(negatives, positive)
            grad_queries[i] = slopes @ keys[rows]
            grad_keys[rows] += np.outer(slopes, queries[i])
            grad_temperature -= queries[i] @ grad_queries[i] / temperature
        return [losses, sums, similarities, grad_queries, grad_keys, np.array([grad_temperature])]


def rows(n: int, d: int, seed: int) -> np.ndarray:
    """Of length 1."""
    values = np.random.default_rng(seed).normal(size=(n, d))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def problem(n: int, m: int, d: int, **options) -> Problem:
    """Every query is like its positive; several queries share one."""
    keys = rows(m, d, 1)
    positives = np.random.default_rng(2).integers(m, size=n)
    queries = keys[positives] + 0.5 * rows(n, d, 3)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return Problem(queries, keys, positives, **options)


def excluding(n: int, m: int) -> dict[str, np.ndarray]:
    """Ids that exclude a fifth of the pairs, positives among them, and a mask."""
    return {
        "query_ids": np.arange(n) % 5 - 1,
        "key_ids": np.arange(m) % 5 - 1,
        "key_mask": np.arange(m) % 7 != 3,
    }


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(value[~finite], expected[~finite])
    scale = np.linalg.norm(expected[finite])
    error = np.linalg.norm(decode(value)[finite] - expected[finite])
    return error / scale if scale > 0 else error


NAMES = ["loss", "log_sum_exp", "positive", "grad_queries", "grad_keys", "grad_temperature"]


def assert_close(values, expected, tolerance, names=NAMES) -> None:
    errors = {
        name: relative_error(value, right)
        for name, value, right in zip(names, values, expected, strict=True)
    }
    assert max(errors.values()) <= tolerance, errors


def tolerance_of(case: Problem) -> float:
    return TOLERANCES.get((case.engine, case.dtype), HALF_TOLERANCE)


def check(library, case: Problem) -> None:
    """Forward, backward and both at once against float64, with sweeps split and whole."""
    tolerance = tolerance_of(case)
    expected = case.oracle()
    assert_close(case.backward(library), expected[3:], tolerance, NAMES[3:])
    device(library, blocks=1)
    assert_close(case.forward(library), expected[:3], tolerance, NAMES[:3])
    assert_close(case.forward_backward(library), expected, tolerance)
    assert case.error_flag() == 0


SIZES = [
    (1, 1, 3),
    (2, 1, 17),
    (1, 2, 32),
    (63, 65, 17),
    (64, 64, 64),
    (65, 63, 123),
    (100, 200, 100),
    (200, 100, 32),
    (130, 70, 256),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(("engine", "dtype"), EXACT_ENGINES)
def test_float32(library, size, exclude, engine, dtype):
    options = excluding(*size[:2]) if exclude else {}
    check(library, problem(*size, engine=engine, dtype=dtype, **options))


@pytest.mark.parametrize("size", [(2, 3, 3), (63, 65, 17), (65, 63, 64), (70, 130, 123)])
@pytest.mark.parametrize(("engine", "dtype"), ENGINES[2:])
def test_half_precision(library, size, engine, dtype):
    case = problem(*size, engine=engine, dtype=dtype, **excluding(*size[:2]))
    check(library, case)


@pytest.mark.parametrize(("engine", "dtype"), [*EXACT_ENGINES, (TENSOR_CORE, BFLOAT16)])
def test_the_size_of_training(library, engine, dtype):
    case = problem(192, 192, 256, engine=engine, dtype=dtype, temperature=0.07)
    assert_close(case.forward_backward(library), case.oracle(), tolerance_of(case))


def test_tensor_cores_round_rows_of_float32(library):
    case = problem(70, 90, 100, engine=TENSOR_CORE)
    check(library, case)
    assert relative_error(case.forward(library)[0], case.oracle()[0]) > FLOAT32_TOLERANCE


def test_more_features_than_one_block_of_columns(library):
    check(library, problem(66, 40, 300, engine=SCALAR))


@pytest.mark.parametrize("blocks", [1, 2, 3, 264])
@pytest.mark.parametrize("engine", [SCALAR, TENSOR_CORE, SPLIT])
def test_streamed_rows_are_split_over_blocks(library, engine, blocks):
    case = problem(5, 300, 8, engine=engine)  # 5 tiles, or 10
    device(library, blocks=blocks)
    assert_close(case.forward_backward(library), case.oracle(), tolerance_of(case))


@pytest.mark.parametrize(("n", "m"), [(64, 4096), (4096, 64)])
@pytest.mark.parametrize(("engine", "dtype"), [(SPLIT, FLOAT32), (TENSOR_CORE, BFLOAT16)])
def test_many_rows_through_one_block(library, n, m, engine, dtype):
    """Tensor cores cut toward zero: over many rows with a common mean that does not cancel."""
    keys = 0.44 * rows(m, 64, 1) + 0.9 * rows(1, 64, 2)
    positives = np.arange(n) % m
    queries = keys[positives] + 0.5 * rows(n, 64, 3)
    case = Problem(queries, keys, positives, weights=np.full(n, 1 / n), engine=engine, dtype=dtype)
    device(library, blocks=1)
    # The tolerance is the one of few rows: with split, nothing may grow with their number.
    assert_close(case.forward_backward(library), case.oracle(), tolerance_of(case))


def test_gradients_by_finite_differences(library):
    n, m, d, step = 4, 5, 3, 1e-2
    options = {"temperature": 0.5, "query_ids": [0, 1, 2, 3], "key_ids": [9, 0, 1, 7, 7]}
    queries, keys, positives = rows(n, d, 1), rows(m, d, 2), [0, 1, 1, -1]
    case = Problem(queries, keys, positives, **options)
    gradients = case.forward_backward(library)[3:]

    def total(queries, keys, temperature):
        shifted = Problem(queries, keys, positives, **(options | {"temperature": temperature}))
        losses = shifted.forward(library)[0].astype(np.float64)
        return losses @ shifted.weights.astype(np.float64)

    inputs = [queries, keys, np.array([0.5])]
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(inputs[which])
        for index in np.ndindex(numeric.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in inputs]
                moved[which][index] += sign * step
                values.append(total(moved[0], moved[1], float(moved[2][0])))
            numeric[index] = (values[0] - values[1]) / (2 * step)
        # float32 losses over steps of 0.01 and the third derivative: 1e-4 each.
        np.testing.assert_allclose(gradient, numeric, atol=1e-3)
        assert np.abs(numeric).max() > 0.05


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_well_aligned_pairs_keep_their_digits(library, engine, dtype):
    keys = rows(90, 64, 4)
    queries = keys + 0.05 * rows(90, 64, 5)
    case = Problem(queries, keys, np.arange(90), temperature=0.05, engine=engine, dtype=dtype)
    loss, expected = case.forward(library)[0], case.oracle()[0]
    assert expected.max() < 1e-3
    assert (loss > 0).all()
    # A loss this small has the relative error of exp(similarity): similarities near 20 carry
    # 20 * 2^-23 of rounding in float32, however short the rows' own digits are.
    np.testing.assert_allclose(loss, expected, rtol=5e-5)


@pytest.mark.parametrize(("engine", "dtype"), [*EXACT_ENGINES, (TENSOR_CORE, FLOAT16)])
def test_weights_of_any_size_and_sign(library, engine, dtype):
    # Weights of single pairs near 1e-11: below what float16 can say.
    weights = np.where(np.arange(60) % 3 == 0, 0.0, 1e-9 * (-1.0) ** np.arange(60))
    case = problem(60, 130, 32, engine=engine, dtype=dtype, weights=weights)
    outputs, expected = case.forward_backward(library), case.oracle()
    assert np.abs(expected[4]).max() < 1e-7
    if dtype == FLOAT32:
        assert_close(outputs, expected, tolerance_of(case))
    np.testing.assert_array_equal(decode(outputs[3])[::3], 0.0)
    np.testing.assert_allclose(outputs[5], expected[5], rtol=HALF_TOLERANCE)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_rows_with_nothing_to_compare(library, engine, dtype):
    keys, queries = rows(70, 20, 1), rows(5, 20, 2)
    ids = {"query_ids": [1, 2, 3, 4, 5], "key_ids": np.full(70, 4)}  # query 3 has no negative
    mask = np.arange(70) != 6
    case = Problem(
        queries, keys, [3, -1, 6, 0, 69], key_mask=mask, engine=engine, dtype=dtype, **ids
    )
    check(library, case)
    loss, log_sum_exp, *_, grad_queries, grad_keys, _ = case.forward_backward(library)
    np.testing.assert_array_equal(loss[[1, 2, 3]], 0.0)
    np.testing.assert_array_equal(decode(grad_queries)[[1, 2, 3]], 0.0)
    np.testing.assert_array_equal(decode(grad_keys)[6], 0.0)
    assert log_sum_exp[3] == -np.inf
    assert (loss[[0, 4]] > 0).all()


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_everything_masked(library, engine, dtype):
    case = problem(66, 65, 20, engine=engine, dtype=dtype, key_mask=np.zeros(65))
    loss, log_sum_exp, _, *gradients = case.forward_backward(library)
    np.testing.assert_array_equal(loss, 0.0)
    np.testing.assert_array_equal(log_sum_exp, -np.inf)
    for gradient in [*gradients, *case.backward(library)]:
        np.testing.assert_array_equal(decode(gradient), 0.0)


@pytest.mark.parametrize("engine", [SCALAR, TENSOR_CORE, SPLIT])
def test_no_negatives_and_a_very_unlike_positive(library, engine):
    # Similarity -200: exp(200) is infinite, and infinity times no negative is NaN.
    case = Problem([[-1.0, 0.0]], [[1.0, 0.0]], [0], temperature=0.005, engine=engine)
    loss, _, positive, *gradients = case.forward_backward(library)
    np.testing.assert_allclose(positive, -200.0, rtol=1e-6)
    for zeros in (loss, *gradients):
        np.testing.assert_array_equal(zeros, 0.0)


@pytest.mark.parametrize("engine", [SCALAR, TENSOR_CORE, SPLIT])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows(library, engine, n, m):
    case = Problem(np.ones((n, 4)), np.ones((m, 4)), np.full(n, -1), engine=engine)
    outputs = case.forward_backward(library)
    for which in (0, 3, 4, 5):
        np.testing.assert_array_equal(outputs[which], 0.0)
    for gradient in case.backward(library):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_very_unlike_rows_do_not_underflow(library, engine, dtype):
    # All similarities near -200: as exponentials, nothing is left of them in float32.
    keys = 1.0 + 0.1 * rows(65, 64, 1)
    case = Problem(
        -keys[:40] / 8, keys / 8, np.arange(40), temperature=0.005, engine=engine, dtype=dtype
    )
    assert case.oracle()[1].max() < -150
    loss, expected = case.forward(library)[0], case.oracle()[0]
    assert expected.min() > 1
    np.testing.assert_allclose(loss, expected, atol=2e-3)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_nan_propagates(library, engine, dtype):
    keys, queries = rows(70, 20, 1), rows(70, 20, 2)
    queries[5, 3] = np.nan
    bad_query = Problem(queries, keys, np.arange(70), engine=engine, dtype=dtype)
    loss, _, _, grad_queries, grad_keys, grad_temperature = bad_query.forward_backward(library)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(70) == 5)
    np.testing.assert_array_equal(np.isnan(decode(grad_queries)).all(1), np.arange(70) == 5)
    assert np.isnan(decode(grad_keys)).any(1).all()
    assert np.isnan(grad_temperature).all()

    keys[69] = np.nan
    bad_key = Problem(rows(70, 20, 2), keys, np.arange(70), engine=engine, dtype=dtype)
    assert np.isnan(bad_key.forward_backward(library)[0]).all()


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_nan_stays_in_masked_keys_and_unused_queries(library, engine, dtype):
    keys, queries = rows(70, 20, 1), rows(66, 20, 2)
    positives, mask = np.arange(66), np.arange(70) != 69
    positives[7] = -1
    clean = Problem(queries, keys, positives, key_mask=mask, engine=engine, dtype=dtype)
    expected = clean.forward_backward(library)
    keys[69], queries[7] = np.nan, np.nan
    dirty = Problem(queries, keys, positives, key_mask=mask, engine=engine, dtype=dtype)
    outputs = dirty.forward_backward(library)
    for which in (0, 3, 4, 5):
        np.testing.assert_array_equal(outputs[which], expected[which])


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_key_that_nobody_compares_keeps_its_nan(library, engine, dtype):
    keys = rows(70, 20, 1)
    keys[[3, 66]] = np.nan
    case = Problem(rows(5, 20, 2), keys, np.full(5, -1), engine=engine, dtype=dtype)
    loss, *_, grad_queries, grad_keys, grad_temperature = case.forward_backward(library)
    for zeros in (loss, grad_queries, grad_keys, grad_temperature):
        np.testing.assert_array_equal(decode(zeros), 0.0)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_bits_do_not_depend_on_the_order_of_threads(library, engine, dtype):
    case = problem(70, 200, 40, engine=engine, dtype=dtype, **excluding(70, 200))

    def outputs():
        return [
            array
            for function in (case.forward, case.forward_backward, case.backward)
            for array in function(library)
        ]

    for blocks in (1, 264):
        device(library, blocks=blocks)
        first = outputs()
        device(library, blocks=blocks, reversed_order=True)
        for one, other in zip(first, outputs(), strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("engine", [SCALAR, TENSOR_CORE, SPLIT])
def test_positive_out_of_range_raises_the_flag(library, bad, engine):
    queries, keys = rows(3, 4, 1), rows(5, 4, 2)
    case = Problem(queries, keys, [0, bad, 2], engine=engine)
    outputs = case.forward_backward(library)
    assert case.error_flag() == 1
    without = Problem(queries, keys, [0, -1, 2], engine=engine)
    for one, other in zip(outputs, without.forward_backward(library), strict=True):
        np.testing.assert_array_equal(one, other)
    assert without.error_flag() == 0
    case.forward(library)
    assert case.error_flag() == 1
    case.backward(library, wanted=(False, True, False))
    assert case.error_flag() == 1


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", ["queries", "keys"])
def test_rows_that_are_not_aligned(library, name, dtype):
    """As a slice of rows is not. Tensor cores copy 16 bytes at a time."""
    case = problem(70, 66, 64, engine=TENSOR_CORE, dtype=dtype)
    expected = case.forward_backward(library)
    _, size = case.workspace(library, True)
    aligned = getattr(case, name)
    memory = np.zeros(aligned.size + 1, aligned.dtype)
    start = 1 if memory.ctypes.data % 16 == 0 else 0
    setattr(case, name, memory[start : start + aligned.size].reshape(aligned.shape))
    getattr(case, name)[...] = aligned
    assert getattr(case, name).ctypes.data % 16 != 0
    assert case.workspace(library, True)[1] > size  # else the emulation would end the process
    for one, other in zip(case.forward_backward(library), expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_gradients_that_nobody_wants(library):
    case = problem(20, 30, 8)
    full = case.backward(library)
    only_queries = case.backward(library, wanted=(True, False, False))
    only_keys = case.backward(library, wanted=(False, True, False))
    np.testing.assert_array_equal(only_queries[0], full[0])
    np.testing.assert_array_equal(only_keys[1], full[1])


def test_auto_asks_the_device(library):
    def losses(dtype, d, engine):
        return problem(40, 50, d, engine=engine, dtype=dtype).forward(library)[0]

    def same(dtype, d, engine):
        return np.array_equal(losses(dtype, d, AUTO), losses(dtype, d, engine))

    assert same(FLOAT32, 100, SPLIT)
    assert same(BFLOAT16, 100, TENSOR_CORE)
    assert not same(FLOAT32, 100, SCALAR)
    assert same(FLOAT32, 257, SCALAR)

    def size(engine):
        return problem(40, 50, 64, engine=engine, dtype=BFLOAT16).workspace(library, True)[1]

    assert size(AUTO) == size(TENSOR_CORE) < size(SCALAR)
    device(library, major=7)
    assert size(AUTO) == size(SCALAR)
    assert same(FLOAT32, 100, SCALAR)
    assert same(BFLOAT16, 100, SCALAR)


def refused(library, code: int, **changes) -> bool:
    case = problem(4, 5, 6)
    memory, size = case.workspace(library, True)
    outputs = [*(poisoned(4) for _ in range(3)), *case.gradients()]
    for name, value in changes.items():
        setattr(case, name, value)
    status = case.call(library.forward_backward, [case.weights], outputs, memory, size)
    assert all(np.isnan(decode(output)).all() for output in outputs)
    return status == code


def test_refused_calls(library):
    for temperature in (0.0, -1.0, np.nan, np.inf):
        assert refused(library, INVALID_VALUE, temperature=temperature)
    assert refused(library, INVALID_VALUE, query_ids=np.zeros(4, np.int32))
    assert refused(library, INVALID_VALUE, d=0)
    assert refused(library, INVALID_VALUE, n=-1)
    assert refused(library, INVALID_VALUE, m=2**31)
    device(library, major=7)
    assert refused(library, NOT_SUPPORTED, engine=SPLIT)
    assert refused(library, NOT_SUPPORTED, engine=TENSOR_CORE)
    assert library.error_string(NOT_SUPPORTED) == b"operation not supported"


def test_workspace_too_small(library):
    case = problem(4, 5, 6)
    memory, size = case.workspace(library, False)
    outputs = [poisoned(4) for _ in range(3)]
    assert case.call(library.forward, [], outputs, memory, size - 1) == INVALID_VALUE
    assert np.isnan(outputs[0]).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_normalized_rows(library, dtype):
    n, d, epsilon = 9, 37, 1e-4
    values = 3 * np.random.default_rng(0).normal(size=(n, d))
    values[4] = 0.0
    values[5] *= 1e-4  # shorter than epsilon
    inputs = encode(values, dtype)
    gradient = encode(np.random.default_rng(1).normal(size=(n, d)), dtype)
    normalized, inverse_norms = poisoned((n, d), dtype), poisoned(n)
    result = poisoned((n, d), dtype)
    sizes = (ctypes.c_int64(n), ctypes.c_int64(d), ctypes.c_float(epsilon))
    arguments = (pointer(inputs), *sizes, pointer(normalized), pointer(inverse_norms))
    assert library.normalize_rows(dtype, *arguments) == 0
    arguments = (pointer(inputs), pointer(inverse_norms), pointer(gradient), *sizes)
    assert library.normalize_rows_backward(dtype, *arguments, pointer(result)) == 0

    exact, upstream = decode(inputs), decode(gradient)
    squares = (exact**2).sum(1, keepdims=True)
    norms = np.sqrt(np.maximum(squares, np.float32(epsilon)))
    unit = exact / norms
    along = np.where(squares > epsilon, (unit * upstream).sum(1, keepdims=True), 0.0)
    tolerance = {FLOAT32: 1e-6, FLOAT16: 1e-3, BFLOAT16: 8e-3}[dtype]
    np.testing.assert_allclose(decode(normalized), unit, rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(inverse_norms, 1 / norms[:, 0], rtol=1e-6)
    assert relative_error(result, (upstream - unit * along) / norms) < tolerance


def cut(value: Fraction, bits: int, largest: Fraction) -> Fraction:
    """`value` without what is below `bits` bits after the leading one of `largest`."""
    unit = Fraction(2) ** (math.frexp(largest)[1] - 1 - bits)
    return math.trunc(value / unit) * unit


def test_sums_of_the_emulated_tensor_cores(library):
    def add(left, right, sums):
        arrays = [np.array(array, np.float32) for array in (left, right, sums)]
        library.add_products(*map(pointer, arrays))
        return arrays[2]

    # By hand: each product is cut by itself, to 2^-24 beside a sum of 1, which then has 2^-23.
    ones, e = np.ones((8, 8)), 2.0**-24
    for sizes, after in [([1.9 * e, 1.9 * e], 2 * e), ([e], 0), ([0.9 * e] * 8, 0), ([-e], -e),
                         ([-0.9 * e] * 8, 0), ([1, -1, e, e], 2 * e)]:  # fmt: skip
        left = np.pad(np.array(sizes), (0, 8 - len(sizes)))
        np.testing.assert_array_equal(add(left, ones, np.ones(8)), 1 + after)

    random = np.random.default_rng(0)
    for scale in 10.0 ** np.arange(-12, 13, 4):
        left, right = (decode(encode(random.normal(size=s) * scale, BFLOAT16)) for s in (8, (8, 8)))
        sums = np.float32(random.normal(size=8) * scale)
        expected = []
        for column, start in zip(right.T, sums, strict=True):
            terms = [Fraction(float(start))]
            terms += [Fraction(a) * Fraction(b) for a, b in zip(left, column, strict=True)]
            total = sum(cut(term, 24, max(map(abs, terms))) for term in terms)
            expected.append(float(cut(total, 23, abs(total))))
        np.testing.assert_array_equal(add(left, right, sums), expected)

    infinite = add(np.ones(8), np.where(np.eye(8), [np.inf] * 4 + [np.nan] * 4, 1), np.ones(8))
    np.testing.assert_array_equal(infinite, [np.inf] * 4 + [np.nan] * 4)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_conversions_of_the_emulation(library, dtype):
    # Every finite number of 16 bits, and the middles between neighbours, which go to even.
    bits = np.arange(0x7C00 if dtype == FLOAT16 else 0x7F7F, dtype=np.uint16)
    exact = decode(bits.view(np.float16) if dtype == FLOAT16 else bits)
    values = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2, exact[1:] * 1.0001, [np.inf]])
    values = np.concatenate([values, -values]).astype(np.float32)
    rounded, back = np.zeros(len(values), np.uint16), poisoned(len(values))
    library.round_trip(
        dtype == BFLOAT16,
        pointer(values),
        ctypes.c_int64(len(values)),
        pointer(rounded),
        pointer(back),
    )
    expected = encode(values, dtype)
    np.testing.assert_array_equal(rounded, expected.view(np.uint16))
    np.testing.assert_array_equal(back, decode(expected))
