"""One list of checks over every method; a new one takes part by being in the list."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Regions, Segmenter
from tfmtseg.compat import keras
from tfmtseg.models import segmenter
from tfmtseg.models.blocks import Convolution
from tfmtseg.models.methods import METHODS

CROP = (8, 8, 16)
NESTED = Regions.parse("brats_124")
EXCLUSIVE = Regions.exclusive(["a", "b", "c"])

# Methods that differ in their data alone are one network, of which the last stands for all, see
# test_methods_of_one_network_are_one_model.
NETWORKS = {replace(method, uses_unlabelled=False): name for name, method in METHODS.items()}

# Every network, and the contrast between classes, which learns by other rules.
CASES = {
    **{name: {"method": name} for name in NETWORKS.values()},
    "sscpcseg classes": {"method": "sscpcseg", "contrastive_form": "classes"},
    "bcpcpcseg classes": {"method": "bcpcpcseg", "contrastive_form": "classes"},
    "sscpcseg dense": {"method": "sscpcseg", "contrastive_form": "dense"},
    "bcpcpcseg across": {"method": "bcpcpcseg", "contrastive_form": "dense_across"},
}

# Branches, by prefix, that learn nothing where no volume has a label.
NEED_LABELS = (None, "boundary", "class")
# Branches whose features the head sees, in inference too.
FEED_THE_HEAD = ("boundary",)


def make(case: str, regions: Regions = NESTED, width: int = 8, **options) -> Segmenter:
    keras.utils.set_random_seed(3)
    options = {"cube_size": 8, "predictor_blocks": 1, "seed": 4, **options}
    case = CASES.get(case, {"method": case})
    model = Segmenter(regions=regions, width=width, **options, **case)
    model.build((None, *CROP, 2))
    return model


def batch(labeled: list[int], regions: Regions = NESTED) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images that show their labels, in blocks of 2 voxels, so that regions have an inside."""
    rng = np.random.default_rng(0)
    values = [0, *sorted({value for values in regions.members for value in values})]
    labels = rng.choice(values, size=(len(labeled), *(size // 2 for size in CROP)))
    for axis in (1, 2, 3):
        labels = labels.repeat(2, axis)
    images = labels[..., None] + rng.normal(size=(*labels.shape, 2))
    return (
        tf.constant(images, tf.float32),
        tf.constant(labels, tf.uint8),
        tf.constant(labeled, tf.float32),
    )


@pytest.fixture(scope="module", params=CASES)
def compiled(request) -> tuple[Segmenter, list[np.ndarray]]:
    """A model for each case, and its weights at the start."""
    model = make(request.param)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.optimizer.build(model.trainable_variables)
    return model, model.get_weights()


@pytest.fixture
def model(compiled) -> Segmenter:
    """That model, as it was at the start."""
    model, start = compiled
    model.set_weights(start)
    model.optimizer.iterations.assign(0)
    for metric in model.metrics:
        metric.reset_state()
    return model


def parts(model: Segmenter) -> dict[str, list[np.ndarray]]:
    layers = {
        "encoder": model.encoder, "decoder": model.decoder,
        "head": model.head, "branch": model.branch,
    }  # fmt: skip
    return {name: layer.get_weights() for name, layer in layers.items() if layer is not None}


def moved(before: dict, after: dict) -> set[str]:
    """Names of the parts of which any weight changed."""
    return {
        name
        for name, weights in before.items()
        if any(not np.array_equal(a, b) for a, b in zip(weights, after[name], strict=True))
    }


TWINS = [name for name in METHODS if name not in NETWORKS.values()]


@pytest.mark.parametrize("name", TWINS)
def test_methods_of_one_network_are_one_model(name, monkeypatch):
    """The model does not even look which cases its method uses."""
    twin = NETWORKS[replace(METHODS[name], uses_unlabelled=False)]
    seen = {key: value for key, value in asdict(METHODS[name]).items() if key != "uses_unlabelled"}
    seen["can_pretrain"] = METHODS[name].can_pretrain
    monkeypatch.setitem(segmenter.METHODS, name, SimpleNamespace(**seen))
    shown, configs = [], []
    for method in (name, twin):
        model = make(method)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        shown.append({key: float(x) for key, x in model.train_step(batch([1, 0])).items()})
        configs.append({**model.get_config(), "method": None, "name": None})
    assert configs[0] == configs[1]
    assert shown[0] == pytest.approx(shown[1], rel=1e-5)  # threads may sum in another order


def adds_up(model: Segmenter, logs: dict[str, float]) -> bool:
    """Whether the loss is the sum of its terms, of those that there are."""
    terms = [logs["seg_loss"], logs.get("mix_loss", np.nan)]
    if model.branch is not None:
        terms.append(model.branch_weight * logs[f"{model.branch.prefix}_loss"])
    return logs["loss"] == pytest.approx(np.nansum(terms), rel=1e-5)


@pytest.mark.parametrize("labeled", [[1, 1], [1, 0], [0, 0]], ids=["labelled", "mixed", "none"])
def test_an_update_moves_what_it_should(model, labeled):
    model.optimizer.iterations.assign(2)  # from then on, a teacher labels
    before = parts(model)
    logs = {name: float(value) for name, value in model.train_step(batch(labeled)).items()}
    assert not any(np.isinf(value) for value in logs.values())
    assert adds_up(model, logs)
    expected = set(before)
    known = {name: value for name, value in logs.items() if not np.isnan(value)}
    if any(labeled):
        assert known == logs
    else:  # of what has a label, nothing is known
        assert not any(name.startswith(("seg_", "dice_")) for name in known)
        learns = getattr(model.branch, "prefix", None) not in NEED_LABELS
        expected = {"encoder", "branch"} if learns else set()
        if learns and model.branch.decodes:
            expected.add("decoder")
        assert (logs["loss"] > 0) == learns
        if not learns:  # no accuracy and no chance of nothing
            assert set(known.values()) <= {0}
    assert moved(before, parts(model)) == expected


def test_losses_add_up(model):
    logs = {name: float(value) for name, value in model.test_step(batch([1, 0])).items()}
    assert adds_up(model, logs)


def test_inference_knows_of_no_branch_but_where_it_feeds_the_head(model):
    images = batch([1])[0]
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((1, *CROP, NESTED.num_outputs), tf.float32)
    if model.branch is not None:
        rng = np.random.default_rng(1)
        weights = model.branch.get_weights()
        model.branch.set_weights([w + rng.normal(size=np.shape(w)) for w in weights])
    same = np.array_equal(logits, model(images))
    assert same == (METHODS[model.method].branch not in FEED_THE_HEAD)


def test_config_and_weights_survive_files(model, tmp_path):
    config = json.loads(json.dumps(model.get_config()))
    keras.utils.set_random_seed(99)  # other initial weights
    again = Segmenter.from_config(config)
    assert again.get_config() == model.get_config()
    sized = METHODS[model.method].branch == "vae"  # its dense layers have to know
    again.build((None, *(CROP if sized else (None,) * 3), 2))
    images = batch([1])[0]
    assert np.abs(again(images) - model(images)).max() > 1e-3
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    assert len(again.get_weights()) == len(model.get_weights())
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again(images), model(images))


def test_keras_file_survives(model, tmp_path):
    model.train_step(batch([1, 0]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is Segmenter
    assert again.get_config() == model.get_config()
    assert int(again.optimizer.iterations) == 1
    assert len(again.get_weights()) == len(model.get_weights())
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    images = batch([1])[0]
    np.testing.assert_array_equal(again(images), model(images))


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_trainable_weight(case):
    # At width 8, a group of the first level's GroupNorm is one channel, and the bias of
    # the convolution before it has no effect; at 16 there is no such exception.
    model = make(case, width=16)
    with tf.GradientTape(persistent=True) as tape:
        loss, shown, *_ = model._forward(batch([1, 0]), training=True)
    checks = [(loss, model.trainable_variables)]
    if model.branch is not None:  # its task alone trains it and the whole encoder
        own = [*model.encoder.trainable_variables, *model.branch.trainable_variables]
        if model.branch.decodes:
            own += model.decoder.trainable_variables
        checks.append((shown[f"{model.branch.prefix}_loss"], own))
    for value, variables in checks:
        gradients = tape.gradient(value, variables)
        sizes = [0.0 if gradient is None else np.abs(gradient).max() for gradient in gradients]
        for variable, size in zip(variables, sizes, strict=True):
            # Well above what float32 leaves of a gradient that is mathematically 0.
            assert size > 1e-6 * max(sizes), getattr(variable, "path", variable.name)


@pytest.mark.parametrize("case", CASES)
def test_fit(case):
    # Building a graph takes most of the time: `evaluate` and `predict` are left to the
    # tests of Segmenter.
    model = make(case, EXCLUSIVE)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    dataset = tf.data.Dataset.from_tensor_slices(batch([1, 0] * 2, EXCLUSIVE))
    data = dataset.batch(2, drop_remainder=True)
    history = model.fit(data, verbose=0, shuffle=False).history
    assert all(np.isfinite(values).all() for values in history.values())
    assert int(model.optimizer.iterations) == 2
    assert {"loss", "seg_loss", "dice_a", "dice_b", "dice_c"} <= set(history)
    if model.branch is not None:
        assert {f"{model.branch.prefix}_{name}" for name in model.branch.shown} <= set(history)


@pytest.fixture(params=["model", "everywhere"])
def policy(request):
    """Options of a model in mixed precision: its own, as of tools/train.py, or Keras' for all."""
    if request.param == "everywhere":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield {"dtype": "mixed_bfloat16"} if request.param == "model" else {}
    keras.mixed_precision.set_global_policy("float32")


@functools.cache  # for both policies
def losses_in_float32(case: str) -> dict[str, float]:
    model = make(case, dtype="float32")
    model.compile(keras.optimizers.SGD(0.1))
    model.optimizer.iterations.assign(2)
    return {name: float(x) for name, x in model._forward(batch([1, 0]), training=True)[1].items()}


def whole(model: Segmenter) -> list[Convolution]:
    """Convolutions whose results stay float32: logits and what is redrawn of the images."""
    owners = [model, *(part for part in (model.teacher, model.branch) if part is not None)]
    last = [model.branch.last] if METHODS[model.method].branch == "vae" else []
    return [owner.head for owner in owners if hasattr(owner, "head")] + last


@pytest.mark.parametrize("case", CASES)
def test_mixed_precision(case, policy):
    model = make(case, **policy)
    exact = set(map(id, whole(model)))
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, Convolution)]
    # 23 of the encoder, 9 of the decoder, the head; a teacher has the same.
    assert len(layers) >= 33 * (1 if model.teacher is None else 2)
    for layer in layers:
        assert layer.compute_dtype == ("float32" if id(layer) in exact else "bfloat16"), layer.name
    model.compile(keras.optimizers.SGD(0.1))
    model.optimizer.iterations.assign(2)  # from then on, a teacher labels
    _, shown, *_ = model._forward(batch([1, 0]), training=True)
    for name, value in shown.items():
        assert value.dtype == tf.float32, name
        assert np.isfinite(value), name
        if name.endswith("loss"):  # features of 8 bits: the losses are alike
            assert float(value) == pytest.approx(losses_in_float32(case)[name], rel=0.1, abs=0.05)
    assert model(batch([1])[0]).dtype == tf.float32
    assert {tf.as_dtype(weight.dtype) for weight in model.trainable_weights} == {tf.float32}
