"""The native ops in plain TensorFlow: their twins, oracles and fallbacks.

InfoNCE works on the rows of the similarity matrix in chunks, so that memory grows with
chunk x keys and not with queries x keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """Losses `(r,)` of some queries, and their gradient by the logits, `(r, M)`.

    `counted` tells, `(r, 1)`, which queries have a positive.
    """

    losses: tf.Tensor
    counted: tf.Tensor
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
        # Without a positive, the weight of the negatives is exp(-infinity).
        everything = tf.where(exists, positives + odds, float("inf"))
        among = tf.exp(logits - positives)
        share = tf.exp(negatives - everything)  # of the negatives
        of_positives = (among - 1.0 / count) - among * share
        of_negatives = tf.where(negative, tf.exp(logits - everything), 0.0)
        return tf.where(exists, tf.where(positive, of_positives, of_negatives), 0.0)

    return _Rows(losses[:, 0], exists, slopes)


def _in_chunks(
    queries: tf.Tensor,
    keys: tf.Tensor,
    candidates: Candidates,
    work: Callable[..., Sequence[tf.Tensor]],
    row_shapes: Sequence[tuple[int | None, ...]],
    row_weights: tf.Tensor | None = None,
    totals: Sequence[tf.Tensor] = (),
) -> tuple[tf.Tensor, ...]:
    """Calls `work(queries, candidates, row_weights, totals)` for chunks of queries.

    It returns one tensor for each of `row_shapes`, whose rows are put together, and
    new totals. All chunks are of one size, as XLA wants it; what fills the last one up has
    no positive and weighs nothing.
    """
    rows = tf.shape(queries)[0]
    known = queries.shape.is_fully_defined() and keys.shape.is_fully_defined()
    if known and queries.shape[0] * keys.shape[0] <= CHUNK_ELEMENTS:  # spares the loop
        return tuple(work(queries, candidates, row_weights, totals))
    most = tf.maximum(rows, 1)
    chunk = tf.clip_by_value(CHUNK_ELEMENTS // tf.maximum(tf.shape(keys)[0], 1), 1, most)
    count = -(-most // chunk)

    def cut(values: tf.Tensor | None, fill: int = 0) -> tf.Tensor | None:
        if values is None:
            return None
        padding = [[0, count * chunk - rows]] + [[0, 0]] * (values.shape.rank - 1)
        filled = tf.pad(values, padding, constant_values=fill)
        return tf.reshape(filled, tf.concat([[count, chunk], tf.shape(values)[1:]], 0))

    of_chunks = (
        cut(queries), cut(candidates.positives, -1), cut(candidates.query_ids), cut(row_weights)
    )  # fmt: skip
    parts = [
        tf.TensorArray(tf.float32, count, infer_shape=False, element_shape=(None, *shape))
        for shape in row_shapes
    ]

    def body(i: tf.Tensor, parts: list, totals: list) -> tuple:
        own, positives, ids, weights = (None if each is None else each[i] for each in of_chunks)
        of_own = candidates._replace(positives=positives, query_ids=ids)
        results = work(own, of_own, weights, totals)
        split = len(parts)
        written = [p.write(i, r) for p, r in zip(parts, results[:split], strict=True)]
        return i + 1, written, list(results[split:])

    _, parts, totals = tf.while_loop(
        lambda i, *_: i < count, body, (tf.constant(0), parts, list(totals)), parallel_iterations=1
    )
    return (*(part.concat()[:rows] for part in parts), *totals)


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

    def work(queries: tf.Tensor, candidates: Candidates, *_: Any) -> tuple[tf.Tensor]:
        return (_rows(queries, keys, temperature, candidates).losses,)

    return _in_chunks(queries, keys, candidates, work, [()])[0]


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
    if candidates.key_mask is not None:  # what is left out may be NaN, and 0 times NaN is
        keys = tf.where(candidates.key_mask[:, None], keys, 0.0)

    def work(
        queries: tf.Tensor, candidates: Candidates, weights: tf.Tensor, totals: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        rows = _rows(queries, keys, temperature, candidates)
        slopes = rows.slopes() * (weights[:, None] / temperature)
        counted = tf.where(rows.counted, queries, 0.0)
        grad_keys = totals[0] + tf.matmul(slopes, counted, transpose_a=True)
        return rows.losses, tf.matmul(slopes, keys), grad_keys

    shapes, totals = [(), (queries.shape[1],)], [tf.zeros_like(keys)]
    found, grad_queries, grad_keys = _in_chunks(
        queries, keys, candidates, work, shapes, row_weights, totals
    )
    along = tf.where(grad_queries == 0.0, 0.0, queries * grad_queries)  # queries may be NaN
    grad_temperature = -tf.reduce_sum(along) / temperature
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

    def work(queries: tf.Tensor, candidates: Candidates, *_: Any) -> tuple[tf.Tensor]:
        similarities = tf.matmul(queries, keys, transpose_b=True)
        best = [
            tf.reduce_max(tf.where(mask, similarities, float("-inf")), axis=1)
            for mask in candidates.masks(tf.shape(keys)[0])
        ]
        return (tf.cast(best[0] > best[1], tf.float32),)

    return _in_chunks(queries, keys, candidates, work, [()])[0]


def group_norm_relu(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, groups: int, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """ReLU of GroupNorm.

    Args:
        x: Float, `(batch, x, y, z, channels)`.
        gamma: Float32, `(channels,)`.
        beta: Float32, `(channels,)`.
        groups: Channel groups that share mean and variance.
        epsilon: Added to the variance.

    Returns:
        The result, of the shape and type of `x`, and float32 `(batch, groups)`: mean and
        1 / sqrt(variance + epsilon). Not differentiable here; see
        `group_norm_relu_gradients`.
    """
    grouped = _by_groups(x, groups)
    mean = _group_mean(_voxel_sum(grouped), x)
    # Not the mean of squares less the squared mean, which cancel where the mean is large.
    squares = tf.math.squared_difference(grouped, mean)
    rstd = tf.math.rsqrt(_group_mean(_voxel_sum(squares), x) + epsilon)
    # The affine map folds into one multiply-add per voxel.
    scale = rstd * tf.reshape(gamma, (groups, -1))
    offset = tf.reshape(beta, (groups, -1)) - mean * scale
    y = tf.cast(tf.nn.relu(grouped * scale + offset), x.dtype)
    return tf.reshape(y, tf.shape(x)), mean[:, 0, :, 0], rstd[:, 0, :, 0]


def group_norm_relu_gradients(
    upstream: tf.Tensor,
    x: tf.Tensor,
    y: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    rstd: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients of `group_norm_relu`, from what it was given and what it returned.

    Automatic differentiation would keep and read several more arrays of the size of `x`.

    Args:
        upstream: The gradient of `y`.
        x: As for `group_norm_relu`, like `gamma` and `beta`.
        y: The results of `group_norm_relu`, like `mean` and `rstd`.
        gamma: See `x`.
        beta: See `x`.
        mean: See `y`.
        rstd: See `y`.

    Returns:
        The gradients of `x`, `gamma` and `beta`, in their shapes and types.
    """
    groups = mean.shape[1]
    grouped = _by_groups(x, groups)
    gamma = tf.reshape(gamma, (groups, -1))
    mean, rstd = mean[:, None, :, None], rstd[:, None, :, None]
    d = tf.raw_ops.ReluGrad(gradients=_by_groups(upstream, groups), features=_by_groups(y, groups))
    d_sum = _voxel_sum(d)
    centred = _voxel_sum(d * grouped) - d_sum * mean  # sum of d * (x - mean)
    d_mean = _group_mean(d_sum * gamma, x)
    slope = _group_mean(centred * gamma, x) * rstd * rstd
    dx = d * (rstd * gamma) - grouped * (rstd * slope) + rstd * (mean * slope - d_mean)
    d_gamma = tf.reshape(tf.reduce_sum(centred * rstd, 0), [-1])
    d_beta = tf.reshape(tf.reduce_sum(d_sum, 0), [-1])
    return tf.cast(tf.reshape(dx, tf.shape(x)), x.dtype), d_gamma, d_beta


def _by_groups(x: tf.Tensor, groups: int) -> tf.Tensor:
    """As float32 `(batch, voxels, groups, channels of a group)`; statistics keep this rank."""
    shape = (tf.shape(x)[0], _voxels(x), groups, x.shape[-1] // groups)
    return tf.cast(tf.reshape(x, shape), tf.float32)


def _voxels(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_prod(tf.shape(x)[1:-1])


def _voxel_sum(values: tf.Tensor) -> tf.Tensor:
    """`(batch, 1, groups, channels of a group)`."""
    return tf.reduce_sum(values, 1, keepdims=True)


def _group_mean(voxel_sums: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`(batch, 1, groups, 1)`, from sums over the voxels of `x`."""
    count = tf.cast(_voxels(x) * voxel_sums.shape[-1], tf.float32)
    return tf.math.divide_no_nan(tf.reduce_sum(voxel_sums, -1, keepdims=True), count)
