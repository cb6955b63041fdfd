"""InfoNCE in plain TensorFlow: the twin, the oracle and the fallback of the op."""

from __future__ import annotations

import tensorflow as tf

_LEFT_OUT = -1e30  # far below any similarity, finite, so that no NaN arises from it


def similarities(
    queries: tf.Tensor,
    keys: tf.Tensor,
    temperature: tf.Tensor,
    normalize: bool,
) -> tf.Tensor:
    """`queries . keys / temperature`, float32, `(N, M)`."""
    queries = tf.cast(queries, tf.float32)
    keys = tf.cast(keys, tf.float32)
    if normalize:
        queries = tf.math.l2_normalize(queries, axis=-1)
        keys = tf.math.l2_normalize(keys, axis=-1)
    return tf.matmul(queries, keys, transpose_b=True) / temperature


def split_candidates(
    logits: tf.Tensor,
    positives: tf.Tensor,
    query_ids: tf.Tensor | None,
    key_ids: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Separates each row's positive from its negatives.

    Args:
        logits: `(N, M)`.
        positives: `(N,)`, the column of each row's positive.
        query_ids: `(N,)` or None; see `tfmtseg.ops.info_nce`.
        key_ids: `(M,)` or None.

    Returns:
        The positive's logit, `(N,)`, and the logits of the negatives, `(N, M)`, where
        whatever is no negative is a very low number.
    """
    left_out = tf.one_hot(positives, tf.shape(logits)[1], on_value=True, off_value=False)
    if query_ids is not None and key_ids is not None:
        left_out |= query_ids[:, None] == key_ids[None, :]
    return (
        tf.gather(logits, positives, batch_dims=1),
        tf.where(left_out, tf.constant(_LEFT_OUT, logits.dtype), logits),
    )


def info_nce_reference(
    queries: tf.Tensor,
    keys: tf.Tensor,
    positives: tf.Tensor,
    temperature: tf.Tensor,
    normalize: bool,
    query_ids: tf.Tensor | None,
    key_ids: tf.Tensor | None,
) -> tf.Tensor:
    """InfoNCE per row with the `N x M` matrix in memory; arguments as `info_nce`.

    The positive stays out of the log-sum-exp: `loss = softplus(lse_negatives - positive)`
    keeps full relative precision where the positive dominates, while
    `logsumexp - positive` cancels there.
    """
    logits = similarities(queries, keys, temperature, normalize)
    positive, negatives = split_candidates(logits, positives, query_ids, key_ids)
    return tf.math.softplus(tf.reduce_logsumexp(negatives, axis=1) - positive)
