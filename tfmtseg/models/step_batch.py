"""What a step is given: the volumes of a batch, and which of them teach what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfmtseg.ops import replicas


def unpack(data: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, `int32` labels `(batch, x, y, z)` and boolean flags `(batch,)` of a batch."""
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"dataset: an element is a {type(data).__name__}, must be (images, labels) or "
            "(images, labels, labeled). Fix: change what the dataset yields."
        )
    images, labels = (_tensor(*pair) for pair in zip(("images", "labels"), data, strict=False))
    if labels.shape.rank == 5 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape.rank != 4:
        raise ValueError(
            f"labels: shape is {labels.shape}, must be (batch, x, y, z). "
            "Fix: give integer label maps, not one-hot channels."
        )
    if not labels.shape[1:].is_compatible_with(images.shape[1:4]):
        raise ValueError(
            f"labels: size is {tuple(labels.shape[1:])}, must be {tuple(images.shape[1:4])}, that "
            "of the images. Fix: give each image the label map of its voxels."
        )
    labeled = data[2] if len(data) == 3 else None
    if labeled is None:  # as `train_on_batch` of Keras 3 gives it
        labeled = tf.ones(tf.shape(images)[:1], tf.bool)
        return images, _whole(labels, labeled), labeled
    labeled = tf.cast(labeled, tf.float32)
    if not any(labeled.shape.is_compatible_with(shape) for shape in ([None], [None, 1])):
        raise ValueError(
            f"labeled: shape is {labeled.shape}, must be (batch,). Fix: give one flag for each "
            "volume; weights of voxels are not supported."
        )
    labeled = tf.reshape(labeled, [-1])
    message = (
        "labeled: must be 1 or 0 for each volume. Fix: give flags; weights of volumes are not "
        "supported."
    )
    check = tf.debugging.assert_equal(labeled * (labeled - 1.0), 0.0, message)
    with tf.control_dependencies([check] if check is not None else []):
        labeled = labeled > 0
    return images, _whole(labels, labeled), labeled


def _tensor(name: str, value: Any) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: is a {type(value).__name__}, must be one tensor. Fix: change what the "
            "dataset yields."
        ) from None
    if tensor.shape.rank is None:
        raise ValueError(
            f"{name}: number of axes is unknown, must be known. Fix: call tf.ensure_shape in the "
            "dataset, as on what tf.py_function returns."
        )
    return tensor


def _whole(labels: tf.Tensor, labeled: tf.Tensor) -> tf.Tensor:
    """Labels as `int32`; those that count are not rounded, as 0.99 of an interpolated mask."""
    if not labels.dtype.is_floating:
        return tf.cast(labels, tf.int32)
    shown = tf.where(labeled[:, None, None, None], labels, tf.zeros((), labels.dtype))
    message = "labels: must be whole numbers. Fix: resample label maps by nearest neighbour only."
    whole = tf.cast(shown, tf.int32)
    check = tf.debugging.assert_equal(shown, tf.cast(whole, shown.dtype), message)
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(whole)


def stand_in(
    images: tf.Tensor, labels: tf.Tensor, labeled: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """A volume of zeros for a replica without any: a last batch may be smaller.

    Returns:
        The arguments, and `(batch,)`, False for that volume.
    """
    missing = tf.cast(tf.equal(tf.shape(images)[0], 0), tf.int32)

    def filled(values: tf.Tensor) -> tf.Tensor:
        shape = tf.concat([[missing], tf.shape(values)[1:]], 0)
        return tf.concat([values, tf.zeros(shape, values.dtype)], 0)

    return filled(images), filled(labels), filled(labeled), filled(tf.ones_like(labeled))


@dataclass(frozen=True)
class Kind:
    """Volumes of the global batch that something is learned from, as a replica sees them.

    Args:
        chosen: Booleans, `(batch,)`: those of this replica. Where it has none, all its
            volumes stand in for them, because convolutions refuse empty batches.
        share: Float32, `()`: the fraction that this replica has, 0 with stand-ins.
        first: `int32`, `()`: how many the replicas before have.
        count: Float32, `()`: how many there are in the global batch.
    """

    chosen: tf.Tensor
    share: tf.Tensor
    first: tf.Tensor
    count: tf.Tensor


def sort_volumes(labeled: tf.Tensor, real: tf.Tensor) -> tuple[dict[str, Kind], tf.Tensor]:
    """Sorts the volumes of a batch.

    Args:
        labeled: Booleans, `(batch,)`.
        real: False for volumes that count nowhere.

    Returns:
        All `"images"`; those with `"labels"`; the `"others"`, without (with, where every
        volume of the global batch has one). And whether there is one without.
    """
    masks = labeled, real & ~labeled
    own = tf.stack([tf.math.count_nonzero(mask, dtype=tf.int32) for mask in masks])
    counts = replicas.gather(own[None])
    some_unlabeled = tf.reduce_sum(counts[:, 1]) > 0

    def kind(mask: tf.Tensor, counts: tf.Tensor) -> Kind:
        ours = tf.math.count_nonzero(mask, dtype=tf.float32)
        count = tf.cast(tf.reduce_sum(counts), tf.float32)
        return Kind(
            chosen=mask | ~tf.reduce_any(mask),
            share=tf.math.divide_no_nan(ours, count),
            first=replicas.rows_before(counts),
            count=count,
        )

    kinds = {
        "images": kind(real, tf.reduce_sum(counts, 1)),
        "labels": kind(labeled, counts[:, 0]),
        "others": kind(
            tf.where(some_unlabeled, masks[1], labeled),
            tf.where(some_unlabeled, counts[:, 1], counts[:, 0]),
        ),
    }
    return kinds, some_unlabeled


def check_labels(labels: tf.Tensor, weights: tf.Tensor, count: int) -> tf.Tensor:
    """The labels, if those that count are below `count`: a mask of 0 and 255 teaches nothing."""
    message = (
        f"labels: must be 0 for background to {count - 1} for the last region. Fix: renumber them, "
        "such as a mask of 0 and 255 to 0 and 1, or give as many regions as there are labels."
    )
    # As floats, because GPUs leave sums of integers to the CPU.
    shown = tf.where(weights[:, None, None, None] > 0, tf.cast(labels, tf.float32), 0.0)
    checks = [
        tf.debugging.assert_less(tf.reduce_max(shown), float(count), message),
        tf.debugging.assert_non_negative(tf.reduce_min(shown), message),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(labels)
