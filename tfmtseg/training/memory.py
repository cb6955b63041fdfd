"""How much memory a training takes, told before it starts."""

from __future__ import annotations

import math

from tfmtseg.models.contrastive_branch import grid_shape
from tfmtseg.training.config import TrainConfig

START_GB = 1.4  # TensorFlow, this package, graphs, and patches on their way, with room
# Arrays of the size and width of the first level's features, for each patch of a step, that
# wait for the gradient or are at work. All levels and branches are counted in, except the
# contrastive cubes, which the decoder does not see.
LIVE_FEATURES = 38
LIVE_CUBE_FEATURES = 12
# Arrays that the loss keeps of each channel of the output beyond six, those of three nested
# regions, with which the above was measured. `encdec` took 8.4 and `bcp` 5.7, by
# `tools/measure_memory.py --classes=103` and 5, 2 + 2 patches of 64 x 64 x 64, a width of 8.
LIVE_OUTPUTS = 9
COUNTED_OUTPUTS = 6
WEIGHT_COPIES = 5  # weights, gradients, two moments, average


def training_memory_gb(
    config: TrainConfig, parameters: int, num_outputs: int = COUNTED_OUTPUTS
) -> float:
    """The most memory that a training is to take on a CPU, in 10^9 bytes.

    A rule, made from measurements so that it is kept, not that it is sharp: see
    `docs/reliability.md` for what trainings took of it.

    Args:
        config: Settings with a known crop and cube.
        parameters: Trainable weights, those of the branch included.
        num_outputs: Channels of the network's output, `Regions.num_outputs`.
    """
    voxels = config.patches_per_step() * math.prod(config.crop)
    arrays = LIVE_FEATURES * voxels
    if config.form and config.form.compares == "views":
        arrays *= 2  # each smaller than its patch
    elif config.form and config.form.compares == "cubes":  # those of classes are there anyway
        cubes = config.patches_per_step("others") * math.prod(
            grid_shape(config.crop, config.cube_size)
        )
        arrays += LIVE_CUBE_FEATURES * cubes * math.prod(config.cube_size)
    numbers = arrays * config.width + WEIGHT_COPIES * parameters
    numbers += LIVE_OUTPUTS * max(num_outputs - COUNTED_OUTPUTS, 0) * voxels
    return START_GB + 4 * numbers / 1e9
