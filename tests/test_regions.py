from __future__ import annotations

import json

import numpy as np
import pytest

from tfmtseg.errors import InputError
from tfmtseg.regions import PRESETS, Regions

BRATS = Regions.parse("brats_msd")


def test_preset_is_the_decathlons_numbering():
    assert BRATS.names == ("WT", "TC", "ET")
    assert BRATS.members == ((1, 2, 3), (2, 3), (3,))
    assert BRATS.nested
    assert Regions.parse("WT=1,2,3;TC=2,3;ET=3") == BRATS
    assert Regions.parse("WT = 1, 2,3; TC=2 ,3; ET=3") == BRATS


def test_both_numberings_show_the_same_tumour():
    # Oedema, non-enhancing core, enhancing: 1, 2, 3 in the Decathlon, 2, 1, 4 in BraTS.
    tumour = np.array([0, 1, 2, 3])
    masks = Regions.parse("brats_124").masks(np.array([0, 2, 1, 4])[tumour])
    np.testing.assert_array_equal(masks, BRATS.masks(tumour))


def test_label_maps_are_written_in_the_numbering_of_their_preset():
    regions = Regions.parse("brats_124")
    truth = np.array([0, 2, 1, 4])
    inside = regions.masks(truth)[..., None]
    logits = np.concatenate([~inside, inside], -1).reshape(4, 6).astype(float)
    np.testing.assert_array_equal(regions.label_map(logits), truth)


def test_presets_are_valid():
    for name in PRESETS:
        assert Regions.parse(name).nested


def test_sizes():
    exclusive = Regions.exclusive(["a", "b", "c"])
    assert (exclusive.head_sizes, exclusive.num_outputs) == ((4,), 4)
    assert (BRATS.head_sizes, BRATS.num_outputs) == ((2, 2, 2), 6)
    sparse = Regions.parse("whole=1,4;core=4")
    assert sparse.num_outputs == 4


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["liver", "right kidney", "left kidney"], ("left kidney", "right kidney")),
        (["Kidney_L", "Kidney_R"], ("Kidney_L", "Kidney_R")),
        (["hippocampus-lh-1", "hippocampus-rh-2"], None),
        (["lh1", "rh1"], ("lh1", "rh1")),
        (["left ventricle cavity", "right ventricle"], None),
        (["WT", "TC", "ET"], None),
        (["l", "left"], None),
    ],
)
def test_regions_of_two_sides(names, pair):
    assert Regions.exclusive(names).mirror_pair == pair


def test_masks_of_exclusive_regions():
    masks = Regions.exclusive(["a", "b"]).masks(np.array([[0, 1], [2, 1]]))
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks[..., 0], [[False, True], [False, True]])
    np.testing.assert_array_equal(masks[..., 1], [[False, False], [True, False]])


def test_masks_of_nested_regions():
    masks = BRATS.masks(np.array([0, 1, 2, 3], np.uint8))
    expected = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(masks, np.array(expected, bool))


def test_label_map_of_exclusive_regions():
    logits = np.array([[2.0, 1, 0], [0, 1, 0], [-3, -2, -1]])
    label_map = Regions.exclusive(["a", "b"]).label_map(logits)
    assert label_map.dtype == np.uint8
    np.testing.assert_array_equal(label_map, [0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.full((2, 2), np.nan), "logits: value is NaN"),
        (np.zeros((2, 3)), "logits: channels are 3, must be 2"),
    ],
)
def test_logits_that_say_nothing(logits, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        Regions.exclusive(["a"]).label_map(logits)


@pytest.mark.parametrize(
    "value",
    [2, np.int64(2), ["1", "2"], Regions.exclusive(["1", "2"])],
    ids=["number", "of NumPy", "names", "regions"],
)
def test_whatever_says_what_is_segmented(value):
    regions = Regions.of(value)
    assert regions == Regions.exclusive(["1", "2"])
    assert Regions.of(regions.get_config()) == regions
    assert Regions.of("brats_msd") == Regions.parse("brats_msd")


@pytest.mark.parametrize("value", [0, [], ["a", "a"], "a", 2.7, None])
def test_what_says_nothing_is_refused(value):
    with pytest.raises(InputError, match="Fix: "):
        Regions.of(value)


def test_label_map_paints_from_large_to_small():
    yes, no = [0.0, 1.0], [1.0, 0.0]
    logits = np.array(
        [
            [*no, *no, *no],
            [*yes, *no, *no],
            [*yes, *yes, *no],
            [*yes, *yes, *yes],
            [*no, *no, *yes],  # the smallest region wins over larger ones that disagree
            [*no, *yes, *no],
        ]
    )
    np.testing.assert_array_equal(BRATS.label_map(logits), [0, 1, 2, 3, 3, 2])


def test_label_map_takes_the_lowest_label_of_its_own():
    # Between whole and core lie the labels 1 and 2: a voxel of the shell gets 1.
    regions = Regions.parse("whole=1,2,4;core=4")
    logits = np.array([[0.0, 1, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(regions.label_map(logits), [1, 4])


@pytest.mark.parametrize("regions", [BRATS, Regions.exclusive(["a", "b", "c"])])
def test_masks_of_a_label_map_survive_the_round_trip(regions):
    truth = np.random.default_rng(0).integers(4, size=(5, 4, 3))
    if regions.nested:
        masks = regions.masks(truth)[..., None]
        logits = np.concatenate([~masks, masks], -1).reshape(*truth.shape, 6).astype(float)
    else:
        logits = np.eye(4)[truth]
    np.testing.assert_array_equal(regions.label_map(logits), truth)


@pytest.mark.parametrize("regions", [BRATS, Regions.exclusive(["a", "b"])])
def test_config_round_trip_through_json(regions):
    assert Regions.from_config(json.loads(json.dumps(regions.get_config()))) == regions


@pytest.mark.parametrize("text", ["", "brats", "WT", "WT=", "WT=a", "WT=1=2", "WT=1,2;", "=;="])
def test_text_that_is_no_definition(text):
    with pytest.raises(InputError, match=r"--regions: value is .* Fix: "):
        Regions.parse(text)


@pytest.mark.parametrize("text", ["WT=1,2;TC=3", "WT=1,2;TC=1,2", "ET=3;TC=2,3"])
def test_regions_that_are_not_nested(text):
    with pytest.raises(InputError, match="a proper part of"):
        Regions.parse(text)


def test_names_must_be_there_and_differ():
    with pytest.raises(InputError, match="one per region"):
        Regions.exclusive([])
    with pytest.raises(InputError, match="all different"):
        Regions.exclusive(["a", "a"])
    with pytest.raises(InputError, match="one per region"):
        Regions(("a", "b"), ((1,),), nested=False)


def test_a_name_given_twice_is_refused():
    with pytest.raises(InputError, match="all different"):
        Regions.parse("WT=1,2,3;WT=2,3")


def test_a_region_is_not_called_like_the_mean_of_all():
    with pytest.raises(InputError, match="name is 'mean', must be another"):
        Regions.exclusive(["core", "mean"])


@pytest.mark.parametrize("text", ["WT=0,1,2;TC=2", "WT=-1,2;TC=2", "=1,2;TC=2", "WT=1,256;TC=1"])
def test_every_region_has_a_name_and_no_background(text):
    with pytest.raises(InputError, match=r"labels in 1\.\.255"):
        Regions.parse(text)


def test_exclusive_labels_have_no_gap():
    with pytest.raises(InputError, match="without a gap"):
        Regions(("a", "b"), ((1,), (3,)), nested=False)


def test_largest_components_of_classes():
    label_map = np.zeros((9, 3, 3), np.uint8)
    label_map[0] = 1  # 9 voxels
    label_map[2, 0] = 1  # 3 voxels, apart
    label_map[4:6, 0] = 2
    label_map[6, 1] = 2  # touches by an edge only
    expected = label_map.copy()
    expected[2] = expected[6] = 0
    result = Regions.exclusive(["a", "b", "c"]).largest_components(label_map)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8


def test_largest_components_are_of_one_volume():
    with pytest.raises(
        ValueError, match=r"label_map: shape is \(1, 2, 2, 2\), must be \(x, y, z\)"
    ):
        Regions.exclusive(["a"]).largest_components(np.zeros((1, 2, 2, 2), int))


def test_largest_components_of_nested_regions():
    """The smaller region's larger piece lies in what the larger region loses."""
    label_map = np.zeros((9, 3, 3), np.int32)
    label_map[0:4] = 1
    label_map[0, 0] = 2  # 3 voxels
    label_map[6:8] = 2  # 18 voxels, of a piece of 18
    expected = label_map.copy()
    expected[6:8] = 0
    regions = Regions.parse("WHOLE=1,2;CORE=2")
    np.testing.assert_array_equal(regions.largest_components(label_map), expected)
    assert not regions.largest_components(np.zeros((2, 2, 2), int)).any()


def test_largest_components_of_three_nested_regions():
    """The smallest region's only piece lies in what the middle region loses."""
    label_map = np.array([2, 2, 2, 2, 2, 1, 1, 1, 3, 3, 1, 1], np.uint8).reshape(12, 1, 1)
    expected = np.array([2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]).reshape(12, 1, 1)
    regions = Regions.parse("WT=1,2,3;TC=2,3;ET=3")
    np.testing.assert_array_equal(regions.largest_components(label_map), expected)
