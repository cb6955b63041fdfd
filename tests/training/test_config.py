"""Settings: kinds, rules, YAML, presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tfmtseg.data.augment import Augmentation
from tfmtseg.errors import InputError
from tfmtseg.training.config import TrainConfig, find_preset, read_settings

GOOD = TrainConfig(data_dir="data", model_dir="model")


def test_defaults_pass_the_check():
    GOOD.check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_dir", ""),
        ("method", "magic"),
        ("width", 12),
        ("overlap", 1.0),
        ("train_steps", 150),
        ("crop", (32, -16, 32)),
        ("cube_size", (16, 16, -8)),
        ("strides", ((2, 2, 2), (2, 2, 0), (2, 2, 2))),
        ("num_labeled", -1),
        ("labeled_per_step", 0),
        ("scale", 0.9),
        ("contrastive_form", "other"),
        ("learning_rate", 0.0),
        ("mode", "finetune"),
        ("teacher_momentum", 1.0),
        ("teacher_start", 1.5),
        ("pseudo_label_weight", -0.5),
        ("negatives", "all"),
        ("strategy", "parameter_server"),
        ("num_replicas", -1),
        ("optimizer", "sgd"),
        ("weight_averaging", "median"),
        ("seed", -1),
        ("num_folds", 1),
        ("num_folds", -2),
        ("fold", 1),
        ("seed", 2**32),
        ("foreground_probability", 33.0),
        ("elastic_probability", -0.1),
        ("blur_probability", 20.0),
        ("noise", -1.0),
        ("elastic_voxels", -3.0),
        ("weight_decay", -0.001),
        ("steps_per_epoch", 0),
        ("ids_per_subject", 2),  # and no --subject_regex
        ("model_dir", "runs/lr[0.003]"),
    ],
)
def test_bad_settings_are_named_with_a_mend(field, value):
    with pytest.raises(InputError, match=rf"^--{field}: value is .* must be .* Fix: ") as caught:
        dataclasses.replace(GOOD, **{field: value}).check()
    assert repr(value) in str(caught.value)


THICK = ((2, 2, 1), (2, 2, 1), (2, 2, 2))  # 8, 8 and 2 in all


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (96, 96, 8)}, None),
        ({"crop": (96, 96, 6), "cube_size": (32, 32, 6)}, None),
        ({"crop": (96, 0, 0)}, None),
        ({"crop": (32, 30, 9)}, r"--crop: .* multiples of \(8, 8, 2\).* Fix: choose 32,24,8, or"),
        ({"crop": (4, 0, 1)}, "Fix: choose 8,0,2, or"),
        ({"cube_size": (16, 12, 1)}, "--cube_size: .* Fix: choose 16,8,2, or"),
        # z is neither spanned nor cut into halves: 8 is no multiple of 6 / 2.
        ({"crop": (32, 32, 8), "cube_size": (16, 16, 6)}, "--cube_size: .* half must divide"),
    ],
)
def test_crop_and_cubes_fit_the_strides(changes, message):
    config = dataclasses.replace(GOOD, strides=THICK, **changes)
    if message is None:
        config.check()
    else:
        with pytest.raises(InputError, match=message):
            config.check()


def test_cubes_matter_to_the_contrastive_methods_alone():
    config = dataclasses.replace(GOOD, crop=(32, 32, 32), cube_size=(24, 24, 24))
    with pytest.raises(InputError, match="half must divide"):
        config.check()
    dataclasses.replace(config, method="encdec").check()

    dataclasses.replace(config, contrastive_form="classes").check()


def test_averages_of_chosen_updates_want_all_updates():
    """float16 leaves out those that overflow, the last one of the average among them."""
    config = dataclasses.replace(GOOD, weight_averaging="swa", precision="mixed_bfloat16")
    config.check()
    with pytest.raises(InputError, match=r"--weight_averaging: .*float16.* Fix: choose ema"):
        dataclasses.replace(config, precision="mixed_float16").check()


def test_folds_give_the_test_cases():
    config = dataclasses.replace(GOOD, num_folds=5, fold=4)
    config.check()
    for field, value in (("fold", 5), ("num_test", 2), ("test_list", "list.txt")):
        with pytest.raises(InputError, match=rf"^--{field}: .* with --num_folds=5"):
            dataclasses.replace(config, **{field: value}).check()


@pytest.mark.parametrize(("form", "fits"), [("repaired", 32), ("paper", 24)])
def test_a_grid_in_which_nothing_can_be_predicted(form, fits):
    config = dataclasses.replace(GOOD, contrastive_form=form, cube_size=(16, 16, 16))
    dataclasses.replace(config, crop=(fits,) * 3).check()
    with pytest.raises(InputError, match=r"--crop: grid of cubes is .* must be .* such as encdec"):
        dataclasses.replace(config, crop=(fits - 8,) * 3).check()


def test_a_crop_without_room_for_two_views():
    config = dataclasses.replace(GOOD, contrastive_form="dense", strides=((2, 2, 2),) * 3)
    dataclasses.replace(config, crop=(24, 24, 32)).check()
    with pytest.raises(InputError, match=r"--crop: .* 4 times the product of --strides"):
        dataclasses.replace(config, crop=(24, 24, 24)).check()


@pytest.mark.parametrize(
    ("field", "value"), [("method", "bcp"), ("unlabeled_per_step", 0), ("branch_weight", 0.0)]
)
def test_pretraining_needs_a_branch_and_unlabelled_patches(field, value):
    config = dataclasses.replace(GOOD, mode="pretrain")
    config.check()
    with pytest.raises(InputError, match=rf"^--{field}: .* with --mode=pretrain"):
        dataclasses.replace(config, **{field: value}).check()


def test_cubes_that_are_not_there_cannot_be_augmented():
    config = dataclasses.replace(GOOD, augment_cubes=True)
    for form in ("repaired", "paper"):
        dataclasses.replace(config, contrastive_form=form).check()
    dataclasses.replace(config, contrastive_form="dense", method="encdec").check()
    with pytest.raises(InputError, match=r"^--augment_cubes: .* false with .*=dense, .*Fix: leave"):
        dataclasses.replace(config, contrastive_form="dense").check()


@pytest.mark.parametrize("form", ["dense_across", "classes"])
def test_positives_across_cases_need_other_cases(form):
    config = dataclasses.replace(GOOD, contrastive_form=form, flips=(False, False, False))
    config.check()
    with pytest.raises(InputError, match=rf"^--negatives: .* batch or global with .*={form}"):
        dataclasses.replace(config, negatives="case").check()
    dataclasses.replace(config, negatives="case", method="encdec").check()


def test_places_of_mirrored_patches_are_no_positives():
    config = dataclasses.replace(GOOD, contrastive_form="dense_across", flips=(False, True, False))
    with pytest.raises(InputError, match=r"^--flips: .* false,false,false with .*=dense_across"):
        config.check()


def test_classes_cannot_pretrain():
    config = dataclasses.replace(GOOD, contrastive_form="classes", mode="pretrain")
    with pytest.raises(InputError, match=r"^--contrastive_form: .* dense_across with --mode=pret"):
        config.check()
    dataclasses.replace(config, method="ssvaeseg").check()


def test_the_fix_for_train_steps_is_right():
    with pytest.raises(InputError, match="choose 200"):
        dataclasses.replace(GOOD, train_steps=150, steps_per_epoch=100).check()


def test_yaml_round_trip(tmp_path):
    config = dataclasses.replace(
        GOOD,
        crop=(32, 48, 8),
        flips=(False, True, False),
        subject_regex=r"a_(\d+)",
        strides=THICK,
        cube_size=(16, 16, 8),
        rotation_degrees=(0.0, 0.0, 30.0),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_mapping(read_settings(path), str(path)) == config


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"widht": 8}, "widht"),
        ({"width": "eight"}, "width"),
        ({"width": 8.5}, "width"),
        ({"crop": [32, 32]}, "crop"),
        ({"crop": "large"}, "crop"),
        ({"strides": ["2x2x1", "2x2x1"]}, "strides"),
        ({"strides": ["2x2", "2x2x1", "2x2x2"]}, "strides"),
        ({"strides": [2, 2, 1]}, "strides"),  # by level or by axis?
        ({"strides": "2x2x2"}, "strides"),
        ({"flips": ["maybe", "no", "no"]}, "flips"),
        ({"width": True}, "width"),
        ({"data_dir": 5}, "data_dir"),
    ],
)
def test_unknown_names_and_wrong_kinds_are_refused(values, word):
    with pytest.raises(InputError, match=rf"^here: setting '{word}'"):
        TrainConfig.from_mapping(values, "here")


def test_flag_strings_become_tuples():
    config = TrainConfig.from_mapping({"crop": ["8", "16", "24"], "flips": ["true"] * 3}, "flags")
    assert config.crop == (8, 16, 24)
    assert config.flips == (True, True, True)


@pytest.mark.parametrize(
    "strides", [["2x2x1", "2x2x1", "2x2x2"], [[2, 2, 1], [2, 2, 1], [2, 2, 2]]]
)
def test_strides_of_flags_and_files(strides):
    assert TrainConfig.from_mapping({"strides": strides}, "here").strides == THICK


@pytest.mark.parametrize("value", [16, "16", [16], ["16"]])
def test_one_number_stands_for_three(value):
    config = TrainConfig.from_mapping({"cube_size": value, "rotation_degrees": value}, "here")
    assert config.cube_size == (16, 16, 16)
    assert config.rotation_degrees == (16.0, 16.0, 16.0)
    assert all(type(degrees) is float for degrees in config.rotation_degrees)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", ""])
def test_settings_file_must_be_a_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        read_settings(path)


def test_missing_settings_file(tmp_path):
    with pytest.raises(InputError, match="unreadable"):
        read_settings(tmp_path / "none.yaml")


def test_every_augmentation_strength_is_a_setting_with_the_same_default():
    assert GOOD.augmentation == Augmentation()


def test_shipped_settings_are_valid_and_found_by_name():
    preset = find_preset("Hippocampus")
    assert preset is not None
    config = TrainConfig.from_mapping(read_settings(preset), str(preset))
    dataclasses.replace(config, data_dir="d", model_dir="m").check()
    assert config.flips == (False, False, False)
    preset = find_preset("ACDC")
    assert preset is not None
    config = TrainConfig.from_mapping(read_settings(preset), str(preset))
    dataclasses.replace(config, data_dir="d", model_dir="m", strides=THICK).check()
    assert config.rotation_degrees[:2] == (0, 0)
    assert find_preset("something else") is None
    assert find_preset("") is None
    for path in Path(preset).parent.glob("*.yaml"):
        TrainConfig.from_mapping(read_settings(path), str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crop: " + "[" * 5000, "unreadable"),
        ("train_steps: " + "9" * 5000, "unreadable"),
        ("!!python/object/apply:os.getcwd []", "unreadable"),
        # strides are lists of lists; no setting lies deeper
        ("strides: [[[1, 2]], 3, 4]", "setting 'strides' is nested"),
        # ten levels of ten aliases each: small to read, ten gigabytes to print
        (
            "a0: &a0 [0]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11)),
            "setting 'a2' is nested",
        ),
    ],
    ids=["deep", "number", "object", "nested", "aliases"],
)
def test_hostile_settings_file(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_settings(path)
    assert len(str(caught.value)) < 400


def test_a_list_in_place_of_a_number_is_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("crop: [[1, 2], 3, 4]")
    with pytest.raises(InputError, match=r"setting 'crop' is .* must be of the kind 3 values"):
        TrainConfig.from_mapping(read_settings(path), str(path))
