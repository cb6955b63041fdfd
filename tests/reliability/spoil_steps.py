"""Spoils the images of one step of a training and looks at where it stops.

    python tests/reliability/spoil_steps.py [METHOD...]

For each method (without any: for all), one voxel of the images of a random step is NaN or
infinite. The run must end in that step with status 2 and a message that names step, loss
and cases; the checkpoint before must be the last one, and finite.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import runs
import tensorflow as tf

from tfmtseg.console import BAD_INPUT
from tfmtseg.models.methods import METHODS
from tfmtseg.training import run


def spoil(step: int, value: float, named: Path) -> None:
    """Puts `value` into one voxel of each image of a step, counted from 1.

    Which step's cases the message names, counted from 0, is written to the file `named`.
    """
    sound, names = run.training_batches, run.batch_cases

    def spoilt(*arguments, steps: tuple[int, int], **settings):
        def change(index, batch):
            images, *others = batch
            wrong = tf.tensor_scatter_nd_update(images, [[0, 1, 2, 3, 0]], [value])
            return (tf.where(index == step - 1, wrong, images), *others)

        batches = sound(*arguments, steps=steps, **settings)
        return batches.enumerate(steps[0]).map(change)

    def told(labelled, unlabelled, index: int, **settings):
        named.write_text(str(index))
        return names(labelled, unlabelled, index, **settings)

    run.training_batches, run.batch_cases = spoilt, told


def stops_at(step: int, value: float, method: str, data: Path, folder: Path) -> None:
    log, model_dir, named = folder / "log", folder / "run", folder / "named"
    command = runs.flags(data, model_dir, method=method)
    status = runs.run_training(command, log, lambda: spoil(step, value, named))
    text = log.read_text()
    found = re.search(
        rf"^step {step}: \w+ is (NaN|infinite).*, must be finite\. Fix: look at the batch's "
        r"cases, PHANTOM_\d+, PHANTOM_\d+.*The last checkpoint is as it was\.$",
        text, re.MULTILINE,
    )  # fmt: skip
    saved = (step - 1) // runs.STEPS_PER_EPOCH * runs.STEPS_PER_EPOCH
    numbers = runs.checkpoint(model_dir) if saved else {}
    finite = all(np.isfinite(values).all() for values in numbers.values())
    if status != BAD_INPUT or not found or not finite:
        raise AssertionError(f"{method}, step {step}: status {status}, {finite}\n{runs.tail(log)}")
    if named.read_text() != str(step - 1):  # all steps have these cases, in other orders
        raise AssertionError(f"{method}, step {step}: cases of batch {named.read_text()} named")
    if saved and runs.step_of(numbers) != saved:
        raise AssertionError(f"{method}, step {step}: {runs.step_of(numbers)} saved, not {saved}")


def main(methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = runs.make_data(Path(folder, "data"))
        for method in methods:
            random = np.random.default_rng(zlib.crc32(method.encode()))
            place = Path(folder, method)
            place.mkdir()
            step = int(random.integers(1, runs.TRAIN_STEPS + 1))
            stops_at(step, random.choice([np.nan, np.inf]), method, data, place)
    print(
        f"NaN or infinity at a random step, {', '.join(methods)}: {len(methods)} of {len(methods)} "
        "stopped in that step and named it, 0 checkpoints spoilt"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or list(METHODS))
