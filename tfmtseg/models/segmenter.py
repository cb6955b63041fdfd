"""The model: one encoder, one decoder, a segmentation head and perhaps a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss
from tfmtseg.metrics.training_dice import DiceScore
from tfmtseg.models.blocks import Factors, convolution
from tfmtseg.models.boundary_branch import BoundaryBranch
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.contrastive_branch import ContrastiveBranch
from tfmtseg.models.decoder import Decoder
from tfmtseg.models.encoder import ISOTROPIC, LEVELS, Encoder
from tfmtseg.models.methods import METHODS
from tfmtseg.models.vae_branch import VAEBranch
from tfmtseg.regions import Regions


@compat.register
class Segmenter(keras.Model):
    """3D segmentation model whose encoder may serve a second task.

    A plain Keras model: `compile(optimizer)`, `fit(dataset)`, `evaluate`, `predict`.
    It carries its own losses. A dataset yields `(images, labels)`, or
    `(images, labels, labeled)` where `labeled` is 1 for volumes whose labels count and
    0 for unlabelled ones: their labels are ignored, but a branch may learn from them.
    The contrastive branch learns from these alone (in a batch without any, from the
    labelled ones), the variational branch from all volumes, the boundary branch from
    those with a label. `vaeseg` and `cpcseg` are `ssvaeseg` and `sscpcseg` where the
    dataset yields labelled volumes only.

    Args:
        regions: What is segmented: a `Regions`, its configuration, or the number of
            foreground labels.
        method: A name of `tfmtseg.models.methods.METHODS`.
        width: Channels of the first level, a multiple of 8. 32 in the paper.
        dropout: Fraction of values dropped after the first convolution.
        strides: Strides of levels 1 to 3 along x, y and z.
        cube_size: Edge of the contrastive branch's cubes, in voxels.
        contrastive_form: `"repaired"` or `"paper"`, see `ContrastiveBranch`.
        predictor_blocks: Residual blocks of the contrastive branch's predictor.
        branch_weight: Factor of the branch's loss. Defaults to 0.1 for the repaired
            and 0.001 for the paper's contrastive form, 0.1 for the variational and 1
            for the boundary branch.
        seed: Seed of dropout and sampling. Both depend on it and on the number of
            updates made, and on nothing else.
        **kwargs: As for every Keras model.

    Call arguments:
        images: `(batch, x, y, z, modalities)`; each spatial size a multiple of the
            product of the strides (8 by default).
        training: Whether dropout is on.

    Returns:
        Logits, `(batch, x, y, z, regions.num_outputs)`, float32.

    Example:

    ```python
    model = tfmtseg.Segmenter(regions=2, method="cpcseg", width=8, cube_size=16)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    model.fit(dataset, epochs=5)
    ```

    Raises:
        ValueError: If the method is unknown.

    Reference:
        Iwasawa, Hirano and Sugawara, 2020,
        [arXiv 2009.11160](https://arxiv.org/abs/2009.11160).
    """

    def __init__(
        self,
        regions: Regions | Mapping[str, Any] | int,
        method: str = "sscpcseg",
        width: int = 32,
        dropout: float = 0.2,
        strides: Sequence[Factors] = ISOTROPIC,
        cube_size: int = 32,
        contrastive_form: str = "repaired",
        predictor_blocks: int = 8,
        branch_weight: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if method not in METHODS:
            raise ValueError(
                f"method: value is {method!r}, must be one of {', '.join(METHODS)}. "
                "Fix: change --method."
            )
        if isinstance(regions, int):
            regions = Regions.exclusive([str(i + 1) for i in range(regions)])
        elif not isinstance(regions, Regions):
            regions = Regions.from_config(regions)
        self.regions = regions
        self.method = method
        self.seed = seed
        self.encoder = Encoder(width, dropout, strides, name="encoder")
        self.decoder = Decoder(width, strides, name="decoder")
        self.head = convolution(regions.num_outputs, 1, name="head", dtype="float32")
        self.branch: Branch | None = None
        kind = METHODS[method].branch
        if kind == "vae":
            self.branch = VAEBranch(width, strides, name="vae_branch")
        elif kind == "boundary":
            self.branch = BoundaryBranch(width, regions, strides, name="boundary_branch")
        elif kind == "contrastive":
            self.branch = ContrastiveBranch(
                width * 8, cube_size, contrastive_form, predictor_blocks, name="contrastive_branch"
            )
        self.branch_weight = branch_weight
        self.segmentation_loss = SegmentationLoss(regions)
        shown = ["loss", "seg_loss"]
        if self.branch is not None:
            if branch_weight is None:
                self.branch_weight = self.branch.default_weight
            shown += [f"{self.branch.prefix}_{name}" for name in self.branch.shown]
        for name in shown:  # as attributes, so that both Kerases find and reset them
            setattr(self, f"{name}_tracker", keras.metrics.Mean(name))
        self.dice = DiceScore(regions)
        self._arguments = {
            "method": method,
            "width": width,
            "dropout": dropout,
            "cube_size": cube_size,
            "contrastive_form": contrastive_form,
            "predictor_blocks": predictor_blocks,
            "branch_weight": branch_weight,
            "seed": seed,
        }

    def build(self, input_shape: Any) -> None:
        """Makes all weights, the branch's included.

        Args:
            input_shape: `(batch, x, y, z, modalities)`. The last must be known, and with
                a variational branch the size, which is that of all later training patches.
        """
        shape = (None, None, None, None, input_shape[-1])
        width = self.encoder.width
        self.encoder.build(shape)
        self.decoder.build({name: (*shape[:-1], width * 2**i) for i, name in enumerate(LEVELS)})
        channels = width
        if self.branch is not None:
            channels += self.branch.feature_channels
        self.head.build((*shape[:-1], channels))
        if self.branch is not None:
            self.branch.build(input_shape)
        self.built = True

    def compile(self, optimizer: Any = "adam", loss: Any = None, **kwargs: Any) -> None:
        """Sets the optimizer.

        Args:
            optimizer: Any Keras optimizer.
            loss: Must be None: the model carries its losses.
            **kwargs: As for `keras.Model.compile`. XLA is off unless asked for: it makes
                3D convolutions on CPU about ten times slower.

        Raises:
            ValueError: If a loss is given, or XLA asked for with a contrastive branch.
        """
        if loss is not None:
            raise ValueError(
                f"loss: value is {loss!r}, must be None. Fix: leave it out, "
                "Segmenter carries the losses of its method."
            )
        contrastive = isinstance(self.branch, ContrastiveBranch)
        if contrastive and kwargs.get("jit_compile") is True:
            raise ValueError(
                f"jit_compile: value is {kwargs['jit_compile']!r}, must be False with a "
                "contrastive branch, whose op has no XLA form. Fix: leave it out."
            )
        kwargs["jit_compile"] = kwargs.get("jit_compile") is True
        super().compile(optimizer=optimizer, **kwargs)

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """See the class."""
        levels = self.encoder(images, seed=self._seed(0) if training else None)
        return self._segment(levels, self._branch_features(levels))

    def _branch_features(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        return None if self.branch is None else self.branch.features(levels)

    def _segment(
        self, levels: Mapping[str, tf.Tensor], branch_features: tf.Tensor | None = None
    ) -> tf.Tensor:
        features = self.decoder(levels)
        if branch_features is not None:
            features = tf.concat([features, branch_features], -1)
        return self.head(features)

    def _seed(self, purpose: int) -> tf.Tensor:
        """A seed of its own for each purpose, replica and update, `int32`, `(2,)`."""
        optimizer = getattr(self, "optimizer", None)
        step = 0 if optimizer is None else compat.iterations(optimizer)
        replica = tf.distribute.get_replica_context()
        number = 0 if replica is None else replica.replica_id_in_sync_group
        seed = tf.random.experimental.stateless_fold_in(tf.stack([self.seed, purpose]), step)
        return tf.random.experimental.stateless_fold_in(seed, number)

    def _forward(
        self, data: Any, training: bool
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], dict[str, Any]]:
        """Forward pass and losses of a batch.

        Each part of the model sees the volumes it learns from: the decoder those with
        a label, the branch those without (all of them, where every volume has one).

        Returns:
            The loss to minimise, what the trackers show, and what the metrics need.
        """
        images, labels, labeled = _unpack(data)
        if not self.built:  # `fit` on a new model comes here before any call
            self.build(images.shape)
        seeds = [self._seed(i) if training else None for i in range(3)]
        # Convolutions refuse empty batches: without any label, all run with weight 0.
        segmented = labeled | ~tf.reduce_any(labeled)
        weights = tf.cast(tf.boolean_mask(labeled, segmented), tf.float32)
        annotated = tf.boolean_mask(images, segmented)
        labels = tf.boolean_mask(labels, segmented)
        if self.branch is not None and self.branch.encodes_all:
            # One pass of the encoder for the branch and the decoder.
            branch_levels = self.encoder(images, seed=seeds[0])
            levels = {
                name: tf.boolean_mask(level, segmented) for name, level in branch_levels.items()
            }
        else:
            levels = branch_levels = self.encoder(annotated, seed=seeds[0])
        features = self._branch_features(levels)
        logits = self._segment(levels, features)
        values = self.segmentation_loss.call(labels, logits)
        loss = seg_loss = tf.math.divide_no_nan(
            tf.reduce_sum(values * weights), tf.reduce_sum(weights)
        )
        shown = {"seg_loss": seg_loss}
        if self.branch is not None:
            batch = Batch(
                images=images,
                others=tf.boolean_mask(images, tf.reduce_all(labeled) | ~labeled),
                labels=labels,
                weights=weights,
                levels=branch_levels,
                features=features,
                encode=lambda further: self.encoder(further, seed=seeds[1]),
                seed=seeds[2],
            )
            prefix = self.branch.prefix
            for name, value in self.branch.learn(batch).items():
                shown[f"{prefix}_{name}"] = tf.reduce_mean(value)
            loss += self.branch_weight * shown[f"{prefix}_loss"]
        shown["loss"] = loss
        metrics = {"x": annotated, "y": labels, "y_pred": logits, "sample_weight": weights}
        return loss, shown, metrics

    def _update_metrics(
        self, shown: Mapping[str, tf.Tensor], metrics: Mapping[str, Any]
    ) -> dict[str, Any]:
        for name, value in shown.items():
            getattr(self, f"{name}_tracker").update_state(value)
        self.dice.update_state(metrics["y"], metrics["y_pred"], metrics["sample_weight"])
        return dict(self.compute_metrics(**metrics))

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update; returns the running means of losses and Dice scores."""
        with tf.GradientTape() as tape:
            loss, shown, metrics = self._forward(data, training=True)
            loss = tf.debugging.check_numerics(loss, "the training loss")
            scaled = compat.scale_loss(self.optimizer, loss)
        variables = self.trainable_variables
        compat.apply_gradients(self.optimizer, tape.gradient(scaled, variables), variables)
        return self._update_metrics(shown, metrics)

    def test_step(self, data: Any) -> dict[str, Any]:
        """The same losses and scores without dropout and without an update."""
        _, shown, metrics = self._forward(data, training=False)
        return self._update_metrics(shown, metrics)

    def count_parameters(self) -> dict[str, int]:
        """Trainable numbers of encoder, decoder (with the head) and branch."""
        parts = {
            "encoder": self.encoder.trainable_weights,
            "decoder": self.decoder.trainable_weights + self.head.trainable_weights,
            "branch": [] if self.branch is None else self.branch.trainable_weights,
        }
        return {
            name: sum(int(np.prod(weight.shape)) for weight in weights)
            for name, weights in parts.items()
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this model, ready for JSON."""
        return {
            "regions": self.regions.get_config(),  # Keras 2 wraps dicts that are attributes
            "strides": [list(factors) for factors in self.encoder.strides],
            **self._arguments,
        }


def _unpack(data: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, `int32` labels `(batch, x, y, z)` and boolean flags `(batch,)` of a batch."""
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"dataset: an element is a {type(data).__name__}, must be (images, labels) or "
            "(images, labels, labeled). Fix: change what the dataset yields."
        )
    images, labels = data[:2]
    labels = tf.cast(labels, tf.int32)
    if labels.shape.rank == 5 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape.rank != 4:
        raise ValueError(
            f"labels: shape is {labels.shape}, must be (batch, x, y, z). "
            "Fix: give integer label maps, not one-hot channels."
        )
    labeled = data[2] if len(data) == 3 else tf.ones(tf.shape(images)[:1])
    return images, labels, tf.reshape(tf.cast(labeled, tf.float32), [-1]) > 0
