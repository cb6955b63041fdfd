"""Makes one step on a large crop and tells how much memory it took.

    python benchmarks/large_crop.py --remat

Width 32, a labelled and an unlabelled patch of 144 x 144 x 128 voxels of 4 modalities,
contrastive cubes of 32.
"""

from __future__ import annotations

import time

import numpy as np
from absl import app, flags
from interleave import machine

_REMAT = flags.DEFINE_bool("remat", False, "As the setting of that name.")
_CROP = flags.DEFINE_list("crop", ["144", "144", "128"], "Voxels of a patch.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of the first level.")
_CUBE = flags.DEFINE_integer("cube_size", 32, "Voxels along the edges of the cubes.")
_PRECISION = flags.DEFINE_string("precision", "float32", "As the setting of that name.")


def main(_: list[str]) -> None:
    """Makes the step."""
    import tfmtseg  # noqa: I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.memory import peak_memory_gb
    from tfmtseg.training.config import TrainConfig
    from tfmtseg.training.optimizers import make_optimizer

    crop = tuple(map(int, _CROP.value))
    model = tfmtseg.Segmenter(
        regions=tfmtseg.Regions.parse("brats_msd"),
        method="sscpcseg",
        width=_WIDTH.value,
        cube_size=_CUBE.value,
        remat=_REMAT.value,
        dtype=_PRECISION.value,
    )
    model.build((None, *crop, 4))
    model.compile(make_optimizer(TrainConfig()))
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    images = random.normal(size=(2, *crop, 4)).astype(np.float32)
    labels = random.integers(0, 4, (2, *crop)).astype(np.int32)
    batch = tf.data.Dataset.from_tensors((images, labels, np.float32([1, 0])))
    start = time.perf_counter()
    loss = model.fit(batch, verbose=0, shuffle=False).history["loss"][0]
    print(
        f"{machine()}: {' x '.join(_CROP.value)}, width {_WIDTH.value}, {_PRECISION.value}, remat "
        f"{_REMAT.value}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s, peak "
        f"{peak_memory_gb():.1f} GB"
    )


if __name__ == "__main__":
    app.run(main)
