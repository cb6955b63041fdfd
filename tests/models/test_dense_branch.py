from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.models import dense_branch
from tfmtseg.models.dense_branch import DenseContrastiveBranch, view_shape
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.ops.seed import Seed

THICK = ((2, 2, 1), (2, 2, 1), (2, 2, 2))  # 8, 8 and 2 in all
CROP = (32, 24, 16)


@pytest.mark.parametrize(
    ("crop", "strides", "expected"),
    [
        # 3/4 of 32 is 24, of 48 it is 36, which rounds up to 40, a multiple of 8.
        ((32, 48, 32), ((2, 2, 2),) * 3, (24, 40, 24)),
        ((96, 96, 8), THICK, (72, 72, 6)),
        ((8, 16, 24), ((2, 2, 2),) * 3, (8, 16, 24)),  # no room
    ],
)
def test_views_fit_the_strides(crop, strides, expected):
    assert view_shape(crop, strides) == expected


def make(**kwargs) -> DenseContrastiveBranch:
    branch = DenseContrastiveBranch(3, THICK, **kwargs)
    branch.build((None, *CROP, 1))
    return branch


def coordinates(cases: int) -> np.ndarray:
    """Volumes whose voxels hold their place."""
    grid = np.stack(np.meshgrid(*map(np.arange, CROP), indexing="ij"), -1)
    return np.repeat(grid[None].astype(np.float32), cases, 0)


def rows_of(branch, images, seed, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """The features that are compared, without changes of intensity and projection."""
    seen = []
    monkeypatch.setattr(dense_branch, "another_view", lambda images, seed: images)
    monkeypatch.setattr(branch, "project", lambda rows: rows)
    monkeypatch.setattr(
        dense_branch,
        "contrast",
        lambda *rows: seen.append([x.numpy().reshape(-1, 3) for x in rows[:2]]) or {},
    )
    views = []
    branch(
        tf.constant(images),
        describe=lambda x, view: views.append(x) or x,
        seed=Seed(tf.constant(seed)),
    )
    assert all(view.shape[1:4] == view_shape(CROP, THICK) for view in views)
    return *seen[0], [view.numpy()[0, 0, 0, 0] for view in views]


def test_queries_and_keys_are_the_same_places(monkeypatch):
    differences = []
    for seed in range(12):
        queries, keys, (one, other) = rows_of(make(), coordinates(2), [seed, 5], monkeypatch)
        np.testing.assert_array_equal(queries, keys)
        first, second = np.split(queries, 2)
        np.testing.assert_array_equal(first, second)  # one choice of places for all volumes
        apart = np.linalg.norm(first[:, None] - first[None], axis=-1)
        assert apart[~np.eye(len(first), dtype=bool)].min() == 3
        differences.append(one - other)
    # Along y three quarters, 18, round up to all 24 voxels; x and z leave room for offsets.
    assert (np.ptp(differences, axis=0) > 0).tolist() == [True, False, True]


def test_moves_what_describes_and_projects():
    branch = make()
    scale = tf.Variable([1.0, -2.0, 0.5])
    images = tf.constant(np.random.default_rng(1).normal(size=(2, *CROP, 3)), tf.float32)
    with tf.GradientTape() as tape:
        result = branch(images, describe=lambda x, view: x * scale, seed=Seed(tf.constant([1, 2])))
        loss = tf.reduce_mean(result["loss"])
    for gradient in tape.gradient(loss, [scale, *branch.trainable_variables]):
        assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_views_have_dropout_of_their_own(monkeypatch, dropout):
    """A mask that both share would tell the place without a look at the image."""
    seen = []
    nothing = dict.fromkeys(DenseContrastiveBranch.shown, tf.zeros(()))
    monkeypatch.setattr(dense_branch, "another_view", lambda images, seed: images)
    monkeypatch.setattr(
        dense_branch, "contrast", lambda queries, keys, *_: seen.append((queries, keys)) or nothing
    )
    model = Segmenter(1, "sscpcseg", contrastive_form="dense", width=8, dropout=dropout, seed=1)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 16, 1))  # too small for offsets
    batch = images.astype(np.float32), np.zeros(images.shape[:-1], np.uint8), np.ones(2, np.float32)
    model._forward(tuple(map(tf.constant, batch)), training=True)
    ((queries, keys),) = seen
    assert np.array_equal(queries, keys) == (dropout == 0)


def test_config_round_trip(survives_config):
    values = {"width": 3, "strides": THICK, "across_cases": True, "negatives": "batch"}
    again = survives_config(DenseContrastiveBranch, **values)
    assert (again.strides, again.across_cases, again.negatives) == (THICK, True, "batch")


def test_views_have_intensities_of_their_own():
    """Gain, shift and noise of a standard deviation of .1, drawn for each view and volume."""
    branch = DenseContrastiveBranch(1)
    shape = (2, 8, 8, 8, 1)  # no room for views at different places
    branch.build((None, *shape[1:]))
    images = tf.random.stateless_normal(shape, [0, 1])
    views = []
    branch(
        images,
        describe=lambda view, i: views.append(view.numpy()) or view,
        seed=Seed(tf.constant([1, 2])),
    )
    gains = set()
    for view in views:
        for before, after in zip(images.numpy().reshape(2, -1), view.reshape(2, -1), strict=True):
            gain, shift = np.polyfit(before, after, 1)
            # 512 draws: the standard deviation of theirs is 3 % of it.
            assert np.std(after - gain * before - shift) == pytest.approx(0.1, rel=0.15)
            gains.add(round(float(gain), 3))
    assert len(gains) == 4
