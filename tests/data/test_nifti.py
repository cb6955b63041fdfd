from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tfmtseg.data import nifti
from tfmtseg.errors import InputError, InputWarning

SHAPE = (7, 9, 12)


def rotation_z(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    result = np.eye(4)
    result[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return result


RAS = np.array([[1.5, 0, 0, -8], [0, 1, 0, -7], [0, 0, 2.5, -15], [0, 0, 0, 1]])
SHEAR = RAS + np.array([[0, 0.4, 0, 0], [0] * 4, [0] * 4, [0] * 4])
AFFINES = {
    "ras": RAS,
    "lps": np.diag([-1.0, -1, 2.5, 1]),
    # stored axes: to the foot, to the right, to the back
    "permuted": np.array([[0, 1.5, 0, 3], [0, 0, -1, 4], [-2.5, 0, 0, 5], [0, 0, 0, 1.0]]),
    "oblique": rotation_z(25) @ RAS,
    "oblique_lps": rotation_z(-30) @ np.diag([-1.0, -1, 2.5, 1]),
}


def save(path: Path, voxels: np.ndarray, affine=RAS, kind=nib.Nifti1Image, **kwargs) -> Path:
    nib.save(kind(voxels, affine, **kwargs), path)
    return path


def random_image(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def random_label() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)


class TestGeometry:
    @pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
    @pytest.mark.parametrize("name", AFFINES)
    def test_label_round_trip(self, tmp_path, name, kind):
        image = save(tmp_path / "i.nii.gz", random_image(), AFFINES[name], kind)
        label = save(tmp_path / "l.nii.gz", random_label(), AFFINES[name], kind)
        volume = nifti.read_image([image])
        read = nifti.read_label(label, labels=range(3), like=volume.geometry, image=image)

        # the oracle for RAS+ is nibabel's own reorientation
        canonical = nib.as_closest_canonical(nib.load(image))
        np.testing.assert_array_equal(volume.voxels[..., 0], canonical.get_fdata())
        np.testing.assert_allclose(volume.geometry.ras_affine, canonical.affine, atol=1e-12)
        np.testing.assert_allclose(  # header zooms are float32
            volume.geometry.spacing_mm, canonical.header.get_zooms(), rtol=1e-6
        )
        assert volume.geometry.ras_shape == canonical.shape == read.shape

        out = tmp_path / "out.nii.gz"
        nifti.write_label_map(out, read, volume.geometry)
        source, written = nib.load(image), nib.load(out)
        assert type(written) is kind
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(written.dataobj), random_label())
        np.testing.assert_array_equal(written.affine, source.affine)
        for field in nifti._SPATIAL_FIELDS:
            np.testing.assert_array_equal(written.header[field], source.header[field], field)

    def test_sheared(self, tmp_path):
        path = save(tmp_path / "i.nii.gz", random_image(), SHEAR)
        with pytest.warns(InputWarning, match="shear"):
            geometry = nifti.read_image([path]).geometry
        nifti.write_label_map(tmp_path / "o.nii.gz", np.zeros(SHAPE, np.uint8), geometry)
        np.testing.assert_array_equal(nib.load(tmp_path / "o.nii.gz").affine, nib.load(path).affine)

    def test_qform_only(self, tmp_path):
        image = nib.Nifti1Image(random_image(), None)
        image.header.set_qform(AFFINES["oblique"], code=1)
        nib.save(image, tmp_path / "i.nii.gz")
        geometry = nifti.read_geometry(tmp_path / "i.nii.gz")
        # quaternions are stored in float32
        np.testing.assert_allclose(geometry.affine, AFFINES["oblique"], atol=1e-5)
        nifti.write_label_map(tmp_path / "o.nii.gz", np.zeros(SHAPE, np.uint8), geometry)
        written = nib.load(tmp_path / "o.nii.gz")
        np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "i.nii.gz").affine)
        assert (written.header["qform_code"], written.header["sform_code"]) == (1, 0)

    def test_pixdim_beside_an_sform_alone(self, tmp_path):
        image = nib.Nifti1Image(random_image(), np.eye(4))
        image.header["pixdim"][1:4] = 0.7, 0.7, 5
        nib.save(image, tmp_path / "i.nii.gz")
        with pytest.warns(InputWarning, match=r"pixdim, 0\.7 x 0\.7 x 5, .* disagree"):
            assert nifti.read_geometry(tmp_path / "i.nii.gz").spacing_mm == (1, 1, 1)
        image.header["pixdim"][1:4] = 1.001, 0.999, 1
        nib.save(image, tmp_path / "i.nii.gz")
        nifti.read_geometry(tmp_path / "i.nii.gz")

    def test_channels_follow_the_axes(self, tmp_path):
        voxels = random_image((*SHAPE, 3))
        path = save(tmp_path / "i.nii.gz", voxels, AFFINES["permuted"])
        volume = nifti.read_image([path], num_modalities=3)
        canonical = nib.as_closest_canonical(nib.load(path)).get_fdata()
        np.testing.assert_array_equal(volume.voxels, canonical)
        assert volume.voxels.flags.c_contiguous
        np.testing.assert_array_equal(volume.geometry.from_ras(volume.voxels), voxels)

    def test_micrometres(self, tmp_path):
        image = nib.Nifti1Image(random_image(), np.diag([500.0, 1000, 2000, 1]))
        image.header.set_xyzt_units("micron")
        nib.save(image, tmp_path / "i.nii.gz")
        assert nifti.read_geometry(tmp_path / "i.nii.gz").spacing_mm == (0.5, 1.0, 2.0)

    def test_from_affine_is_what_a_file_of_it_has(self, tmp_path):
        geometry = nifti.Geometry.from_affine(SHAPE, RAS)
        nifti.write_label_map(tmp_path / "o.nii", np.zeros(SHAPE, np.uint8), geometry)
        assert nifti.read_geometry(tmp_path / "o.nii") == geometry
        np.testing.assert_array_equal(nib.load(tmp_path / "o.nii").affine, RAS)

    def test_config_survives_json(self, tmp_path):
        path = save(tmp_path / "i.nii.gz", random_image(), AFFINES["oblique"])
        geometry = nifti.read_geometry(path)
        text = json.dumps(geometry.get_config(), allow_nan=False)
        assert nifti.Geometry.from_config(json.loads(text)) == geometry


class TestImage:
    def test_one_file_per_modality(self, tmp_path):
        voxels = random_image((*SHAPE, 2))
        paths = [save(tmp_path / f"c_000{i}.nii.gz", voxels[..., i]) for i in range(2)]
        volume = nifti.read_image(paths, num_modalities=2)
        np.testing.assert_array_equal(volume.voxels, voxels)

    def test_all_modalities_together_are_limited(self, tmp_path, monkeypatch):
        paths = [save(tmp_path / f"c_000{i}.nii.gz", random_image()) for i in range(3)]
        monkeypatch.setattr(nifti, "MAX_VOXELS", 3 * random_image().size)
        assert nifti.read_image(paths).voxels.shape == (*SHAPE, 3)
        monkeypatch.setattr(nifti, "MAX_VOXELS", 3 * random_image().size - 1)
        with pytest.raises(InputError, match=r"c_0000\.nii\.gz: image is 3 files of .* must"):
            nifti.read_image(paths)

    def test_modalities_must_lie_in_one_space(self, tmp_path):
        one = save(tmp_path / "c_0000.nii.gz", random_image())
        moved = RAS.copy()
        moved[1, 3] += 3
        two = save(tmp_path / "c_0001.nii.gz", random_image(), moved)
        with pytest.raises(InputError, match=r"c_0001\.nii\.gz: affine is 3 mm off"):
            nifti.read_image([one, two])

    @pytest.mark.parametrize("dtype", ["uint8", ">i2", "int64", "float64", ">f4"])
    def test_stored_types(self, tmp_path, dtype):
        dtype = np.dtype(dtype)
        voxels = np.rint(random_image()).astype(dtype)
        header = nib.Nifti1Header(endianness=">" if dtype.byteorder == ">" else "<")
        path = save(tmp_path / "i.nii", voxels, header=header, dtype=dtype)
        read = nifti.read_image([path]).voxels
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[..., 0], voxels)

    def test_scaling(self, tmp_path):
        image = nib.Nifti1Image(np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16), RAS)
        image.header.set_slope_inter(0.5, -3)
        nib.save(image, tmp_path / "i.nii.gz")
        stored = np.asarray(nib.load(tmp_path / "i.nii.gz").dataobj)
        np.testing.assert_array_equal(
            nifti.read_image([tmp_path / "i.nii.gz"]).voxels[..., 0], stored
        )

    def test_several_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(nifti, "CHUNK_VOXELS", 100)
        path = save(tmp_path / "i.nii.gz", random_image())
        np.testing.assert_array_equal(nifti.read_image([path]).voxels[..., 0], random_image())

    def test_number_of_channels(self, tmp_path):
        path = save(tmp_path / "i.nii.gz", random_image((*SHAPE, 3)))
        with pytest.raises(InputError, match="number of channels is 3, must be 1"):
            nifti.read_image([path], num_modalities=1)

    @pytest.mark.parametrize(
        ("values", "words"), [([np.nan], "1 NaN"), ([np.inf, -np.inf], "2 Inf")]
    )
    def test_not_finite(self, tmp_path, values, words):
        voxels = random_image()
        voxels.flat[: len(values)] = values
        path = save(tmp_path / "i.nii.gz", voxels)
        with pytest.raises(InputError, match=f"voxel values is {words}"):
            nifti.read_image([path])

    def test_voxel_limit_comes_before_the_allocation(self, tmp_path):
        content = bytearray(nib.Nifti1Image(random_image(), RAS).to_bytes())
        content[40:48] = np.array([3, 30000, 30000, 30000], "<i2").tobytes()
        path = tmp_path / "i.nii.gz"
        path.write_bytes(gzip.compress(bytes(content)))
        with pytest.raises(InputError, match="limit"):  # 108 TB would be a MemoryError
            nifti.read_image([path])

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"nope\.nii\.gz: file is missing"):
            nifti.read_image([tmp_path / "nope.nii.gz"])

    def test_a_pipe_is_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "i.nii.gz")  # opening it would wait for ever
        with pytest.raises(InputError, match="regular file"):
            nifti.read_image([tmp_path / "i.nii.gz"])


class TestDamage:
    @pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
    def test_truncated(self, tmp_path, share):
        path = save(tmp_path / "i.nii.gz", random_image())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match=r"i\.nii\.gz: .*truncated"):
            nifti.read_image([path])

    def test_checksum_far_behind_the_voxels(self, tmp_path):
        content = nib.Nifti1Image(random_image(), RAS).to_bytes() + bytes(300_000)
        stored = bytearray(gzip.compress(content, compresslevel=0))  # one byte is one byte
        stored[1000] ^= 0x40
        (tmp_path / "i.nii.gz").write_bytes(stored)
        with pytest.raises(InputError, match="CRC"):
            nifti.read_image([tmp_path / "i.nii.gz"])


class TestLabel:
    @pytest.fixture
    def image(self, tmp_path):
        return save(tmp_path / "i.nii.gz", random_image())

    def read(self, path, image, labels=range(3)):
        geometry = nifti.read_geometry(image)
        return nifti.read_label(path, labels=labels, like=geometry, image=image)

    def test_other_axis_order_in_the_same_space(self, tmp_path, image):
        flipped = RAS.copy()
        flipped[0, 0] *= -1
        flipped[0, 3] = RAS[0, 3] + RAS[0, 0] * (SHAPE[0] - 1)
        path = save(tmp_path / "l.nii.gz", random_label()[::-1], flipped)
        np.testing.assert_array_equal(self.read(path, image), random_label())

    @pytest.mark.parametrize(
        ("value", "words"),
        [(7, "7 in 1 voxels"), (-1, "-1"), (256, "256"), (0.5, "0.5")],
    )
    def test_values(self, tmp_path, image, value, words):
        label = random_label().astype(np.float32)
        label[0, 0, 0] = value
        path = save(tmp_path / "l.nii.gz", label)
        with pytest.raises(InputError, match=f"{words}.*an integer in 0..2"):
            self.read(path, image)

    def test_values_with_a_gap(self, tmp_path, image):
        label = np.where(random_label() == 2, 4, random_label()).astype(np.uint8)
        path = save(tmp_path / "l.nii.gz", label)
        np.testing.assert_array_equal(self.read(path, image, (0, 1, 4)), label)
        label[0, 0, 0] = 3
        save(path, label)
        with pytest.raises(InputError, match="label value is 3 in 1 voxels, must be one of 0, 1, "):
            self.read(path, image, (0, 1, 4))

    def test_almost_integers_are_rounded(self, tmp_path, image):
        path = save(tmp_path / "l.nii.gz", random_label().astype(np.float32) * (1 - 1e-6))
        np.testing.assert_array_equal(self.read(path, image), random_label())

    def test_shape(self, tmp_path, image):
        path = save(tmp_path / "l.nii.gz", random_label()[..., :-1])
        with pytest.raises(InputError, match=r"\(7, 9, 11\), must be \(7, 9, 12\).*i\.nii\.gz"):
            self.read(path, image)

    def test_place(self, tmp_path, image):
        moved = RAS.copy()
        moved[0, 3] += 5
        path = save(tmp_path / "l.nii.gz", random_label(), moved)
        with pytest.raises(InputError, match="affine is 5 mm off"):
            self.read(path, image)

    def test_background_alone_is_odd(self, tmp_path, image):
        path = save(tmp_path / "l.nii.gz", np.zeros(SHAPE, np.uint8))
        with pytest.warns(InputWarning, match=r"l\.nii\.gz: every label is background"):
            assert not self.read(path, image).any()


class TestWriting:
    geometry = nifti.Geometry.from_affine(SHAPE, RAS)

    def test_same_bytes(self, tmp_path):
        for name in ("a.nii.gz", "b.nii.gz"):
            nifti.write_label_map(tmp_path / name, random_label(), self.geometry)
        content = (tmp_path / "a.nii.gz").read_bytes()
        assert content == (tmp_path / "b.nii.gz").read_bytes()
        # RFC 1952: no optional fields such as a file name, and no time
        assert content[3:8] == bytes(5)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.nii.gz"
        nifti.write_label_map(path, random_label(), self.geometry)
        before = path.read_bytes()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(gzip.GzipFile, "write", full)
        with pytest.raises(OSError, match="No space"):
            nifti.write_label_map(path, 0 * random_label(), self.geometry)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_refuses_another_shape(self, tmp_path):
        with pytest.raises(ValueError, match="Expected a uint8 label map of shape"):
            nifti.write_label_map(tmp_path / "a.nii.gz", random_label()[1:], self.geometry)
