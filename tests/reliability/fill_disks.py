"""Lets disks be full while TensorFlow writes, and looks at what is left.

    python tests/reliability/fill_disks.py TIMES [SEED]

For checkpoints and final weights, TIMES times each, and for exports, which take longer, a
tenth of that: files may not grow beyond a random size while numbers are saved over others,
or beside the last export. That must fail with an OSError, all files must be what they
were, without any more beside them, and a save with room must succeed.
Then the disk fills up amid a training, which must tell so with status 1, and go on, when
there is room and its command is repeated, to the bits of a run with room.
"""

from __future__ import annotations

import re
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import runs
import tensorflow as tf

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.console import BAD_SYSTEM
from tfmtseg.export import export_model
from tfmtseg.training.callbacks import Checkpoints
from tfmtseg.training.checkpoint import write_weights

UNLIMITED = resource.RLIM_INFINITY


def limit_files(size: int) -> None:
    """The size in bytes beyond which no file of this process may grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_on_full_disks(directory: Path, times: int, random: np.random.Generator) -> None:
    model = Segmenter(regions=1, method="bcp", width=8)
    model.build((None, 16, 16, 16, 1))
    model.compile(keras.optimizers.AdamW(1e-3))
    model.optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(model, directory / "checkpoints")
    variables = compat.tensorflow_variables([*model.state, *model.optimizer.variables])

    def save(action: Callable[[], object]) -> None:
        value = int(random.integers(1000))
        for variable in variables:
            variable.assign(tf.cast(tf.fill(variable.shape, value), variable.dtype))
        action()

    for name, action in (
        ("checkpoints", checkpoints.commit),
        ("weights", partial(write_weights, directory, model)),
    ):
        fail_to_write(partial(save, action), directory / name, times, random)


def fail_to_write(
    write: Callable[[], object], folder: Path, times: int, random: np.random.Generator
) -> None:
    write()
    before = files(folder)
    largest = max(map(len, before.values()))
    for _ in range(times):
        limit_files(int(random.integers(largest)))
        try:
            write()
        except OSError:
            pass
        else:
            raise AssertionError(f"{folder}: a write beyond the limit was not reported")
        finally:
            limit_files(UNLIMITED)
        if files(folder) != before:
            raise AssertionError(f"{folder}: a failed write changed the files")
    write()


def train_on_a_full_disk(folder: Path, random: np.random.Generator) -> Path:
    """Returns the folder of the run with room."""
    data, log = runs.make_data(folder / "data"), folder / "log"
    settings = {"method": "encdec", **runs.OTHERS}  # as interrupt_runs.py has them
    whole, broken = runs.whole(folder, data, **settings), folder / "broken"
    (path,) = (whole / "weights").glob("*.data*")
    size = int(random.integers(path.stat().st_size))
    step = int(random.integers(1, runs.TRAIN_STEPS))
    command = runs.flags(data, broken, **settings)
    status = runs.run_training(command, log, runs.after_step(step, partial(limit_files, size)))
    told = re.search(rf"^{broken}/\w+: access is refused \(.*Fix: ", log.read_text(), re.MULTILINE)
    if status != BAD_SYSTEM or not told:
        raise AssertionError(f"step {step}: status {status}\n{runs.tail(log)}")
    runs.must_train(command, log)
    if runs.digest(whole) != runs.digest(broken):
        raise AssertionError("other numbers after a full disk")
    return whole


def main(times: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = train_on_a_full_disk(folder, random)
        log = folder / "log"
        with runs.copy(lambda: save_on_full_disks(folder, times, random), log) as process:
            if runs.wait(process):
                raise AssertionError(runs.tail(log))
        exports, served = max(1, times // 10), folder / "served"
        write = partial(export_model, whole, served)
        with runs.copy(lambda: fail_to_write(write, served, exports, random), log) as process:
            if runs.wait(process):
                raise AssertionError(runs.tail(log))
    print(
        f"checkpoints and weights: {times} full disks each, exports: {exports}, 0 partial files; "
        "a training on a full disk told so and went on to the same bits"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
