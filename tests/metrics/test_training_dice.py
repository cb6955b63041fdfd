from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.metrics.training_dice import DiceScore
from tfmtseg.regions import Regions

BRATS = Regions.parse("brats_msd")
EXCLUSIVE = Regions.exclusive(["a", "b", "c"])


def batches(regions: Regions) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    shape = (2, 4, 3, 2)
    return [
        (
            random.integers(4, size=shape),
            random.normal(size=(*shape, regions.num_outputs)).astype(np.float32),
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("regions", [EXCLUSIVE, BRATS])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0]])
def test_pools_all_voxels(regions, weights):
    metric = DiceScore(regions)
    overlap, sizes = np.zeros(3), np.zeros(3)
    for labels, logits in batches(regions):
        metric.update_state(labels, logits, weights)
        counted = slice(None) if weights is None else slice(0, 1)
        truth = regions.masks(labels)[counted].reshape(-1, 3)
        predicted = regions.masks(regions.label_map(logits))[counted].reshape(-1, 3)
        overlap += (truth & predicted).sum(0)
        sizes += truth.sum(0) + predicted.sum(0)
    result = {name: float(value) for name, value in metric.result().items()}
    expected = {f"dice_{name}": 2 * overlap[i] / sizes[i] for i, name in enumerate(regions.names)}
    assert result == pytest.approx(expected, rel=1e-6)
    assert len(set(result.values())) == 3


def test_absent_regions_score_one_and_reset_forgets():
    metric = DiceScore(EXCLUSIVE)
    background = np.zeros((1, 2, 2, 2, 4), np.float32)
    background[..., 0] = 1
    labels = np.zeros((1, 2, 2, 2), np.int32)
    for _ in range(2):
        assert np.isnan([float(value) for value in metric.result().values()]).all()
        metric.update_state(labels, background, [0.0])
        assert np.isnan([float(value) for value in metric.result().values()]).all()
        metric.update_state(labels, background)
        assert {float(value) for value in metric.result().values()} == {1.0}
        metric.update_state(labels + 1, background)  # region a is missed
        assert float(metric.result()["dice_a"]) == 0.0
        assert float(metric.result()["dice_b"]) == 1.0
        metric.reset_state()


def test_inside_a_graph_with_unknown_batch():
    metric = DiceScore(EXCLUSIVE)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, None], tf.int32),
            tf.TensorSpec([None, None, None, None, 4], tf.float32),
        ]
    )
    def update(labels, logits):
        metric.update_state(labels, logits)

    labels, logits = batches(EXCLUSIVE)[0]
    update(labels.astype(np.int32), logits)
    eager = DiceScore(EXCLUSIVE)
    eager.update_state(labels, logits)
    for name, value in eager.result().items():
        assert float(metric.result()[name]) == float(value)


def test_config_round_trip():
    metric = DiceScore(BRATS, name="scores")
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert (again.name, again.regions) == ("scores", BRATS)
