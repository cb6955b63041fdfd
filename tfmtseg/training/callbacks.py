"""What happens beside the updates: progress, history, TensorBoard, checkpoints."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.files import read_rows, write_rows
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.saving import whole_or_not
from tfmtseg.training.checkpoint import latest_checkpoint
from tfmtseg.training.strategy import anywhere

# Of labels 1, 2, ... in overlays.
COLOURS = np.array(
    [[230, 85, 60], [70, 150, 230], [250, 200, 60], [120, 200, 90], [180, 110, 220]], np.float32
)


class Progress(keras.callbacks.Callback):
    """One bar over all updates, with the time left and the losses of late.

    Args:
        total_steps: Updates in all, those of earlier calls included.
        first_step: Updates of earlier calls.
    """

    def __init__(self, total_steps: int, first_step: int):
        super().__init__()
        self.total_steps = total_steps
        self.made = first_step
        self.bar: tqdm | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the bar."""
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.made,
            desc="Training",
            unit="step",
            # A file gets a line now and then, a terminal a live bar.
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Moves the bar."""
        shown = {k: f"{float(v):.3f}" for k, v in (logs or {}).items() if k.endswith("_loss")}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
            self.made += 1

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the bar, where one was opened."""
        if self.bar is not None:
            self.bar.close()


class Clock(keras.callbacks.Callback):
    """Wall-clock and processor time (of all threads) of all updates that count.

    Updates that a break undid do not count, and neither does the first one after a break:
    TensorFlow builds its graph anew there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spent = np.zeros(2)
        self.mark: np.ndarray | None = None  # of the last reading, while updates are made
        self.after_break = False

    def go_on(self, spent: Sequence[float]) -> None:
        """Adds to what was read before a break."""
        self.spent = np.array(spent, np.float64)
        self.after_break = True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts."""
        self.mark = None if self.after_break else self._now()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts, after a break."""
        if self.after_break:
            self.mark, self.after_break = self._now(), False

    def read(self) -> tuple[float, float]:
        """Seconds of both so far."""
        now = self._now()
        if self.mark is not None:
            self.spent += now - self.mark
            self.mark = now
        return float(self.spent[0]), float(self.spent[1])

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops."""
        self.read()
        self.mark = None

    def _now(self) -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])


class History(keras.callbacks.Callback):
    """Writes one line per virtual epoch to a CSV file; goes on where it stopped.

    Args:
        path: The file.
        steps_per_epoch: Updates per line.
        schedule: Maps a step to its learning rate.
        clock: For the columns `seconds` and `cpu_seconds`.
    """

    def __init__(self, path: Path, steps_per_epoch: int, schedule: Any, clock: Clock):
        super().__init__()
        self.path = path
        self.steps_per_epoch = steps_per_epoch
        self.schedule = schedule
        self.clock = clock
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = list(read_rows(path))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds a line; lines of this and later epochs, left by a break, go."""
        step = (epoch + 1) * self.steps_per_epoch
        self.rows = [row for row in self.rows if int(row["step"]) < step]
        values = {name: float(value) for name, value in sorted((logs or {}).items())}
        values.pop("learning_rate", None)
        rate = float(self.schedule(step - 1))
        seconds, cpu_seconds = (round(spent, 2) for spent in self.clock.read())
        self.rows.append(
            {
                "step": step,
                "learning_rate": rate,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                **values,
            }
        )
        write_rows(self.path, self.rows)


class TensorBoard(keras.callbacks.Callback):
    """One tag per loss term, Dice per region, and a picture.

    Tags: `loss/seg`, `dice/WT`, `cpc/accuracy`, `images/overlay`; held-out values go
    to a writer of their own and share the plots.

    Args:
        directory: Folder of the event files.
        steps_per_epoch: Updates per point.
        example: `(images, labels)` whose first volume is drawn: image, truth and
            prediction beside each other in the axial slice with most foreground. None
            draws nothing.
    """

    def __init__(
        self,
        directory: Path,
        steps_per_epoch: int,
        example: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.example = example
        self.writers = {
            kind: tf.summary.create_file_writer(str(directory / kind))
            for kind in ("training", "held_out")
        }

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the values of this epoch."""
        step = (epoch + 1) * self.steps_per_epoch
        for name, value in (logs or {}).items():
            kind = "held_out" if name.startswith("val_") else "training"
            with self.writers[kind].as_default():
                tf.summary.scalar(tag(name.removeprefix("val_")), float(value), step)
        if self.example is not None:
            image, truth = (part[:1] for part in self.example)
            logits = self.model(image, training=False).numpy()
            if not np.isnan(logits).any():  # half precision may overflow, and training go on
                predicted = self.model.regions.label_map(logits)
                picture = overlay(image[0, ..., 0], truth[0], predicted[0])
                with self.writers["training"].as_default():
                    tf.summary.image("images/overlay", picture[None], step)
        for writer in self.writers.values():
            writer.flush()


def tag(name: str) -> str:
    """TensorBoard's tag for a logged value: `seg_loss` -> `loss/seg`, `dice_WT` -> `dice/WT`."""
    if name == "loss":
        return "loss/total"
    if name.endswith("_loss"):
        return f"loss/{name.removesuffix('_loss')}"
    return name.replace("_", "/", 1)


def overlay(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Image, truth and prediction in the axial slice with most foreground.

    Args:
        image: Float, `(x, y, z)`.
        truth: Label map of the same shape.
        predicted: Likewise.

    Returns:
        `uint8`, `(height, 3 * width, 3)`.
    """
    z = int(np.argmax((truth > 0).sum((0, 1))))
    low, high = np.percentile(image[:, :, z], [1, 99])
    grey = np.clip((image[:, :, z] - low) / max(high - low, 1e-6), 0, 1) * 255
    panels = []
    for label_map in (np.zeros_like(truth), truth, predicted):
        picture = np.repeat(grey[..., None], 3, -1)
        inside = label_map[:, :, z] > 0
        colours = COLOURS[(label_map[:, :, z][inside].astype(int) - 1) % len(COLOURS)]
        picture[inside] = 0.5 * picture[inside] + 0.5 * colours
        # Anterior up, the patient's right on the left, as in the report.
        panels.append(np.rot90(picture)[:, ::-1])
    return np.concatenate(panels, 1).astype(np.uint8)


class Checkpoints(keras.callbacks.Callback):
    """Saves weights, teacher and optimizer after each virtual epoch, and restores the last save.

    Args:
        model: A compiled model with built weights and optimizer.
        directory: Folder of the checkpoints; the last two are kept.
        writes: Whether this process saves; of several workers, one does.
    """

    def __init__(self, model: Segmenter, directory: Path, writes: bool = True):
        super().__init__()
        self.directory = directory
        self.writes = writes
        self.clock = Clock()
        # Not the optimizer's count, in which Keras 3 leaves out what loss scaling left out.
        self.step = 0
        self.saved_step = 0
        self._kept = {
            "step": tf.Variable(0, dtype=tf.int64, trainable=False),
            "seconds": tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False),
        }
        self.state = tf.train.Checkpoint(
            model=compat.tensorflow_variables(model.state),
            optimizer=compat.optimizer_variables(model.optimizer),
            **self._kept,
        )
        # TensorFlow makes the counter at the first save; under several workers, all of them
        # would have to take part in that.
        int(self.state.save_counter)
        self.manager = tf.train.CheckpointManager(self.state, str(directory), max_to_keep=2)

    def restore(self) -> int:
        """Brings back the last save, if there is one; returns the updates made so far."""
        latest = latest_checkpoint(self.directory)
        if latest is not None:
            self.state.restore(latest).assert_consumed()
            self.saved_step = int(self._kept["step"])
            if self.step == 0:  # this call has made no update yet
                self.step = self.saved_step
                self.clock.go_on(self._kept["seconds"].numpy())
        return self.step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Counts."""
        self.step += 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves."""
        self.commit()

    def commit(self) -> None:
        """Saves, in the process that writes.

        If that fails, the last save remains, and no part of the new one.
        """
        if self.writes:
            self._kept["step"].assign(self.step)
            self._kept["seconds"].assign(self.clock.read())
            with whole_or_not(self.directory):
                self.manager.save()
            self.saved_step = self.step


class Termination(keras.callbacks.Callback):
    """Saves after the current update when the process is asked to end, and ends it.

    Of several workers, all end with the one that is asked: none can go on without it, and the
    one that saves has to be there.

    Args:
        checkpoints: Saves.
        strategy: Who trains.
    """

    def __init__(self, checkpoints: Checkpoints, strategy: tf.distribute.Strategy):
        super().__init__()
        self.checkpoints = checkpoints
        self.strategy = strategy
        self.asked = False
        self.before: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begins to listen to SIGTERM. Python lets only the main thread do so."""
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves at once; leaves unless the epoch is complete, whose line of history comes first."""
        if anywhere(self.strategy, self.asked):
            self.checkpoints.commit()
            if batch + 1 < self.params["steps"]:
                self.leave()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Leaves, if asked to."""
        if anywhere(self.strategy, self.asked):
            self.leave()

    def leave(self) -> None:
        """Ends the process with status 143, as shells call a death by SIGTERM."""
        who = "Asked to end" if self.asked else "Another worker was asked to end"
        saved = f": saved after step {self.checkpoints.saved_step}" * self.checkpoints.writes
        print(f"{who}{saved}. Repeat the command to go on.")
        sys.exit(128 + signal.SIGTERM)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Listens no longer."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None
