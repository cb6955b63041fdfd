"""Arms, runs, settings and estimates."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import nibabel
import numpy as np
import pytest

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.data.splits import subject_of
from tfmtseg.errors import InputError, InputErrors
from tfmtseg.experiment import estimate
from tfmtseg.experiment.estimate import Estimates, describe_plan
from tfmtseg.experiment.plan import (
    Arm,
    Experiment,
    Run,
    open_experiment,
    parse_arms,
    parse_counts,
    parse_seeds,
    parse_settings,
    plan_runs,
    read_base_settings,
)
from tfmtseg.experiment.results import Results
from tfmtseg.training.config import TrainConfig


def test_arms():
    texts = ["shape_prior", "encdec", "control_a", "long=encdec:train_steps=40:crop=16/32/8"]
    encdec, control, long = parse_arms(texts)
    assert (encdec.method, encdec.settings) == ("encdec", {})
    assert (control.method, control.settings) == ("sscpcseg", {"branch_weight": 0.0})
    assert long.settings == {"train_steps": 40, "crop": (16, 32, 8)}
    assert [arm.definition for arm in (encdec, control, long)] == texts[1:]
    assert long.kind == ("encdec", (("crop", (16, 32, 8)),))


@pytest.mark.parametrize(
    "setting",
    [
        "augment_cubes=true",
        "branch_weight=1",
        "contrastive_form=paper",
        "cube_size=16",
        "negatives=case",
        "predictor_blocks=1",
    ],
)
def test_the_control_of_a_contrast_knows_nothing_of_it(setting):
    beside, alone = parse_arms([f"a=bcpcpcseg:{setting}", f"b=sscpcseg:{setting}"])
    assert beside.control == ("bcp", ())
    assert alone.control == ("encdec", ())
    assert beside.differs_in_task_alone


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["unet"], "--arms: arm is 'unet', must be one of shape_prior, encdec"),
        (["x=unet"], "--arms: arm is 'x=unet'"),
        (["encdec=sscpcseg"], "a name that is none of them"),
        (["../x=encdec"], "--arms: arm is '../x=encdec'"),
        (["x=encdec:widht=8"], "setting 'widht' is unknown"),
        (["x=encdec:width=wide"], "setting 'width' is 'wide'"),
        (["x=encdec:seed=1"], "setting is 'seed=1', must be NAME=VALUE, and not"),
        (["x=encdec:width"], "setting is 'width', must be NAME=VALUE"),
        (["x=encdec:num_test=3"], "num_test is that of an arm, must be the same for all arms"),
        (["x=bcp:unlabeled_dir=more"], "Fix: give it as --set unlabeled_dir=VALUE"),
        (["encdec", "encdec"], "--arms: arm is 'encdec' twice"),
        (["shape_prior"], "--arms: arm is missing"),
    ],
)
def test_bad_arms(texts, message):
    with pytest.raises(InputError, match="Fix: ") as error:
        parse_arms(texts)
    assert message in str(error.value)


def test_counts_and_seeds():
    assert parse_counts(["3", "all"]) == [3, 0]
    assert parse_seeds(["0", "12"]) == [0, 12]
    for text in ("0", "-1", "some"):
        with pytest.raises(InputError, match="--num_labeled: value is"):
            parse_counts([text])
    with pytest.raises(InputError, match="--seeds: value is 'x'"):
        parse_seeds(["x"])
    for parse in (parse_counts, parse_seeds):  # as of an empty variable of the shell
        with pytest.raises(InputError, match="value is empty"):
            parse([])


def test_settings_from_the_file_made_for_the_data_set(shared_data):
    settings = read_base_settings(
        str(shared_data / "Task04_Hippocampus"), None, parse_settings(["crop=16,32,16"], "--set")
    )
    assert settings.num_test == 50
    assert settings.crop == (16, 32, 16)
    assert settings.data_dir == ""


def test_the_experiment_sets_what_is_its_own(tmp_path):
    write_phantoms(tmp_path / "data", 1, shape=(8, 8, 8))
    (tmp_path / "mine.yaml").write_text("seed: 5\nnum_labeled: 9\nwidth: 16\n")
    settings = read_base_settings(str(tmp_path / "data"), str(tmp_path / "mine.yaml"), {})
    assert settings == TrainConfig(width=16)


def test_runs_seed_by_seed(make_experiment):
    experiment = make_experiment("encdec", "control_a")
    arms = list(experiment.arms.values())
    runs = plan_runs(experiment, arms, [0, 3, 3], [1, 0, 1])
    assert [str(run) for run in runs] == [
        "encdec/n3_seed1", "control_a/n3_seed1", "encdec/nall_seed1", "control_a/nall_seed1",
        "encdec/n3_seed0", "control_a/n3_seed0", "encdec/nall_seed0", "control_a/nall_seed0",
    ]  # fmt: skip


def test_runs_are_checked_before_the_first_starts(make_experiment):
    experiment = make_experiment("encdec", "x=encdec:train_steps=7", steps_per_epoch=2)
    with pytest.raises(InputError, match="must be a multiple of steps_per_epoch"):
        plan_runs(experiment, list(experiment.arms.values()), [3], [0])


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({}, 9, "--num_labeled"),
        ({"num_development": 9}, 3, "--num_development"),
        ({"crop": (20, 32, 16)}, 3, "--crop: value is"),
        ({"regions": "a=7"}, 3, "7"),
    ],
)
def test_runs_have_the_data_they_ask_for(settings, count, message, make_experiment):
    """Of 12 cases four are for the test; crops have to fit strides that the data give."""
    experiment = make_experiment("encdec", **settings)
    with pytest.raises((InputError, InputErrors), match=message):
        plan_runs(experiment, list(experiment.arms.values()), [3, count], [0])


def test_a_data_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="--data_dir: value is missing, must be a folder"):
        read_base_settings("", None, {})
    with pytest.raises(InputErrors, match="/none: data folder is missing"):
        read_base_settings(str(tmp_path / "none"), None, {})


def test_an_experiment_has_test_cases(make_experiment, tmp_path):
    experiment = make_experiment("encdec", num_test=0)
    arms = list(experiment.arms.values())
    with pytest.raises(InputError, match=r"num_test is 0, must be 1 or more.*--set num_test=10"):
        plan_runs(experiment, arms, [3], [0])
    (tmp_path / "some.txt").write_text("PHANTOM_003\n")
    for settings in ({"test_list": str(tmp_path / "some.txt")}, {"num_folds": 5}):
        experiment = make_experiment("encdec", num_test=0, **settings)
        assert len(plan_runs(experiment, arms, [3], [0])) == 1


def test_subjects_and_preset_are_those_of_the_runs(tmp_path):
    """Of a link that --set allow_root allows, and of a layout that names the patient."""
    write_phantoms(tmp_path / "store", 1, shape=(8, 8, 8))
    description = tmp_path / "store/dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "name": "Hippocampus"}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").symlink_to(description)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / folder).symlink_to(tmp_path / "store" / folder)
    allowed = {"allow_root": str(tmp_path / "store")}
    assert read_base_settings(str(tmp_path / "data"), None, allowed).num_test == 50
    case = tmp_path / "brats/BraTS-GLI-00008-000"
    case.mkdir(parents=True)
    for ending in ("t2f", "t1n", "t1c", "t2w", "seg"):
        (case / f"{case.name}-{ending}.nii.gz").touch()
    regex = read_base_settings(str(tmp_path / "brats"), None, {}).subject_regex
    assert subject_of(case.name, regex) == "BraTS-GLI-00008"


def test_flags_give_the_settings_of_the_run(make_experiment):
    """The command line of a run, read as tools/train.py does, is its configuration."""
    experiment = make_experiment("x=sscpcseg:crop=32/16/8:flips=true/false/false", width=16)
    run = Run(experiment.arms["x"], 0, 4)
    flags = experiment.train_flags(run, experiment.data_dir, str(experiment.directory))
    values = dict(flag[2:].split("=", 1) for flag in flags)
    assert values.pop("config_file") == str(experiment.results / "settings.yaml")
    lists = {name: text.split(",") for name, text in values.items() if name in ("crop", "flips")}
    base = dataclasses.asdict(experiment.settings)
    assert TrainConfig.from_mapping({**base, **values, **lists}, "") == experiment.config(run)


def test_reading_back(make_experiment):
    experiment = make_experiment("encdec", "control_a", "x=encdec:crop=16/32/8", width=16)
    again = Experiment.read(experiment.directory)
    assert again == dataclasses.replace(experiment, data_dir="")


@pytest.mark.parametrize("damage", ["threads: 1", "arms"])
def test_a_damaged_file(make_experiment, damage):
    experiment = make_experiment("encdec")
    path = experiment.results / "experiment.yaml"
    path.write_text(path.read_text().replace(damage, "x: ["))
    with pytest.raises(InputError, match=rf"^{path}: settings file is unreadable"):
        Experiment.read(experiment.directory)
    path.write_text("threads: 1\n")
    with pytest.raises(InputError, match=rf"^{path}: experiment is damaged \(KeyError: 'arms'\)"):
        Experiment.read(experiment.directory)


def test_further_arms_but_no_other_settings(make_experiment):
    before = make_experiment("encdec", "x=encdec:train_steps=8")

    def again(texts, settings=before.settings, threads=1):
        return open_experiment(before.directory, "data", settings, parse_arms(texts), threads)

    assert list(again(["control_a"]).arms) == ["encdec", "x", "control_a"]
    assert again(["x=encdec:train_steps=8"]).arms == before.arms
    with pytest.raises(InputError, match=r"arm x is 'x=encdec:train_steps=8', must be .*=12'"):
        again(["x=encdec:train_steps=12"])
    with pytest.raises(InputError, match="width is 32, must be 8, as asked for now"):
        again(["encdec"], dataclasses.replace(before.settings, width=8))
    with pytest.raises(InputError, match="threads is 1, must be 2"):
        again(["encdec"], threads=2)


def test_what_is_left_to_the_data_is_no_other_setting(make_experiment):
    """An experiment of before goes on with what it has, without its name on the command line."""
    before = make_experiment("encdec", rotation_degrees=(15.0, 15.0, 0.0))
    asked = dataclasses.replace(before.settings, rotation_degrees=(-1.0, -1.0, -1.0))
    again = open_experiment(before.directory, "data", asked, list(before.arms.values()), 1)
    assert again.settings == before.settings
    other = dataclasses.replace(asked, rotation_degrees=(-1.0, 5.0, -1.0))
    with pytest.raises(InputError, match="rotation_degrees is"):
        open_experiment(before.directory, "data", other, list(before.arms.values()), 1)


def test_an_experiment_goes_on_where_its_folders_lie_elsewhere(make_experiment):
    before = make_experiment("encdec", unlabeled_dir="old")
    asked = dataclasses.replace(before.settings, unlabeled_dir="new", allow_root="store")
    again = open_experiment(before.directory, "data", asked, list(before.arms.values()), 1)
    assert (again.settings.unlabeled_dir, again.settings.allow_root) == ("new", "store")


def test_estimates_of_the_rule(make_experiment):
    """2 us x 2 patches x 32^3 voxels x 16/8 x 100 steps, 60 s to start, 4 test cases of .5 s."""
    experiment = make_experiment("encdec", "sscpcseg", crop=(32, 32, 32), width=16, train_steps=100)
    estimates = Estimates(experiment, Results({}, {}))
    encdec, sscpcseg = (Run(arm, 3, 0) for arm in experiment.arms.values())
    step = 2e-6 * 2 * 32**3 * 2
    assert estimates.seconds(encdec) == pytest.approx(100 * step + 60 + 2)
    # Two unlabelled patches more, and a second task.
    assert estimates.seconds(sscpcseg) == pytest.approx(100 * 4 * step + 60 + 2)
    # 1.4 GB, and in float32: 5 copies of 12 million weights at most; 38 arrays of every patch; a
    # contrast adds 12 of 27 cubes of 16^3.
    arrays = 38 * 2 * 32**3 + 5 * 12e6 / 16
    assert estimates.memory_mib(encdec) == pytest.approx((1.4e9 + 4 * 16 * arrays) / 2**20)
    arrays += 38 * 2 * 32**3 + 12 * 2 * 27 * 16**3
    assert estimates.memory_mib(sscpcseg) == pytest.approx((1.4e9 + 4 * 16 * arrays) / 2**20)
    assert estimates.source(encdec) == "rule"


def test_estimates_of_sizes_left_to_the_data(make_experiment, thick):
    """Derived by hand: thick slices are not halved at first, so that all 24 are taken."""
    isotropic = ((2, 2, 2),) * 3, (32, 32, 16), (16, 16, 16)
    anisotropic = ((2, 2, 1), (2, 2, 2), (2, 2, 2)), (32, 32, 24), (16, 16, 24)
    for data, expected in (({}, isotropic), ({"data": thick}, anisotropic)):
        experiment = make_experiment("sscpcseg", width=16, train_steps=100, **data)
        run = Run(experiment.arms["sscpcseg"], 3, 0)
        config = experiment.sized(run)
        assert (config.strides, config.crop, config.cube_size) == expected
        estimates = Estimates(experiment, Results({}, {}))
        voxels = 4 * math.prod(config.crop)
        assert estimates.seconds(run) == pytest.approx(100 * 2e-6 * 2 * voxels * 2 + 60 + 2)
        # 38 arrays of every patch, 12 of 3 x 3 cubes that overlap by half, 5 of weights.
        cubes = 2 * 3 * 3 * math.prod(config.cube_size)
        arrays = 38 * voxels + 12 * cubes + 5 * 12e6 / 16
        assert estimates.memory_mib(run) == pytest.approx((1.4e9 + 4 * 16 * arrays) / 2**20)


@pytest.fixture
def thick(tmp_path, phantoms):
    """The phantoms with slices of 3 mm."""
    folder = tmp_path / "thick"
    shutil.copytree(phantoms, folder)
    for path in folder.glob("*Tr/*.nii.gz"):
        voxels = np.asanyarray(nibabel.load(path).dataobj)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 3, 1])), path)
    return folder


def test_many_outputs_take_memory(make_experiment, tmp_path, phantoms):
    """9 arrays of two patches for each beyond six: of 8, and of those that the data declare."""
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    content = json.loads((data / "dataset.json").read_text())
    content["labels"] = {"0": "background", **{str(i): f"organ {i}" for i in range(1, 104)}}
    (data / "dataset.json").write_text(json.dumps(content))

    def memory_mib(**settings):
        experiment = make_experiment("encdec", data=data, crop=(32, 32, 32), width=16, **settings)
        (arm,) = experiment.arms.values()
        return Estimates(experiment, Results({}, {})).memory_mib(Run(arm, 3, 0))

    few = memory_mib(regions="brats_msd")
    nested = memory_mib(regions="a=1,2,3,4;b=2,3,4;c=3,4;d=4")
    assert nested - few == pytest.approx(4 * 9 * 2 * 2 * 32**3 / 2**20)
    assert memory_mib() - few == pytest.approx(4 * 9 * 98 * 2 * 32**3 / 2**20)


def test_estimates_from_finished_runs(make_experiment, make_results):
    """Those took 10 s for 4 steps, 2 s to evaluate, and 1000 MiB."""
    experiment = make_experiment("encdec", "long=encdec:train_steps=40", "sscpcseg")
    estimates = Estimates(experiment, make_results({"encdec": 0.0}, counts=(3,), num_seeds=2))
    long, sscpcseg = (Run(experiment.arms[name], 3, 0) for name in ("long", "sscpcseg"))
    assert estimates.seconds(long) == pytest.approx(10 * 10 + 2)
    assert estimates.memory_mib(long) == 1000
    assert estimates.source(long) == "2 finished"
    assert estimates.source(sscpcseg).startswith("rule x ")
    ruled = Estimates(experiment, Results({}, {}))
    encdec = Run(experiment.arms["encdec"], 3, 0)
    scale = 12 / ruled.seconds(encdec)
    assert estimates.seconds(sscpcseg) == pytest.approx(scale * ruled.seconds(sscpcseg))


def test_estimates_prefer_runs_of_this_processor(make_experiment, make_results, monkeypatch):
    experiment = make_experiment("encdec")
    results = make_results({"encdec": 0.0}, counts=(3,), num_seeds=2)
    slow = dataclasses.replace(results.runs["encdec", 3, 1], processor="slow", seconds=100.0)
    results = Results({**results.runs, slow.key: slow}, results.scores)
    run = Run(experiment.arms["encdec"], 3, 2)
    for processor, seconds in (("none", 10), ("slow", 100), ("new", 55)):
        monkeypatch.setattr(estimate, "processor_name", lambda name=processor: name)
        expected = seconds / 4 * experiment.settings.train_steps + 2
        assert Estimates(experiment, results).seconds(run) == pytest.approx(expected)


def test_few_are_kept(make_experiment):
    experiment = make_experiment("encdec")
    assert Experiment.read(experiment.directory).few == (3, 6)

    def again(*few):
        arms = list(experiment.arms.values())
        return open_experiment(experiment.directory, "data", experiment.settings, arms, 1, few)

    again(7, 0).write()
    assert Experiment.read(experiment.directory).few == (7, 0)
    assert again().few == (7, 0)


def test_plan_in_words(make_experiment, make_results):
    experiment = make_experiment("encdec", "sscpcseg", crop=(32, 32, 32))
    runs = plan_runs(experiment, list(experiment.arms.values()), [3], [0, 1])
    begun = experiment.run_directory(runs[2])
    begun.mkdir(parents=True)
    (begun / "history.csv").write_text("step\n1\n2\n")
    results = make_results({"sscpcseg": 0.0}, counts=(3,), num_seeds=1)
    lines = describe_plan(experiment, runs, results, parallel=2).splitlines()
    states = [line.split()[2:4] for line in lines[1:5]]
    assert states == [["to", "do"], ["finished"], ["after", "step"], ["to", "do"]]
    assert lines[5].startswith("3 of 4 runs to make: ")
    assert "--parallel=2" in lines[5]
    assert lines[6].startswith("Rule: ")


def test_arms_may_be_looked_up():
    assert len({Arm("x", "encdec", {"width": 8}), Arm("x", "encdec", {"width": 8})}) == 1
