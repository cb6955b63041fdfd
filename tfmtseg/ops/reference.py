"""InfoNCE in plain TensorFlow: the twin, the oracle and the fallback of the native op.

The rows of the similarity matrix are worked on in chunks, so that memory grows with
chunk x keys and not with queries x keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

CHUNK_ELEMENTS = 2**21  # numbers of the similarity matrix held at once, 8 MB each copy


class Candidates(NamedTuple):
    """Which keys each query is compared with.

    Args:
        positives: `int32`, `(N,)`: the row of the keys that each query has to find,
            negative for none. With `key_labels`, the query's label.
        key_labels: `int32`, `(M,)`, or None. Keys of a query's label are its positives.
        query_ids: `int32`, `(N,)`, or None. Pairs of equal ids are left out, except
            positives given by their row.
        key_ids: `int32`, `(M,)`; given together with `query_ids`.
        key_mask: `bool`, `(M,)`, or None. False leaves a key out.
    """

    positives: tf.Tensor
    key_labels: tf.Tensor | None = None
    query_ids: tf.Tensor | None = None
    key_ids: tf.Tensor | None = None
    key_mask: tf.Tensor | None = None

    def rows(self, start: tf.Tensor, stop: tf.Tensor) -> Candidates:
        """The same for some of the queries."""
        ids = None if self.query_ids is None else self.query_ids[start:stop]
        return self._replace(positives=self.positives[start:stop], query_ids=ids)

    def masks(self, num_keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Boolean `(N, M)`: the positives, and the negatives."""
        if self.key_labels is None:
            positive = tf.one_hot(self.positives, num_keys, on_value=True, off_value=False)
        else:
            positive = self.positives[:, None] == self.key_labels[None, :]
        compared = ~positive
        if self.query_ids is not None and self.key_ids is not None:
            different = self.query_ids[:, None] != self.key_ids[None, :]
            compared &= different
            if self.key_labels is not None:
                positive &= different
        if self.key_mask is not None:
            positive &= self.key_mask[None, :]
            compared &= self.key_mask[None, :]
        return positive, compared


class _Rows(NamedTuple):
    """Losses `(r,)` of some queries, and their gradient by the logits, `(r, M)`."""

    losses: tf.Tensor
    slopes: Callable[[], tf.Tensor]


def _log_sum_exp(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_logsumexp(values, axis=1, keepdims=True)


def _rows(
    queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor, candidates: Candidates
) -> _Rows:
    """Works on a chunk of queries, all of whose logits fit into memory.

    With l the log-sum-exp of the negatives, h that of the positives and a their mean,
    the loss is softplus(l - h) + (h - a). Both terms keep their relative precision. The
    usual form, the log-sum-exp of everything minus a, loses it where positives dominate.
    """
    logits = tf.matmul(queries, keys, transpose_b=True) / temperature
    positive, negative = candidates.masks(tf.shape(keys)[0])
    nothing = tf.constant(float("-inf"))
    negatives = _log_sum_exp(tf.where(negative, logits, nothing))
    positives = _log_sum_exp(tf.where(positive, logits, nothing))
    count = tf.math.count_nonzero(positive, 1, keepdims=True, dtype=tf.float32)
    mean = tf.math.divide_no_nan(
        tf.reduce_sum(tf.where(positive, logits, 0.0), 1, keepdims=True), count
    )
    exists = count > 0
    odds = tf.math.softplus(negatives - positives)
    losses = tf.where(exists, odds + (positives - mean), 0.0)

    def slopes() -> tf.Tensor:
        # A row without a positive has weight 0 everywhere: exp(-infinity).
        everything = tf.where(exists, positives + odds, float("inf"))
        among = tf.exp(logits - positives)
        share = tf.exp(negatives - everything)  # of the negatives
        of_positives = (among - 1.0 / count) - among * share
        of_negatives = tf.where(negative, tf.exp(logits - everything), 0.0)
        return tf.where(positive, of_positives, of_negatives)

    return _Rows(losses[:, 0], slopes)


def _in_chunks(
    queries: tf.Tensor,
    keys: tf.Tensor,
    work: Callable[[tf.Tensor, tf.Tensor, Sequence[tf.Tensor]], Sequence[tf.Tensor]],
    row_shapes: Sequence[tuple[int | None, ...]],
    totals: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, ...]:
    """Calls `work(start, stop, totals)` for chunks of rows.

    It returns one tensor for each of `row_shapes`, whose rows are put together, and
    new totals.
    """
    rows = tf.shape(queries)[0]
    known = queries.shape.is_fully_defined() and keys.shape.is_fully_defined()
    if known and queries.shape[0] * keys.shape[0] <= CHUNK_ELEMENTS:  # spares the loop
        return tuple(work(tf.constant(0), rows, totals))
    chunk = tf.maximum(CHUNK_ELEMENTS // tf.maximum(tf.shape(keys)[0], 1), 1)
    count = -(-rows // chunk)
    parts = [
        tf.TensorArray(tf.float32, count, infer_shape=False, element_shape=(None, *shape))
        for shape in row_shapes
    ]

    def body(i: tf.Tensor, parts: list, totals: list) -> tuple:
        results = work(i * chunk, tf.minimum((i + 1) * chunk, rows), totals)
        split = len(parts)
        written = [p.write(i, r) for p, r in zip(parts, results[:split], strict=True)]
        return i + 1, written, list(results[split:])

    _, parts, totals = tf.while_loop(
        lambda i, *_: i < count, body, (tf.constant(0), parts, list(totals)), parallel_iterations=1
    )
    return (*(part.concat() for part in parts), *totals)


def losses(
    queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor, candidates: Candidates
) -> tf.Tensor:
    """InfoNCE loss of every query, in nats; 0 for a query without a positive.

    Args:
        queries: Float, `(N, D)`, compared as they are.
        keys: Float, `(M, D)`.
        temperature: Positive float32 scalar.
        candidates: Who is compared with whom.

    Returns:
        Float32, `(N,)`. Not differentiable here; see `losses_with_gradients`.
    """
    queries, keys = tf.cast(queries, tf.float32), tf.cast(keys, tf.float32)

    def work(start: tf.Tensor, stop: tf.Tensor, totals: Sequence[tf.Tensor]) -> tuple:
        part = candidates.rows(start, stop)
        return (_rows(queries[start:stop], keys, temperature, part).losses,)

    return _in_chunks(queries, keys, work, [()], [])[0]


def losses_with_gradients(
    queries: tf.Tensor,
    keys: tf.Tensor,
    temperature: tf.Tensor,
    candidates: Candidates,
    row_weights: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The losses, and the gradients of their weighted sum, from one set of logits.

    Args:
        queries: As for `losses`, like the following three.
        keys: See `queries`.
        temperature: See `queries`.
        candidates: See `queries`.
        row_weights: Float32, `(N,)`.

    Returns:
        Float32 losses `(N,)` and the gradients by queries `(N, D)`, keys `(M, D)` and
        temperature `()`.
    """
    queries, keys = tf.cast(queries, tf.float32), tf.cast(keys, tf.float32)

    def work(start: tf.Tensor, stop: tf.Tensor, totals: Sequence[tf.Tensor]) -> tuple:
        own = queries[start:stop]
        rows = _rows(own, keys, temperature, candidates.rows(start, stop))
        slopes = rows.slopes() * (row_weights[start:stop, None] / temperature)
        grad_keys = totals[0] + tf.matmul(slopes, own, transpose_a=True)
        return rows.losses, tf.matmul(slopes, keys), grad_keys

    found, grad_queries, grad_keys = _in_chunks(
        queries, keys, work, [(), (queries.shape[1],)], [tf.zeros_like(keys)]
    )
    grad_temperature = -tf.reduce_sum(queries * grad_queries) / temperature
    return found, grad_queries, grad_keys, grad_temperature


def accuracies(queries: tf.Tensor, keys: tf.Tensor, candidates: Candidates) -> tf.Tensor:
    """1 where a query is more similar to a positive than to every negative, else 0.

    Args:
        queries: As for `losses`, like the following two.
        keys: See `queries`.
        candidates: See `queries`.

    Returns:
        Float32, `(N,)`.
    """
    queries, keys = tf.cast(queries, tf.float32), tf.cast(keys, tf.float32)

    def work(start: tf.Tensor, stop: tf.Tensor, totals: Sequence[tf.Tensor]) -> tuple:
        similarities = tf.matmul(queries[start:stop], keys, transpose_b=True)
        best = [
            tf.reduce_max(tf.where(mask, similarities, float("-inf")), axis=1)
            for mask in candidates.rows(start, stop).masks(tf.shape(keys)[0])
        ]
        return (tf.cast(best[0] > best[1], tf.float32),)

    return _in_chunks(queries, keys, work, [()], [])[0]
