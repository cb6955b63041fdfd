"""InfoNCE: every query has to find its own key among all keys."""

from __future__ import annotations

import tensorflow as tf

from tfmtseg.ops import reference


def _prepare(
    queries: tf.Tensor,
    keys: tf.Tensor,
    positives: tf.Tensor | None,
    temperature: tf.Tensor | float,
    query_ids: tf.Tensor | None,
    key_ids: tf.Tensor | None,
) -> tuple[tf.Tensor, ...]:
    """Converts and checks the arguments that the functions below share."""
    queries = tf.convert_to_tensor(queries)
    keys = tf.convert_to_tensor(keys)
    for name, rows in (("queries", queries), ("keys", keys)):
        if rows.shape.rank != 2:
            raise ValueError(f"{name}: shape is {rows.shape}, must be (rows, features)")
    if not queries.shape[1:].is_compatible_with(keys.shape[1:]):
        raise ValueError(
            f"queries, keys: shapes are {queries.shape} and {keys.shape}, must agree in features"
        )
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids, key_ids: one is None, must be both or neither")
    if positives is None:
        positives = tf.range(tf.shape(queries)[0])
    if query_ids is not None:
        query_ids = tf.convert_to_tensor(query_ids)
        key_ids = tf.convert_to_tensor(key_ids)
    temperature = tf.cast(temperature, tf.float32)
    with tf.control_dependencies(
        [tf.debugging.assert_positive(temperature, "temperature must be positive")]
    ):
        temperature = tf.identity(temperature)
    return queries, keys, tf.convert_to_tensor(positives), temperature, query_ids, key_ids


def info_nce(
    queries: tf.Tensor,
    keys: tf.Tensor,
    *,
    positives: tf.Tensor | None = None,
    temperature: tf.Tensor | float = 0.1,
    normalize: bool = True,
    query_ids: tf.Tensor | None = None,
    key_ids: tf.Tensor | None = None,
) -> tf.Tensor:
    """InfoNCE loss of every query, in nats.

    `loss_i = -log(exp(s_ip) / sum_j exp(s_ij))` with `s_ij = q_i . k_j / temperature`;
    `p` is the positive of query `i` and `j` runs over the positive and all negatives.
    A row without any negative has loss 0.

    Args:
        queries: Float, `(N, D)`.
        keys: Float, `(M, D)`.
        positives: Integers `(N,)`, the row of `keys` that each query has to find.
            Defaults to key `i` for query `i`.
        temperature: Positive number or scalar tensor.
        normalize: Whether to scale queries and keys to length 1 first.
        query_ids: Integers `(N,)`. A pair of query and key with equal ids is not
            compared, unless it is the query's positive.
        key_ids: Integers `(M,)`; given together with `query_ids`.

    Returns:
        Float32, `(N,)`. Differentiable in `queries`, `keys` and `temperature`.

    Raises:
        ValueError: If a rank is not 2, the feature counts differ or only one of the
            two ids is given.
        tf.errors.InvalidArgumentError: If the temperature is not positive.

    Reference:
        [van den Oord et al., 2018](https://arxiv.org/abs/1807.03748), equation 4.
    """
    queries, keys, positives, temperature, query_ids, key_ids = _prepare(
        queries, keys, positives, temperature, query_ids, key_ids
    )
    return reference.info_nce_reference(
        queries, keys, positives, temperature, normalize, query_ids, key_ids
    )


def retrieval_accuracy(
    queries: tf.Tensor,
    keys: tf.Tensor,
    *,
    positives: tf.Tensor | None = None,
    normalize: bool = True,
    query_ids: tf.Tensor | None = None,
    key_ids: tf.Tensor | None = None,
) -> tf.Tensor:
    """Whether each query is more similar to its positive than to every negative.

    Args:
        queries: As for `info_nce`, like all other arguments.
        keys: See `queries`.
        positives: See `queries`.
        normalize: See `queries`.
        query_ids: See `queries`.
        key_ids: See `queries`.

    Returns:
        Float32, `(N,)`: 1 or 0. Has no gradient.
    """
    queries, keys, positives, one, query_ids, key_ids = _prepare(
        queries, keys, positives, 1.0, query_ids, key_ids
    )
    logits = reference.similarities(
        tf.stop_gradient(queries), tf.stop_gradient(keys), one, normalize
    )
    positive, negatives = reference.split_candidates(logits, positives, query_ids, key_ids)
    return tf.cast(positive > tf.reduce_max(negatives, axis=1), tf.float32)
