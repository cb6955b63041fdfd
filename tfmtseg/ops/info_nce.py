"""InfoNCE: every query has to find its own key among all keys."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg.ops import library, native, reference
from tfmtseg.ops.reference import Candidates

REDUCTIONS = ("none", "mean", "sum")


def info_nce(
    queries: tf.Tensor,
    keys: tf.Tensor,
    *,
    positives: tf.Tensor | None = None,
    query_labels: tf.Tensor | None = None,
    key_labels: tf.Tensor | None = None,
    temperature: tf.Tensor | float = 0.1,
    normalize: bool = True,
    query_ids: tf.Tensor | None = None,
    key_ids: tf.Tensor | None = None,
    key_mask: tf.Tensor | None = None,
    row_weights: tf.Tensor | None = None,
    reduction: str = "none",
    implementation: str = "auto",
) -> tf.Tensor:
    """InfoNCE loss, in nats, without the matrix of similarities in memory.

    `loss_i = -mean_p log(exp(s_ip) / sum_j exp(s_ij))` with `s_ij = q_i . k_j /
    temperature`, where `p` runs over the positives of query `i` and `j` over positives
    and negatives. A query has one positive, by its row, or those of its label
    (supervised contrastive). Queries without a positive, and those without a negative
    and with one positive, have loss 0 and gradient 0.

    With `reduction="mean"` or `"sum"` the gradients are made together with the loss,
    from one set of logits, which saves a quarter of the work in training, except in float16.

    Args:
        queries: Float32, bfloat16 or float16, `(N, D)`.
        keys: The same type, `(M, D)`.
        positives: Integers `(N,)`, the row of `keys` that each query has to find;
            negative for none. Defaults to key `i` for query `i`.
        query_labels: Integers `(N,)`, instead of `positives`: keys of the same label
            are the query's positives.
        key_labels: Integers `(M,)`; given together with `query_labels`.
        temperature: Positive number or scalar tensor.
        normalize: Whether to scale queries and keys to length 1 first, in float32; they stay
            float32 then.
        query_ids: Integers `(N,)`. A pair of query and key with equal ids is not
            compared, unless `positives` names it.
        key_ids: Integers `(M,)`; given together with `query_ids`.
        key_mask: Booleans `(M,)`; False leaves a key out everywhere.
        row_weights: Floats `(N,)`, factors of the losses.
        reduction: `"none"`, `"sum"`, or `"mean"`: the sum divided by that of the
            weights, or by `N` without weights.
        implementation: As for `tfmtseg.ops.library.choose`; with labels, `"auto"` is plain
            TensorFlow where there is a GPU, for which the native op has no kernel then.
            The native op does not run under XLA.

    Returns:
        Float32, `(N,)`, or `()` when reduced. Differentiable in `queries`, `keys`,
        `temperature` and `row_weights`; once, with the native op.

    Raises:
        ValueError: If a rank or type is wrong, feature counts or types differ, only one of two
            arguments that belong together is given, or a name is unknown.
        tf.errors.InvalidArgumentError: If the temperature is not positive and finite, a
            positive is no row of `keys`, or a number does not fit into `int32`.
        tfmtseg.ops.library.NativeOpsError: If `"native"` is asked for and cannot be
            built or loaded.

    Reference:
        [van den Oord et al., 2018](https://arxiv.org/abs/1807.03748), equation 4;
        [Khosla et al., 2020](https://arxiv.org/abs/2004.11362), equation 2.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: value is {reduction!r}, must be one of {', '.join(REDUCTIONS)}"
        )
    if implementation == "auto" and query_labels is not None and library.uses_gpu():
        implementation = "reference"  # the native op compares by label on CPUs alone
    backend = native if library.choose(implementation) == "native" else reference
    queries, keys = _rows(queries, keys)
    candidates = _candidates(
        queries, keys, positives, query_labels, key_labels, query_ids, key_ids, key_mask
    )
    if normalize:
        queries, keys = _normalized(queries, keys, candidates)
    temperature = _positive(temperature)
    weights = None
    if row_weights is not None:
        weights = _vector("row_weights", row_weights, queries, tf.float32)
    if reduction == "none":
        losses = _each(backend, queries, keys, temperature, candidates)
        return losses if weights is None else weights * losses
    if weights is None:
        weights = tf.ones(tf.shape(queries)[:1])
    if reduction == "mean":
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
    if queries.dtype == tf.float16:
        # Gradients made beforehand would vanish in float16 before the loss scale reaches them.
        losses = _each(backend, queries, keys, temperature, candidates)
        return tf.reduce_sum(weights * losses)
    return _weighted_sum(backend, queries, keys, temperature, candidates, weights)


def nt_xent(
    first: tf.Tensor, second: tf.Tensor, *, temperature: tf.Tensor | float = 0.1, **kwargs: Any
) -> tf.Tensor:
    """NT-Xent: both views of a sample find each other among all views of a batch.

    Args:
        first: Float, `(N, D)`, one view of each sample.
        second: The same shape, the other view.
        temperature: Positive number or scalar tensor.
        **kwargs: `normalize`, `reduction` and `implementation` of `info_nce`.

    Returns:
        Float32, `(2 N,)` for the first and then the second views, or `()` when reduced.

    Reference:
        [Chen et al., 2020](https://arxiv.org/abs/2002.05709), equation 1.
    """
    views = tf.concat([first, second], 0)
    samples = tf.shape(first)[0]
    own = tf.range(2 * samples)
    return info_nce(
        views,
        views,
        positives=tf.concat([own[samples:], own[:samples]], 0),
        query_ids=own,
        key_ids=own,
        temperature=temperature,
        **kwargs,
    )


def supervised_contrastive(
    rows: tf.Tensor, labels: tf.Tensor, *, temperature: tf.Tensor | float = 0.1, **kwargs: Any
) -> tf.Tensor:
    """Supervised contrastive loss: rows of one label find each other among all rows.

    Args:
        rows: Float, `(N, D)`.
        labels: Integers, `(N,)`.
        temperature: Positive number or scalar tensor.
        **kwargs: `normalize`, `reduction` and `implementation` of `info_nce`.

    Returns:
        Float32, `(N,)`, 0 for the only row of a label, or `()` when reduced.

    Reference:
        [Khosla et al., 2020](https://arxiv.org/abs/2004.11362), equation 2.
    """
    own = tf.range(tf.shape(rows)[0])
    return info_nce(
        rows,
        rows,
        query_labels=labels,
        key_labels=labels,
        query_ids=own,
        key_ids=own,
        temperature=temperature,
        **kwargs,
    )


def retrieval_accuracy(
    queries: tf.Tensor,
    keys: tf.Tensor,
    *,
    positives: tf.Tensor | None = None,
    query_labels: tf.Tensor | None = None,
    key_labels: tf.Tensor | None = None,
    normalize: bool = True,
    query_ids: tf.Tensor | None = None,
    key_ids: tf.Tensor | None = None,
    key_mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Whether each query is more similar to a positive than to every negative.

    With labels, this is whether the most similar key is of the query's label.

    Args:
        queries: As for `info_nce`, like all other arguments.
        keys: See `queries`.
        positives: See `queries`.
        query_labels: See `queries`.
        key_labels: See `queries`.
        normalize: See `queries`.
        query_ids: See `queries`.
        key_ids: See `queries`.
        key_mask: See `queries`.

    Returns:
        Float32, `(N,)`: 1 or 0; 0 without a positive. Has no gradient.
    """
    queries, keys = _rows(tf.stop_gradient(queries), tf.stop_gradient(keys))
    candidates = _candidates(
        queries, keys, positives, query_labels, key_labels, query_ids, key_ids, key_mask
    )
    if normalize:
        queries, keys = _normalized(queries, keys, candidates)
    return reference.accuracies(queries, keys, candidates)


def _each(
    backend: Any,
    queries: tf.Tensor,
    keys: tf.Tensor,
    temperature: tf.Tensor,
    candidates: Candidates,
) -> tf.Tensor:
    """The loss of each row; the gradient makes the logits again."""

    @tf.custom_gradient
    def forward(queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor) -> Any:
        losses = backend.losses(queries, keys, temperature, candidates)

        def gradient(upstream: tf.Tensor | tf.IndexedSlices) -> tuple[tf.Tensor, ...]:
            upstream = tf.convert_to_tensor(upstream)  # sparse, where some losses were picked
            _, by_queries, by_keys, by_temperature = backend.losses_with_gradients(
                queries, keys, temperature, candidates, upstream
            )
            return (
                tf.cast(by_queries, queries.dtype),
                tf.cast(by_keys, keys.dtype),
                by_temperature,
            )

        return losses, gradient

    return forward(queries, keys, temperature)


def _weighted_sum(
    backend: Any,
    queries: tf.Tensor,
    keys: tf.Tensor,
    temperature: tf.Tensor,
    candidates: Candidates,
    weights: tf.Tensor,
) -> tf.Tensor:
    """The weighted sum of the losses; the gradient is a scaling of what is made with it."""

    @tf.custom_gradient
    def forward(
        queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor, weights: tf.Tensor
    ) -> Any:
        losses, *gradients = backend.losses_with_gradients(
            queries, keys, temperature, candidates, weights
        )

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            by_queries, by_keys, by_temperature = (
                upstream * tf.cast(part, tf.float32) for part in gradients
            )
            return (
                tf.cast(by_queries, queries.dtype),
                tf.cast(by_keys, keys.dtype),
                by_temperature,
                upstream * losses,
            )

        return tf.reduce_sum(weights * losses), gradient

    return forward(queries, keys, temperature, weights)


def _rows(queries: tf.Tensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    queries, keys = tf.convert_to_tensor(queries), tf.convert_to_tensor(keys)
    for name, rows in (("queries", queries), ("keys", keys)):
        if rows.shape.rank != 2:
            raise ValueError(f"{name}: shape is {rows.shape}, must be (rows, features)")
    if not queries.shape[1:].is_compatible_with(keys.shape[1:]):
        raise ValueError(
            f"queries, keys: shapes are {queries.shape} and {keys.shape}, must agree in features"
        )
    known = (tf.float32, tf.bfloat16, tf.float16)
    if queries.dtype != keys.dtype or queries.dtype not in known:
        raise ValueError(
            f"queries, keys: types are {queries.dtype.name} and {keys.dtype.name}, must be the "
            "same: float32, bfloat16 or float16"
        )
    return queries, keys


def _normalized(
    queries: tf.Tensor, keys: tf.Tensor, candidates: Candidates
) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows of length 1, in float32.

    What is left out may be NaN, and the gradient by it is 0.
    """
    queries, keys = tf.cast(queries, tf.float32), tf.cast(keys, tf.float32)
    if candidates.key_mask is not None:
        keys = tf.where(candidates.key_mask[:, None], keys, 0.0)
    return _unit(queries), _unit(keys)


@tf.custom_gradient
def _unit(rows: tf.Tensor) -> Any:
    """`tf.math.l2_normalize`, but rows whose result has gradient 0 have gradient 0, also NaN."""
    least = 1e-12
    unit = tf.math.l2_normalize(rows, axis=-1, epsilon=least)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        squares = tf.reduce_sum(tf.square(rows), -1, keepdims=True)
        along = tf.reduce_sum(upstream * unit, -1, keepdims=True)
        across = upstream - tf.where(squares >= least, along, 0.0) * unit
        result = across * tf.math.rsqrt(tf.maximum(squares, least))
        return tf.where(tf.reduce_any(upstream != 0, -1, keepdims=True), result, 0.0)

    return unit, gradient


def _vector(name: str, values: Any, rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`values` as a vector with one entry for each of `rows`."""
    values = tf.convert_to_tensor(values)
    if values.shape.rank != 1 or not values.shape.is_compatible_with(rows.shape[:1]):
        raise ValueError(f"{name}: shape is {values.shape}, must be {rows.shape[:1]}")
    if dtype != tf.int32 or values.dtype == tf.int32:
        return tf.cast(values, dtype)
    if not values.dtype.is_integer:
        raise ValueError(f"{name}: type is {values.dtype.name}, must be an integer")
    # Checked in their own type: a cast wraps what it cannot hold.
    own, limits = values.dtype, []
    if own.max > dtype.max:
        limits.append(tf.debugging.assert_less_equal(values, tf.constant(dtype.max, own), name))
    if own.min < dtype.min:
        limits.append(tf.debugging.assert_greater_equal(values, tf.constant(dtype.min, own), name))
    with tf.control_dependencies([limit for limit in limits if limit is not None]):
        return tf.cast(values, dtype)


def _candidates(
    queries: tf.Tensor,
    keys: tf.Tensor,
    positives: tf.Tensor | None,
    query_labels: tf.Tensor | None,
    key_labels: tf.Tensor | None,
    query_ids: tf.Tensor | None,
    key_ids: tf.Tensor | None,
    key_mask: tf.Tensor | None,
) -> Candidates:
    if (query_labels is None) != (key_labels is None):
        raise ValueError("query_labels, key_labels: one is None, must be both or neither")
    if query_labels is not None and positives is not None:
        raise ValueError("positives: given beside query_labels, must be one of them")
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids, key_ids: one is None, must be both or neither")

    def vector(name: str, values: Any, rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor | None:
        return None if values is None else _vector(name, values, rows, dtype)

    if query_labels is not None:
        positives = _vector("query_labels", query_labels, queries, tf.int32)
    else:
        if positives is None:
            positives = tf.range(tf.shape(queries)[0])
        positives = _vector("positives", positives, queries, tf.int32)
        rule = "positives must be less than the number of keys"
        inside = tf.debugging.assert_less(positives, tf.shape(keys)[0], rule)
        with tf.control_dependencies([] if inside is None else [inside]):
            positives = tf.identity(positives)
    return Candidates(
        positives,
        vector("key_labels", key_labels, keys, tf.int32),
        vector("query_ids", query_ids, queries, tf.int32),
        vector("key_ids", key_ids, keys, tf.int32),
        vector("key_mask", key_mask, keys, tf.bool),
    )


def _positive(temperature: tf.Tensor | float) -> tf.Tensor:
    temperature = tf.cast(temperature, tf.float32)
    if temperature.shape.rank != 0:
        raise ValueError(f"temperature: shape is {temperature.shape}, must be ()")
    rule = "temperature must be positive and finite"
    checks = [
        tf.debugging.assert_positive(temperature, rule),
        tf.debugging.assert_less(temperature, tf.constant(float("inf")), rule),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(temperature)
