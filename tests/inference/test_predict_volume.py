"""Label maps from logits: one piece, ensembles, mirrored images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tfmtseg.data.cases import Case
from tfmtseg.data.nifti import Geometry, write_image
from tfmtseg.data.preprocess import normalize
from tfmtseg.errors import InputError
from tfmtseg.inference import predict
from tfmtseg.inference.predict import check_flips, load_runs, predict_case, predict_volume
from tfmtseg.regions import Regions


@pytest.mark.parametrize("one_piece", [False, True])
def test_predictions_keep_one_piece_where_regions_are_one(one_piece):
    """The network calls bright voxels foreground; there are two bodies of them."""
    image = np.zeros((8, 8, 8, 1), np.float32)
    image[1:3, 1:3, 1:3] = image[4:7, 4:7, 4:7] = 100

    def predict_logits(batch: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(batch), batch - batch.mean()], -1)

    run = SimpleNamespace(
        regions=Regions.exclusive(["body"]),
        predict_logits=predict_logits,
        config=SimpleNamespace(crop=(8, 8, 8), overlap=0.5, largest_component=one_piece),
    )
    label_map = predict_volume([run], normalize(image))
    assert label_map.sum() == (27 if one_piece else 27 + 8)
    assert label_map[4:7, 4:7, 4:7].all()


def fixed(logits: np.ndarray, **config) -> SimpleNamespace:
    """A run whose network gives these logits, `(x, y, z, 2)`, whatever it sees."""
    return SimpleNamespace(
        directory="RUN",
        modalities=("T1",),
        regions=Regions.exclusive(["body"]),
        predict_logits=lambda batch: np.repeat(logits[None], len(batch), 0),
        config=SimpleNamespace(
            **{"crop": (4, 4, 4), "overlap": 0.0, "largest_component": False,
               "flips": (True, False, False), **config}
        ),
    )  # fmt: skip


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 4, 4, 2)).astype(np.float32)


def test_an_ensemble_is_the_mean_of_logits():
    logits = [random_logits(seed) for seed in range(3)]
    volume = normalize(random_logits(9)[..., :1])
    label_map = predict_volume([fixed(each) for each in logits], volume)
    mean = np.mean(logits, 0, dtype=np.float64)
    np.testing.assert_array_equal(label_map, mean[..., 1] > mean[..., 0])
    alone = [predict_volume([fixed(each)], volume) for each in logits]
    assert all((label_map != each).any() for each in alone)


@pytest.mark.filterwarnings("ignore:.*the volume is very small")
def test_logits_that_are_nan_are_no_background(tmp_path):
    """As where half precision overflows: the image, which is finite, is named."""
    write_image(
        tmp_path / "a.nii.gz", random_logits(9)[..., :1], Geometry.from_affine((4, 4, 4), np.eye(4))
    )
    spoilt = random_logits(0)
    spoilt[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"a\.nii\.gz: prediction is NaN, must be a number"):
        predict_case([fixed(spoilt)], Case("a", (tmp_path / "a.nii.gz",)))


def test_flips_are_those_of_the_training():
    logits = random_logits(0)
    label_map = predict_volume([fixed(logits)], normalize(random_logits(9)[..., :1]), flips=True)
    mean = (logits + logits[::-1]) / 2  # along x alone
    np.testing.assert_array_equal(label_map, mean[..., 1] > mean[..., 0])
    with pytest.raises(InputError, match=r"--test_time_flips: .* mirrored no axis"):
        check_flips([fixed(logits), fixed(logits, flips=(False,) * 3)], True)


def test_runs_that_do_not_fit_each_other(monkeypatch):
    first, other, pieces = (fixed(random_logits(0)) for _ in range(3))
    other.regions = Regions.exclusive(["head"])
    pieces.config.largest_component = True
    known = {"first": first, "same": first, "other": other, "pieces": pieces}
    monkeypatch.setattr(predict, "load_run", known.get)
    assert load_runs(["first", "same"]) == (first, first)
    with pytest.raises(InputError, match=r"RUN: regions is .*head"):
        load_runs(["first", "other"])
    with pytest.raises(InputError, match="--model_dir: value is empty"):
        load_runs([])
    with pytest.raises(InputError, match="RUN: largest_component is True, must be False"):
        load_runs(["first", "pieces"])
