"""From cached cases to batches: crop first, then cast, normalise and augment.

A batch is a pure function of the seed and the number of the step, so training that
goes on after a break sees exactly the batches it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfmtseg.data.augment import (
    NO_AUGMENTATION,
    Augmentation,
    change_intensities,
    draw_displacements,
    interpolate,
    nearest,
)
from tfmtseg.data.cache import Record
from tfmtseg.data.preprocess import dequantize

SLACK = 2.0  # voxels a crop's centre may lie outside the range in which crops fit
MARGIN = 1  # voxels read beyond the outermost place, for interpolation


@dataclass(frozen=True)
class Share:
    """The replicas of a training that a dataset feeds, in turn: all, or one machine's.

    Args:
        first: The first of them.
        count: How many follow each other.
        total: All replicas of the training.
    """

    first: int = 0
    count: int = 1
    total: int = 1

    def numbers(self, start: int, stop: int, per_batch: int) -> tf.data.Dataset:
        """Numbers of these replicas' patches, among those from `start` to `stop`.

        Each batch of `per_batch`, a multiple of `total`, is shared out in runs of equal
        length.
        """
        each = per_batch // self.total
        rows = slice(self.first * each, (self.first + self.count) * each)
        return tf.data.Dataset.range(start, stop).batch(per_batch).map(lambda n: n[rows]).unbatch()


WHOLE = Share()


def read_window(
    record: Record, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a box of a case, which may reach beyond the volume.

    Args:
        record: The case.
        start: First voxel along x, y, z.
        stop: One past the last voxel.

    Returns:
        Normalised float32 intensities `(x, y, z, modalities)`, the case's background
        value where there is no volume, and the `uint8` label map `(x, y, z)`, zeros
        where there is none.
    """
    size = np.asarray(record.geometry.ras_shape)
    low, high = np.clip(start, 0, size), np.clip(stop, 0, size)
    inner = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    place = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    shape = tuple(stop - start)
    image = dequantize(record.image[inner], record.scale, record.offset)
    if image.shape[:-1] != shape:
        inside = image
        image = np.empty((*shape, len(record.scale)), np.float32)
        image[:] = record.background
        image[place] = inside
    label_map = np.zeros(shape, np.uint8)
    label = record.label
    if label is not None:
        label_map[place] = label[inner]
    return image, label_map


def crop_centre(
    record: Record, crop: Sequence[int], draws: np.ndarray, foreground_probability: float
) -> np.ndarray:
    """The centre of a random crop.

    With `foreground_probability` it lies near a voxel of a label drawn among those
    that occur, so that rare labels are seen as often as frequent ones; else anywhere
    in the volume.

    Args:
        record: The case.
        crop: Size in voxels.
        draws: Uniform numbers in [0, 1), `(6,)`.
        foreground_probability: 0 for cases without a label.

    Returns:
        Float, `(3,)`, in voxels.
    """
    size = np.asarray(record.geometry.ras_shape, np.float64)
    half = np.asarray(crop, np.float64) / 2
    middle = (size - 1) / 2
    reach = np.maximum(size / 2 - half, 0) + SLACK
    centre = middle + (2 * draws[3:] - 1) * reach
    foreground = record.foreground if draws[0] < foreground_probability else None
    if foreground is not None:
        present = np.unique(foreground[:, 3])
        if present.size:
            voxels = foreground[foreground[:, 3] == present[int(draws[1] * present.size)], :3]
            voxel = voxels[int(draws[2] * len(voxels))]
            # The voxel falls anywhere in the middle half of the crop.
            centre = np.clip(voxel + (draws[3:] - 0.5) * half, middle - reach, middle + reach)
    return centre


def case_index(number: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Which of `count` cases patch `number` comes from: a fresh order in each round.

    Args:
        number: `int64`, `()`.
        count: Number of cases.
        seed: Chooses the orders.

    Returns:
        `int64`, `()`.
    """
    order = tf.stack([tf.constant(seed, tf.int64), number // count])
    return tf.random.experimental.index_shuffle(number % count, order, count - 1)


def patches(
    records: Sequence[Record],
    crop: tuple[int, int, int],
    numbers: tf.data.Dataset,
    *,
    augmentation: Augmentation,
    foreground_probability: float,
    seed: int,
) -> tf.data.Dataset:
    """One patch for each of `numbers`, from the case that `case_index` names.

    Args:
        records: Cases, all of one number of modalities.
        crop: Size of a patch in voxels.
        numbers: `int64` numbers of the patches to make.
        augmentation: How patches are changed.
        foreground_probability: Fraction of patches of labelled cases centred on
            labelled tissue.
        seed: Everything random follows from it and the patch's number.

    Returns:
        Dataset of `(image, label map, labeled)`: float32 `(x, y, z, modalities)`,
        `uint8` `(x, y, z)` and float32 `()`, 1 where the case has a label.
    """
    channels = len(records[0].scale)
    spacings = tf.constant([record.geometry.spacing_mm for record in records], tf.float32)
    labelled = tf.constant([float(record.labelled) for record in records])

    def read(index: int, draws: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple:
        record = records[index]
        centre = crop_centre(record, crop, draws, foreground_probability)
        if augmentation == NO_AUGMENTATION:
            # Without interpolation, voxels stay what they are.
            centre = np.floor(centre) + (np.asarray(crop) - 1) % 2 / 2
        start = np.floor(centre + low).astype(int) - MARGIN
        stop = np.ceil(centre + high).astype(int) + MARGIN + 1
        return *read_window(record, start, stop), (centre - start).astype(np.float32)

    def make(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        index = case_index(number, len(records), seed)
        seeds = tf.unstack(
            tf.random.experimental.stateless_split(
                tf.stack([tf.constant(seed, tf.int64), number]), 3
            )
        )
        displacements = draw_displacements(augmentation, crop, tf.gather(spacings, index), seeds[0])
        image, label_map, centre = tf.numpy_function(
            read,
            [
                index,
                tf.random.stateless_uniform((6,), seeds[1]),
                tf.reduce_min(displacements, (0, 1, 2)),
                tf.reduce_max(displacements, (0, 1, 2)),
            ],
            [tf.float32, tf.uint8, tf.float32],
        )
        image.set_shape((None, None, None, channels))
        label_map.set_shape((None, None, None))
        centre.set_shape((3,))
        places = displacements + centre
        patch = change_intensities(interpolate(image, places), augmentation, seeds[2])
        patch.set_shape((*crop, channels))
        return patch, tf.ensure_shape(nearest(label_map, places), crop), tf.gather(labelled, index)

    return numbers.map(make, num_parallel_calls=2, deterministic=True)


def training_batches(
    labelled: Sequence[Record],
    unlabelled: Sequence[Record],
    crop: tuple[int, int, int],
    *,
    labeled_per_step: int,
    unlabeled_per_step: int,
    steps: tuple[int, int],
    augmentation: Augmentation,
    foreground_probability: float,
    seed: int,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Batches of labelled and unlabelled patches.

    These take turns in the largest number of equal groups, so that the batches of all
    replicas, one after the other, are in the order of one replica's.

    Args:
        labelled: Cases with a label.
        unlabelled: Cases without; may be empty when `unlabeled_per_step` is 0.
        crop: Size of a patch in voxels.
        labeled_per_step: Labelled patches in each step, of all replicas together.
        unlabeled_per_step: Unlabelled patches, likewise.
        steps: First step and one past the last.
        augmentation: How patches are changed, the same for both kinds.
        foreground_probability: See `patches`.
        seed: Seed of orders, crops and augmentation.
        share: Whose batches to make.

    Returns:
        Dataset of `(images, labels, labeled)`, one batch per step and replica.
    """
    streams = []
    for number, (records, per_step) in enumerate(
        ((labelled, labeled_per_step), (unlabelled, unlabeled_per_step))
    ):
        if per_step == 0:
            continue
        streams.append(
            patches(
                records,
                crop,
                share.numbers(steps[0] * per_step, steps[1] * per_step, per_step),
                augmentation=augmentation,
                foreground_probability=foreground_probability,
                seed=2 * seed + number,
            ).batch(per_step // share.total, drop_remainder=True)
        )
    if len(streams) == 1:
        batches = streams[0]
    else:
        groups = math.gcd(labeled_per_step, unlabeled_per_step) // share.total
        batches = tf.data.Dataset.zip(tuple(streams)).map(
            lambda *parts: tuple(_take_turns(pair, groups) for pair in zip(*parts, strict=True))
        )
    return batches.prefetch(2)


def _take_turns(kinds: Sequence[tf.Tensor], groups: int) -> tf.Tensor:
    """Some of the first rows, some of the second, then the next of the first and so on."""
    split = [tf.reshape(rows, (groups, -1, *rows.shape[1:])) for rows in kinds]
    return tf.reshape(tf.concat(split, 1), (-1, *kinds[0].shape[1:]))


def batch_cases(
    labelled: Sequence[Record],
    unlabelled: Sequence[Record],
    step: int,
    *,
    labeled_per_step: int,
    unlabeled_per_step: int,
    seed: int,
) -> list[str]:
    """Names of the cases whose patches `training_batches` puts into one batch, by kind.

    Args:
        labelled: As for `training_batches`, like all that follow.
        unlabelled: See there.
        step: The batch.
        labeled_per_step: See there.
        unlabeled_per_step: See there.
        seed: See there.
    """
    names = []
    for number, (records, per_step) in enumerate(
        ((labelled, labeled_per_step), (unlabelled, unlabeled_per_step))
    ):
        for patch in range(step * per_step, (step + 1) * per_step):
            index = case_index(tf.constant(patch, tf.int64), len(records), 2 * seed + number)
            names.append(records[int(index)].name)
    return names


def held_out_batches(
    records: Sequence[Record],
    crop: tuple[int, int, int],
    *,
    per_batch: int,
    foreground_probability: float,
    seed: int,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """One fixed patch of each case, unchanged, for losses and scores on held-out cases.

    Args:
        records: Cases.
        crop: Size of a patch in voxels.
        per_batch: Patches per batch, of all replicas together.
        foreground_probability: See `patches`.
        seed: Seed of the crops.
        share: Whose batches to make.

    Returns:
        Finite dataset of `(images, labels, labeled)`.
    """
    return patches(
        records,
        crop,
        share.numbers(0, len(records), per_batch),
        augmentation=NO_AUGMENTATION,
        foreground_probability=foreground_probability,
        seed=seed,
    ).batch(per_batch // share.total)
