from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tfmtseg.data.preprocess import STEP, WORKING_BYTES, background_value, normalize
from tfmtseg.errors import InputWarning

SHAPE = (20, 22, 24)


def body(background: float, mean: float = 50, std: float = 8, seed: int = 0) -> np.ndarray:
    """A block of noise inside a constant surround."""
    result = np.full(SHAPE, background, np.float32)
    result[4:16, 4:18, 4:20] = np.random.default_rng(seed).normal(mean, std, (12, 14, 16))
    return result


def tight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(500, 90, SHAPE).astype(np.float32)


class TestBackground:
    @pytest.mark.parametrize("value", [0.0, -3.6, 1000.0])
    def test_constant_surround(self, value):
        assert background_value(body(value)) == np.float32(value)

    def test_tight_crop(self):
        assert background_value(tight()) is None

    def test_the_lowest_value_where_half_of_the_faces_is_not_enough(self):
        image = tight()
        image[:, :4] = 7  # 8/22 of four faces and one of the two others: less than half
        assert background_value(image) == 7
        image[:, :4] = 900  # no lower than the rest: a bright organ
        assert background_value(image) is None

    def test_a_lowest_value_of_few_voxels_is_none(self):
        image = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
        image.flat[:10] = 0
        assert background_value(image) is None
        image.flat[:11] = 0
        assert background_value(image) == 0


class TestNormalize:
    def test_z_score_of_the_foreground(self):
        image = np.stack([body(-3.6, 50, 8, 1), body(0, -7, 0.1, 2)], axis=-1)
        result = normalize(image)
        for i, background in enumerate((np.float32(-3.6), 0)):
            foreground = image[..., i] != background
            values = image[..., i][foreground].astype(np.float64)
            kept = np.clip(values, *np.percentile(values, [0.5, 99.5]))
            expected = (values - kept.mean()) / kept.std()
            # rounding to the step, and float32 of values around 10
            np.testing.assert_allclose(
                result.values()[..., i][foreground], expected, rtol=0, atol=STEP / 2 + 1e-5
            )
        assert result.voxels.dtype == np.int16
        assert result.constant == ()

    def test_background_is_what_its_voxels_have(self):
        image = np.stack([body(-3.6), tight()], axis=-1)
        result = normalize(image)
        assert np.all(result.values()[0, 0, 0, 0] == result.background[0])
        assert result.background[1] == result.values()[..., 1].min()

    @pytest.mark.parametrize("air", [-4, -1000])
    def test_a_tighter_crop_leaves_the_tissue_in_its_units(self, air):
        """A ball in air that is not 0, cut where air fills over and under half of the faces."""
        places = np.indices((64, 64, 64)) - 31.5
        inside = (places**2).sum(0) < 25**2
        values = np.random.default_rng(0).normal(20, 3, inside.shape)
        ball = np.where(inside, values, air).astype(np.float32)[..., None]
        tissue = []
        for cut in range(4, 19):
            part = (slice(cut, 64 - cut),) * 3
            normalized = normalize(ball[part]).values()[..., 0]
            middle = (slice(28 - cut, 36 - cut),) * 3
            tissue.append((normalized[middle].mean(), normalized[middle].std()))
        # means of samples of over 10^4 voxels, clipped at percentiles
        np.testing.assert_allclose(tissue, [tissue[0]] * len(tissue), rtol=0, atol=0.1)

    def test_units_do_not_matter(self):
        image = body(0)[..., None]
        np.testing.assert_allclose(
            normalize(image * 1e6).values(), normalize(image).values(), rtol=0, atol=STEP
        )

    def test_outliers_are_cut_and_do_not_move_the_rest(self):
        image = body(0)[..., None]
        spoilt = image.copy()
        spoilt[8, 8, 8] = 1e7
        clean, result = normalize(image).values(), normalize(spoilt).values()
        np.testing.assert_allclose(result[8, 8, 8], 10, rtol=1e-6)
        result[8, 8, 8] = clean[8, 8, 8]
        # one of 2,688 voxels moves a winsorised mean by about 2.6 / 2,688
        np.testing.assert_allclose(result, clean, rtol=0, atol=0.02)

    def test_zero_counts_as_background_of_a_tight_crop(self):
        image = -tight()  # so that 0 is not the lowest value
        image[6:12, 6:12, 6:12] = 0
        assert background_value(image) is None
        values = normalize(image[..., None]).values()[..., 0]
        assert abs(values[image != 0].mean()) < 0.01

    @pytest.mark.parametrize("value", [0, 7, -1e30, 1e30])
    def test_constant_channel(self, value):
        image = np.stack([np.full(SHAPE, value), body(0)], axis=-1).astype(np.float32)
        with pytest.warns(InputWarning, match=r"a/b\.nii: channel 0 is constant"):
            result = normalize(image, "a/b.nii")
        assert result.constant == (0,)
        assert not result.voxels[..., 0].any()
        assert result.voxels[..., 1].any()

    def test_rounding_noise_is_constant(self):
        image = np.full((*SHAPE, 1), 1000, np.float32)
        image[3:9] = np.nextafter(np.float32(1000), np.float32(2000))
        with pytest.warns(InputWarning, match="constant"):
            assert not normalize(image).voxels.any()

    def test_a_mask_as_image_is_not_constant(self):
        image = np.zeros((*SHAPE, 1), np.float32)
        image[5:15, 5:15, 5:15] = 1
        assert len(np.unique(normalize(image).voxels)) == 2

    def test_huge_values(self):
        values = normalize((body(0) * np.float32(1e36))[..., None]).values()
        assert np.isfinite(values).all()
        assert values.std() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_memory(channels):
    """Predictions of large images are refused by this number."""
    voxels = np.random.default_rng(0).normal(size=(100, 100, 100, channels)).astype(np.float32)
    tracemalloc.start()
    normalize(voxels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.01 * 100**3 * (2 * channels + WORKING_BYTES)
