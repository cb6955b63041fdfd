"""What the checks of whole runs share: small runs on phantoms, and copies of this process.

Importing TensorFlow takes most of the time of a small run. A process that has imported
it but not yet used it has none of its threads and may be copied: each run here is a copy
with the command line of tools/train.py. A process that copies itself must therefore leave
every TensorFlow operation to its copies; reading a checkpoint's numbers is none.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tfmtseg.training import callbacks  # isort: skip  before tensorflow
import tensorflow as tf
from tfmtseg.tools import train

from tfmtseg import compat
from tfmtseg.data.phantom import write_phantoms

TRAIN_STEPS, STEPS_PER_EPOCH = 24, 3
UNSURE = ("seconds", "cpu_seconds", "loss", "val_loss")  # what may differ between equal runs
SETTINGS = {
    "regions": "brats_msd",
    "num_labeled": 2,
    "num_test": 1,
    "width": 8,
    "crop": "16,16,16",
    "cube_size": "8,8,8",
    "predictor_blocks": 1,
    "train_steps": TRAIN_STEPS,
    "steps_per_epoch": STEPS_PER_EPOCH,
    "warmup_steps": 5,
    "teacher_start": 0.2,
}
OTHERS = {"optimizer": "ranger", "weight_averaging": "swa"}  # than the defaults


@contextlib.contextmanager
def copy(action: Callable[[], int | None], log: str | os.PathLike[str]) -> Iterator[int]:
    """A copy of this process that does `action` and ends with its result.

    Args:
        action: Returns the exit status, or nothing for 0.
        log: File that gets what the copy prints.
    """
    process = os.fork()
    if process == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        try:
            status = action() or 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    yield process


def wait(process: int) -> int:
    """The exit status of a copy; below 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def make_data(folder: Path) -> Path:
    """Writes five phantoms: two labelled cases, one for development, one for the test."""
    write_phantoms(folder, 5, seed=4, shape=(24, 24, 24))
    return folder


def flags(data: Path, model_dir: Path, **settings: object) -> list[str]:
    """The command line of a small run; `settings` win over those above."""
    places = {"data_dir": data, "model_dir": model_dir, "cache_dir": data.parent / "cache"}
    chosen = {**places, **SETTINGS, **settings}
    return [f"--{name}={value}" for name, value in chosen.items()]


def run_training(command: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Trains in a copy of this process; returns its exit status.

    Args:
        command: Flags of tools/train.py.
        log: File that gets what it prints.
        prepare: Is called in the copy beforehand.
    """

    def action() -> None:
        prepare()
        sys.argv = ["train.py", *command]
        train.run()

    with copy(action, log) as process:
        return wait(process)


def must_train(command: list[str], log: Path) -> None:
    """Trains to the end, or raises."""
    if status := run_training(command, log):
        raise AssertionError(f"{command}: status {status}\n{tail(log)}")


def whole(folder: Path, data: Path, **settings: object) -> Path:
    """A run that nothing interrupts, in `folder`, or where RUNS_DIR names an earlier check's."""
    name = "-".join(map(str, settings.values()))
    model_dir = Path(os.environ.get("RUNS_DIR", folder)) / f"whole-{name}"
    if not (model_dir / "result.json").exists():
        must_train(flags(data, model_dir, **settings), folder / "log")
    return model_dir


def after_step(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """For `prepare`: lets a training do `action` after an update."""

    def prepare() -> None:
        move = callbacks.Progress.on_train_batch_end

        def move_and_act(self, batch, logs=None) -> None:
            move(self, batch, logs)
            if int(compat.iterations(self.model.optimizer)) == step:
                action()

        callbacks.Progress.on_train_batch_end = move_and_act

    return prepare


def checkpoint(model_dir: Path) -> dict[str, np.ndarray]:
    """All numbers of the last checkpoint: weights, teacher and optimizer."""
    return numbers(tf.train.latest_checkpoint(str(model_dir / "checkpoints")))


def step_of(saved: dict[str, np.ndarray]) -> int:
    """Updates made before a checkpoint."""
    return int(saved["step/.ATTRIBUTES/VARIABLE_VALUE"])


def digest(model_dir: Path, broken_epochs: Sequence[int] = ()) -> str:
    """One hash of everything a finished run leaves that does not tell of time or place.

    The last checkpoint, the final weights, and losses, scores and learning rates of all
    epochs. The shown sum of the losses is left out, its terms are in: TensorFlow 2.15 rounds
    that sum in an order that differs from process to process.

    Args:
        model_dir: Folder of the run.
        broken_epochs: Last steps of epochs that are left out of the curves.
    """
    result = hashlib.sha256()
    for saved in (checkpoint(model_dir), numbers(str(model_dir / "weights" / "final"))):
        for name, values in sorted(saved.items()):
            result.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    with (model_dir / "history.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kept = {name: x for name, x in row.items() if name not in UNSURE}
            if int(row["step"]) not in broken_epochs:
                result.update(json.dumps(kept, sort_keys=True).encode())
    return result.hexdigest()


def numbers(prefix: str) -> dict[str, np.ndarray]:
    """All numbers of a checkpoint but the count of saves and the time spent."""
    reader = tf.train.load_checkpoint(prefix)
    names = [name for name in reader.get_variable_to_shape_map() if not name.startswith("_")]
    left_out = ("save_counter", "seconds")
    return {name: reader.get_tensor(name) for name in names if not name.startswith(left_out)}


def tail(log: Path) -> str:
    """The end of a log, for messages."""
    return log.read_text(errors="replace")[-2000:]
