"""Kills processes inside the saving of checkpoints and looks at what the next one finds.

    python tests/reliability/kill_saves.py KILLS [SEED]

A process restores the last checkpoint of a small model and its optimizer, and saves
without end, with other numbers in every variable each time. It tells when a save begins
and when it has returned, and is killed with signal 9 at a random moment, until KILLS of
these moments lay inside a save. Each successor must find a whole checkpoint, and none
older than the last one whose save had returned.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import runs

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.training.callbacks import Checkpoints


def numbers(variables: list, step: int) -> list[np.ndarray]:
    """What the variables hold after `step` saves."""
    return [
        np.full(variable.shape, step + index, variable.dtype.as_numpy_dtype)
        for index, variable in enumerate(variables)
    ]


def live(directory: Path, pipe: int) -> None:
    """Restores, checks what it found, and saves without end."""
    model = Segmenter(regions=1, method="bcp", width=8)
    model.build((None, 16, 16, 16, 1))
    model.compile(keras.optimizers.AdamW(1e-3))
    model.optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(model, directory)
    variables = compat.tensorflow_variables([*model.optimizer.variables, *model.state])
    found = checkpoints.restore()
    if found:
        for variable, expected in zip(variables, numbers(variables, found), strict=True):
            np.testing.assert_array_equal(variable.numpy(), expected)

    def tell(what: str, step: int) -> None:
        os.write(pipe, f"{what} {step} {time.monotonic()}\n".encode())

    tell("found", found)
    for step in itertools.count(found + 1):
        for variable, values in zip(variables, numbers(variables, step), strict=True):
            variable.assign(values)
        checkpoints.step = step
        tell("begin", step)
        checkpoints.on_epoch_end(step)
        tell("end", step)


def watch_a_life(
    directory: Path, log: Path, saves: int, delay: float
) -> list[tuple[str, int, float]]:
    """Kills a process `delay` seconds after its `saves`-th save began; returns what it told."""
    source, sink = os.pipe()
    told = []
    with runs.copy(lambda: live(directory, sink), log) as process:
        os.close(sink)
        with os.fdopen(source) as lines:
            for line in lines:
                what, step, moment = line.split()
                told.append((what, int(step), float(moment)))
                if what == "begin":
                    saves -= 1
                    if saves == 0:
                        time.sleep(delay)
                        os.kill(process, signal.SIGKILL)
        status = runs.wait(process)
    if status != -signal.SIGKILL:
        raise AssertionError(f"the saving process failed by itself\n{runs.tail(log)}")
    return told


def main(kills: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    inside = others = 0
    begun = ended = 0  # the last save of which either was told
    seconds = [0.3]
    with tempfile.TemporaryDirectory() as folder:
        directory, log = Path(folder, "checkpoints"), Path(folder, "log")
        while True:
            delay = random.uniform(0, statistics.median(seconds))
            told = watch_a_life(directory, log, int(random.integers(1, 4)), delay)
            found = told[0][1]
            if not ended <= found <= begun:
                raise AssertionError(f"found save {found}, but {ended} had returned")
            if inside == kills:
                break
            begun, ended = found, found
            for (what, step, moment), (_, _, before) in zip(told[1:], told, strict=False):
                if what == "begin":
                    begun = step
                else:
                    ended = step
                    seconds.append(moment - before)
            inside += begun > ended
            others += begun == ended
    print(
        f"{inside} x SIGKILL inside saves of {statistics.median(seconds):.2f} s "
        f"(and {others} between saves): 0 lost or damaged"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
