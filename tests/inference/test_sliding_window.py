from __future__ import annotations

import itertools

import numpy as np
import pytest

from tfmtseg.inference.sliding_window import (
    gaussian_window,
    sliding_window_logits,
    window_starts,
    with_flips,
)

WINDOW = (8, 6, 4)


def random_volume(shape, channels=2, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, channels)).astype(np.float32)


def test_window_starts_by_hand():
    assert window_starts(10, 10, 0.5) == [0]
    assert window_starts(10, 4, 0.5) == [0, 2, 4, 6]
    assert window_starts(11, 4, 0.5) == [0, 2, 4, 6, 7]  # the last is moved back
    assert window_starts(8, 4, 0.0) == [0, 4]
    assert window_starts(3, 1, 0.9) == [0, 1, 2]  # never a step of 0


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [7, 8, 20, 33])
def test_windows_cover_every_voxel(size, overlap):
    covered = np.zeros(size, int)
    for start in window_starts(size, 7, overlap):
        covered[start : start + 7] += 1
    assert covered.min() >= 1


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        window_starts(8, 4, 1.0)
    with pytest.raises(ValueError, match="window"):
        window_starts(8, 9, 0.5)


@pytest.mark.parametrize("window", [(1, 1, 1), (2, 3, 5), (96, 96, 96)])
def test_gaussian_window(window):
    weights = gaussian_window(window)
    assert weights.shape == window
    assert weights.dtype == np.float32
    assert weights.min() >= 0.001 * (1 - 1e-6)
    # The middle of an even size lies half a voxel, 4 / size standard deviations, off.
    peak = np.prod([1 if size % 2 else np.exp(-8 / size**2) for size in window])
    assert weights.max() == pytest.approx(peak, rel=1e-6)
    for axis in range(3):
        np.testing.assert_array_equal(weights, np.flip(weights, axis))


def test_gaussian_window_by_hand():
    """One standard deviation of 9 / 8 voxels: exp(-1 / 2 * (8 / 9)^2) beside the middle."""
    weights = gaussian_window((9, 9, 9))
    assert weights[4, 4, 4] == 1
    assert weights[5, 4, 4] == pytest.approx(np.exp(-32 / 81), rel=1e-6)
    assert weights[0, 0, 0] == pytest.approx(0.001)


def test_one_window_is_the_prediction_itself():
    volume = random_volume(WINDOW)
    logits = sliding_window_logits(np.tanh, volume, WINDOW, background=(0, 0))
    # A weight is multiplied and divided again: one rounding each.
    np.testing.assert_allclose(logits, np.tanh(volume), rtol=3e-7)


@pytest.mark.parametrize("shape", [(8, 6, 4), (17, 13, 9), (5, 30, 4), (3, 2, 1), (40, 6, 3)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_pointwise_functions_are_reproduced(shape, overlap):
    """Windows that agree must not change by being averaged, whatever the sizes."""
    volume = random_volume(shape)

    def affine(batch: np.ndarray) -> np.ndarray:
        assert batch.shape[1:] == (*WINDOW, 2)
        assert batch.dtype == np.float32
        return np.stack([batch[..., 0] * 2 - batch[..., 1], batch[..., 1] + 1, batch[..., 0]], -1)

    logits = sliding_window_logits(affine, volume, WINDOW, background=(0, 0), overlap=overlap)
    assert logits.shape == (*shape, 3)
    assert logits.dtype == np.float32
    # Up to 4 * 4 * 4 windows of values below 10 are summed in float32.
    np.testing.assert_allclose(logits, affine_reference(volume), atol=1e-5)


def affine_reference(volume: np.ndarray) -> np.ndarray:
    first, second = volume[..., 0], volume[..., 1]
    return np.stack([first * 2 - second, second + 1, first], -1)


def test_constant_is_reproduced():
    def constant(batch: np.ndarray) -> np.ndarray:
        return np.full((*batch.shape[:-1], 2), (3.0, -7.0), np.float32)

    logits = sliding_window_logits(constant, random_volume((19, 7, 11)), WINDOW, background=(0, 0))
    np.testing.assert_allclose(logits, np.broadcast_to((3, -7), logits.shape), rtol=1e-6)


def test_weighted_mean_by_hand():
    """Two windows that disagree meet as their Gaussian weights say."""
    window = (4, 1, 1)
    answers = iter([0.0, 1.0])

    def disagree(batch: np.ndarray) -> np.ndarray:
        return np.stack([np.full((*window, 1), next(answers), np.float32) for _ in batch])

    logits = sliding_window_logits(
        disagree, random_volume((6, 1, 1), 1), window, background=(0,), overlap=0.5
    )
    weights = gaussian_window(window)[:, 0, 0]  # w0 w1 w1 w0
    first = weights[0] / (weights[2] + weights[0])
    expected = [0, 0, first, 1 - first, 1, 1]
    np.testing.assert_allclose(logits[:, 0, 0, 0], expected, rtol=1e-6)


def test_small_volumes_are_padded_with_the_background_on_both_sides():
    seen = []

    def remember(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return batch

    volume = random_volume((4, 6, 3))
    logits = sliding_window_logits(remember, volume, WINDOW, background=(-1.5, 9.0))
    np.testing.assert_allclose(logits, volume, rtol=3e-7)
    (batch,) = seen
    np.testing.assert_array_equal(batch[0, 2:6, :, 0:3], volume)
    for border in (batch[0, :2], batch[0, 6:], batch[0, :, :, 3:]):
        assert border.size
        assert (border == np.array((-1.5, 9.0), np.float32)).all()


def test_batches():
    sizes = []

    def remember(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        return batch

    volume = random_volume((14, 6, 4))  # starts 0, 4, 6
    first = sliding_window_logits(remember, volume, WINDOW, background=(0, 0), batch_size=2)
    assert sizes == [2, 1]
    second = sliding_window_logits(np.copy, volume, WINDOW, background=(0, 0), batch_size=9)
    np.testing.assert_array_equal(first, second)


def test_the_volume_is_left_alone():
    volume = random_volume((12, 6, 4))
    before = volume.copy()
    sliding_window_logits(np.copy, volume, WINDOW, background=(0, 0))
    np.testing.assert_array_equal(volume, before)


def test_windows_of_background_are_predicted_once():
    """A volume of 4 * 4 * 4 windows with something in one corner, seen by 2 * 2 * 2 of them."""
    window, background = (4, 4, 4), np.array((-2.0, 3.0), np.float32)
    volume = np.broadcast_to(background, (10, 10, 10, 2)).copy()
    volume[2, 2, 2] = 9
    seen = []

    def windows(batch: np.ndarray) -> np.ndarray:
        seen.extend(batch)
        total = batch.sum((1, 2, 3), keepdims=True)  # looks at the whole window
        return np.broadcast_to(total, batch.shape) + batch

    logits = sliding_window_logits(windows, volume, window, background=background)
    assert len(seen) == 8 + 1
    seen.clear()
    plain = sliding_window_logits(windows, volume, window, background=(0, 0))
    assert len(seen) == 64
    # The order of up to 8 sums differs: a few roundings of values near 300.
    np.testing.assert_allclose(logits, plain, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_against_float64(batch_size):
    """Written out voxel by voxel: every window's logits, weighted and averaged in float64."""
    window, shape, overlap = (4, 6, 3), (9, 7, 5), 0.5
    volume = random_volume(shape)
    mixing = np.random.default_rng(1).normal(size=(2, 3))

    def network(batch: np.ndarray) -> np.ndarray:
        ramp = np.arange(window[0])[:, None, None, None]  # depends on the place in the window
        return np.tanh((batch + ramp) @ mixing.astype(batch.dtype)).astype(batch.dtype)

    # Steps of 2, 3 and 1; the last window ends with the volume.
    starts = [[0, 2, 4, 5], [0, 1], [0, 1, 2]]
    sums, weights = np.zeros((*shape, 3)), np.zeros((*shape, 1))
    for start in itertools.product(*starts):
        part = tuple(slice(a, a + n) for a, n in zip(start, window, strict=True))
        logits = network(volume[None].astype(np.float64)[(0, *part)][None])[0]
        for place in np.ndindex(*window):
            distances = [(i - (n - 1) / 2) / (n / 8) for i, n in zip(place, window, strict=True)]
            weight = max(np.exp(-0.5 * np.square(distances).sum()), 1e-3)
            voxel = tuple(a + i for a, i in zip(start, place, strict=True))
            sums[voxel] += weight * logits[place]
            weights[voxel] += weight
    result = sliding_window_logits(
        network, volume, window, background=(0, 0), overlap=overlap, batch_size=batch_size
    )
    # tanh of sums up to 30 in float32: some 1e-6.
    np.testing.assert_allclose(result, sums / weights, atol=1e-5)


@pytest.mark.parametrize("flips", [(True, False, True), (True, True, True), (False, False, False)])
def test_flips_by_hand(flips):
    """A network that sees where it is: each voxel times its place, which mirrors do not share."""
    ramp = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4, 1)
    calls = []

    def predict(batch: np.ndarray) -> np.ndarray:
        calls.append(batch)
        return batch * ramp

    batch = np.random.default_rng(0).normal(size=(5, 2, 3, 4, 1)).astype(np.float32)
    found = with_flips(predict, flips)(batch)
    # The voxel stays, the place it is multiplied by is that of all its mirrors.
    places = ramp.astype(np.float64)
    for axis, mirrored in enumerate(flips):
        if mirrored:
            places = (places + np.flip(places, axis)) / 2
    np.testing.assert_allclose(found, batch * places, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 ** sum(flips)
    assert found.dtype == np.float32
