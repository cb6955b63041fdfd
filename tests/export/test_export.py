"""Exported models in processes that have TensorFlow alone, against predictions in Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data.preprocess import normalize
from tfmtseg.errors import InputError
from tfmtseg.export import export_model
from tfmtseg.inference.predict import predict_volume
from tfmtseg.inference.sliding_window import sliding_window_logits
from tfmtseg.training.sizes import total_strides

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("tensorflow_alone.py")
ENVIRONMENTS = [ROOT / name for name in (".venv", ".venv-addons")]


def make_volume(shape, seed) -> np.ndarray:
    """A bright body in front of a constant, in the units of a scanner."""
    rng = np.random.default_rng(seed)
    volume = np.full((*shape, 2), -5, np.float32)
    body = tuple(slice(1, size - 1) for size in shape)
    inside = [size - 2 for size in shape]
    volume[body] = np.exp(rng.normal(size=(*inside, 2))) * (300, 2)
    volume[body] += np.linspace(0, 500, inside[0])[:, None, None, None]
    return volume


INPUTS = {
    "serving_default-0": np.stack([make_volume((9, 13, 6), seed) for seed in (0, 1)]),
    "serving_default-1": make_volume((16, 16, 16), 2)[None],
    "volume-0": make_volume((21, 18, 17), 3),
    "volume-1": make_volume((5, 20, 7), 4),
}


@pytest.fixture(scope="module", params=["this TensorFlow", "the other TensorFlow"])
def answers(request, exported, tmp_path_factory):
    """Outputs of all models, computed by this environment's TensorFlow or the other's."""
    python, site_packages = Path(sys.executable), Path(tf.__file__).parents[1]
    if request.param == "the other TensorFlow":
        others = [path for path in ENVIRONMENTS if path != Path(sys.prefix)]
        ready = [path for path in others if (path / ".installed").exists()]
        if not ready:
            pytest.skip(f"needs the other environment, {others[0].name}, which is not set up")
        python = ready[0] / "bin" / "python"
        site_packages = next(ready[0].glob("lib/python3*/site-packages"))
    folder = tmp_path_factory.mktemp("answers")
    np.savez(folder / "inputs.npz", **INPUTS)
    done = subprocess.run(
        [python, "-I", "-S", SCRIPT, site_packages, "answer", folder, *exported.values()],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: np.load(folder / f"{name}.npz", allow_pickle=False) for name in exported}


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64))
    return odds / odds.sum(-1, keepdims=True)


def expected_logits(run, name: str) -> np.ndarray:
    """By the functions that `tfmtseg-predict` uses, with one window for `serving_default`."""
    images = INPUTS[name]
    if name.startswith("volume"):
        volume = normalize(images)
        return sliding_window_logits(
            run.predict_logits, volume.values(), run.config.crop,
            background=volume.background, overlap=run.config.overlap,
        )  # fmt: skip
    strides = np.array(total_strides(run.model.encoder.strides))
    window = -(-np.array(images.shape[1:4]) // strides) * strides
    return np.stack(
        [
            sliding_window_logits(
                lambda batch: run.model(batch).numpy(), volume.values(), window,
                background=volume.background,
            )
            for volume in map(normalize, images)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("model", ["nested", "exclusive"])
def test_outputs_equal_those_of_python(answers, runs, model, name):
    run = runs[model]
    logits = expected_logits(run, name)
    heads = np.split(logits, np.cumsum(run.regions.head_sizes)[:-1], -1)
    probabilities = np.concatenate([softmax(head)[..., 1:] for head in heads], -1)
    found = answers[model][f"{name}-probabilities"]
    assert found.dtype == np.float32
    assert found.std() > 0.05  # a network that says something
    np.testing.assert_allclose(found, probabilities, atol=1e-5)

    labels, expected = answers[model][f"{name}-labels"], run.regions.label_map(logits)
    if run.config.largest_component:
        several = expected.reshape(-1, *expected.shape[-3:])
        pieces = np.stack([run.regions.largest_components(each) for each in several])
        assert (pieces != several).any()
        expected = pieces.reshape(expected.shape)
    assert labels.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    # Where two classes are as likely to the last digits, either may win.
    sure = np.min([np.ptp(np.sort(head)[..., -2:], axis=-1) for head in heads], axis=0) > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(labels[sure], expected[sure])


def test_labels_of_a_volume_are_those_of_predict(answers, runs):
    for name in ("nested", "exclusive"):
        expected = predict_volume([runs[name]], normalize(INPUTS["volume-0"]))
        assert (answers[name]["volume-0-labels"] == expected).mean() > 0.999


@pytest.mark.parametrize("model", ["nested", "exclusive"])
def test_a_model_of_the_users_own_code(runs, tmp_path, model):
    """`Segmenter.export`, for other sizes than the model was built with, odd ones too."""
    segmenter = runs[model].model
    segmenter.export(tmp_path / "model")
    assert b"Tfmtseg" not in (tmp_path / "model" / "saved_model.pb").read_bytes()
    images = np.random.default_rng(0).normal(size=(2, 21, 16, 7, 2)).astype(np.float32)
    served = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    found = served(images=tf.constant(images))
    padded = np.pad(images, ((0, 0), (0, 3), (0, 0), (0, 1), (0, 0)))
    expected = segmenter(padded).numpy()[:, :21, :, :7]
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    agree = found["labels"].numpy() == runs[model].regions.label_map(expected)
    assert agree.mean() > 0.99  # where two classes are as likely, either may win
    assert found["labels"].dtype == tf.uint8


def test_values_that_are_not_finite_are_refused(answers):
    assert "images: values must be finite" in str(answers["nested"]["refusal"])


def test_what_is_written(runs, exported):
    path = exported["nested"]
    assert path.name == "1"
    assert {entry.name for entry in path.iterdir()} >= {"saved_model.pb", "variables"}
    description = json.loads((path / "assets.extra" / "model.json").read_text())
    assert description["modalities"] == ["FLAIR", "T1"]
    assert description["regions"]["names"] == ["WT", "TC", "ET"]
    assert description["window"] == [16, 8, 8]
    for file in path.rglob("*"):  # nothing of this machine
        assert not file.is_file() or str(ROOT).encode() not in file.read_bytes(), file


def test_only_weights_of_the_inference_are_written(runs, exported):
    """The contrastive branch and the teacher are none."""
    size = sum(file.stat().st_size for file in (exported["exclusive"] / "variables").iterdir())
    model = runs["exclusive"].model
    counts = model.count_parameters()
    needed = 4 * (counts["encoder"] + counts["decoder"])
    assert needed < size < 1.1 * needed


@pytest.fixture
def without_graphs(monkeypatch):
    """Exports that write a byte instead of a model, which takes seconds."""

    def save(module, path, signatures, options):
        Path(path, "saved_model.pb").write_bytes(b"0")

    network = SimpleNamespace(variables=[])
    monkeypatch.setattr("tfmtseg.export.served", lambda run: (network, {}))
    monkeypatch.setattr("tensorflow.saved_model.save", save)


def test_versions_are_counted_up(runs, without_graphs, tmp_path):
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    for expected in ("10", "11"):
        assert export_model(runs["nested"].directory, tmp_path).name == expected


def test_a_run_in_mixed_precision_is_exported_in_any(runs, without_graphs, monkeypatch, tmp_path):
    """Its weights are float32."""
    run = runs["nested"]
    shutil.copytree(run.directory, tmp_path / "run")
    description = json.loads((tmp_path / "run" / "model.json").read_text())
    description["arguments"]["dtype"] = "mixed_bfloat16"
    (tmp_path / "run" / "model.json").write_text(json.dumps(description))
    exported = []
    network = SimpleNamespace(variables=[])
    monkeypatch.setattr("tfmtseg.export.served", lambda run: exported.append(run) or (network, {}))
    for precision in (None, "float32"):
        export_model(tmp_path / "run", tmp_path / "model", precision)
    mixed, full = (each.model for each in exported)
    assert mixed.dtype_policy.name == "mixed_bfloat16"
    images = np.random.default_rng(0).normal(size=(1, 16, 8, 8, 2)).astype(np.float32)
    np.testing.assert_array_equal(full(images), run.model(images))
    assert np.abs(mixed(images) - full(images)).max() > 1e-4


def test_a_failed_export_leaves_nothing(runs, without_graphs, monkeypatch, tmp_path):
    def fail(*arguments):
        raise OSError("No space left on device")

    export_model(runs["nested"].directory, tmp_path / "model")
    monkeypatch.setattr("tfmtseg.saving.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        export_model(runs["nested"].directory, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["1"]


def test_output_that_is_a_file_is_refused(runs, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(InputError, match="must be a folder"):
        export_model(runs["nested"].directory, tmp_path / "model")
