"""Contrast between places: dense InfoNCE on the decoder's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.models.blocks import Factors, per_axis
from tfmtseg.models.branch import Batch
from tfmtseg.models.contrast import contrast, spatial_size
from tfmtseg.models.encoder import ISOTROPIC
from tfmtseg.models.views import another_view
from tfmtseg.models.voxel_contrast import VoxelContrast
from tfmtseg.ops.seed import Seed

SPACING = 3  # voxels between the places that are compared


def view_shape(crop: Sequence[int], strides: Sequence[Factors]) -> Factors:
    """Size of a view: about three quarters of each axis, where the strides allow it.

    Args:
        crop: Voxels along x, y, z.
        strides: The encoder's; their product divides each axis of crop and view.
    """
    x, y, z = (
        min(size, -(-3 * size // (4 * step)) * step)
        for size, step in zip(crop, np.prod(strides, 0).tolist(), strict=True)
    )
    return x, y, z


@compat.register
class DenseContrastiveBranch(VoxelContrast):
    """Finds each place of a volume again in another view of it.

    Two *views* are cut from every volume, at different offsets and with different
    intensities, and pass encoder and decoder. The decoder's features at a lattice of
    places that both views show are projected; each place of the first view is a
    *query* that has to find itself in the second, its *positive key*, among the places
    of the volumes that `negatives` names.

    Offsets differ, so that no place can be told by its distance from the border. Places
    are `SPACING` voxels apart, so that near neighbours, which look alike, are not among
    the negatives. All volumes have the same offsets: where they are aligned, whole but for
    little, and not mirrored, the same place of another case shows the same anatomy. Such a
    key is left out, or, with `across_cases`, one more positive.

    Labels are not used; labelled and unlabelled volumes take part alike.

    Args:
        width: Channels of the decoder's features.
        strides: As for the encoder.
        across_cases: Whether the same place of other cases is a positive key: for aligned
            data, in patches that hold most of a volume.
        negatives: Which cases the keys come from: `"case"`, `"batch"` or `"global"`, see
            `contrast`.
        **kwargs: As for every Keras layer.

    Call arguments:
        images: `(batch, x, y, z, modalities)`, spatial sizes known.
        describe: Maps images and the number of the view, 0 or 1, to features of their
            voxels, `(batch, x, y, z, channels)`.
        seed: A `Seed`. Defaults to a fixed one.
        real: See `contrast`.

    Returns:
        `loss`, in nats, and `accuracy`, each `(queries,)`; `chance`, a scalar: the
        loss of a branch that knows nothing.

    Raises:
        ValueError: If `negatives` is unknown, or `"case"` with `across_cases`.

    Reference:
        [O Pinheiro et al., 2020](https://arxiv.org/abs/2011.05499) (contrast between
        the same place of two views); [Chaitanya et al.,
        2020](https://arxiv.org/abs/2006.10511) (of volumes, and across aligned cases).
    """

    prefix = "dense"
    shown = ("loss", "accuracy", "chance")
    finds_places = True
    learns_from = "images"
    may_differ = ("dtype", "negatives", "across_cases")

    def __init__(
        self,
        width: int,
        strides: Sequence[Factors] = ISOTROPIC,
        across_cases: bool = False,
        negatives: str = "global",
        **kwargs: Any,
    ):
        super().__init__(width, negatives, **kwargs)
        if across_cases and negatives == "case":
            raise ValueError(
                "negatives: value is 'case', must be 'batch' or 'global' where the same place of "
                "other cases is a positive. Fix: change negatives or the form."
            )
        self.strides = per_axis(strides)
        self.across_cases = across_cases

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from all volumes."""
        return self(batch.images, describe=_decoded(batch), seed=batch.seed, real=batch.share > 0)

    def keys(self, batch: Batch) -> tf.Tensor:
        """See `Branch`: the places of the second view."""
        return self._views(batch.images, _decoded(batch), batch.seed)[1]

    def call(
        self,
        images: tf.Tensor,
        describe: Callable[[tf.Tensor, int], tf.Tensor],
        seed: Seed | None = None,
        real: tf.Tensor | bool = True,
    ) -> dict[str, tf.Tensor]:
        """See the class."""
        queries, keys = self._views(images, describe, seed)
        return contrast(
            queries,
            keys,
            np.arange(keys.shape[1]),
            tf.exp(tf.convert_to_tensor(self.log_temperature)),
            self.negatives,
            real,
            self.across_cases,
        )

    def _views(
        self,
        images: tf.Tensor,
        describe: Callable[[tf.Tensor, int], tf.Tensor],
        seed: Seed | None,
    ) -> list[tf.Tensor]:
        """The places of both views, projected, `(batch, places, length)`."""
        crop = spatial_size(images)
        size = view_shape(crop, self.strides)
        room = np.subtract(crop, size)
        seeds = (Seed.fixed() if seed is None else seed).split(3)
        chances = tf.random.stateless_uniform((2, 3), seeds[0].pair)
        offsets = tf.cast(chances * tf.cast(room + 1, tf.float32), tf.int32)
        start = tf.reduce_max(offsets, 0)  # from here on, both views show `size - room` voxels
        places = []
        for i in range(2):
            view = _box(images, offsets[i], size)
            features = describe(another_view(view, seeds[1 + i]), i)
            common = _box(features, start - offsets[i], np.subtract(size, room).tolist())
            lattice = common[:, ::SPACING, ::SPACING, ::SPACING]
            rows = self.project(tf.reshape(lattice, (-1, lattice.shape[-1])))
            places.append(tf.reshape(rows, (-1, math.prod(lattice.shape[1:4]), rows.shape[-1])))
        return places

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {
            "strides": self.strides,
            "across_cases": self.across_cases,
        }
        return {**super().get_config(), **config}


def _decoded(batch: Batch) -> Callable[[tf.Tensor, int], tf.Tensor]:
    # With one dropout mask for both, places could be told by it.
    return lambda images, view: batch.decode(batch.encode(images, 1, 0, view))


def _box(volumes: tf.Tensor, start: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """The voxels from `start` on, `(batch, *size, channels)`."""
    begin = tf.concat([[0], start, [0]], 0)
    box = tf.slice(volumes, begin, [-1, *map(int, size), -1])
    return tf.ensure_shape(box, (None, *map(int, size), volumes.shape[-1]))
