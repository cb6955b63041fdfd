from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.models import contrast, contrastive_branch
from tfmtseg.models.contrastive_branch import ContrastiveBranch, extract_cubes, grid_shape
from tfmtseg.models.encoder import ISOTROPIC, Encoder
from tfmtseg.ops.seed import Seed

FORMS = ("repaired", "paper")


def test_grids_of_the_paper():
    assert grid_shape((144, 144, 128), (32, 32, 32)) == (8, 8, 7)  # 448 cubes
    assert grid_shape((32, 48, 32), (16, 16, 16)) == (3, 5, 3)  # 45 cubes
    assert grid_shape((16, 16, 16), (16, 16, 16)) == (1, 1, 1)


def test_grids_of_thick_slices():
    assert grid_shape((96, 96, 8), (32, 32, 8)) == (5, 5, 1)
    assert grid_shape((96, 64, 9), (32, 16, 9)) == (5, 7, 1)  # what spans may be odd
    assert grid_shape((16, 4, 1), (8, 4, 1)) == (3, 1, 1)


@pytest.mark.parametrize(
    ("crop", "cube_size"),
    [
        ((32, 32, 32), (15, 15, 15)),
        ((32, 36, 32), (16, 16, 16)),
        ((32, 8, 32), (16, 16, 16)),
        ((32, 32, 8), (16, 16, 16)),
        ((32, 32, 9), (16, 16, 1)),
    ],
)
def test_cubes_must_fit_the_crop(crop, cube_size):
    with pytest.raises(ValueError, match=r"cube_size: value is .* must be even.*Fix:"):
        grid_shape(crop, cube_size)


@pytest.mark.parametrize(
    ("crop", "edges", "grid"),
    [
        ((8, 12, 8), (4, 4, 4), (3, 5, 3)),
        ((8, 12, 8), (4, 6, 2), (3, 3, 7)),
        ((8, 12, 3), (4, 4, 3), (3, 5, 1)),
        ((8, 5, 1), (4, 5, 1), (3, 1, 1)),
    ],
)
def test_cubes_are_slices_of_the_image(crop, edges, grid):
    images = np.random.default_rng(0).normal(size=(2, *crop, 3)).astype(np.float32)
    starts = [
        range(0, size - edge + 1, max(1, edge // 2)) for size, edge in zip(crop, edges, strict=True)
    ]
    expected = [
        image[x : x + edges[0], y : y + edges[1], z : z + edges[2]]
        for image in images
        for x, y, z in itertools.product(*starts)
    ]
    assert tuple(map(len, starts)) == grid_shape(crop, edges) == grid
    np.testing.assert_array_equal(extract_cubes(images, edges), expected)


@pytest.mark.parametrize("form", FORMS)
def test_augmented_cubes_have_draws_of_their_own(form):
    images = tf.random.stateless_normal((3, 16, 16, 16, 2), [0, 1])
    branch = ContrastiveBranch(2, 8, form, blocks=0, augment_cubes=True)
    branch.build(None)
    seen = []

    def encode(cubes: tf.Tensor) -> tf.Tensor:
        seen.append(cubes.numpy())
        return cubes

    def encoded(images: tf.Tensor, first: int, draw: int) -> np.ndarray:
        seed = Seed(tf.constant([draw, 7]), first)
        branch(images, encode=encode, seed=seed, training=draw > 0)
        return seen.pop()

    # Gain and shift of each cube and modality, fitted to 512 voxels; noise is what is left.
    x, y = (
        np.reshape(np.moveaxis(cubes, -1, 1), (3 * 27 * 2, -1))
        for cubes in (extract_cubes(images, (8, 8, 8)).numpy(), encoded(images, 0, 1))
    )
    gains, shifts = np.transpose([np.polyfit(a, b, 1) for a, b in zip(x, y, strict=True)])
    left = y - gains[:, None] * x - shifts[:, None]
    assert left.std() == pytest.approx(0.1, rel=0.02)
    # Uniform within 0.2: a standard deviation of 0.115, among the 27 cubes of each case too.
    for changes in (gains, shifts):
        within = changes.reshape(3, 27, 2).std(1)
        assert ((within > 0.08) & (within < 0.15)).all()
    # The cubes of a case are changed alike where it is alone on a replica.
    np.testing.assert_array_equal(encoded(images[2:], 2, 1), encoded(images, 0, 1)[-27:])
    assert not np.allclose(encoded(images, 0, 1), encoded(images, 0, 2))
    # Held-out cases are left as they are.
    np.testing.assert_array_equal(encoded(images, 0, 0), extract_cubes(images, (8, 8, 8)))


class Bypass:
    """A branch whose queries are the context's codes, and codes that are given.

    Without residual blocks and with an identity as its last convolution, the predictor
    changes nothing.
    """

    def __init__(self, crop, form: str, codes: np.ndarray):
        self.crop, self.codes = crop, codes.astype(np.float32)
        channels = codes.shape[-1]
        # Cubes of 4 voxels, half overlapping; a single one spans its axis.
        self.branch = ContrastiveBranch(channels, (4, 4, 4), form, blocks=0)
        self.branch.build(None)
        identity = np.eye(channels, dtype=np.float32).reshape(1, 1, 1, channels, channels)
        self.branch.last.set_weights([identity, np.zeros(channels)])
        if form == "repaired":
            self.branch.directions.assign(np.zeros((6, channels)))

    def __call__(self, **kwargs) -> dict[str, np.ndarray]:
        images = tf.zeros((len(self.codes), *self.crop, 1))
        channels = self.codes.shape[-1]

        def encode(cubes):
            codes = tf.reshape(self.codes, (-1, 1, 1, 1, channels))
            assert len(cubes) == len(codes)
            return codes + tf.constant([-1.0, 1.0]).numpy().reshape(
                1, 2, 1, 1, 1
            )  # the mean counts

        result = self.branch(images, encode=encode, **kwargs)
        return {name: value.numpy() for name, value in result.items()}


def crop_of(grid: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(2 * (size + 1) for size in grid)


def random_codes(cases: int, grid: tuple[int, int, int], channels: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(cases, *grid, channels))


def directions(grid) -> list[tuple[list[tuple], list[tuple]]]:
    """For each of six directions, the places of the context and their targets.

    Written from the description: the halves lie on the two sides of the middle layer
    (of the middle two, on an even grid), and a place's target is the one that lies
    at the same depth into the other half.
    """
    result = []
    for axis, side in np.ndindex(3, 2):
        size = grid[axis]
        half = (size - 1) // 2
        context, targets = [], []
        for place in np.ndindex(*grid):
            depth = place[axis]  # counted from the side where the context lies
            if depth < half:
                ends = []
                for d in (depth, depth + size - half):
                    end = list(place)
                    end[axis] = size - 1 - d if side else d
                    ends.append(tuple(end))
                context.append(ends[0])
                targets.append(ends[1])
        if context:
            result.append((context, targets))
    return result


def repaired_by_hand(codes: np.ndarray, temperature: float = 0.1):
    """Loss, accuracy and number of candidates of each query, with loops in float64."""
    cases, *grid = codes.shape[:4]
    unit = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    rows = []
    for case in range(cases):
        for context, targets in directions(grid):
            for place, target in zip(context, targets, strict=True):
                query = unit[case][place]
                positive = query @ unit[case][target] / temperature
                negatives = np.array(
                    [
                        query @ unit[other][key] / temperature
                        for other in range(cases)
                        for key in np.ndindex(*grid)
                        if key != target
                    ]
                )
                loss = np.log1p(np.exp(negatives - positive).sum())
                rows.append((loss, positive > negatives.max(), 1 + len(negatives)))
    return (np.array(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("grid", [(3, 5, 3), (4, 3, 2), (1, 5, 1), (5, 5, 1)])
@pytest.mark.parametrize("cases", [1, 3])
def test_repaired_form_matches_loops(cases, grid):
    codes = random_codes(cases, grid)
    result = Bypass(crop_of(grid), "repaired", codes)()
    loss, accuracy, candidates = repaired_by_hand(codes)
    assert len(set(candidates)) == 1
    np.testing.assert_allclose(result["chance"], np.log(candidates[0]), rtol=1e-6)
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result["accuracy"], accuracy)


def test_chance_counts_candidates():
    # method.md counts 448 and 45 cubes; negatives leave out the positive's place.
    for grid, cases in (((3, 5, 3), 1), ((3, 5, 3), 4)):
        result = Bypass(crop_of(grid), "repaired", random_codes(cases, grid))()
        assert result["chance"] == pytest.approx(np.log(cases * 44 + 1))
    # The paper's form: 15 targets and 20 sampled codes.
    result = Bypass(crop_of((3, 5, 3)), "paper", random_codes(2, (3, 5, 3)))()
    assert result["chance"] == pytest.approx(np.log(35))
    result = Bypass(crop_of((8, 8, 7)), "paper", random_codes(1, (8, 8, 7)))()
    assert result["chance"] == pytest.approx(np.log(212))
    assert result["loss"].shape == (192,)


@pytest.mark.parametrize("form", FORMS)
def test_equal_codes_are_worth_chance(form):
    grid = (3, 5, 3)
    result = Bypass(crop_of(grid), form, np.ones((2, *grid, 8)))()
    np.testing.assert_allclose(result["loss"], result["chance"], rtol=1e-5)
    np.testing.assert_array_equal(result["accuracy"], 0)


@pytest.mark.parametrize("grid", [(3, 3, 3), (5, 3, 4), (6, 4, 3), (2, 3, 2), (5, 4, 1)])
def test_context_and_targets_share_no_voxel(grid, monkeypatch):
    # Codes that name case and place show which code became a query of which key.
    cases = 2
    codes = np.stack(
        [np.arange(cases * math.prod(grid)) + 1.0, np.ones(cases * math.prod(grid))], -1
    ).reshape(cases, *grid, 2)
    calls = []
    original = contrast.info_nce

    def spy(queries, keys, **kwargs):
        calls.append((np.rint(queries).astype(int)[:, 0], np.rint(keys).astype(int)[:, 0], kwargs))
        return original(queries, keys, **kwargs)

    monkeypatch.setattr(contrast, "info_nce", spy)
    Bypass(crop_of(grid), "repaired", codes)()
    ((queries, keys, arguments),) = calls
    targets = keys[arguments["positives"].numpy()]

    crop = crop_of(grid)
    numbers = np.arange(cases * math.prod(crop), dtype=np.float32).reshape(cases, *crop, 1)
    voxels = [set(cube.ravel().astype(int)) for cube in extract_cubes(numbers, (4, 4, 4)).numpy()]

    expected = directions(grid)
    per_case = sum(len(context) for context, _ in expected)
    assert len(queries) == cases * per_case
    names = codes[..., 0].astype(int)
    first = 0
    for case in range(cases):
        for context, target in expected:
            rows = slice(first, first + len(context))
            first += len(context)
            np.testing.assert_array_equal(queries[rows], [names[case][place] for place in context])
            np.testing.assert_array_equal(targets[rows], [names[case][place] for place in target])
            # A query may have seen the whole context half of its direction.
            seen = set().union(*(voxels[name - 1] for name in queries[rows]))
            assert not any(seen & voxels[name - 1] for name in targets[rows])


def test_predictions_see_the_context_alone_and_each_direction_its_vector(monkeypatch):
    # Queries may not change with codes outside of their context.
    grid = (3, 1, 1)
    seen = []
    original = contrast.info_nce

    def spy(queries, keys, **kwargs):
        seen.append(np.array(queries))
        return original(queries, keys, **kwargs)

    monkeypatch.setattr(contrast, "info_nce", spy)
    codes = random_codes(1, grid)
    bypass = Bypass(crop_of(grid), "repaired", codes)
    bypass.branch.directions.assign(np.arange(6)[:, None] * np.ones((6, 8)))
    bypass()
    # Forwards the context is the first cube, backwards the last.
    np.testing.assert_allclose(seen[0], [codes[0, 0, 0, 0], codes[0, 2, 0, 0] + 1], atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "axis"), [((2, 3, 3), 2), ((2, 3, 1), 1), ((3, 3, 1), 1), ((3, 1, 1), 0)]
)
def test_paper_form_matches_loops(grid, axis):
    # Along the last axis with 2 or more, the first layer of 2 or 3 is context and the last
    # is target; the pool of 12 or less is below 20, so all are negatives.
    cases = 2
    codes = random_codes(cases, grid)
    result = Bypass(crop_of(grid), "paper", codes)()
    losses, accuracies = [], []
    for image in codes:
        layers = np.moveaxis(image, axis, 2)
        for x, y in np.ndindex(*layers.shape[:2]):
            similar = image.reshape(-1, 8) @ layers[x, y, 0]
            target = layers[x, y, -1] @ layers[x, y, 0]
            losses.append(np.log(np.exp(similar).sum()) - target)
            accuracies.append(target >= similar.max())
    assert result["chance"] == pytest.approx(np.log(math.prod(grid)))
    np.testing.assert_allclose(result["loss"], losses, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(result["accuracy"], accuracies)


def test_paper_form_samples_20_negatives_that_are_no_targets(monkeypatch):
    grid, cases = (3, 5, 4), 2
    names = np.arange(1.0, cases * 60 + 1).reshape(cases, *grid)
    codes = np.stack([names, np.ones_like(names)], -1)
    seen = []
    original = contrastive_branch.info_nce

    def spy(queries, keys, **kwargs):
        seen.append((np.array(queries)[:, 0], np.array(keys)[:, 0]))
        return original(queries, keys, **kwargs)

    monkeypatch.setattr(contrastive_branch, "info_nce", spy)
    # map_fn runs as a plain loop here, so that the spy sees numbers.
    monkeypatch.setattr(
        tf,
        "map_fn",
        lambda f, pair, **_: [tf.stack(v) for v in zip(*map(f, zip(*pair)))],  # noqa: B905
    )
    bypass = Bypass(crop_of(grid), "paper", codes)
    draws = []
    for seed in ([0, 1], [0, 1], [0, 2]):
        seen.clear()
        bypass(seed=Seed(tf.constant(seed)))
        for case, (queries, keys) in enumerate(seen):
            np.testing.assert_allclose(queries, names[case, :, :, :2].ravel())
            np.testing.assert_allclose(keys[:30], names[case, :, :, 2:].ravel())
            negatives = keys[30:]
            assert len(set(negatives)) == len(negatives) == 20
            assert set(negatives) <= set(names[case, :, :, :2].ravel())
        draws.append(np.concatenate([keys for _, keys in seen]))
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("form", "grid"), [("repaired", (2, 2, 2)), ("repaired", (1, 1, 2)), ("paper", (1, 1, 1))]
)
def test_too_small_crops_are_refused(form, grid):
    with pytest.raises(ValueError, match=r"crop: grid of cubes is .* must be .*Fix:"):
        Bypass(crop_of(grid), form, random_codes(1, grid))()


def test_unknown_form():
    with pytest.raises(ValueError, match="form: value is 'papr', must be one of repaired, paper"):
        ContrastiveBranch(8, 4, "papr")


def test_config_has_every_argument(survives_config):
    survives_config(
        ContrastiveBranch, channels=16, cube_size=(16, 8, 5), form="paper", blocks=3,
        negatives="batch", remat=True, augment_cubes=True,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cube_size", [8, (16, 8, 5)])
def test_config_round_trip(form, cube_size):
    branch = ContrastiveBranch(16, cube_size, form, blocks=3, name="branch")
    again = keras.layers.deserialize(keras.layers.serialize(branch))
    assert again.get_config() == branch.get_config()
    assert tuple(again.cube_size) == ((8, 8, 8) if cube_size == 8 else cube_size)
    for layer in (branch, again):
        layer.build(None)
    assert len(again.trainable_weights) == 3 * 8 + 2 + (2 if form == "repaired" else 0)


def test_predictor_of_the_papers_size():
    # 8 residual blocks of 256 channels: 8 * (54 * 256^2 + 6 * 256) = 28,323,840, and a
    # 1x1x1 convolution: 256^2 + 256 = 65,792.
    branch = ContrastiveBranch(256, 32, "paper", blocks=8)
    branch.build(None)
    assert sum(int(np.prod(w.shape)) for w in branch.trainable_weights) == 28_389_632


def structured_images(cases: int, shape=(16, 16, 16)) -> tf.Tensor:
    """Smooth images that differ: waves along all axes, of each case's own phase."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    rng = np.random.default_rng(0)
    images = []
    for _ in range(cases):
        a, b, c = rng.uniform(0, 2 * np.pi, 3)
        channels = [np.sin(3 * x + a) + y, np.cos(4 * y + b) - z + np.sin(5 * z + c)]
        images.append(np.stack(channels, -1))
    return tf.constant(np.array(images), tf.float32)


class Pair:
    """An encoder and its branch, whose cubes have an edge of 8 voxels."""

    def __init__(self, form: str, width: int, strides=ISOTROPIC, cube_size=8):
        keras.utils.set_random_seed(1)
        self.encoder = Encoder(width, strides=strides)
        self.encoder.build((None, None, None, None, 2))
        self.branch = ContrastiveBranch(8 * width, cube_size, form, blocks=1)
        self.branch.build(None)
        self.weights = self.encoder.trainable_weights + self.branch.trainable_weights

    def __call__(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.branch(images, encode=lambda cubes: self.encoder(cubes)["h3"])


@pytest.mark.parametrize("form", FORMS)
def test_a_predictor_that_says_nothing_is_worth_chance(form):
    pair = Pair(form, width=8)
    pair.branch.last.set_weights([np.zeros(w.shape) for w in pair.branch.last.get_weights()])
    result = pair(structured_images(2))
    np.testing.assert_allclose(result["loss"], result["chance"], rtol=1e-5)


def test_a_new_branch_knows_nothing():
    # Queries and keys of an untrained network are not related. Their cosines spread by
    # about 0.1, one unit at the temperature of 0.1, which adds half a unit to the loss.
    # (The paper's raw products spread much further, so its loss starts well above.)
    pair = Pair("repaired", width=16)
    noise = tf.random.stateless_normal((3, 16, 16, 16, 2), [0, 1])
    result = pair(noise)
    assert np.mean(result["loss"]) == pytest.approx(float(result["chance"]), abs=0.6)
    assert np.mean(result["accuracy"]) < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_branch_alone_reaches_every_weight(form):
    # 16 channels: with one channel per group, GroupNorm would take out what the bias
    # of the convolution before it adds.
    pair = Pair(form, width=16)
    images = structured_images(2)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(pair(images)["loss"])
    weights = pair.weights
    gradients = tape.gradient(loss, weights)
    assert len(weights) == 82 + 10 + (2 if pair.branch.form == "repaired" else 0)
    largest = max(np.abs(gradient).max() for gradient in gradients if gradient is not None)
    for weight, gradient in zip(weights, gradients, strict=True):
        name = getattr(weight, "path", weight.name)
        assert gradient is not None, name
        # Well above what float32 leaves of a gradient that is mathematically 0.
        assert np.abs(gradient).max() > 1e-5 * largest, name


@pytest.mark.parametrize("form", FORMS)
def test_three_equal_edges_are_one_bit_for_bit(form):
    images = structured_images(2)
    results = []
    for cube_size in (8, (8, 8, 8)):
        pair = Pair(form, width=8, cube_size=cube_size)
        with tf.GradientTape() as tape:
            result = pair(images)
        gradients = tape.gradient(result["loss"], pair.weights)
        results.append([*result.values(), *map(tf.convert_to_tensor, gradients)])
    for one, three in zip(*results, strict=True):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("form", FORMS)
def test_thick_slices(form):
    """Strides, cubes and grid in the plane: the branch learns, along x and y alone."""
    strides = ((2, 2, 1), (2, 2, 1), (2, 2, 1))
    pair = Pair(form, width=8, strides=strides, cube_size=(8, 8, 3))
    images = structured_images(2, (16, 24, 3))
    with tf.GradientTape() as tape:
        result = pair(images)
    gradients = tape.gradient(result["loss"], pair.weights)
    assert all(gradient is not None for gradient in gradients)
    # Grid 3 x 5 x 1. Repaired: 5 + 5 queries along x, 6 + 6 along y (2 of 5 layers each),
    # each among its own 15 codes and the other case's 14. Paper: 2 of 5 layers along y,
    # 6 targets and the 9 others.
    queries, candidates = (22, 29) if form == "repaired" else (6, 15)
    assert result["loss"].shape == (2 * queries,)
    assert float(result["chance"]) == pytest.approx(np.log(candidates))
    if form == "repaired":
        directions = np.abs(tf.convert_to_tensor(gradients[-2])).max(axis=1)
        assert (directions[:4] > 0).all()
        np.testing.assert_array_equal(directions[4:], 0)  # none along z


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_temperature_stays_in_its_range(sign):
    branch = ContrastiveBranch(8, 4, blocks=0)
    branch.build(None)
    weight = branch.log_temperature
    assert np.exp(weight) == pytest.approx(0.1)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.apply_gradients([(tf.constant(sign * 100.0), weight)])
    assert np.exp(weight) == pytest.approx(0.03 if sign > 0 else 1.0)
    optimizer.apply_gradients([(tf.constant(0.0), weight)])
    assert 0.0299 < np.exp(weight) <= 1.0


@pytest.mark.parametrize(
    # Raw products need small steps, normalised codes bear large ones.
    ("form", "learning_rate", "steps"),
    [("repaired", 3e-3, 25), ("paper", 3e-4, 10)],
)
def test_a_few_steps_bring_the_loss_well_below_chance(form, learning_rate, steps):
    pair = Pair(form, width=8)
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(pair.weights)
    images = structured_images(2, (16, 8, 16))  # 9 cubes each

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            result = pair(images)
            loss = tf.reduce_mean(result["loss"])
        gradients = tape.gradient(loss, pair.weights)
        optimizer.apply_gradients(zip(gradients, pair.weights, strict=True))
        return loss, result["chance"]

    losses, (chance, *_) = zip(*(step() for _ in range(steps)), strict=True)
    assert min(losses[-5:]) < chance - 0.5
