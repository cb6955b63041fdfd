"""Measures the memory of a training step on this machine's processor: one row of a table.

    for crop in 32 64 96; do python tools/measure_memory.py --crop=$crop,$crop,$crop; done

The peak of two steps on random patches, less what the process held before it made the model:
weights, gradients, optimizer, activations, and what TensorFlow and oneDNN take to work with.
Methods and settings are those of `tools/train.py`.
"""

from __future__ import annotations

import platform

import numpy as np

import tfmtseg  # noqa: F401  # isort: skip  before tensorflow
import tensorflow as tf
from absl import app, flags

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.console import flags_only
from tfmtseg.memory import GB, peak_memory_gb, resident_memory_gb
from tfmtseg.models.encoder import ISOTROPIC
from tfmtseg.models.methods import METHODS
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.regions import Regions
from tfmtseg.training.sizes import choose_cube

_METHOD = flags.DEFINE_enum("method", "sscpcseg", list(METHODS), "The method.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of the first level.")
_CROP = flags.DEFINE_list("crop", ["64"] * 3, "Voxels of a patch.")
_MODALITIES = flags.DEFINE_integer("modalities", 4, "Input channels.")
_LABELED = flags.DEFINE_integer("labeled", 1, "Labelled patches in a step.")
_UNLABELED = flags.DEFINE_integer("unlabeled", 1, "Unlabelled patches in a step.")
_CLASSES = flags.DEFINE_integer(
    "classes", 0, "Classes to segment; 0: the three nested regions of BraTS.", lower_bound=0
)


def step_memory_gb() -> float:
    """What two training steps needed at their peak, in 10^9 bytes."""
    crop = [int(size) for size in _CROP.value]
    labeled = [1.0] * _LABELED.value
    if METHODS[_METHOD.value].uses_unlabelled:
        labeled += [0.0] * _UNLABELED.value
    random = np.random.default_rng(0)
    images = random.normal(size=(len(labeled), *crop, _MODALITIES.value)).astype(np.float32)
    regions = _CLASSES.value or Regions.parse("brats_msd")
    labels = random.integers(0, 1 + (_CLASSES.value or 3), images.shape[:-1]).astype(np.uint8)
    data = tf.constant(images), tf.constant(labels), tf.constant(labeled)
    before = resident_memory_gb()
    model = Segmenter(
        regions,
        _METHOD.value,
        width=_WIDTH.value,
        cube_size=choose_cube(crop, ISOTROPIC),
        predictor_blocks=2,
    )
    model.build(images.shape)
    model.compile(keras.optimizers.Adam())
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step)
    for _ in range(2):
        step(data)
    return peak_memory_gb() - before


def main(argv: list[str]) -> None:
    flags_only(argv)
    gib = step_memory_gb() * GB / 2**30
    patches = _LABELED.value + _UNLABELED.value * METHODS[_METHOD.value].uses_unlabelled
    crop = " x ".join(_CROP.value)
    print(f"| {_METHOD.value} | {_WIDTH.value} | {crop} | {patches} | {gib:.2f} |")
    print(f"{platform.machine()}, {platform.system()}, {compat.versions()}")


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
