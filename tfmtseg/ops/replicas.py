"""What the replicas of a training step have to tell each other.

Each replica computes a part of one step, on its part of the global batch; the optimizer
adds up their gradients. A step means the same on any number of replicas if each replica's
loss is its *part* of the loss of the global batch: then the parts, and the gradients, add
up to what one replica would have computed.

Outside of `tf.distribute.Strategy.run` there is one replica, and nothing here changes
anything.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def count() -> int:
    """Number of replicas that compute this step together."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def total(values: Any) -> Any:
    """The sum over all replicas, the same on each.

    Not to be differentiated: what one replica derives from a total is no part.

    Args:
        values: A tensor, or a list or dictionary of tensors.
    """
    if count() == 1:
        return values
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def gather(rows: tf.Tensor) -> tf.Tensor:
    """The rows of all replicas, one replica's after the other's.

    Differentiable: rows get the gradients of the losses of all replicas.

    Args:
        rows: `(n, ...)`; `n` may differ between replicas.
    """
    if count() == 1:
        return rows
    return tf.distribute.get_replica_context().all_gather(rows, axis=0)


def rows_before(counts: tf.Tensor) -> tf.Tensor:
    """How many rows lie before this replica's in what `gather` returns.

    Args:
        counts: Integers, `(replicas, ...)`: the number of rows on each replica.

    Returns:
        The shape of `counts` without its first axis.
    """
    if count() == 1:
        return tf.zeros_like(counts[0])
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    return tf.reduce_sum(counts[:replica], 0)
