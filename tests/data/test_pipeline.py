from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data.augment import NO_AUGMENTATION, Augmentation
from tfmtseg.data.cache import Record, foreground_voxels
from tfmtseg.data.nifti import Geometry
from tfmtseg.data.pipeline import (
    Share,
    batch_cases,
    crop_centre,
    held_out_batches,
    patches,
    read_window,
    training_batches,
)

SIZE = (14, 12, 10)
CROP = (8, 8, 8)
STEP = 0.01
BACKGROUND = (-9.0, 9.0)
STALE = 7  # in the label files of unlabelled cases, which nobody may read


def make_record(directory: Path, number: int, labelled: bool) -> Record:
    """A case whose first channel is its number everywhere and whose second is noise."""
    random = np.random.default_rng(number)
    image = random.integers(-300, 300, (*SIZE, 2)).astype(np.int16)
    image[..., 0] = 100 * number
    label = np.full(SIZE, STALE, np.uint8)
    if labelled:
        label = np.zeros(SIZE, np.uint8)
        label[6:9, 5:8, 4:7] = 1
        label[0, 0, 0] = 2  # rare, and in a corner
    name = f"case{number}"
    arrays = {"image": image, "label": label, "foreground": foreground_voxels(label, seed=0)}
    for kind, array in arrays.items():
        np.save(directory / f"{name}.{kind}.npy", array)
    kinds = ("image", "label", "foreground") if labelled else ("image",)
    return Record(
        name=name,
        directory=directory,
        files={kind: f"{name}.{kind}.npy" for kind in kinds},
        foreground_labels=(1, 2),
        scale=np.array([STEP, 2 * STEP], np.float32),
        offset=np.array([0.0, 1.0], np.float32),
        background=np.array(BACKGROUND, np.float32),
        geometry=Geometry.from_affine(SIZE, np.diag([1.0, 1.0, 3.0, 1.0])),
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> list[Record]:
    directory = tmp_path_factory.mktemp("labelled")
    return [make_record(directory, number, True) for number in range(3)]


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> list[Record]:
    directory = tmp_path_factory.mktemp("unlabelled")
    return [make_record(directory, number, False) for number in range(5, 9)]


def values(record: Record) -> np.ndarray:
    return record.image * record.scale + record.offset


def padded(array: np.ndarray, fill, width: int = 12) -> np.ndarray:
    """`array` with `width` voxels of `fill` around it."""
    result = np.empty([size + 2 * width for size in SIZE] + list(array.shape[3:]), array.dtype)
    result[...] = fill
    result[tuple(slice(width, width + size) for size in SIZE)] = array
    return result


def test_a_window_inside(labelled):
    record = labelled[1]
    image, label = read_window(record, np.array([2, 3, 1]), np.array([9, 8, 7]))
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    np.testing.assert_allclose(image, values(record)[2:9, 3:8, 1:7], rtol=1e-6)
    np.testing.assert_array_equal(label, record.label[2:9, 3:8, 1:7])


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        ((-3, -2, -1), (4, 4, 4)),
        ((10, 9, 8), (17, 15, 12)),
        ((-2, -2, -2), (16, 14, 12)),
        ((-9, 2, 2), (-4, 5, 5)),  # wholly outside
        ((15, 2, 2), (20, 5, 5)),
    ],
)
def test_a_window_beyond_the_volume_is_padded(labelled, start, stop):
    record = labelled[2]
    image, label = read_window(record, np.array(start), np.array(stop))
    window = tuple(slice(a + 12, b + 12) for a, b in zip(start, stop, strict=True))
    np.testing.assert_allclose(image, padded(values(record), BACKGROUND)[window], rtol=1e-6)
    np.testing.assert_array_equal(label, padded(np.array(record.label), 0)[window])


def test_a_window_of_an_unlabelled_case_has_no_label(unlabelled):
    _, label = read_window(unlabelled[0], np.zeros(3, int), np.array(SIZE))
    assert not label.any()


def test_centres_stay_where_crops_fit(labelled):
    random = np.random.default_rng(0)
    centres = np.array([crop_centre(labelled[0], CROP, random.random(6), 0.3) for _ in range(500)])
    # A crop that fits has its centre half a crop from the border; 2 voxels of slack.
    low = np.array(CROP) / 2 - 0.5 - 2
    high = np.array(SIZE) - 0.5 - np.array(CROP) / 2 + 2
    assert (centres >= low - 1e-9).all()
    assert (centres <= high + 1e-9).all()
    # And they use that room.
    assert (centres.min(0) < low + 0.5).all()
    assert (centres.max(0) > high - 0.5).all()


def test_centres_of_crops_larger_than_the_volume(labelled):
    random = np.random.default_rng(0)
    middle = (np.array(SIZE) - 1) / 2
    for _ in range(50):
        centre = crop_centre(labelled[0], (32, 32, 32), random.random(6), 1.0)
        assert (np.abs(centre - middle) <= 2).all()


def numbered(count: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(count)


def case_of(image: np.ndarray) -> int:
    """The number of the case a patch comes from: its first channel, where not padded."""
    (number,) = set(np.unique(image[..., 0].round(4))) - {BACKGROUND[0]}
    return int(number)


def test_patches_without_augmentation_are_voxels_of_the_volume(labelled):
    dataset = patches(
        labelled, CROP, numbered(6), augmentation=NO_AUGMENTATION,
        foreground_probability=0.5, seed=3,
    )  # fmt: skip
    for image, label, flag in dataset.as_numpy_iterator():
        assert image.shape == (*CROP, 2)
        assert (label.dtype, label.shape, flag) == (np.uint8, CROP, 1.0)
        record = labelled[case_of(image)]
        everything = padded(values(record), BACKGROUND).astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(everything, (*CROP, 2))[:, :, :, 0]
        places = np.argwhere(np.isclose(windows[:, :, :, 3, 3, 3, 1], image[3, 3, 3, 1]))
        found = [p for p in places if np.allclose(windows[tuple(p)], image, atol=1e-5)]
        assert len(found) == 1
        window = tuple(slice(a, a + size) for a, size in zip(found[0], CROP, strict=True))
        np.testing.assert_array_equal(label, padded(np.array(record.label), 0)[window])


def test_every_case_is_seen_once_per_round(labelled, unlabelled):
    records = [*labelled, *unlabelled]
    dataset = patches(
        records, CROP, numbered(7 * 4), augmentation=NO_AUGMENTATION,
        foreground_probability=0.0, seed=0,
    )  # fmt: skip
    seen = [(case_of(image), flag) for image, _, flag in dataset.as_numpy_iterator()]
    assert all((number < 3) == bool(flag) for number, flag in seen)
    rounds = np.array([number for number, _ in seen]).reshape(4, 7)
    for order in rounds:
        assert sorted(order) == [0, 1, 2, 5, 6, 7, 8]
    assert len({tuple(order) for order in rounds}) > 1  # each round has an order of its own


def test_one_case_alone(labelled):
    dataset = patches(
        labelled[:1], CROP, numbered(3), augmentation=NO_AUGMENTATION,
        foreground_probability=0.0, seed=0,
    )  # fmt: skip
    images = [image for image, _, _ in dataset.as_numpy_iterator()]
    assert [case_of(image) for image in images] == [0, 0, 0]
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, Augmentation()])
def test_foreground_probability_of_one_always_shows_foreground(labelled, augmentation):
    dataset = patches(
        labelled, CROP, numbered(30), augmentation=augmentation,
        foreground_probability=1.0, seed=1,
    )  # fmt: skip
    labels = np.array([label for _, label, _ in dataset.as_numpy_iterator()])
    assert labels.reshape(30, -1).any(axis=1).all()
    # The rare label is aimed at as often as the frequent one.
    assert (labels == 2).reshape(30, -1).any(axis=1).sum() >= 6


def test_foreground_probability_matters(labelled):
    def share(probability: float) -> float:
        random = np.random.default_rng(0)
        counted = 0
        for _ in range(200):
            centre = crop_centre(labelled[0], (4, 4, 4), random.random(6), probability)
            low = np.floor(centre - 1.5).astype(int)
            counted += read_window(labelled[0], low, low + 4)[1].any()
        return counted / 200

    assert share(1.0) == 1.0
    assert share(0.0) < 0.6
    assert share(0.0) < share(0.5) < 1.0


def batches(
    labelled, unlabelled, steps, augmentation=None, unlabeled_per_step=2, seed=5, foreground=0.5
):
    dataset = training_batches(
        labelled, unlabelled, CROP, labeled_per_step=2, unlabeled_per_step=unlabeled_per_step,
        steps=steps, augmentation=augmentation or NO_AUGMENTATION,
        foreground_probability=foreground, seed=seed,
    )  # fmt: skip
    return list(dataset.as_numpy_iterator())


def test_both_kinds_take_turns_and_labels_of_the_others_never_come(labelled, unlabelled):
    result = batches(labelled, unlabelled, (0, 8))
    assert len(result) == 8
    for images, labels, flags in result:
        assert images.shape == (4, *CROP, 2)
        assert labels.shape == (4, *CROP)
        np.testing.assert_array_equal(flags, [1, 0, 1, 0])
        numbers = [case_of(image) for image in images]
        assert max(numbers[::2]) < 3
        assert min(numbers[1::2]) >= 5
        assert STALE not in labels
        assert not labels[1::2].any()


def test_labelled_patches_alone(labelled):
    (batch,) = batches(labelled, [], (0, 1), unlabeled_per_step=0)
    assert [part.shape for part in batch] == [(2, *CROP, 2), (2, *CROP), (2,)]
    np.testing.assert_array_equal(batch[2], [1, 1])


def test_batches_are_a_pure_function_of_the_step(labelled, unlabelled):
    augmentation = Augmentation()
    whole = batches(labelled, unlabelled, (0, 4), augmentation)
    later = batches(labelled, unlabelled, (3, 4), augmentation)
    for batch, again in zip(whole[3:], later, strict=True):
        for part, same in zip(batch, again, strict=True):
            np.testing.assert_array_equal(part, same)
    # No patch comes twice, and another seed gives others.
    images = np.concatenate([batch[0] for batch in whole]).reshape(16, -1)
    assert len(np.unique(images, axis=0)) == 16
    (other,) = batches(labelled, unlabelled, (0, 1), augmentation, seed=6)
    assert not np.array_equal(other[0], whole[0][0])


def test_labelled_patches_do_not_depend_on_the_unlabelled_ones(labelled, unlabelled):
    # All methods of a comparison see the same labelled patches.
    with_both = batches(labelled, unlabelled, (0, 3))
    alone = batches(labelled, [], (0, 3), unlabeled_per_step=0)
    for both, labelled_only in zip(with_both, alone, strict=True):
        np.testing.assert_array_equal(both[0][::2], labelled_only[0])


def test_both_streams_draw_apart(labelled):
    # The same cases in both streams, as when labels are hidden: not the same crops.
    hidden = [record.without_label() for record in labelled]
    images, _, _ = batches(labelled, hidden, (0, 1), foreground=0.0)[0]
    assert not any(np.array_equal(a, b) for a in images[::2] for b in images[1::2])


def test_patches_are_turned_in_millimetres_of_their_case(tmp_path):
    # Channels that count voxels along x, y, z show where each voxel was taken from.
    record = replace(
        make_record(tmp_path, 0, True), scale=np.ones(3, "f4"), offset=np.zeros(3, "f4"),
        background=np.zeros(3, "f4"),
    )  # fmt: skip
    np.save(tmp_path / "case0.image.npy", np.stack(np.indices(SIZE), -1).astype(np.int16))
    np.save(tmp_path / "case0.foreground.npy", np.array([[7, 6, 5, 1]], np.int32))
    dataset = patches(
        [record], (4, 4, 4), numbered(3), foreground_probability=1.0, seed=0,
        augmentation=replace(NO_AUGMENTATION, rotation_degrees=(30.0, 30.0, 30.0)),
    )  # fmt: skip
    for places, _, _ in dataset.as_numpy_iterator():
        matrix = np.stack([places[-1, 0, 0], places[0, -1, 0], places[0, 0, -1]], 1)
        matrix = (matrix - places[0, 0, 0][:, None]) / 3
        in_mm = np.diag([1, 1, 3]) @ matrix @ np.diag([1, 1, 1 / 3])
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-4)
        assert np.abs(matrix - np.eye(3)).max() > 0.05


def test_held_out_batches_are_fixed_and_cover_every_case_once(labelled):
    dataset = held_out_batches(labelled, CROP, per_batch=2, foreground_probability=1.0, seed=0)
    first = list(dataset.as_numpy_iterator())
    assert [len(flags) for _, _, flags in first] == [2, 1]
    images = np.concatenate([images for images, _, _ in first])
    assert sorted(case_of(image) for image in images) == [0, 1, 2]
    assert all(labels.any() for _, batch, _ in first for labels in batch)
    for batch, again in zip(first, dataset.as_numpy_iterator(), strict=True):
        for part, same in zip(batch, again, strict=True):
            np.testing.assert_array_equal(part, same)


def test_replicas_share_out_the_batches_of_one(labelled, unlabelled):
    """Four replicas on two machines: their batches, put together, are one replica's."""
    arguments = {
        "crop": CROP, "labeled_per_step": 4, "unlabeled_per_step": 8, "steps": (3, 5),
        "augmentation": NO_AUGMENTATION, "foreground_probability": 0.5, "seed": 5,
    }  # fmt: skip
    whole = list(training_batches(labelled, unlabelled, **arguments).as_numpy_iterator())
    machines = [
        list(
            training_batches(
                labelled, unlabelled, **arguments, share=Share(first, 2, 4)
            ).as_numpy_iterator()
        )
        for first in (0, 2)
    ]
    assert [len(batches) for batches in machines] == [4, 4]  # two steps, two replicas
    for step, expected in enumerate(whole):
        replicas = [batch for batches in machines for batch in batches[2 * step : 2 * step + 2]]
        for _, _, flags in replicas:
            np.testing.assert_array_equal(flags, [1, 0, 0])
        for part in range(3):
            together = np.concatenate([replica[part] for replica in replicas])
            np.testing.assert_array_equal(together, expected[part])


def test_the_last_held_out_batch_may_not_reach_all_replicas(labelled):
    arguments = {"per_batch": 2, "foreground_probability": 1.0, "seed": 0}
    seen = [
        [
            case_of(images[0])
            for images, _, _ in held_out_batches(
                labelled, CROP, **arguments, share=Share(first, 1, 2)
            ).as_numpy_iterator()
        ]
        for first in (0, 1)
    ]
    assert list(map(len, seen)) == [2, 1]
    assert sorted(seen[0] + seen[1]) == [0, 1, 2]


def test_the_cases_of_a_batch_have_names(labelled, unlabelled):
    per_step = {"labeled_per_step": 2, "unlabeled_per_step": 3}
    batches = training_batches(
        labelled,
        unlabelled,
        CROP,
        **per_step,
        steps=(4, 7),
        augmentation=NO_AUGMENTATION,
        foreground_probability=0.0,
        seed=3,
    )
    for step, (images, _, _) in enumerate(batches, start=4):
        # The first channel is the case's number, and BACKGROUND outside.
        seen = [f"case{round(float(image[..., 0].max()))}" for image in images.numpy()]
        assert batch_cases(labelled, unlabelled, step, **per_step, seed=3) == seen


def test_image_and_label_are_moved_alike(tmp_path):
    """An image that is its own label, turned, zoomed, bent and flipped."""
    label = np.zeros(SIZE, np.uint8)
    label[4:11, 3:9, 2:7] = 1
    arrays = {
        "image": label[..., None].astype(np.int16),
        "label": label,
        "foreground": foreground_voxels(label, seed=0),
    }
    for kind, array in arrays.items():
        np.save(tmp_path / f"{kind}.npy", array)
    record = Record(
        name="case",
        directory=tmp_path,
        files={kind: f"{kind}.npy" for kind in arrays},
        foreground_labels=(1,),
        scale=np.ones(1, np.float32),
        offset=np.zeros(1, np.float32),
        background=np.zeros(1, np.float32),
        geometry=Geometry.from_affine(SIZE, np.diag([1.0, 1.0, 3.0, 1.0])),
    )
    spatial = Augmentation(
        elastic_probability=1.0, gamma=1.0, gain=0.0, shift=0.0, noise=0.0, blur_probability=0.0
    )
    data = patches(
        [record], CROP, tf.data.Dataset.range(8), augmentation=spatial,
        foreground_probability=0.0, seed=0,
    )  # fmt: skip
    for image, moved, _ in data.as_numpy_iterator():
        # Of eight voxels around a place, the nearest has at least an eighth of the weight.
        np.testing.assert_array_equal(moved[image[..., 0] > 7 / 8], 1)
        np.testing.assert_array_equal(moved[image[..., 0] < 1 / 8], 0)
        assert 0.02 < moved.mean() < 0.98
