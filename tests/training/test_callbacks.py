"""Tags, overlays and the history file."""

from __future__ import annotations

import csv

import numpy as np

from tfmtseg.training.callbacks import COLOURS, History, overlay, tag


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
