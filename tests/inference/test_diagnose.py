from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.phantom import write_phantoms
from tfmtseg.data.splits import Splits
from tfmtseg.inference import diagnose as diagnose_module
from tfmtseg.inference.diagnose import RIDGE, LinearProbe, accuracy_by_place, diagnose
from tfmtseg.metrics.dice import dice_score
from tfmtseg.regions import Regions
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.finished_run import Run
from tfmtseg.training.run import make_model


def test_keys_that_show_their_place_are_found_by_it():
    # Three places with codes along the axes, in two cases that differ by a little.
    places = np.eye(3, dtype=np.float32)
    keys = np.stack([places, 2 * places + 0.1])
    assert accuracy_by_place(places, tf.constant(keys)) == 1
    # With codes of other places, each is mistaken for its neighbour.
    assert accuracy_by_place(np.roll(places, 1, axis=0), tf.constant(keys)) == 0


def test_the_same_place_in_another_case_is_no_candidate():
    """Else the second case, nearer to the mean, would be found in place of the first."""
    places = np.eye(3, dtype=np.float32)
    keys = np.stack([places + 0.3, places])
    assert accuracy_by_place(places, tf.constant(keys)) == 1


def test_probe_against_newtons_method():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (400, 2))
    mask = features @ [1, -1] + rng.normal(0, 1, 400) > 0.5
    probe = LinearProbe(features, mask[:, None])
    inputs = np.column_stack([(features - features.mean(0)) / features.std(0), np.ones(400)])
    weights = np.zeros(3)
    for _ in range(20):
        p = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (p - mask) / 400 + 2 * RIDGE * weights
        hessian = (inputs.T * (p * (1 - p))) @ inputs / 400 + 2 * RIDGE * np.eye(3)
        weights -= np.linalg.solve(hessian, gradient)
    # L-BFGS stops when the loss changes by less than 2e-9 of itself.
    np.testing.assert_allclose(probe.weights[:, 0], weights, atol=2e-3)
    np.testing.assert_array_equal(probe.predict(features[:5])[:, 0], inputs[:5] @ weights > 0)


def test_places_have_the_label_of_the_voxel_in_their_middle():
    images = tf.random.stateless_normal((2, 8, 8, 4, 1), [0, 1])
    labels = (images[..., 0] > 0).numpy().astype(np.uint8)
    model = SimpleNamespace(
        encoder=lambda x: {"h0": x, "h1": x[:, 1::2, 1::2], "h2": x[:, 2::4, 2::4, 1::2]},
        decoder=lambda levels: levels["h0"],
        regions=Regions.exclusive(["bright"]),
    )
    found = diagnose_module._features(model, images, labels)
    assert [len(features) for features, *_ in found.values()] == [512, 128, 16, 512]
    for features, places, masks in found.values():
        np.testing.assert_array_equal(masks, features > 0)
        assert places.shape == (len(features), 9)
        np.testing.assert_array_equal(*np.split(places, 2))  # of both images


def test_a_probe_of_place_finds_what_lies_at_one_place():
    """A ball off the middle of two patches of noise, found by its place as well as it is round."""
    images = tf.random.stateless_normal((2, 12, 12, 8, 1), [0, 2])
    x, y, z = np.meshgrid(np.arange(12), np.arange(12), np.arange(8), indexing="ij")
    ball = (x - 4) ** 2 + (y - 7) ** 2 + (z - 3) ** 2 <= 9
    model = SimpleNamespace(
        encoder=lambda x: {}, decoder=lambda levels: images, regions=Regions.exclusive(["ball"])
    )
    labels = np.stack([ball, ball]).astype(np.uint8)
    found = diagnose_module._features(model, images, labels)
    noise, places, masks = found["decoder"]
    inputs = diagnose_module._probed("decoder", noise, places)
    assert list(inputs) == ["decoder", "decoder+place", "place"]
    dice = {k: dice_score(LinearProbe(v, masks).predict(v), masks) for k, v in inputs.items()}
    assert dice["decoder"] < 0.2
    # RIDGE keeps the surface a little from the edge of the ball.
    assert dice["place"] > 0.9
    assert dice["decoder+place"] > 0.9


def test_the_probe_is_scored_case_by_case(monkeypatch):
    """A probe that is right on one case, and finds nothing in two others: one third.

    Were patches of several cases pooled, it would be more: with half of its voxels found, a
    pool scores two thirds.
    """
    names = ["a", "b", "c"]

    def patches(run, records, per_batch, number):
        for record in [*records, *records[::-1]]:  # each round has its own order
            yield record, np.zeros((1, 1))

    def features(model, images, labels):
        right = images == "a"
        values = np.full((4, 1), 1.0 if right else -1.0)
        return {"h0": (values, values, np.ones((4, 1), bool))}

    monkeypatch.setattr(diagnose_module, "_patches", patches)
    monkeypatch.setattr(diagnose_module, "_features", features)
    monkeypatch.setattr(
        diagnose_module,
        "LinearProbe",
        lambda *_: SimpleNamespace(predict=lambda values: values[:, :1] > 0),
    )
    run = SimpleNamespace(config=SimpleNamespace(seed=0), model=None)
    found = diagnose_module._probe(run, names[:1], names)
    assert found == {"h0": pytest.approx(1 / 3), "h0+place": pytest.approx(1 / 3)}


def spy(monkeypatch) -> list:
    """Gets the names of the cases whenever patches are read, and what is made of them."""
    events = []

    def watch(name: str, event) -> None:
        whole = getattr(diagnose_module, name)
        monkeypatch.setattr(
            diagnose_module, name, lambda *args: events.append(event(*args)) or whole(*args)
        )

    watch("_patches", lambda run, records, *_: ("read", [r.name for r in records]))
    watch("accuracy_by_place", lambda *_: "search by place")
    watch("LinearProbe", lambda *_: "fit")
    return events


@pytest.mark.parametrize(
    # The dense contrast learns from all patches of a step, that of codes from the unlabelled.
    ("form", "per_step"), [("repaired", 2), ("dense", 1), ("classes", 2)]
)  # fmt: skip
def test_a_run_is_measured(tmp_path, monkeypatch, form, per_step):
    write_phantoms(tmp_path / "data", 4, shape=(20, 20, 20))
    config = TrainConfig(
        data_dir=str(tmp_path / "data"), model_dir=str(tmp_path / "run"), method="sscpcseg",
        contrastive_form=form, regions="brats_msd", width=8, predictor_blocks=1,
        crop=(16, 16, 16), cube_size=(8, 8, 8), strides=((2, 2, 2),) * 3,
        labeled_per_step=per_step, unlabeled_per_step=per_step,
    )  # fmt: skip
    folder = read_data_folder(config.data_dir)
    names = [case.name for case in folder.cases]
    splits = Splits((names[0],), (names[1],), tuple(names[2:]), ())
    keras.utils.set_random_seed(0)
    model = make_model(config, Regions.parse(config.regions))
    model.build((None, 16, 16, 16, len(folder.modalities)))
    run = Run(tmp_path / "run", config, folder.modalities, (1.0, 1.0, 1.0), splits, model)
    monkeypatch.setattr(diagnose_module, "load_run", lambda *_, **__: run)
    monkeypatch.setattr(diagnose_module, "ROUNDS", 1)
    events = spy(monkeypatch)
    result = diagnose(config.model_dir)
    # What is fitted sees training cases alone: the search by place all of them, the probe those
    # with a label. Held-out cases come after the fit.
    search = [("read", names[:2]), ("read", names[2:]), "search by place"]
    probe = [("read", names[:1]), *["fit"] * 11, *(("read", [name]) for name in names[2:])]
    assert events == (probe if form == "classes" else search + probe)
    path = tmp_path / "run" / "diagnosis" / "development.json"
    assert json.loads(path.read_text()) == result
    assert result["cases"] == 2
    # 2 cases of 27 cubes without the other case's cube at the place; views of 16 voxels
    # have no room, and show 6 x 6 x 6 places. Classes are not searched for by place.
    candidates = {"repaired": 2 * 27 - 1, "dense": 2 * 216 - 1, "classes": None}[form]
    assert ("contrast" in result) == (candidates is not None)
    if candidates is not None:
        contrast = result["contrast"]
        assert contrast["chance"] == pytest.approx(math.log(candidates))
        assert 0 <= contrast["accuracy"] <= 1
        assert 0 <= contrast["accuracy_by_place"] <= 1
        assert contrast["loss"] > 0
    levels = ["h0", "h1", "h2", "h3", "decoder"]
    assert set(result["probe"]) == {"place", *levels, *(f"{level}+place" for level in levels)}
    # The largest region is brighter than the rest: even untrained features tell it apart.
    assert 0.1 < result["probe"]["h0"] <= 1
