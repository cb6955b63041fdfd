from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.ops import (
    info_nce,
    library,
    native,
    nt_xent,
    reference,
    retrieval_accuracy,
    supervised_contrastive,
)

both = pytest.mark.parametrize("implementation", ["reference", "native"])


def arrays(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (n, d), keys (m, d) and the row of each query's positive (n,)."""
    random = np.random.default_rng(seed)
    queries, keys = random.normal(size=(n, d)), random.normal(size=(m, d))
    return queries.astype(np.float32), keys.astype(np.float32), random.integers(m, size=n)


def by_hand(
    queries,
    keys,
    positives=None,
    temperature=0.1,
    normalize=True,
    query_ids=None,
    key_ids=None,
    key_mask=None,
    query_labels=None,
    key_labels=None,
) -> np.ndarray:
    """The definition, row by row in float64."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    if normalize:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    losses = []
    for i, query in enumerate(queries):
        similar = keys @ query / temperature
        here = [j for j in range(len(keys)) if key_mask is None or key_mask[j]]
        apart = [j for j in here if query_ids is None or query_ids[i] != key_ids[j]]
        if query_labels is None:
            own = [j for j in here if j == positives[i]]
        else:
            own = [j for j in apart if query_labels[i] == key_labels[j]]
        negatives = [similar[j] for j in apart if j not in own]
        # log(1 + sum exp(s_j - s_p)) keeps its digits where the sum is far below 1.
        terms = [
            np.logaddexp(
                0.0,
                np.logaddexp.reduce(
                    [*negatives, *(similar[j] for j in own if j != p)] - similar[p]
                ),
            )
            for p in own
        ]
        losses.append(np.mean(terms) if terms else 0.0)
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


def comparisons(kind: str, n: int, m: int, positives: np.ndarray) -> dict[str, np.ndarray]:
    """Arguments that say who is compared with whom."""
    random = np.random.default_rng(5)
    if kind == "plain":
        return {"positives": positives}
    if kind == "mask":  # some positives are masked too
        return {"positives": positives, "key_mask": random.uniform(size=m) < 0.7}
    ids = {"query_ids": np.arange(n) % 3, "key_ids": np.arange(m) % 4}
    if kind == "labels":  # a query of a label that no key has
        labels = {
            "query_labels": random.integers(4, size=n),
            "key_labels": random.integers(3, size=m),
        }
        return {**labels, **ids, "key_mask": random.uniform(size=m) < 0.9}
    # Ids that leave out some pairs, the positives of all even queries among them.
    ids["key_ids"][positives[::2]] = ids["query_ids"][::2]
    some = np.where(np.arange(n) % 5 == 4, -1, positives) if kind == "none" else positives
    return {"positives": some, **ids}


KINDS = ["plain", "mask", "ids", "none", "labels"]
# Sizes off any tile, one row, more queries than keys, long features, several tasks.
SIZES = [(1, 1, 1), (1, 5, 3), (5, 1, 2), (7, 13, 5), (33, 65, 17), (70, 40, 130), (130, 500, 20)]


@functools.cache  # for both implementations
def losses_in_float64(size, normalize, kind) -> tuple[dict, np.ndarray]:
    """Arguments and the right losses."""
    queries, keys, positives = arrays(*size)
    arguments = {"queries": queries, "keys": keys, "temperature": 0.3, "normalize": normalize}
    arguments |= comparisons(kind, *size[:2], positives)
    return arguments, by_hand(**arguments)


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64(size, normalize, kind, implementation):
    arguments, expected = losses_in_float64(size, normalize, kind)
    result = info_nce(**arguments, implementation=implementation)
    assert result.dtype == tf.float32
    # Logits are up to 100 (raw, 130 features): rounded to 1e-5 in float32.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


@functools.cache  # for both implementations
def gradients_in_float64(normalize, kind, reduction) -> tuple[list, dict, float, list]:
    """Arguments that are moved and others, a function of the losses, and its gradients."""
    queries, keys, positives = arrays(10, 7, 3)
    weights = np.random.default_rng(1).uniform(0.5, 1.5, size=10)
    options = {"normalize": normalize, **comparisons(kind, 10, 7, positives)}

    def objective(q=queries, k=keys, temperature=0.3, w=weights):
        losses = by_hand(q, k, temperature=float(temperature), **options)
        # Not 1, so that a lost factor shows.
        return 3.0 * (w @ losses) / (w.sum() if reduction == "mean" else 1.0)

    gradients = [
        numeric_gradient(lambda q: objective(q=q), queries),
        numeric_gradient(lambda k: objective(k=k), keys),
        numeric_gradient(lambda t: objective(temperature=t), 0.3),
        numeric_gradient(lambda w: objective(w=w), weights),
    ]
    return [queries, keys, 0.3, weights], options, objective(), gradients


@both
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradients_of_all_inputs(normalize, kind, reduction, implementation):
    values, options, expected, gradients = gradients_in_float64(normalize, kind, reduction)
    variables = [tf.constant(value, tf.float32) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        losses = info_nce(
            *variables[:2],
            temperature=variables[2],
            row_weights=variables[3],
            reduction=reduction,
            implementation=implementation,
            **options,
        )
        assert losses.shape == ((10,) if reduction == "none" else ())
        total = 3.0 * tf.reduce_sum(losses)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    for gradient, right in zip(tape.gradient(total, variables), gradients, strict=True):
        assert np.abs(right).max() > 1e-3
        # float32 against central differences; entries are of the order of 1 to 100.
        np.testing.assert_allclose(gradient, right, rtol=2e-4, atol=2e-4 * np.abs(right).max())


@both
def test_own_key_is_the_default_positive(implementation):
    queries, keys, _ = arrays(6, 9, 4)
    np.testing.assert_array_equal(
        info_nce(queries, keys, implementation=implementation),
        info_nce(queries, keys, positives=np.arange(6), implementation=implementation),
    )


@both
def test_ids_leave_out_negatives_but_never_the_positive(implementation):
    keys = np.eye(3, dtype=np.float32)
    queries = keys[:1]
    # Similarity 1 to the positive and 0 to two others, temperature 1.
    compare = functools.partial(
        info_nce, queries, keys, positives=[0], temperature=1.0, implementation=implementation
    )
    all_three = compare(query_ids=[9], key_ids=[0, 1, 2])
    np.testing.assert_allclose(all_three, [np.log(1 + 2 / np.e)], rtol=1e-6)
    without_second = compare(query_ids=[5], key_ids=[5, 5, 2])  # the positive has this id too
    np.testing.assert_allclose(without_second, [np.log(1 + 1 / np.e)], rtol=1e-6)
    without_any = compare(query_ids=[5], key_ids=[5, 5, 5])
    np.testing.assert_array_equal(without_any, [0.0])


@both
def test_row_without_negatives_has_a_zero_gradient(implementation):
    queries = tf.constant(arrays(2, 3, 4)[0])
    with tf.GradientTape() as tape:
        tape.watch(queries)
        loss = info_nce(
            queries, queries, query_ids=[1, 1], key_ids=[1, 1], implementation=implementation
        )
    np.testing.assert_array_equal(loss, [0, 0])
    np.testing.assert_array_equal(tape.gradient(loss, queries), np.zeros((2, 4)))


@both
def test_no_negatives_and_a_very_unlike_positive(implementation):
    """Similarity -100: exp(100) is infinite in float32, and infinity times no negative is NaN."""
    queries = tf.constant([[-1.0, 0.0], [0.0, 1.0]])
    keys, temperature = tf.constant([[1.0, 0.0], [0.0, 1.0]]), tf.constant(0.01)
    with tf.GradientTape() as tape:
        tape.watch([queries, keys, temperature])
        loss = info_nce(
            queries, keys, temperature=temperature, query_ids=[7, 1], key_ids=[7, 7],
            implementation=implementation,
        )  # fmt: skip
    gradients = tape.gradient(loss, [queries, keys, temperature])
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert float(loss[0]) == 0
    np.testing.assert_array_equal(gradients[0][0], 0.0)


@both
@pytest.mark.parametrize(("n", "m"), [(0, 4), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(n, m, implementation):
    queries, keys = tf.ones((n, 5)), tf.ones((m, 5))
    with tf.GradientTape() as tape:
        tape.watch([queries, keys])
        losses = info_nce(queries, keys, positives=-np.ones(n, int), implementation=implementation)
        total = tf.reduce_sum(losses)
    np.testing.assert_array_equal(losses, np.zeros(n))
    for gradient, shape in zip(tape.gradient(total, [queries, keys]), [n, m], strict=True):
        np.testing.assert_array_equal(gradient, np.zeros((shape, 5)))
    mean = info_nce(
        queries, keys, positives=-np.ones(n, int), reduction="mean", implementation=implementation
    )
    assert float(mean) == 0


@both
def test_zero_vectors_have_finite_gradients(implementation):
    queries = tf.Variable(np.zeros((3, 4), np.float32))
    with tf.GradientTape() as tape:
        loss = info_nce(queries, np.eye(3, 4, dtype=np.float32), implementation=implementation)
    np.testing.assert_allclose(loss, np.log(3) * np.ones(3), rtol=1e-6)
    assert np.isfinite(tape.gradient(loss, queries)).all()


@both
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_is_passed_on(where, implementation):
    queries, keys, positives = arrays(4, 6, 3)
    (queries if where == "query" else keys)[2] = np.nan
    options = {"positives": positives, "implementation": implementation}
    expected = np.arange(4) == 2 if where == "query" else np.ones(4, bool)
    np.testing.assert_array_equal(np.isnan(info_nce(queries, keys, **options)), expected)
    assert np.isnan(info_nce(queries, keys, reduction="mean", **options))


@both
def test_very_negative_similarities_do_not_vanish(implementation):
    # A running maximum that starts at 0 instead of -infinity would lose all of them.
    queries, keys, positives = arrays(5, 9, 4)
    queries, keys = np.abs(queries) * 30, -np.abs(keys) * 30
    options = {"positives": positives, "normalize": False, "temperature": 1.0}
    result = info_nce(queries, keys, **options, implementation=implementation)
    expected = by_hand(queries, keys, **options)
    assert expected.max() > 1000
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-3)


@both
def test_keeps_its_digits_where_the_naive_form_loses_them(implementation):
    # Queries that found their keys, at temperature 0.05: similarities near 20, where
    # neighbouring float32 numbers lie 1.9e-6 apart, and losses between 1e-12 and 1e-7.
    keys = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:40]
    keys += 0.02 * np.random.default_rng(1).normal(size=keys.shape)
    keys = keys.astype(np.float32)
    queries = (3 * keys).astype(np.float32)
    expected = by_hand(queries, keys, np.arange(40), temperature=0.05)
    assert expected.max() < 2e-6

    result = info_nce(queries, keys, temperature=0.05, implementation=implementation).numpy()
    assert (result > 0).all()
    # The relative error of a loss this small is the absolute error of the similarities.
    np.testing.assert_allclose(result, expected, rtol=5e-5)

    q, k = tf.math.l2_normalize(queries, 1), tf.math.l2_normalize(keys, 1)
    logits = tf.matmul(q, k, transpose_b=True) / 0.05
    positive = tf.reduce_sum(q * k, 1) / 0.05
    naive = (tf.reduce_logsumexp(logits, 1) - positive).numpy()
    assert (np.abs(naive - expected) > 0.9 * expected).all()
    assert (naive <= 0).any()


@both
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_is_computed_in_float32(dtype, normalize, implementation):
    queries, keys, positives = arrays(9, 11, 6)
    queries, keys = tf.cast(queries, dtype), tf.cast(keys, dtype)
    options = {"positives": positives, "normalize": normalize}
    with tf.GradientTape() as tape:
        tape.watch(queries)
        result = info_nce(queries, keys, **options, implementation=implementation)
    assert result.dtype == tf.float32
    assert tape.gradient(result, queries).dtype == dtype
    with tf.GradientTape() as tape:
        tape.watch(queries)
        total = info_nce(queries, keys, **options, reduction="sum", implementation=implementation)
    assert tape.gradient(total, queries).dtype == dtype
    wide = [tf.cast(rows, tf.float32).numpy() for rows in (queries, keys)]
    np.testing.assert_allclose(result, by_hand(*wide, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (7, 13, 5), (48, 192, 32), (49, 385, 64), (252, 507, 123)]
)
@pytest.mark.parametrize("kind", ["plain", "ids", "labels"])
def test_products_of_bfloat16(size, kind):
    """The native op may multiply bfloat16 numbers as such, where the processor can."""
    queries, keys, positives = arrays(*size)
    queries, keys = (
        tf.cast(rows / np.linalg.norm(rows, axis=1, keepdims=True), tf.bfloat16)
        for rows in (queries, keys)
    )
    options = {"normalize": False, **comparisons(kind, *size[:2], positives)}

    def loss_and_gradients(queries, keys, implementation):
        with tf.GradientTape() as tape:
            tape.watch([queries, keys])
            losses = info_nce(queries, keys, **options, implementation=implementation)
        return losses, tape.gradient(losses, [queries, keys])

    losses, gradients = loss_and_gradients(queries, keys, "native")
    wide = [tf.cast(rows, tf.float32) for rows in (queries, keys)]
    expected, wide_gradients = loss_and_gradients(*wide, "reference")
    # Products of bfloat16 numbers are exact in float32 ...
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(gradients, wide_gradients, strict=True):
        # ... gradients are made of weights rounded to 8 bits, and rounded so themselves.
        error = np.linalg.norm(tf.cast(gradient, tf.float32) - exact)
        assert error <= 5e-3 * np.linalg.norm(exact)


@both
def test_inside_a_graph_with_unknown_sizes(implementation):
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None], tf.int64),
        ]
    )
    def traced(queries, keys, positives):
        return info_nce(queries, keys, positives=positives, implementation=implementation)

    for size in ((3, 4, 5), (8, 6, 2)):
        queries, keys, positives = arrays(*size)
        np.testing.assert_allclose(
            traced(queries, keys, positives), by_hand(queries, keys, positives), rtol=1e-5
        )


@both
@pytest.mark.parametrize(("n", "m"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_inside_a_graph_with_unknown_sizes(n, m, implementation):
    unknown = tf.TensorSpec([None, None], tf.float32)

    @tf.function(input_signature=[unknown, unknown, tf.TensorSpec([None], tf.int32)])
    def traced(queries, keys, positives):
        options = {"positives": positives, "implementation": implementation}
        with tf.GradientTape() as tape:
            tape.watch([queries, keys])
            loss = info_nce(queries, keys, reduction="mean", **options)
            loss += tf.reduce_sum(info_nce(queries, keys, **options))
        return loss, *tape.gradient(loss, [queries, keys])

    found = traced(tf.ones((n, 5)), tf.ones((m, 5)), -np.ones(n, np.int32))
    for value, shape in zip(found, [(), (n, 5), (m, 5)], strict=True):
        np.testing.assert_array_equal(value, np.zeros(shape))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_under_xla(kind, known, monkeypatch):
    """With several chunks, the last of which is smaller; XLA knows no sizes that change."""
    queries, keys, positives = arrays(23, 11, 4)
    options = comparisons(kind, 23, 11, positives)
    size = (lambda rows: [rows, 4]) if known else (lambda rows: [None, None])
    signature = [tf.TensorSpec(size(rows), tf.float32) for rows in (23, 11)]

    def loss_and_gradients(queries, keys):
        with tf.GradientTape() as tape:
            tape.watch([queries, keys])
            losses = info_nce(queries, keys, implementation="reference", **options)
            loss = tf.reduce_mean(losses) + info_nce(
                queries, keys, implementation="reference", reduction="sum", **options
            )
        found = retrieval_accuracy(queries, keys, **options)
        return losses, found, *tape.gradient(loss, [queries, keys])

    expected = loss_and_gradients(tf.constant(queries), tf.constant(keys))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 60)  # 5 rows, the last chunk has 3
    compiled = tf.function(loss_and_gradients, input_signature=signature, jit_compile=True)
    # Sums in another order: rounding of float32.
    for ours, whole in zip(compiled(queries, keys), expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6)


@both
def test_losses_of_which_some_are_picked(implementation):
    """`tf.gather` has a sparse gradient."""
    queries, keys, positives = arrays(6, 7, 4)
    gradients = []
    for pick in (lambda rows: tf.gather(rows, [4, 1]), lambda rows: rows[4:0:-3]):
        with tf.GradientTape() as tape:
            tape.watch(inputs := [tf.constant(queries), tf.constant(keys)])
            losses = info_nce(*inputs, positives=positives, implementation=implementation)
            loss = tf.reduce_mean(pick(losses))
        gradients.append(tape.gradient(loss, inputs))
    for ours, whole in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", [False, True])
def test_chunks_of_the_reference_make_no_difference(kind, graph, monkeypatch):
    queries, keys, positives = arrays(23, 11, 4)
    options = comparisons(kind, 23, 11, positives)

    def loss_and_gradients(queries, keys):
        with tf.GradientTape() as tape:
            tape.watch([queries, keys])
            loss = info_nce(queries, keys, reduction="mean", implementation="reference", **options)
        return loss, *tape.gradient(loss, [queries, keys])

    inputs = tf.constant(queries), tf.constant(keys)
    whole = loss_and_gradients(*inputs)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 60)  # 5 rows, the last chunk has 3
    if graph:
        free = tf.TensorSpec([None, 4])
        parts = tf.function(loss_and_gradients, input_signature=[free, free])(*inputs)
    else:
        parts = loss_and_gradients(*inputs)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # another order of sums


@both
def test_the_same_bits_each_time(implementation):
    queries, keys, positives = arrays(300, 700, 40)

    def gradients():
        variables = [tf.constant(queries), tf.constant(keys), tf.constant(0.2)]
        with tf.GradientTape() as tape:
            tape.watch(variables)
            loss = info_nce(
                *variables[:2],
                positives=positives,
                temperature=variables[2],
                reduction="mean",
                implementation=implementation,
            )
        return [loss, *tape.gradient(loss, variables)]

    first = gradients()
    for _ in range(3):
        for one, other in zip(first, gradients(), strict=True):
            np.testing.assert_array_equal(one, other)


@both
def test_equals_npairs_loss_of_tensorflow_addons(implementation):
    # The only independent InfoNCE with the same name for things; it needs TensorFlow 2.15.
    addons = pytest.importorskip(
        "tensorflow_addons", reason="tensorflow_addons needs the environment with TensorFlow 2.15"
    )
    queries, keys, _ = arrays(12, 12, 8)
    similarity = queries @ keys.T / 3.0
    expected = addons.losses.npairs_loss(np.arange(12), similarity)
    result = info_nce(
        queries, keys, temperature=3.0, normalize=False, implementation=implementation
    )
    np.testing.assert_allclose(np.mean(result), expected, rtol=1e-6)


@both
def test_nt_xent_by_its_definition(implementation):
    first, second, _ = arrays(5, 5, 4)
    views = np.concatenate([first, second])
    partner = np.roll(np.arange(10), 5)
    others = {"query_ids": np.arange(10), "key_ids": np.arange(10)}
    np.testing.assert_allclose(
        nt_xent(first, second, temperature=0.2, implementation=implementation),
        by_hand(views, views, partner, 0.2, **others),
        rtol=1e-5,
    )


@both
def test_supervised_contrastive_by_its_definition(implementation):
    rows, _, _ = arrays(9, 1, 4)
    labels = np.array([0, 1, 0, 2, 1, 1, 3, 0, 2])  # 3 stands alone
    similar = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = similar @ similar.T / 0.2
    expected = []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        own = [j for j in others if labels[j] == labels[i]]
        total = np.log(sum(np.exp(similar[i, j]) for j in others))
        expected.append(np.mean([total - similar[i, p] for p in own]) if own else 0.0)
    result = supervised_contrastive(rows, labels, temperature=0.2, implementation=implementation)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    assert result.numpy()[6] == 0


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        (np.ones((2, 3, 1)), ONES, {}, "queries: shape is"),
        (ONES, np.ones(3), {}, "keys: shape is"),
        (ONES, np.ones((2, 4)), {}, "must agree in features"),
        (ONES, ONES, {"query_ids": [0, 1]}, "must be both or neither"),
        (ONES, ONES, {"key_ids": [0, 1]}, "must be both or neither"),
        (ONES, ONES, {"positives": [0]}, "positives: shape is"),
    ],
)
@pytest.mark.parametrize("function", [info_nce, retrieval_accuracy])
def test_bad_calls(function, queries, keys, options, message):
    with pytest.raises(ValueError, match=message):
        function(queries.astype(np.float32), keys.astype(np.float32), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_labels": [0, 1]}, "must be both or neither"),
        ({"query_labels": [0, 1], "key_labels": [0, 1], "positives": [0, 1]}, "must be one of"),
        ({"key_mask": [True]}, "key_mask: shape is"),
        ({"row_weights": [1.0]}, "row_weights: shape is"),
        ({"temperature": [1.0, 2.0]}, "temperature: shape is"),
        ({"reduction": "all"}, "reduction: value is 'all'"),
        ({"implementation": "cuda"}, "implementation: value is 'cuda'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(ONES, ONES, **options)
    if "query_labels" in options:
        with pytest.raises(ValueError, match=message):
            retrieval_accuracy(ONES, ONES, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_types_that_cannot_be_compared(dtype):
    with pytest.raises(ValueError, match="types are"):
        info_nce(ONES.astype(dtype), ONES.astype(dtype))
    with pytest.raises(ValueError, match="types are"):
        info_nce(tf.constant(ONES), tf.cast(ONES, tf.bfloat16))


@both
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature, implementation):
    queries, keys, positives = arrays(2, 3, 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="temperature must be positive"):
        info_nce(
            queries,
            keys,
            positives=positives,
            temperature=temperature,
            implementation=implementation,
        )


@both
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_left_out_may_be_nan(normalize, implementation):
    """A masked key and a query without a positive; bfloat16 too, which has other packing."""
    queries, keys, positives = arrays(60, 70, 6)
    queries, keys = queries / 4, keys / 4
    positives[7], kept = -1, np.arange(70) != 69
    positives[positives == 69] = 3
    for dtype in (tf.float32, tf.bfloat16):
        found = {}
        for value in (0.5, np.nan):
            queries[7], keys[69] = value, value
            with tf.GradientTape() as tape:
                inputs = [tf.cast(queries, dtype), tf.cast(keys, dtype), tf.constant(0.2)]
                tape.watch(inputs)
                loss = info_nce(
                    *inputs[:2], temperature=inputs[2], positives=positives, key_mask=kept,
                    normalize=normalize, reduction="sum", implementation=implementation,
                )  # fmt: skip
            found[value] = [loss, *tape.gradient(loss, inputs)]
        for with_nan, without in zip(found[np.nan], found[0.5], strict=True):
            assert np.isfinite(tf.cast(without, tf.float32)).all()
            np.testing.assert_array_equal(
                tf.cast(with_nan, tf.float32), tf.cast(without, tf.float32)
            )
        assert not tf.cast(found[np.nan][1][7], tf.float32).numpy().any()
        assert not tf.cast(found[np.nan][2][69], tf.float32).numpy().any()


@both
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"positives": [0, 1, 2, -1], "key_mask": [True, False, True, True, True]},
        {"query_labels": [0, 9, 1, 9], "key_labels": [0, 0, 1, 1, 2]},
    ],
    ids=["positives", "labels"],
)
def test_queries_without_a_usable_positive_may_be_nan(options, normalize, implementation):
    """Their positive is masked, or no key is of their label."""
    queries, keys, _ = arrays(4, 5, 3)
    queries[[1, 3]] = np.nan
    with tf.GradientTape() as tape:
        inputs = [tf.constant(queries), tf.constant(keys)]
        tape.watch(inputs)
        loss = info_nce(*inputs, normalize=normalize, implementation=implementation, **options)
    by_queries, by_keys = tape.gradient(loss, inputs)
    np.testing.assert_array_equal(np.take(loss, [1, 3]), 0)
    np.testing.assert_array_equal(by_queries.numpy()[[1, 3]], 0)
    assert np.isfinite(by_queries).all()
    assert np.isfinite(by_keys).all()
    assert by_queries.numpy()[[0, 2]].any(axis=1).all()
    found = retrieval_accuracy(*inputs, normalize=normalize, **options)
    np.testing.assert_array_equal(np.take(found, [1, 3]), 0)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_float16_take_the_loss_scale(reduction, implementation):
    """They are far below what float16 holds until it is applied, as in mixed precision."""
    queries, keys, _ = arrays(256, 256, 64)
    keys = queries + 0.1 * keys  # well-aligned pairs: the gradients are small
    queries, keys = queries / 8, keys / 8
    scale, gradients = 2.0**15, {}
    for dtype in (tf.float16, tf.float32):
        with tf.GradientTape() as tape:
            # The same numbers in both.
            inputs = [tf.cast(tf.cast(rows, tf.float16), dtype) for rows in (queries, keys)]
            tape.watch(inputs)
            loss = scale * info_nce(
                *inputs, temperature=0.05, normalize=False, reduction=reduction,
                row_weights=tf.fill([256], 1e-3), implementation=implementation,
            )  # fmt: skip
        gradients[dtype] = [tf.cast(g, tf.float32) for g in tape.gradient(loss, inputs)]
    for half, full in zip(gradients[tf.float16], gradients[tf.float32], strict=True):
        assert np.linalg.norm(full) > 0
        # Rounded once to 11 bits.
        assert np.linalg.norm(half - full) < 1e-3 * np.linalg.norm(full)


def test_labels_take_plain_tensorflow_where_there_is_a_gpu(monkeypatch):
    """There is no native kernel for them on GPUs: the rows would go to the host and back."""
    monkeypatch.setattr(library, "uses_gpu", lambda: True)
    monkeypatch.setattr(library, "choose", lambda implementation: implementation)

    def refuse(*_):
        raise AssertionError("not asked for")

    monkeypatch.setattr(native, "losses", refuse)
    monkeypatch.setattr(reference, "losses", lambda queries, *_: tf.fill([2], 7.0))
    labels = {"query_labels": [0, 1], "key_labels": [0, 1]}
    assert info_nce(ONES, ONES, **labels).numpy().tolist() == [7.0, 7.0]
    with pytest.raises(AssertionError, match="not asked for"):
        info_nce(ONES, ONES, **labels, implementation="native")


@both
def test_positives_must_be_keys(implementation):
    with pytest.raises(tf.errors.InvalidArgumentError, match="positives must be less than"):
        info_nce(ONES, ONES, positives=[0, 2], implementation=implementation)


@pytest.mark.parametrize(
    ("large", "dtype"),
    [
        (2**40, np.int64),
        (-(2**63), np.int64),  # its magnitude is no int64
        (2**32 - 1, np.uint32),  # would become -1
        (2**32 + 7, np.uint64),
    ],
)
def test_numbers_beyond_32_bits_are_refused(large, dtype):
    ids = np.array([7, large], dtype)
    with pytest.raises(tf.errors.InvalidArgumentError, match="query_ids"):
        info_nce(ONES, ONES, query_ids=ids, key_ids=ids)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_ids_of_any_integer_type(dtype):
    queries, keys, _ = arrays(2, 2, 3)
    expected = info_nce(queries, keys, query_ids=[1, 2], key_ids=[1, 1])
    ids = {"query_ids": np.array([1, 2], dtype), "key_ids": np.array([1, 1], dtype)}
    np.testing.assert_array_equal(info_nce(queries, keys, **ids), expected)


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match="key_ids: type is float32, must be an integer"):
        info_nce(ONES, ONES, query_ids=[0, 1], key_ids=np.array([0.7, 0.2], np.float32))


def test_rows_without_features_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="0 features"):
        info_nce(np.ones((2, 0), np.float32), np.ones((2, 0), np.float32), implementation="native")


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_retrieval_accuracy_by_counting(ids, normalize):
    queries, keys, positives = arrays(60, 7, 3)
    options = comparisons("ids" if ids else "plain", 60, 7, positives)
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
    result = retrieval_accuracy(queries, keys, normalize=normalize, **options)
    np.testing.assert_array_equal(result, expected)
    assert 0 < np.mean(expected) < 1


def test_retrieval_accuracy_by_labels():
    queries, keys, _ = arrays(60, 9, 3)
    options = comparisons("labels", 60, 9, None)
    lengths = np.linalg.norm(keys, axis=1)
    expected = []
    for i, similar in enumerate(queries @ keys.T / lengths):
        here = options["key_mask"] & (options["query_ids"][i] != options["key_ids"])
        nearest = np.argmax(np.where(here, similar, -np.inf))
        expected.append(float(options["key_labels"][nearest] == options["query_labels"][i]))
    result = retrieval_accuracy(queries, keys, **options)
    np.testing.assert_array_equal(result, expected)
    assert 0 < np.mean(expected) < 1


def test_retrieval_accuracy_counts_a_tie_as_wrong():
    keys = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    np.testing.assert_array_equal(retrieval_accuracy(keys, keys), [0, 0, 1])
