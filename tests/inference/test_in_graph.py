"""Each function in the graph against the one in NumPy that it stands for."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data import preprocess
from tfmtseg.inference import in_graph, sliding_window
from tfmtseg.regions import Regions

WINDOW = (8, 6, 4)


def random_volume(shape, channels=1, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, channels)).astype(np.float32)


def surrounded(value: float) -> np.ndarray:
    """Three quarters of the faces and more have one value; the body is bright and skewed."""
    volume = np.full((12, 11, 10, 1), value, np.float32)
    volume[2:10, 2:, 3:8] = np.exp(random_volume((8, 9, 5))) * 300
    return volume


def two_channels() -> np.ndarray:
    return np.concatenate([surrounded(0), random_volume((12, 11, 10)) * 1e-3 + 2], -1)


def outliers() -> np.ndarray:
    volume = random_volume((20, 20, 20)) * 10
    volume[5, 5, 5:8, 0] = 1e6, -1e6, 0
    return volume


VOLUMES = {
    "surround_of_zero": surrounded(0),
    "surround_of_another_value": surrounded(-1024),
    "surround_above": surrounded(5000),
    "surround_on_a_third_of_the_faces": surrounded(-200)[2:10, 2:, 3:9],
    "cropped_tightly": random_volume((9, 8, 7)) * 50 + 1000,
    "one_slice": random_volume((9, 8, 1)),
    "one_voxel_differs": np.eye(1, 60, 30, dtype=np.float32).reshape(5, 4, 3, 1),
    "two_values": (random_volume((9, 8, 7)) > 0).astype(np.float32),
    "large_mean": random_volume((9, 8, 7)) + 1e5,
    "outliers": outliers(),
    "whole_numbers": np.rint(random_volume((16, 16, 16)) * 200),
    "channels": two_channels(),
    "constant": np.full((4, 4, 4, 1), 3, np.float32),
    "zero": np.zeros((4, 4, 4, 1), np.float32),
    "one_voxel": np.ones((1, 1, 1, 1), np.float32),
}


@pytest.mark.parametrize("volume", VOLUMES.values(), ids=VOLUMES)
def test_normalize(volume):
    """Both round to steps of 3e-4: equal to float32, unless a value lies on a border of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", preprocess.InputWarning)
        expected = preprocess.normalize(volume)
    channels = [in_graph.normalize(volume[..., i, None]) for i in range(volume.shape[-1])]
    values = np.concatenate([values for values, _ in channels], -1)
    np.testing.assert_array_equal(values, expected.values())
    np.testing.assert_array_equal(
        np.concatenate([background for _, background in channels]), expected.background
    )


def test_normalize_takes_channels_one_by_one():
    volume = VOLUMES["channels"]
    values, background = tf.function(in_graph.normalize)(volume)
    expected = preprocess.normalize(volume)
    np.testing.assert_array_equal(values, expected.values())
    np.testing.assert_array_equal(background, expected.background)


@pytest.mark.parametrize("size", [1, 2, 3, 200, 201, 399, 401, 5000])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 1.0])
def test_quantiles(size, share):
    values = np.random.default_rng(size).normal(size=size)
    # The same formula; NumPy interpolates from the other end in half of the cases.
    assert float(in_graph._quantile_from_above(tf.constant(values), share)) == pytest.approx(
        np.quantile(values, share), rel=1e-13, abs=1e-13
    )


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(8, 6, 4), (9, 20, 4), (17, 13, 9)])
def test_window_places(shape, overlap):
    starts = [
        sliding_window.window_starts(size, length, overlap)
        for size, length in zip(shape, WINDOW, strict=True)
    ]
    places = in_graph.window_places(tf.constant(shape), WINDOW, overlap)
    np.testing.assert_array_equal(places, list(itertools.product(*starts)))


def position_dependent(windows):
    """Depends on a voxel's place in its window: only the right windows and weights average it."""
    ramp = np.linspace(-1, 1, np.prod(WINDOW), dtype=np.float32).reshape((1, *WINDOW, 1))
    return windows[..., :1] * ramp + windows[..., 1:] * [1.0, 2.0, -3.0] - ramp


@pytest.fixture(scope="module")
def in_graph_logits():
    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, None, 2), tf.float32),
            tf.TensorSpec((2,), tf.float32),
        ]
    )
    def logits(volume, background):
        return in_graph.sliding_window_logits(
            position_dependent, volume, WINDOW,
            background=background, num_outputs=3, overlap=0.6,
        )  # fmt: skip

    return logits


@pytest.mark.parametrize("shape", [(8, 6, 4), (17, 13, 9), (5, 30, 4), (3, 2, 1), (40, 6, 3)])
def test_sliding_window(in_graph_logits, shape):
    volume, background = random_volume(shape, 2), np.array([-1.5, 9.0], np.float32)
    expected = sliding_window.sliding_window_logits(
        position_dependent, volume, WINDOW, background=background, overlap=0.6
    )
    logits = in_graph_logits(volume, background)
    assert logits.shape == expected.shape
    # The same sums in the same order; a compiler may fuse a product and a sum.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_probabilities_of_exclusive_regions():
    logits = np.log(np.array([[0.2, 0.3, 0.5]], np.float32))
    probabilities = in_graph.region_probabilities(logits, Regions.exclusive(["a", "b"]))
    np.testing.assert_allclose(probabilities, [[0.3, 0.5]], rtol=1e-6)


def test_probabilities_of_nested_regions():
    """Each region has two channels: without and with."""
    odds = np.log(np.array([[1, 3, 2, 2, 9, 1]], np.float32))
    probabilities = in_graph.region_probabilities(odds, Regions.parse("brats_msd"))
    np.testing.assert_allclose(probabilities, [[0.75, 0.5, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(9, 8, 7), (6, 1, 12), (1, 1, 1)])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
@pytest.mark.parametrize(
    "regions",
    [Regions.exclusive(["a", "b"]), Regions.parse("brats_msd")],
    ids=["classes", "nested"],
)
def test_largest_components(regions, share, shape):
    """Few voxels make many pieces of equal size, more of them long and winding ones."""
    random = np.random.default_rng(0)
    find = tf.function(in_graph.largest_components)
    for _ in range(3):
        labels = random.choice(sorted(set().union(*regions.members)), shape)
        labels = np.where(random.random(shape) < share, labels, 0).astype(np.int32)
        found = find(tf.constant(labels), regions)
        np.testing.assert_array_equal(found, regions.largest_components(labels))


def test_the_largest_component_of_a_snake():
    mask = np.zeros((9, 9, 3), np.int32)
    mask[::2] = 1
    mask[1::4, -1] = mask[3::4, 0] = 1
    regions = Regions.exclusive(["a"])
    for turned in (mask, mask[::-1], mask.T):
        found = in_graph.largest_components(tf.constant(turned), regions)
        np.testing.assert_array_equal(found, turned)
    assert not np.any(in_graph.largest_components(tf.zeros((2, 3, 4), tf.int32), regions))
