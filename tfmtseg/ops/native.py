"""The ops of `cuda_ops/`, in the form of `tfmtseg.ops.reference`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg.ops import library
from tfmtseg.ops.reference import Candidates


# AutoGraph finds no source of the op's generated wrappers, and would warn of it.
@tf.autograph.experimental.do_not_convert
def losses(
    queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor, candidates: Candidates
) -> tf.Tensor:
    """As `reference.losses`."""
    return library.load().tfmtseg_info_nce(**_inputs(queries, keys, temperature, candidates))


@tf.autograph.experimental.do_not_convert
def losses_with_gradients(
    queries: tf.Tensor,
    keys: tf.Tensor,
    temperature: tf.Tensor,
    candidates: Candidates,
    row_weights: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `reference.losses_with_gradients`."""
    return library.load().tfmtseg_info_nce_with_gradients(
        **_inputs(queries, keys, temperature, candidates), row_weights=row_weights
    )


def _inputs(
    queries: tf.Tensor, keys: tf.Tensor, temperature: tf.Tensor, candidates: Candidates
) -> dict[str, Any]:
    def given(values: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
        return tf.zeros((0,), dtype) if values is None else values

    return {
        "queries": queries,
        "keys": keys,
        "temperature": temperature,
        "positives": candidates.positives,
        "key_labels": given(candidates.key_labels, tf.int32),
        "query_ids": given(candidates.query_ids, tf.int32),
        "key_ids": given(candidates.key_ids, tf.int32),
        "key_mask": given(candidates.key_mask, tf.bool),
        "by_label": candidates.key_labels is not None,
        "has_ids": candidates.query_ids is not None,
        "has_mask": candidates.key_mask is not None,
    }


@tf.autograph.experimental.do_not_convert
def group_norm_relu(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, groups: int, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `reference.group_norm_relu`."""
    return library.load().tfmtseg_group_norm_relu(x, gamma, beta, groups=groups, epsilon=epsilon)


@tf.autograph.experimental.do_not_convert
def group_norm_relu_gradients(
    upstream: tf.Tensor,
    x: tf.Tensor,
    y: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    rstd: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `reference.group_norm_relu_gradients`; does without `y`."""
    return library.load().tfmtseg_group_norm_relu_gradients(upstream, x, gamma, beta, mean, rstd)
