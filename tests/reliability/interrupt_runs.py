"""Interrupts trainings at random steps, repeats their command, and compares what comes out.

    python tests/reliability/interrupt_runs.py KILL|TERM TIMES [METHOD...]

The interruptions, SIGKILL or SIGTERM, are dealt out to runs of the methods (without any:
of all) in turn, at least one to each, and come after random steps; each time the run is
started again by the same command. In the end weights, teacher and optimizer of the last
checkpoint, the final weights, and losses and learning rates of all epochs must be those
of a run that nothing interrupted, to the bit. A run that gets SIGTERM must save after the
very step, and end with status 143 within GRACE_SECONDS; the losses of the epoch it broke
off, means over the epoch's rest, are left out. Runs that get SIGKILL have the optimizer and
the average of the weights that are the defaults, the others those of `runs.OTHERS`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import runs

from tfmtseg.models.methods import METHODS

GRACE_SECONDS = 10  # of those who end processes, the shortest in wide use


def interrupt(
    number: signal.Signals, times: int, method: str, data: Path, folder: Path
) -> list[float]:
    """Interrupts a run `times` times; returns the seconds it took to end."""
    random = np.random.default_rng(zlib.crc32(f"{number} {method}".encode()))
    log, sent_file = folder / "log", folder / "sent"
    settings = {"method": method, **(runs.OTHERS if number == signal.SIGTERM else {})}
    whole, broken = runs.whole(folder, data, **settings), folder / "broken"
    command = runs.flags(data, broken, **settings)

    def send() -> None:
        sent_file.write_text(repr(time.time()))
        os.kill(os.getpid(), number)

    seconds = []
    steps = random.choice(np.arange(1, runs.TRAIN_STEPS), times, replace=False)
    expected = -number if number == signal.SIGKILL else 128 + number
    for step in map(int, np.sort(steps)):
        status = runs.run_training(command, log, runs.after_step(step, send))
        seconds.append(time.time() - float(sent_file.read_text()))
        if status != expected or (broken / "result.json").exists():
            raise AssertionError(f"{method}, step {step}: status {status}\n{runs.tail(log)}")
        if number == signal.SIGTERM:
            saved = runs.step_of(runs.checkpoint(broken))
            if saved != step or seconds[-1] > GRACE_SECONDS:
                raise AssertionError(f"{method}, step {step}: {saved} saved, {seconds[-1]} s")
    runs.must_train(command, log)
    broken_epochs = []
    if number == signal.SIGTERM:
        broken_epochs = [
            -(-int(step) // runs.STEPS_PER_EPOCH) * runs.STEPS_PER_EPOCH for step in steps
        ]
    if runs.digest(whole, broken_epochs) != runs.digest(broken, broken_epochs):
        raise AssertionError(f"{method}: other numbers after breaks at the steps {sorted(steps)}")
    return seconds


def main(name: str, times: int, methods: list[str]) -> None:
    number = signal.Signals[f"SIG{name}"]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        data = runs.make_data(Path(folder, "data"))
        for index, method in enumerate(methods):
            place = Path(folder, method)
            place.mkdir()
            share = max(1, len(range(index, times, len(methods))))
            seconds += interrupt(number, share, method, data, place)
    text = f"{len(seconds)} x {number.name} at random steps, {', '.join(methods)}: "
    if number == signal.SIGTERM:
        text += f"all saved and ended with 143, after at most {max(seconds):.1f} s; "
    print(f"{text}{len(methods)} of {len(methods)} runs went on to the same bits")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(METHODS))
