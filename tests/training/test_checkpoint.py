"""Starting from an earlier run's weights: which parts take them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.errors import InputError
from tfmtseg.training.checkpoint import initialize, load_model, write_model, write_weights

MODALITIES = ("T1", "T2")


def make(method: str = "cpcseg", seed: int = 0, crop: int = 16, **kwargs) -> Segmenter:
    keras.utils.set_random_seed(seed)
    arguments = {"regions": 2, "width": 8, "cube_size": 8, "predictor_blocks": 1}
    model = Segmenter(method=method, **{**arguments, **kwargs})
    model.build((None, crop, crop, crop, len(MODALITIES)))
    return model


def finished(directory: Path, model: Segmenter, modalities=MODALITIES) -> Path:
    write_model(directory, model, modalities, (16, 16, 16), (1, 1, 1))
    write_weights(directory, model)
    (directory / "result.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ({"pretraining": True}, {}, ["encoder", "branch"]),
        ({"pretraining": True}, {"method": "encdec"}, ["encoder"]),
        ({"pretraining": True}, {"cube_size": 16}, ["encoder"]),
        ({}, {"method": "bcpcpcseg"}, ["encoder", "decoder", "head", "branch"]),
        ({"method": "encdec"}, {"method": "bcp", "regions": 3}, ["encoder", "decoder"]),
        ({}, {"pretraining": True}, ["encoder", "decoder", "head", "branch"]),
        ({}, {"negatives": "case"}, ["encoder", "decoder", "head", "branch"]),
        ({}, {"augment_cubes": True}, ["encoder", "decoder", "head", "branch"]),
        ({"method": "encdec"}, {"method": "boundseg"}, ["encoder", "decoder"]),
        ({"method": "boundseg"}, {"method": "encdec"}, ["encoder", "decoder"]),
        ({"method": "vaeseg"}, {"method": "vaeseg"}, ["encoder", "decoder", "head", "branch"]),
        ({"method": "vaeseg"}, {"method": "ssvaeseg", "crop": 32}, ["encoder", "decoder", "head"]),
    ],
    ids=str,
)
def test_the_parts_that_fit_take_the_weights(tmp_path, source, target, expected):
    earlier, model = make(seed=1, **source), make(seed=2, **target)
    names = ["encoder", "decoder", "head", "branch"]
    before = {name: part.get_weights() for name in names if (part := getattr(model, name))}
    run = finished(tmp_path, earlier)
    assert initialize(model, run, MODALITIES) == expected
    for name, weights in before.items():
        theirs = getattr(earlier, name).get_weights() if name in expected else weights
        for a, b in zip(getattr(model, name).get_weights(), theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("field", "source", "modalities"),
    [
        ("width", {"width": 16}, MODALITIES),
        ("modalities", {}, ("T2", "T1")),
        ("strides", {"strides": [[2, 2, 1], [2, 2, 2], [2, 2, 2]]}, MODALITIES),
    ],
)
def test_another_encoder_is_refused(tmp_path, field, source, modalities):
    run = finished(tmp_path, make("encdec", **source), modalities)
    model = make("encdec")
    before = model.get_weights()
    with pytest.raises(InputError, match=rf"{tmp_path}: {field} is .* must be .* Fix: "):
        initialize(model, run, MODALITIES)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_and_unfinished_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"run is missing.*Fix: correct --init_checkpoint"):
        load_model(tmp_path / "none", "--init_checkpoint")
    (tmp_path / "config.yaml").write_text("width: 8\n")
    with pytest.raises(InputError, match="run is not finished"):
        load_model(tmp_path)


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "model.h5"
    file.write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match=r"run is missing"):
        load_model(file)
    run = finished(tmp_path / "run", make("encdec"))
    description = (run / "model.json").read_text()
    for content in ("[]", "{", '{"arguments": {"layers": 3}, "modalities": ["T1"]}'):
        (run / "model.json").write_text(content)
        with pytest.raises(InputError, match="model is unreadable"):
            load_model(run)
    # Weights of another model.
    (run / "model.json").write_text(description.replace('"width": 8', '"width": 16'))
    with pytest.raises(InputError, match="model is unreadable"):
        load_model(run)
    (run / "model.json").write_text(description)
    load_model(run)
    (run / "weights" / "final.index").unlink()
    with pytest.raises(InputError, match="model is unreadable"):
        load_model(run)


def test_the_loss_scale_is_kept():
    """Else a run that goes on leaves out other updates."""
    optimizer = keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**9
    )
    optimizer.build([tf.Variable(1.0)])
    assert any(float(variable) == 2.0**9 for variable in compat.optimizer_variables(optimizer))
