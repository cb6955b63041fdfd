"""What runs on a GPU gives what the CPU gives.

    pytest -m gpu --require-gpu

With --require-gpu, none of these can be skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Regions, Segmenter
from tfmtseg.compat import keras
from tfmtseg.models.methods import FORMS, METHODS
from tfmtseg.ops import group_norm_relu, info_nce, library

pytestmark = pytest.mark.gpu

# By type, relative to the largest value: rounding of the sums, or of half precision's inputs
# and outputs, which both devices round alike but after sums in another order.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32 as written, not in TensorFloat-32."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


def on(device: str, function, *inputs):
    """Value and gradients of all inputs, computed on a device."""
    with tf.device(device):
        inputs = [tf.identity(each) for each in inputs]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
            total = tf.reduce_sum(tf.cast(value, tf.float32) * tf.cast(value, tf.float32))
        results = [value, *tape.gradient(total, inputs)]
    for result in results:  # TensorFlow puts an op without a kernel elsewhere, silently
        assert result.device.endswith(device), f"computed on {result.device}, not on {device}"
    return [np.array(tf.cast(each, tf.float64)) for each in results]


def assert_alike(results, expected, tolerance: float) -> None:
    for a, b in zip(results, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def random(shape, dtype: str, seed: int) -> tf.Tensor:
    return tf.cast(tf.random.stateless_normal(shape, (seed, 0)), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("normalize", [True, False])  # normalised rows are float32
@pytest.mark.parametrize(("count", "features"), [(100, 17), (300, 256), (70, 300)])
def test_info_nce(dtype, normalize, count, features):
    """Both products on tensor cores, those with more than 256 features without."""
    assert library.record().architectures
    rows = [random((count, features), dtype, seed) for seed in (0, 1)]
    if not normalize:  # about as long as normalised ones
        rows = [each * tf.cast(features**-0.5, dtype) for each in rows]
    numbers = np.arange(count)
    candidates = {
        "positives": np.where(numbers % 9 == 8, -1, (numbers * 7) % count),
        "query_ids": numbers % 5,
        "key_ids": numbers % 6,
        "key_mask": numbers % 11 != 10,
        "row_weights": 1 + numbers % 3,
        "normalize": normalize,
    }

    def native(queries, keys, temperature):
        options = candidates | {"temperature": temperature, "implementation": "native"}
        return info_nce(queries, keys, **options)

    def reference(queries, keys, temperature):
        options = candidates | {"temperature": temperature, "implementation": "reference"}
        return info_nce(queries, keys, **options)

    # float32 rows may be taken in two bfloat16 parts, which keep 16 bits of 24.
    tolerance = 1e-4 if dtype == "float32" else TOLERANCES[dtype]
    inputs = *rows, tf.constant(0.2)
    assert_alike(on("GPU:0", native, *inputs), on("CPU:0", reference, *inputs), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 5, 4, 3, 8), (1, 24, 20, 16, 32)])
def test_group_norm_relu(dtype, shape):
    x = random(shape, dtype, 0) * 2 + 3
    gamma, beta = random(shape[-1:], "float32", 1), random(shape[-1:], "float32", 2)

    def reference(*inputs):
        return group_norm_relu(*inputs, 8, implementation="reference")

    def native(*inputs):
        return group_norm_relu(*inputs, 8, implementation="native")

    expected = on("CPU:0", reference, x, gamma, beta)
    assert_alike(on("GPU:0", native, x, gamma, beta), expected, 4 * TOLERANCES[dtype])


# Every method, and every form of the contrast.
CASES = {
    **{method: {"method": method} for method in METHODS},
    **{form: {"method": "bcpcpcseg", "contrastive_form": form} for form in FORMS},
}


def step_on(device: str, case: str, dtype: str) -> dict[str, float]:
    """What a training step shows: losses and scores before its update."""
    images = random((2, 16, 16, 16, 2), "float32", 0)
    labels = tf.random.stateless_uniform((2, 16, 16, 16), (1, 0), 0, 4, tf.int32)
    with tf.device(device):
        keras.utils.set_random_seed(3)
        model = Segmenter(
            Regions.parse("brats_msd"), width=8, dropout=0.0, cube_size=8, predictor_blocks=1,
            dtype=dtype, **CASES[case],
        )  # fmt: skip
        model.build((None, 16, 16, 16, 2))
        model.compile(keras.optimizers.SGD(0.1))
        model.optimizer.iterations.assign(2)  # from then on, a teacher labels
        data = images, labels, tf.constant([1.0, 0.0])
        return {name: float(value) for name, value in model.train_step(data).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_training_step(case):
    """The same numbers, summed in another order."""
    expected = step_on("CPU:0", case, "float32")
    for name, value in step_on("GPU:0", case, "float32").items():
        assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_in_mixed_precision(case, dtype):
    """What `--precision=auto` takes on GPUs. Features of 8 or 11 bits: the losses are alike."""
    expected = step_on("GPU:0", case, "float32")
    for name, value in step_on("GPU:0", case, dtype).items():
        assert np.isfinite(value), name
        if name.endswith("loss"):
            assert value == pytest.approx(expected[name], rel=0.1, abs=0.05), name
