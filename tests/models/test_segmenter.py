from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Regions, Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss
from tfmtseg.models.boundary_branch import BoundaryBranch
from tfmtseg.models.contrastive_branch import ContrastiveBranch
from tfmtseg.models.methods import METHODS
from tfmtseg.models.vae_branch import VAEBranch

CROP = (8, 8, 16)  # 3 cubes of edge 8
IN_PLANE = ((2, 2, 1), (2, 2, 1), (2, 2, 2))


def make(method: str = "sscpcseg", **kwargs) -> Segmenter:
    keras.utils.set_random_seed(3)
    arguments = {"regions": 2, "width": 8, "cube_size": 8, "predictor_blocks": 1, "seed": 4}
    return Segmenter(method=method, **{**arguments, **kwargs})


def compiled(method: str = "sscpcseg", optimizer=None, **kwargs) -> Segmenter:
    model = make(method, **kwargs)
    model.build((None, *CROP, 1))
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1))
    model.optimizer.build(model.trainable_variables)
    return model


def batch(labeled: list[int], seed: int = 0) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=(len(labeled), *CROP))
    images = labels[..., None] + rng.normal(size=(*labels.shape, 1))
    return (
        tf.constant(images, tf.float32),
        tf.constant(labels, tf.uint8),
        tf.constant(labeled, tf.float32),
    )


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


def one_step(model: Segmenter, data) -> tuple[dict[str, float], dict, dict]:
    """Losses of an eager update, and the parts before and after it."""
    before = parts(model)
    for metric in model.metrics:
        metric.reset_state()
    logs = {name: float(value) for name, value in model.train_step(data).items()}
    return logs, before, parts(model)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    """A model that no test may change but by `set_weights` back to `start`."""
    return compiled()


@pytest.fixture(scope="module")
def start(model) -> list[np.ndarray]:
    return model.get_weights()


@pytest.fixture(autouse=True)
def restore(model, start):
    yield
    model.set_weights(start)
    model.optimizer.iterations.assign(0)


def test_methods():
    branches = {"encdec": None, "vaeseg": VAEBranch, "boundseg": BoundaryBranch}
    branches |= {"cpcseg": ContrastiveBranch, "ssvaeseg": VAEBranch, "sscpcseg": ContrastiveBranch}
    branches |= {"bcp": None, "bcpcpcseg": ContrastiveBranch}
    assert set(branches) == set(METHODS)
    for method, branch in branches.items():
        assert METHODS[method].uses_unlabelled == method.startswith(("ss", "bcp"))
        model = make(method)
        assert model.branch is None if branch is None else isinstance(model.branch, branch)
    with pytest.raises(ValueError, match=r"method: value is 'unet', must be one of .*Fix: "):
        make("unet")


def test_branch_weight_defaults_to_its_branch():
    assert make().branch_weight == 0.1
    assert make("vaeseg").branch_weight == make("ssvaeseg").branch_weight == 0.1
    assert make("boundseg").branch_weight == 1.0
    assert make("encdec").branch_weight is None
    assert make(contrastive_form="paper").branch_weight == 0.001
    assert make(branch_weight=0.0).branch_weight == 0.0


@pytest.mark.parametrize(("method", "without"), [("sscpcseg", "encdec"), ("bcpcpcseg", "bcp")])
def test_a_branch_of_weight_0_only_shows_its_loss(method, without):
    """The rest learns what the method without the branch learns, to the last bit."""
    control = compiled(method, branch_weight=0.0)
    data = batch([1, 0, 1, 0])
    shown, before, after = one_step(control, data)
    logs, _, expected = one_step(compiled(without), data)
    assert shown["cpc_loss"] > 0
    assert shown["loss"] == logs["loss"]
    for name in ("encoder", "decoder", "head"):
        for one, other in zip(after[name], expected[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert moved(before, after) == {"encoder", "decoder", "head"}


def test_parameters(model):
    counts = model.count_parameters()
    # As in the encoder's and decoder's tests: 1 modality, 3 outputs.
    assert (counts["encoder"], counts["decoder"]) == (1_103_240, 75_683)
    # A block and a 1x1x1 convolution of 64 channels, 6 directions, the temperature.
    assert counts["branch"] == 54 * 64**2 + 6 * 64 + 64 * 64 + 64 + 6 * 64 + 1
    encdec = make("encdec")
    encdec.build((None, None, None, None, 1))
    assert encdec.count_parameters() == {**counts, "branch": 0}


def test_a_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss: value is 'mse', must be None.*Fix: leave it out"):
        make().compile(optimizer="adam", loss="mse")


@pytest.mark.parametrize("method", ["encdec", "sscpcseg"])
def test_xla_is_off(method):
    model = make(method)
    model.compile()
    assert not model.jit_compile
    model.compile(jit_compile="auto")  # Keras 3's default
    assert not model.jit_compile
    with pytest.raises(ValueError, match=r"jit_compile: value is True, must be False.*Fix: leave"):
        model.compile(jit_compile=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tf.zeros((1, *CROP, 1)), "dataset: an element is a"),
        ((tf.zeros((1, *CROP, 1)),), "dataset: an element is a tuple"),
        ((tf.zeros((1, *CROP, 1)), tf.zeros((1, *CROP, 3))), "labels: shape is .* not one-hot"),
        ((tf.zeros((1, *CROP, 1)), tf.zeros((1, *CROP[:2], 4))), "labels: size is .* must be"),
        (({"a": tf.zeros((1, *CROP, 1))}, tf.zeros((1, *CROP))), "images: is a dict, must be one"),
        ((tf.zeros((1, *CROP)), tf.zeros((1, *CROP))), r"images: shape is .*images\[..., None\]"),
        # One voxel would become eight on the way up, and labels would be broadcast.
        ((tf.zeros((1, 16, 16, 1, 1)), tf.zeros((1, 16, 16, 1))), r"images: size is \(16, 16, 1\)"),
        ((tf.zeros((1, 20, 16, 16, 1)), tf.zeros((1, 20, 16, 16))), "images: size is .*multiples"),
        ((tf.zeros((2, *CROP, 1)), tf.zeros((2, *CROP)), tf.ones((2, 2))), "labeled: shape is"),
        ((tf.zeros((2, *CROP, 1)), tf.zeros((2, *CROP)), tf.ones((2, *CROP))), "labeled: shape"),
    ],
)
def test_bad_elements(model, data, message):
    with pytest.raises(ValueError, match=message):
        model.test_step(data)
    if message.startswith("images") and "dict" not in message:
        with pytest.raises(ValueError, match=message):
            model(data[0])


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, np.nan])
def test_flags_are_no_weights(model, value):
    images, labels, labeled = batch([1, 1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="labeled: must be 1 or 0"):
        model.test_step((images, labels, labeled * [1.0, value]))


def test_sizes_that_a_graph_does_not_know_are_checked_in_it(model):
    """One slice would come out as eight."""
    call = tf.function(model, [tf.TensorSpec((None,) * 4 + (1,))], autograph=False)
    images = batch([1])[0]
    np.testing.assert_allclose(call(images), model(images), atol=1e-4)
    for part in (images[..., :1, :], images[:, :4]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="images: size must be multiples"):
            call(part)


def test_unlabelled_volumes_never_change_the_segmentation(model, start):
    images, labels, labeled = batch([1, 0, 0])
    other_images, other_labels, _ = batch([1, 0, 0], seed=1)
    logs, before, after = one_step(model, (images, labels, labeled))
    model.set_weights(start)
    model.optimizer.iterations.assign(0)  # the same dropout
    changed = tf.concat([images[:1], other_images[1:]], 0)
    changed_labels = tf.concat([labels[:1], other_labels[1:]], 0)
    other_logs, _, other_after = one_step(model, (changed, changed_labels, labeled))

    assert moved(before, after) == {"encoder", "decoder", "head", "branch"}
    for name in ("seg_loss", "dice_1", "dice_2"):
        # The same arithmetic; threads may sum in another order.
        assert logs[name] == pytest.approx(other_logs[name], rel=1e-5)
    for part in ("decoder", "head"):
        for a, b in zip(after[part], other_after[part], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert logs["cpc_loss"] != pytest.approx(other_logs["cpc_loss"], rel=1e-3)
    assert moved(after, other_after) >= {"encoder", "branch"}


def test_the_branch_learns_from_the_unlabelled_where_there_are_any(model):
    images, labels, labeled = batch([1, 0])
    other = batch([1, 0], seed=1)[0]

    def cpc_loss(images, labeled):
        for metric in model.metrics:
            metric.reset_state()
        return float(model.test_step((images, labels, labeled))["cpc_loss"])

    with_other_labelled = tf.concat([other[:1], images[1:]], 0)
    assert cpc_loss(images, labeled) == pytest.approx(cpc_loss(with_other_labelled, labeled))
    both = tf.ones(2)
    assert cpc_loss(images, both) != pytest.approx(cpc_loss(with_other_labelled, both), rel=1e-3)


def test_cubes_are_augmented_in_training_alone(model):
    other = make(augment_cubes=True)
    other.build((None, *CROP, 1))
    other.set_weights(model.get_weights())

    def cpc_loss(model, training):
        return float(model._forward(batch([1, 0]), training=training)[1]["cpc_loss"])

    assert cpc_loss(other, False) == pytest.approx(cpc_loss(model, False), rel=1e-5)
    assert cpc_loss(other, True) != pytest.approx(cpc_loss(model, True), rel=1e-3)


def test_the_variational_branch_learns_from_all_volumes_in_one_pass():
    """Labelled and unlabelled alike; the encoder sees every volume once."""
    model = compiled("ssvaeseg", dropout=0.0)
    seen = []
    encode = model.encoder.call
    model.encoder.call = lambda images, seed=None: seen.append(len(images)) or encode(images, seed)
    images, labels, labeled = batch([1, 0, 1])
    shown = model._forward((images, labels, labeled), training=False)[1]
    assert seen == [3]
    model.encoder.call = encode
    redrawn = model.branch(model.encoder(images)["h3"])["reconstruction"]
    error = np.mean(np.square(np.float64(images) - np.float64(redrawn)))
    assert float(shown["vae_reconstruction"]) == pytest.approx(error, rel=1e-5)
    per_volume = SegmentationLoss(model.regions).call(labels, model(images)).numpy()
    assert float(shown["seg_loss"]) == pytest.approx(per_volume[[0, 2]].mean(), rel=1e-4)


def test_the_variational_branch_must_know_the_size():
    with pytest.raises(
        ValueError, match=r"must be known and multiples of \(8, 8, 8\).*model.build"
    ):
        make("vaeseg").build((None, None, None, None, 1))


def test_sampling_follows_seed_and_step():
    model = compiled("vaeseg", dropout=0.0)

    def reconstruction(training: bool = True) -> float:
        return float(model._forward(batch([1]), training)[1]["vae_reconstruction"])

    first = reconstruction()
    assert first == reconstruction()
    model.optimizer.iterations.assign(7)
    assert abs(first - reconstruction()) > 1e-4
    assert reconstruction(False) == reconstruction(False)


def test_the_segmentation_loss_is_the_mean_over_labelled_volumes(model):
    images, labels, labeled = batch([0, 1, 1])
    for metric in model.metrics:
        metric.reset_state()
    logs = model.test_step((images, labels, labeled))
    per_volume = SegmentationLoss(model.regions).call(labels, model(images))
    assert float(logs["seg_loss"]) == pytest.approx(np.mean(per_volume[1:]), rel=1e-5)


def test_dropout_of_a_step_follows_seed_and_updates(model):
    def loss(training: bool = True) -> float:
        return float(model._forward(batch([1]), training)[1]["seg_loss"])

    first = loss()
    assert first == loss()
    model.optimizer.iterations.assign(7)
    assert abs(first - loss()) > 1e-4
    assert loss(False) == loss(False)
    assert abs(first - loss(False)) > 1e-4


@pytest.mark.parametrize("made", [make, compiled], ids=["new", "compiled"])
def test_dropout_changes_from_call_to_call_in_a_loop_of_ones_own(made):
    """Nobody counts its updates: one mask would hold for ever."""
    model, images = made("encdec"), batch([1])[0]
    if not model.built:
        model.build((None, *CROP, 1))
    assert model(images).shape == (1, *CROP, 3)
    assert model(images).dtype == tf.float32
    outer = keras.Sequential([keras.layers.InputLayer((*CROP, 1)), model])

    def calls(layer) -> list[np.ndarray]:
        keras.utils.set_random_seed(5)
        call = tf.function(lambda values: layer(values, training=True))
        return [call(images).numpy() for _ in range(2)]

    for layer in (model, outer):
        first, second = calls(layer)
        assert np.abs(first - second).max() > 1e-3
        np.testing.assert_array_equal([first, second], calls(layer))
        np.testing.assert_array_equal(layer(images), layer(images))


@pytest.mark.parametrize("form", ["repaired", "paper"])
def test_two_runs_with_one_seed_are_equal(form):
    runs = []
    for _ in range(2):
        model = compiled(contrastive_form=form, optimizer=keras.optimizers.Adam(1e-3))
        logs = one_step(model, batch([1, 0]))[0]
        runs.append((logs, model.get_weights()))
    (logs, weights), (again, same_weights) = runs
    assert logs == pytest.approx(again, rel=1e-5)
    # Adam turns rounding of gradients near 0 into steps of up to the learning rate.
    close = [np.isclose(a, b, atol=1e-5).mean() for a, b in zip(weights, same_weights, strict=True)]
    assert np.mean(close) > 0.999


def test_a_loss_that_is_no_number_stops_training(model):
    images, labels, labeled = batch([1, 0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="seg_loss : Tensor had NaN"):
        model.train_step((images * np.nan, labels, labeled))


def test_strides_of_each_axis():
    model = make("encdec", strides=IN_PLANE)
    logits = model(batch([1])[0])
    assert tuple(logits.shape) == (1, *CROP, 3)
    assert tuple(model.encoder(batch([1])[0])["h3"].shape) == (1, 1, 1, 8, 64)


def test_pretraining_moves_encoder_and_branch_alone():
    model = compiled(pretraining=True)
    images, labels, labeled = batch([1, 0])
    logs, before, after = one_step(model, (images, labels, labeled))
    assert moved(before, after) == {"encoder", "branch"}
    assert set(logs) == {"loss", "cpc_loss", "cpc_accuracy", "cpc_chance"}
    # Every volume takes part, with a label or not: 2 volumes of 3 cubes.
    assert logs["cpc_chance"] == pytest.approx(np.log(5))
    assert model.count_parameters()["decoder"] == 0
    assert Segmenter.from_config(model.get_config()).pretraining


def test_pretraining_needs_something_to_learn():
    with pytest.raises(ValueError, match=r"method: value is 'bcp', must be one of vaeseg.*Fix: "):
        make("bcp", pretraining=True)


def test_config_has_every_argument(survives_config):
    survives_config(
        Segmenter, regions=Regions.parse("brats_msd").get_config(), method="bcpcpcseg", width=8,
        dropout=0.5, strides=IN_PLANE, cube_size=(8, 8, 4), contrastive_form="dense",
        predictor_blocks=1, negatives="batch", augment_cubes=True, branch_weight=0.25,
        teacher_momentum=0.5, teacher_start=3, pseudo_label_weight=0.75, largest_component=True,
        pretraining=True, remat=True, seed=7,
    )  # fmt: skip


@pytest.mark.parametrize("cube_size", [8, (8, 8, 4)])
def test_config_round_trip_through_json(cube_size):
    model = make(
        regions=Regions.parse("brats_msd"),
        strides=IN_PLANE,
        contrastive_form="paper",
        cube_size=cube_size,
    )
    config = json.loads(json.dumps(model.get_config()))
    again = Segmenter.from_config(config)
    assert again.get_config() == model.get_config()
    assert again.regions == model.regions
    assert again.branch.form == "paper"
    assert tuple(again.branch.cube_size) == tuple(model.branch.cube_size)


def dataset(labeled: list[int] | None, batches: int = 2) -> tf.data.Dataset:
    per_batch = len(labeled or [1, 1])
    images, labels, flags = batch((labeled or [1, 1]) * batches)
    elements = (images, labels, flags) if labeled else (images, labels)
    return tf.data.Dataset.from_tensor_slices(elements).batch(per_batch, drop_remainder=True)


def test_fit_with_unlabelled_volumes():
    model = make()  # fit builds it; in a graph too, in the README's example
    # Tracing takes most of the time of such a test: graphs of all methods are in conformance/.
    model.compile(optimizer=keras.optimizers.SGD(0.01), run_eagerly=True)
    history = model.fit(dataset([1, 0]), epochs=2, verbose=0, shuffle=False).history
    expected = {"loss", "seg_loss", "cpc_loss", "cpc_accuracy", "cpc_chance", "dice_1", "dice_2"}
    assert set(history) == expected
    assert all(np.isfinite(values).all() for values in history.values())
    # One unlabelled volume of 3 cubes: the positive and two negatives.
    assert history["cpc_chance"] == pytest.approx([np.log(3)] * 2)
    assert int(model.optimizer.iterations) == 4


def test_fit_evaluate_predict_with_plain_pairs():
    model = make("encdec", dropout=0.0)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), run_eagerly=True)
    data = dataset(None)
    history = model.fit(data, epochs=4, verbose=0, shuffle=False).history
    assert set(history) == {"loss", "seg_loss", "dice_1", "dice_2"}
    assert history["loss"] == history["seg_loss"]
    assert history["loss"][-1] < history["loss"][0]

    scores = model.evaluate(data, verbose=0, return_dict=True)
    predicted = model.predict(data.map(lambda image, label: image), verbose=0)
    assert predicted.shape == (4, *CROP, 3)
    images, labels = (np.concatenate(part) for part in zip(*data, strict=True))
    np.testing.assert_allclose(predicted, model(images), atol=1e-4)
    loss = float(SegmentationLoss(model.regions)(labels, predicted))
    assert scores["seg_loss"] == pytest.approx(loss, rel=1e-4)
    for value in (1, 2):
        mask, truth = predicted.argmax(-1) == value, labels == value
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert scores[f"dice_{value}"] == pytest.approx(dice, rel=1e-5)


def test_single_batches_as_keras_gives_them(model):
    images, labels, _ = batch([1, 1])
    logs = model.test_on_batch(images.numpy(), labels.numpy(), return_dict=True)
    expected = {name: float(value) for name, value in model.test_step((images, labels)).items()}
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(expected)
    assert np.isfinite(
        model.train_on_batch(images.numpy(), labels.numpy(), return_dict=True)["loss"]
    )


def test_shown_losses_are_means_over_volumes(model):
    """A batch without labels does not dilute them, a smaller one counts by what it has."""
    parts = [batch([1, 1], 1), batch([0, 0], 2), batch([1], 3)]
    alone = []
    for part in parts:
        for metric in model.metrics:
            metric.reset_state()
        alone.append({name: float(value) for name, value in model.test_step(part).items()})
    for metric in model.metrics:
        metric.reset_state()
    together = [model.test_step(part) for part in parts][-1]
    seg_loss = (2 * alone[0]["seg_loss"] + alone[2]["seg_loss"]) / 3
    assert float(together["seg_loss"]) == pytest.approx(seg_loss)
    cpc_loss = sum(n * part["cpc_loss"] for n, part in zip((2, 2, 1), alone, strict=True)) / 5
    assert float(together["loss"]) == pytest.approx(seg_loss + model.branch_weight * cpc_loss)
    # Without a label nothing is known of the segmentation, and nothing is perfect.
    assert np.isnan([alone[1][name] for name in ("seg_loss", "dice_1", "dice_2")]).all()
    assert alone[1]["loss"] == pytest.approx(model.branch_weight * alone[1]["cpc_loss"])


def test_nothing_is_known_without_a_label():
    """Else a validation without labels would look perfect."""
    model = compiled("encdec")
    logs = model.test_step(batch([0, 0]))
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(
        dict.fromkeys(("loss", "seg_loss", "dice_1", "dice_2"), np.nan), nan_ok=True
    )
    # `keras.callbacks.TerminateOnNaN` looks at the loss after each step.
    assert float(model.train_step(batch([0, 0]))["loss"]) == 0


def test_metrics_of_the_user_are_of_labelled_volumes():
    """Whether a batch has any or not: what the labels of others hold must not count."""
    images, labels, labeled = batch([1, 1, 0, 0])
    model = make("encdec")
    model.build((None, *CROP, 1))
    metric = keras.metrics.SparseCategoricalAccuracy(name="acc")
    model.compile(metrics=[metric], run_eagerly=True)
    data = tf.data.Dataset.from_tensor_slices((images, labels, labeled))
    found = [model.evaluate(data.batch(n), verbose=0, return_dict=True)["acc"] for n in (4, 1)]
    expected = np.mean(model(images[:2]).numpy().argmax(-1) == labels[:2])
    assert found == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("value", [3, 255])
def test_labels_without_a_region_are_refused(value):
    """A mask of 0 and 255 would be learned as background throughout, with a Dice score of 1."""
    model = compiled("encdec")
    images, labels, labeled = batch([1, 0])
    spoilt = labels.numpy()
    spoilt[1, 0, 0, 0] = value  # does not count
    model.train_step((images, spoilt, labeled))
    spoilt[0, 0, 0, 0] = value
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: must be 0 .* to 2 for the"):
        model.train_step((images, spoilt, labeled))


@pytest.mark.parametrize("value", [0.99, np.nan, np.inf])
def test_labels_are_not_rounded(value):
    """A mask that was interpolated, or scaled, would lose its voxels."""
    model = compiled("encdec")
    images, labels, labeled = batch([1, 0])
    spoilt = np.float32(labels)
    spoilt[1, 0, 0, 0] = value  # does not count
    whole = model.test_step((images, labels, labeled))["loss"]
    assert float(model.test_step((images, spoilt, labeled))["loss"]) == float(whole)
    spoilt[0, 0, 0, 0] = value
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels: must be whole numbers"):
        model.test_step((images, spoilt, labeled))


def test_images_as_scanners_store_them(model):
    images, labels, labeled = batch([1, 0])
    images = tf.round(4 * images)
    stored = tf.cast(images, tf.int16)
    np.testing.assert_array_equal(model(stored), model(images))
    losses = []
    for some in (images, stored):
        for metric in model.metrics:
            metric.reset_state()
        losses.append(float(model.test_step((some, labels, labeled))["loss"]))
    assert losses[0] == losses[1]


def test_a_generator_has_to_tell_the_axes(model):
    images, labels, labeled = batch([1, 0])
    dataset = tf.data.Dataset.from_tensors((images, labels, labeled)).map(
        lambda *parts: tf.numpy_function(lambda *values: values, parts, [p.dtype for p in parts])
    )
    with pytest.raises(ValueError, match=r"images: number of axes is unknown.*ensure_shape"):
        model.fit(dataset, verbose=0, shuffle=False)


@pytest.mark.parametrize(
    "argument",
    [
        {"width": 12}, {"dropout": 20}, {"dropout": 1.0}, {"strides": [(2, 2, 2)] * 2},
        {"branch_weight": -1.0}, {"teacher_momentum": 1.5}, {"teacher_start": 0},
        {"pseudo_label_weight": -0.5}, {"contrastive_form": "cubes"},
        {"pretraining": True, "branch_weight": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_their_range(argument):
    name, value = list(argument.items())[-1]
    with pytest.raises(ValueError, match=rf"{name}: value is {re.escape(repr(value))}, must be "):
        make(**argument)


@pytest.mark.skipif(not compat.KERAS_3, reason="Keras 2.15 does not accumulate gradients")
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_accumulated_gradients_are_refused(dtype):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: value is 4, must be None"):
        compiled(optimizer=optimizer, dtype=dtype)


@pytest.mark.parametrize("kwargs", [{"method": "cpcseg"}, {"contrastive_form": "dense"}])
def test_a_contrast_has_to_know_the_size(kwargs):
    model = make(**kwargs)
    model.build((None, *CROP, 1))
    model.compile(keras.optimizers.SGD(0.1))
    signature = tuple(tf.TensorSpec((None,) * rank, tf.float32) for rank in (5, 4, 1))
    dataset = tf.data.Dataset.from_generator(
        lambda: iter([batch([1, 0])]), output_signature=signature
    )
    with pytest.raises(ValueError, match=r"images: size is \(None, None, None\), must be known"):
        model.fit(dataset, verbose=0, shuffle=False)


def test_label_maps_may_have_a_channel_axis(model):
    images, labels, labeled = batch([1, 1])
    plain = one_step(model, (images, labels))[0]["seg_loss"]
    assert model.regions.num_outputs == 3
    restored = compiled()
    assert one_step(restored, (images, labels[..., None], labeled))[0]["seg_loss"] == pytest.approx(
        plain, rel=1e-5
    )


@pytest.mark.parametrize(
    "kwargs", [{"method": "bcp"}, {"method": "cpcseg", "pretraining": True}], ids=str
)
def test_freezing_and_back(kwargs):
    """What the method leaves as it is stays so."""
    model = compiled(**kwargs)
    before = list(map(id, model.trainable_weights))
    model.trainable = False
    assert model.trainable_weights == []
    again = Segmenter.from_config(model.get_config())
    again.build((None, *CROP, 1))
    assert (again.name, again.trainable, again.trainable_weights) == (model.name, False, [])
    model.trainable = True
    assert list(map(id, model.trainable_weights)) == before


@pytest.mark.parametrize(
    "kwargs", [{"method": "bcp"}, {"method": "cpcseg", "pretraining": True}], ids=str
)
def test_parts_set_trainable_one_by_one(kwargs):
    """As is usual before fine-tuning; what the method leaves as it is stays so."""
    model = compiled(**kwargs)
    before = list(map(id, model.trainable_weights))
    for layer in model.layers:
        layer.trainable = True
    model.compile()
    assert list(map(id, model.trainable_weights)) == before


def test_frozen_layers_stay_frozen_in_a_file(tmp_path):
    model = compiled("bcp", optimizer=keras.optimizers.Adam(0.01))
    model.encoder.trainable = False
    compat.layers_of(model.decoder)[0].trainable = False
    model.compile(keras.optimizers.Adam(0.01))
    model.train_step(batch([1, 1]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert not again.encoder.trainable
    frozen = [[w.trainable for w in compat.weights_of(m)] for m in (model, again)]
    shapes = [[w.shape for w in m.trainable_weights] for m in (model, again)]
    assert frozen[0] == frozen[1]
    assert shapes[0] == shapes[1]
    assert int(again.optimizer.iterations) == 1
    (one, before, after), (other, *_) = (one_step(m, batch([1, 1])) for m in (again, model))
    assert moved(before, after) == {"decoder", "head"}
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*has not yet been built")
def test_a_model_that_is_not_built_survives_files(tmp_path):
    model = make("encdec")
    model.compile(keras.optimizers.Adam(0.01), run_eagerly=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    again.run_eagerly = True
    history = again.fit(dataset(None, 1), verbose=0, shuffle=False).history
    assert np.isfinite(history["loss"]).all()


def test_a_model_that_is_frozen_throughout_learns_nothing():
    model = compiled("encdec")
    model.trainable = False
    with pytest.raises(ValueError, match="model: every layer is frozen"):
        model.train_step(batch([1]))


def test_a_disk_that_is_full_leaves_no_half_model(tmp_path, monkeypatch):
    """TensorFlow's own error would be no OSError."""

    def save(module, path, *_):
        (Path(path) / "saved_model.pb").write_bytes(b"half")
        raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")

    monkeypatch.setattr("tensorflow.saved_model.save", save)
    model = make("encdec")
    model.build((None, *CROP, 1))
    with pytest.raises(OSError, match="No space left"):
        model.export(tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_an_exported_model_refuses_nan(tmp_path):
    model = make("encdec")
    model.build((None, *CROP, 1))
    model.export(tmp_path / "served")
    images = batch([1])[0].numpy()
    images[0, 0, 0, 0] = np.nan
    serve = tf.saved_model.load(tmp_path / "served").signatures["serving_default"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="images: values must be finite"):
        serve(tf.constant(images))
