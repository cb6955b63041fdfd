"""Contrastive predictive coding on a grid of overlapping cubes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.errors import InputError
from tfmtseg.models.blocks import Factors, ResidualBlock, convolution
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.contrast import check_negatives, contrast, spatial_size, temperature_weight
from tfmtseg.models.encoder import LEVELS
from tfmtseg.models.methods import FORMS
from tfmtseg.models.remat import recompute_in_parts
from tfmtseg.models.views import another_view
from tfmtseg.ops import info_nce, retrieval_accuracy
from tfmtseg.ops.seed import Seed

PAPER_NEGATIVES = 20
DEFAULT_WEIGHTS = {"repaired": 0.1, "paper": 0.001}


def grid_shape(crop: Sequence[int], cube_size: Sequence[int]) -> Factors:
    """Cubes along each axis: half overlapping, none beyond the crop.

    Args:
        crop: Voxels along x, y, z.
        cube_size: Edges along x, y, z; one as long as the crop makes a grid of 1.

    Raises:
        InputError: If an edge is longer than the crop; or if it is shorter, and has no
            half or one that does not divide the crop.
    """
    axes = list(zip(crop, cube_size, strict=True))
    if any(
        edge != size and (edge < 1 or edge % 2 or size < edge or size % (edge // 2))
        for size, edge in axes
    ):
        raise InputError(
            "--cube_size", "value", tuple(cube_size),
            f"even, at most the crop {tuple(crop)}, and its half must divide the crop",
            "change --cube_size or --crop; an edge as long as the crop fits too",
        )  # fmt: skip
    x, y, z = (1 if edge == size else size // (edge // 2) - 1 for size, edge in axes)
    return x, y, z


def check_grid(grid: Factors, form: str) -> None:
    """Makes sure that there is something to predict.

    Args:
        grid: Cubes along x, y, z.
        form: Of the contrast, `"repaired"` or `"paper"`.

    Raises:
        InputError: If there are too few along every axis.
    """
    least = FORMS[form].least_cubes
    if max(grid) < least:
        raise InputError(
            "--crop", "grid of cubes", grid, f"{least} or more along an axis ({form} contrast)",
            "enlarge --crop, reduce --cube_size, or choose a method without cubes, such as encdec",
        )  # fmt: skip


def extract_cubes(images: tf.Tensor, cube_size: Sequence[int]) -> tf.Tensor:
    """Cuts images into cubes, half overlapping along each axis.

    Args:
        images: `(batch, x, y, z, modalities)`, spatial sizes known.
        cube_size: Edges along x, y, z, in voxels; they may differ.

    Returns:
        `(batch * cubes, *cube_size, modalities)`; the cubes of an image follow each
        other, z fastest.
    """
    steps = [max(1, edge // 2) for edge in cube_size]
    patches = tf.extract_volume_patches(images, [1, *cube_size, 1], [1, *steps, 1], "VALID")
    return tf.reshape(patches, (-1, *cube_size, images.shape[-1]))


@compat.register
class ContrastiveBranch(Branch):
    """Predicts the codes of one half of the volume from the other half (CPC).

    The image is cut into half-overlapping cubes; the mean over space of the encoder's
    last level is a cube's *code*. Codes keep their place on the grid. The *context*
    half of the grid passes through residual blocks; the result at each place is the
    *query* that has to find, among all candidates, the *positive key*: the code at the
    same place of the other half.

    Two forms exist. `"repaired"` runs in all six directions, normalises codes, learns
    its temperature, keeps the halves free of common voxels and takes as negatives all
    other codes, of the cases that `negatives` names, but those at the positive's place in
    other cases, see `contrast`. Directions without two halves, along axes with fewer than
    3 cubes, are left out. `"paper"` is the original: one
    direction, the last axis with 2 or more cubes, raw dot products, the other targets
    and 20 sampled codes of the same image as negatives.

    Args:
        channels: Length of a code.
        cube_size: Edges of a cube along x, y, z, in voxels; one number stands for all.
            On thick slices a cube spans them all, and the grid lies in their plane.
        form: `"repaired"` or `"paper"`.
        blocks: Residual blocks of the predictor. 8 in the paper; two are enough for
            small codes.
        remat: Whether the cubes pass through the encoder in parts, each as large as an
            image, of which the gradient computes each again. It spares most memory of
            the branch.
        negatives: Which cases the repaired form takes negatives from: `"case"`, `"batch"`
            or `"global"`, see `contrast`. The paper's form stays within the case.
        augment_cubes: Whether in training every cube is changed by a draw of its own, see
            `another_view`. What all cubes of a volume share, their augmentation above all,
            tells which case a code is of; this hides some of it.
        **kwargs: As for every Keras layer.

    Call arguments:
        images: `(batch, x, y, z, modalities)`, spatial sizes known.
        encode: Maps cubes `(n, x, y, z, modalities)`, and the number of their first one
            among all cubes where it is not 0, to the encoder's last level.
        seed: A `Seed`, which chooses the sampled negatives and how cubes are changed.
            Defaults to a fixed one.
        real: See `contrast`.
        training: Whether cubes are changed, with `augment_cubes`.

    Returns:
        `loss`, in nats, and `accuracy`, each `(queries,)`; `chance`, a scalar: the
        loss of a branch that knows nothing, the logarithm of the number of candidates.

    Raises:
        ValueError: If the form is unknown or the crop is too small for two halves.

    Reference:
        Iwasawa et al., 2020, section 3.3; Henaff et al., 2019 (arXiv 1905.09272).
    """

    prefix = "cpc"
    shown = ("loss", "accuracy", "chance")
    finds_places = True
    learns_from = "others"
    may_differ = ("dtype", "remat", "negatives", "augment_cubes")

    def __init__(
        self,
        channels: int,
        cube_size: int | Sequence[int],
        form: str = "repaired",
        blocks: int = 2,
        negatives: str = "global",
        remat: bool = False,
        augment_cubes: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_jit = False  # the op has no XLA form; Keras 3 then compiles without XLA
        if form not in DEFAULT_WEIGHTS:
            raise ValueError(
                f"form: value is {form!r}, must be one of {', '.join(DEFAULT_WEIGHTS)}. "
                "Fix: choose another."
            )
        check_negatives(negatives)
        self.channels = channels
        edges = (cube_size,) * 3 if isinstance(cube_size, int) else tuple(cube_size)
        self.cube_size = edges
        self.form = form
        self.negatives = negatives
        self.default_weight = DEFAULT_WEIGHTS[form]
        self.remat = remat
        self.augment_cubes = augment_cubes
        self.blocks = [ResidualBlock(channels, name=f"block{i}") for i in range(blocks)]
        self.last = convolution(channels, 1, name="last")

    def build(self, input_shape: Any) -> None:
        """Builds the predictor; the shape of `images` is not looked at."""
        shape = (None, None, None, None, self.channels)
        for layer in (*self.blocks, self.last):
            layer.build(shape)
        if self.form == "repaired":
            self.directions = compat.float32_weight(
                self,
                name="directions",
                shape=(6, self.channels),
                initializer=keras.initializers.RandomNormal(stddev=0.5),
            )
            self.log_temperature = temperature_weight(self)
        self.built = True

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from the volumes without a label, where there are any."""
        encode = self._last_level(batch)
        return self(
            batch.others,
            encode=encode,
            seed=batch.seed,
            real=batch.share > 0,
            training=batch.training,
        )

    def keys(self, batch: Batch) -> tf.Tensor:
        """See `Branch`: the codes."""
        codes = self._codes(batch.others, self._last_level(batch))
        return tf.reshape(codes, (-1, math.prod(codes.shape[1:4]), self.channels))

    def call(
        self,
        images: tf.Tensor,
        encode: Callable[..., tf.Tensor],
        seed: Seed | None = None,
        real: tf.Tensor | bool = True,
        training: bool = False,
    ) -> dict[str, tf.Tensor]:
        """See the class."""
        grid = self._grid(images)
        seed = Seed.fixed() if seed is None else seed
        # `seed` itself draws the paper's negatives.
        changes = seed.fold(1) if self.augment_cubes and training else None
        codes = self._codes(images, encode, changes)
        if self.form == "repaired":
            return self._repaired(codes, grid, real)
        return self._paper(codes, grid, seed)

    def _grid(self, images: tf.Tensor) -> Factors:
        size = spatial_size(images)
        try:
            grid = grid_shape(size, self.cube_size)
            check_grid(grid, self.form)
        except InputError as error:  # Keras raises a copy, which takes the message alone
            raise ValueError(str(error).replace("--", "")) from None  # here they are no flags
        return grid

    def _last_level(self, batch: Batch) -> Callable[..., tf.Tensor]:
        """The encoder's last level of cubes of `batch.others`."""
        cubes = math.prod(self._grid(batch.others))
        return lambda images, first=0: batch.encode(images, cubes, first)[LEVELS[-1]]

    def _codes(
        self, images: tf.Tensor, encode: Callable[..., tf.Tensor], changes: Seed | None = None
    ) -> tf.Tensor:
        """Codes on their grid, `(batch, x, y, z, channels)`, float32; of changed cubes, if so."""
        grid = self._grid(images)
        cubes = extract_cubes(images, self.cube_size)
        if changes is not None:
            cubes = another_view(cubes, changes.per_row(math.prod(grid)))

        def mean_features(*cubes: tf.Tensor) -> tf.Tensor:
            return tf.reduce_mean(tf.cast(encode(*cubes), tf.float32), (1, 2, 3))

        if self.remat:
            part_size = max(1, math.prod(images.shape[1:4]) // math.prod(self.cube_size))
            codes = recompute_in_parts(mean_features, cubes, part_size, self.channels)
        else:
            codes = mean_features(cubes)
        return tf.reshape(codes, (-1, *grid, self.channels))

    def _predict(self, context: tf.Tensor) -> tf.Tensor:
        x = tf.cast(context, self.compute_dtype)
        for block in self.blocks:
            x = block(x)
        return tf.cast(self.last(x), tf.float32)

    def _repaired(
        self, codes: tf.Tensor, grid: Factors, real: tf.Tensor | bool
    ) -> dict[str, tf.Tensor]:
        cases = tf.shape(codes)[0]
        places = np.arange(math.prod(grid)).reshape(grid)
        queries, targets = [], []  # per direction: (cases, n, channels) and the places (n,)
        for axis in range(3):
            # An even grid leaves out its two middle layers: cubes overlap by half, so
            # these would show voxels of the context to the targets.
            half = (grid[axis] - 1) // 2
            if half == 0:
                continue
            contexts = []
            for side in range(2):
                ordered = tf.reverse(codes, [axis + 1]) if side else codes
                direction = tf.convert_to_tensor(self.directions)[2 * axis + side]
                contexts.append(tf.gather(ordered, np.arange(half), axis=axis + 1) + direction)
                ordered_places = np.flip(places, axis) if side else places
                layers = np.arange(grid[axis] - half, grid[axis])
                targets.append(np.take(ordered_places, layers, axis=axis).reshape(-1))
            # Both directions of an axis have one shape: one pass of the predictor.
            predictions = self._predict(tf.concat(contexts, 0))
            queries += tf.split(tf.reshape(predictions, (2 * cases, -1, self.channels)), 2)
        return contrast(
            tf.concat(queries, 1),
            tf.reshape(codes, (-1, places.size, self.channels)),
            np.concatenate(targets),
            tf.exp(tf.convert_to_tensor(self.log_temperature)),
            self.negatives,
            real,
        )

    def _paper(self, codes: tf.Tensor, grid: Factors, seed: Seed) -> dict[str, tf.Tensor]:
        axis = max(i for i in range(3) if grid[i] >= 2)
        half = grid[axis] // 2

        def layers(start: int, stop: int) -> tf.Tensor:
            return tf.gather(codes, np.arange(start, stop), axis=axis + 1)

        def rows(x: tf.Tensor) -> tf.Tensor:
            return tf.reshape(x, (-1, math.prod(x.shape[1:4]), self.channels))

        queries = rows(self._predict(layers(0, half)))
        targets = rows(layers(grid[axis] - half, grid[axis]))
        pool = rows(layers(0, grid[axis] - half))
        order = seed.uniform(tf.shape(pool)[:2])
        chosen = tf.argsort(order, axis=1)[:, :PAPER_NEGATIVES]
        keys = tf.concat([targets, tf.gather(pool, chosen, batch_dims=1)], 1)

        def one_image(
            q_and_k: tuple[tf.Tensor, tf.Tensor],
        ) -> tuple[tf.Tensor, tf.Tensor]:
            q, k = q_and_k
            return (
                info_nce(q, k, temperature=1.0, normalize=False),
                retrieval_accuracy(q, k, normalize=False),
            )

        loss, accuracy = tf.map_fn(
            one_image, (queries, keys), fn_output_signature=(tf.float32, tf.float32)
        )
        return {
            "loss": tf.reshape(loss, [-1]),
            "accuracy": tf.reshape(accuracy, [-1]),
            "chance": tf.constant(math.log(keys.shape[1]), tf.float32),
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {
            "channels": self.channels,
            "cube_size": self.cube_size,
            "form": self.form,
            "blocks": len(self.blocks),
            "negatives": self.negatives,
            "remat": self.remat,
            "augment_cubes": self.augment_cubes,
        }
        return {**super().get_config(), **config}
