"""Tags, overlays and the history file."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.training import callbacks
from tfmtseg.training.callbacks import (
    COLOURS,
    Checkpoints,
    Clock,
    History,
    Termination,
    overlay,
    tag,
)


def test_tags():
    names = {"loss": "loss/total", "seg_loss": "loss/seg", "cpc_loss": "loss/cpc"}
    names |= {"dice_WT": "dice/WT", "cpc_accuracy": "cpc/accuracy"}
    assert {name: tag(name) for name in names} == names


def test_overlay_colours_truth_and_prediction_only_where_they_are():
    image = np.zeros((4, 6, 3), np.float32)
    truth, predicted = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)
    truth[1, 2, 1] = 1
    predicted[2, 3, 1] = 2
    picture = overlay(image, truth, predicted)
    assert picture.shape == (6, 12, 3)
    # y runs upwards, and x, which grows towards the patient's right, to the left.
    assert picture[6 - 1 - 2, 4 + 3 - 1].tolist() == (0.5 * COLOURS[0]).astype(np.uint8).tolist()
    assert picture[6 - 1 - 3, 8 + 3 - 2].tolist() == (0.5 * COLOURS[1]).astype(np.uint8).tolist()
    assert np.count_nonzero(picture.any(-1)) == 2


def test_history_goes_on_without_the_lines_a_break_left_behind(tmp_path):
    path = tmp_path / "history.csv"
    history = History(path, 10, lambda step: 0.5, Clock())
    for epoch in range(3):
        history.on_epoch_end(epoch, {"loss": float(epoch)})
    again = History(path, 10, lambda step: 0.5, Clock())
    again.on_epoch_end(1, {"loss": 7.0})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["step"], float(row["loss"])) for row in rows] == [("10", 0.0), ("20", 7.0)]


def test_clock_leaves_out_breaks_and_the_graph_that_is_built_after_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(callbacks.time, "process_time", lambda: 2 * now[0])

    def make_updates(clock: Clock, count: int, first: float) -> tuple[float, float]:
        """The first takes longer; each other 1 second."""
        now[0] += 1000
        clock.on_train_begin()
        for step in range(count):
            now[0] += 1 if step else first
            clock.on_train_batch_end(step)
        return clock.read()

    clock = Clock()
    assert make_updates(clock, 3, first=20) == (22, 44)
    again = Clock()
    again.go_on(clock.read())
    assert make_updates(again, 3, first=20) == (24, 48)
    again.on_train_end()
    assert make_updates(again, 2, first=1) == (26, 52)  # once more in the same process


def test_steps_that_loss_scaling_leaves_out_are_counted(tmp_path):
    """The optimizer does not count them, but the data go on by them."""

    def stub() -> SimpleNamespace:
        weight = tf.Variable(1.0)
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build([weight])
        return SimpleNamespace(state=[weight], optimizer=optimizer)

    checkpoints = Checkpoints(stub(), tmp_path)
    assert checkpoints.restore() == 0
    for step in range(5):
        checkpoints.on_train_batch_end(step)
    checkpoints.commit()
    again = Checkpoints(stub(), tmp_path)
    assert again.restore() == 5
    assert int(again.state.optimizer[0]) == 0  # its count


@pytest.mark.parametrize(("writes", "said"), [(True, ": saved after step 1."), (False, ".")])
@pytest.mark.parametrize("batch", [0, 1], ids=["amid", "at the end"])
def test_an_epoch_that_is_complete_ends_before_the_process(batch, writes, said, capsys):
    """Its line of history comes first, since a later call begins the next epoch; all is saved."""
    committed = []
    checkpoints = SimpleNamespace(
        saved_step=1, writes=writes, commit=lambda: committed.append(batch)
    )
    termination = Termination(checkpoints, tf.distribute.get_strategy())
    termination.set_params({"steps": 2})
    termination.on_train_batch_end(batch)
    termination.on_epoch_end(0)  # nobody has asked
    termination.asked = True
    if batch == 1:
        termination.on_train_batch_end(batch)
    ends = termination.on_epoch_end if batch == 1 else termination.on_train_batch_end
    with pytest.raises(SystemExit) as status:
        ends(batch)
    assert status.value.code == 143
    assert committed == [batch]
    assert capsys.readouterr().out == f"Asked to end{said} Repeat the command to go on.\n"
