from __future__ import annotations

import numpy as np
import pytest

from tfmtseg.compat import keras
from tfmtseg.losses.contrastive import InfoNCE


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_by_the_definition(implementation):
    random = np.random.default_rng(0)
    targets, predictions = random.normal(size=(2, 6, 4)).astype(np.float32)
    similar = predictions.astype(float) @ targets.T / 0.5
    expected = np.mean(np.log(np.exp(similar).sum(1)) - np.diag(similar))
    loss = InfoNCE(temperature=0.5, normalize=False, implementation=implementation)
    assert float(loss(targets, predictions)) == pytest.approx(expected, rel=1e-5)


def test_config_round_trip():
    loss = InfoNCE(temperature=0.3, normalize=False, implementation="reference", name="other")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    assert (again.temperature, again.normalize, again.name) == (0.3, False, "other")


def test_a_model_learns_with_it():
    random = np.random.default_rng(1)
    inputs = random.normal(size=(64, 8)).astype(np.float32)
    targets = inputs @ random.normal(size=(8, 4)).astype(np.float32)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(4)])
    model.compile(keras.optimizers.Adam(0.05), loss=InfoNCE(), jit_compile=False)
    history = model.fit(inputs, targets, batch_size=32, epochs=30, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < losses[0] / 2
