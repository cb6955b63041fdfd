"""Tags, overlays and the history file."""

from __future__ import annotations

import csv

import numpy as np

from tfmtseg.training.callbacks import COLOURS, History, overlay, tag
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.optimizers import make_optimizer, make_schedule


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
    # rot90 puts y downwards from its end and x to the right.
    assert picture[6 - 1 - 2, 4 + 1].tolist() == (0.5 * COLOURS[0]).astype(np.uint8).tolist()
    assert picture[6 - 1 - 3, 8 + 2].tolist() == (0.5 * COLOURS[1]).astype(np.uint8).tolist()
    assert np.count_nonzero(picture.any(-1)) == 2


def test_history_goes_on_without_the_lines_a_break_left_behind(tmp_path):
    path = tmp_path / "history.csv"
    history = History(path, 10, lambda step: 0.5)
    for epoch in range(3):
        history.on_epoch_end(epoch, {"loss": float(epoch)})
    again = History(path, 10, lambda step: 0.5)
    again.on_epoch_end(1, {"loss": 7.0})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["step"], float(row["loss"])) for row in rows] == [("10", 0.0), ("20", 7.0)]


def test_schedule_by_hand():
    config = TrainConfig(train_steps=100, warmup_steps=10, learning_rate=0.2)
    schedule = make_schedule(config)
    expected = [0.2 * min(1, (s + 1) / 10) * (1 - s / 100) ** 0.9 for s in (0, 4, 9, 50, 99)]
    found = [float(schedule(s)) for s in (0, 4, 9, 50, 99)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
    assert float(schedule(100)) == 0.0


def test_weight_decay_is_per_update_at_the_full_rate():
    optimizer = make_optimizer(TrainConfig(learning_rate=0.01, weight_decay=1e-5))
    np.testing.assert_allclose(optimizer.weight_decay * 0.01, 1e-5)
    assert optimizer.use_ema
