from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.ops import info_nce, retrieval_accuracy


def arrays(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (n, d), keys (m, d) and the row of each query's positive (n,)."""
    random = np.random.default_rng(seed)
    queries, keys = random.normal(size=(n, d)), random.normal(size=(m, d))
    return queries.astype(np.float32), keys.astype(np.float32), random.integers(m, size=n)


def by_hand(
    queries, keys, positives, temperature=0.1, normalize=True, query_ids=None, key_ids=None
) -> np.ndarray:
    """The definition, row by row in float64."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    if normalize:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    losses = []
    for i, positive in enumerate(positives):
        similar = keys @ queries[i] / temperature
        negatives = [
            similar[j]
            for j in range(len(keys))
            if j != positive and (query_ids is None or query_ids[i] != key_ids[j])
        ]
        # log(1 + sum exp(s_j - s_p)) keeps its digits where the sum is far below 1.
        losses.append(np.log1p(np.sum(np.exp(np.array(negatives) - similar[positive]))))
    return np.array(losses)


def numeric_gradient(function, value, step=1e-5) -> np.ndarray:
    """Central differences of a scalar function of a float64 array."""
    value = np.array(value, np.float64)
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        shifted = value.copy()
        shifted[index] += step
        above = function(shifted)
        shifted[index] -= 2 * step
        gradient[index] = (above - function(shifted)) / (2 * step)
    return gradient


def with_ids(n: int, m: int, positives: np.ndarray) -> dict[str, np.ndarray]:
    """Ids that leave out some pairs, the positives of all even queries among them."""
    query_ids = np.arange(n) % 3
    key_ids = np.arange(m) % 4
    key_ids[positives[::2]] = query_ids[::2]
    return {"query_ids": query_ids, "key_ids": key_ids}


# Sizes off any tile, one row, more queries than keys, long features.
SIZES = [(1, 1, 1), (1, 5, 3), (5, 1, 2), (7, 13, 5), (33, 65, 17), (70, 40, 130)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ids", [False, True])
def test_matches_float64(size, normalize, ids):
    queries, keys, positives = arrays(*size)
    arguments = with_ids(*size[:2], positives) if ids else {}
    arguments |= {"temperature": 0.3, "normalize": normalize}
    result = info_nce(queries, keys, positives=positives, **arguments)
    assert result.dtype == tf.float32
    # Logits are up to 100 (raw, 130 features): rounded to 1e-5 in float32.
    np.testing.assert_allclose(
        result, by_hand(queries, keys, positives, **arguments), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ids", [False, True])
def test_gradients_of_queries_keys_and_temperature(normalize, ids):
    queries, keys, positives = arrays(5, 7, 3)
    weights = np.random.default_rng(1).normal(size=5)
    options = {"normalize": normalize, **(with_ids(5, 7, positives) if ids else {})}

    variables = [tf.constant(queries), tf.constant(keys), tf.constant(0.3)]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        losses = info_nce(
            variables[0], variables[1], positives=positives, temperature=variables[2], **options
        )
        total = tf.reduce_sum(losses * weights.astype(np.float32))
    gradients = tape.gradient(total, variables)

    def objective(q=queries, k=keys, temperature=0.3):
        return weights @ by_hand(q, k, positives, float(temperature), **options)

    expected = [
        numeric_gradient(lambda q: objective(q=q), queries),
        numeric_gradient(lambda k: objective(k=k), keys),
        numeric_gradient(lambda t: objective(temperature=t), 0.3),
    ]
    for gradient, right in zip(gradients, expected, strict=True):
        assert np.abs(right).max() > 0.01
        # float32 against central differences; entries are of the order of 1 to 100.
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=2e-4)


def test_own_key_is_the_default_positive():
    queries, keys, _ = arrays(6, 9, 4)
    np.testing.assert_array_equal(
        info_nce(queries, keys), info_nce(queries, keys, positives=np.arange(6))
    )


def test_ids_leave_out_negatives_but_never_the_positive():
    keys = np.eye(3, dtype=np.float32)
    queries = keys[:1]
    # Similarity 1 to the positive and 0 to two others, temperature 1.
    compare = functools.partial(info_nce, queries, keys, positives=[0], temperature=1.0)
    all_three = compare(query_ids=[9], key_ids=[0, 1, 2])
    np.testing.assert_allclose(all_three, [np.log(1 + 2 / np.e)], rtol=1e-6)
    without_second = compare(query_ids=[5], key_ids=[5, 5, 2])  # the positive has this id too
    np.testing.assert_allclose(without_second, [np.log(1 + 1 / np.e)], rtol=1e-6)
    without_any = compare(query_ids=[5], key_ids=[5, 5, 5])
    np.testing.assert_array_equal(without_any, [0.0])


def test_row_without_negatives_has_a_zero_gradient():
    queries = tf.constant(arrays(2, 3, 4)[0])
    with tf.GradientTape() as tape:
        tape.watch(queries)
        loss = info_nce(queries, queries, query_ids=[1, 1], key_ids=[1, 1])
    np.testing.assert_array_equal(loss, [0, 0])
    np.testing.assert_array_equal(tape.gradient(loss, queries), np.zeros((2, 4)))


def test_zero_vectors_have_finite_gradients():
    queries = tf.Variable(np.zeros((3, 4), np.float32))
    with tf.GradientTape() as tape:
        loss = info_nce(queries, np.eye(3, 4, dtype=np.float32))
    np.testing.assert_allclose(loss, np.log(3) * np.ones(3), rtol=1e-6)
    assert np.isfinite(tape.gradient(loss, queries)).all()


def test_keeps_its_digits_where_the_naive_form_loses_them():
    # Queries that found their keys, at temperature 0.05: similarities near 20, where
    # neighbouring float32 numbers lie 1.9e-6 apart, and losses between 1e-12 and 1e-7.
    keys = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:40]
    keys += 0.02 * np.random.default_rng(1).normal(size=keys.shape)
    keys = keys.astype(np.float32)
    queries = (3 * keys).astype(np.float32)
    expected = by_hand(queries, keys, np.arange(40), temperature=0.05)
    assert expected.max() < 2e-6

    result = info_nce(queries, keys, temperature=0.05).numpy()
    assert (result > 0).all()
    # The relative error of a loss this small is the absolute error of the similarities.
    np.testing.assert_allclose(result, expected, rtol=5e-5)

    q, k = tf.math.l2_normalize(queries, 1), tf.math.l2_normalize(keys, 1)
    logits = tf.matmul(q, k, transpose_b=True) / 0.05
    positive = tf.reduce_sum(q * k, 1) / 0.05
    naive = (tf.reduce_logsumexp(logits, 1) - positive).numpy()
    assert (np.abs(naive - expected) > 0.9 * expected).all()
    assert (naive <= 0).any()


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    queries, keys, positives = arrays(9, 11, 6)
    queries, keys = tf.cast(queries, dtype), tf.cast(keys, dtype)
    result = info_nce(queries, keys, positives=positives)
    assert result.dtype == tf.float32
    wide = [tf.cast(rows, tf.float32).numpy() for rows in (queries, keys)]
    np.testing.assert_allclose(result, by_hand(*wide, positives), rtol=1e-5, atol=1e-5)


def test_inside_a_graph_with_unknown_sizes():
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None], tf.int64),
        ]
    )
    def traced(queries, keys, positives):
        return info_nce(queries, keys, positives=positives)

    for size in ((3, 4, 5), (8, 6, 2)):
        queries, keys, positives = arrays(*size)
        np.testing.assert_allclose(
            traced(queries, keys, positives), by_hand(queries, keys, positives), rtol=1e-5
        )


def test_equals_npairs_loss_of_tensorflow_addons():
    # The only independent InfoNCE with the same name for things; it needs TensorFlow 2.15.
    addons = pytest.importorskip(
        "tensorflow_addons", reason="tensorflow_addons needs the environment with TensorFlow 2.15"
    )
    queries, keys, _ = arrays(12, 12, 8)
    similarity = queries @ keys.T / 3.0
    expected = addons.losses.npairs_loss(np.arange(12), similarity)
    result = info_nce(queries, keys, temperature=3.0, normalize=False)
    np.testing.assert_allclose(np.mean(result), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        (np.ones((2, 3, 1)), np.ones((2, 3)), {}, "queries: shape is"),
        (np.ones((2, 3)), np.ones(3), {}, "keys: shape is"),
        (np.ones((2, 3)), np.ones((2, 4)), {}, "must agree in features"),
        (np.ones((2, 3)), np.ones((2, 3)), {"query_ids": [0, 1]}, "must be both or neither"),
        (np.ones((2, 3)), np.ones((2, 3)), {"key_ids": [0, 1]}, "must be both or neither"),
    ],
)
@pytest.mark.parametrize("function", [info_nce, retrieval_accuracy])
def test_bad_calls(function, queries, keys, options, message):
    with pytest.raises(ValueError, match=message):
        function(queries.astype(np.float32), keys.astype(np.float32), **options)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    queries, keys, positives = arrays(2, 3, 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="temperature must be positive"):
        info_nce(queries, keys, positives=positives, temperature=temperature)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_retrieval_accuracy_by_counting(ids, normalize):
    queries, keys, positives = arrays(60, 7, 3)
    options = with_ids(60, 7, positives) if ids else {}
    lengths = np.linalg.norm(keys, axis=1) if normalize else 1.0
    similar = queries @ keys.T / lengths  # the length of a query does not change its order
    expected = []
    for i, positive in enumerate(positives):
        others = [
            similar[i, j]
            for j in range(7)
            if j != positive and not (ids and options["query_ids"][i] == options["key_ids"][j])
        ]
        expected.append(float(all(similar[i, positive] > other for other in others)))
    result = retrieval_accuracy(queries, keys, positives=positives, normalize=normalize, **options)
    np.testing.assert_array_equal(result, expected)
    assert 0 < np.mean(expected) < 1


def test_retrieval_accuracy_counts_a_tie_as_wrong():
    keys = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    np.testing.assert_array_equal(retrieval_accuracy(keys, keys), [0, 0, 1])
