from __future__ import annotations

import json
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from tfmtseg.data import cache, preprocess
from tfmtseg.data.cache import build_cache, foreground_voxels
from tfmtseg.data.cases import Case
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import read_image
from tfmtseg.errors import InputErrors


@pytest.fixture
def cases(folder):
    for name in ("a", "b", "c"):
        folder.case(name)
    return read_data_folder(folder.write()).cases


@pytest.fixture
def build(tmp_path):
    def run(cases, num_modalities=1, labels=range(3), **settings):
        return build_cache(
            cases, tmp_path / "cache", num_modalities=num_modalities, labels=labels, **settings
        )

    return run


def stamps(directory) -> dict[str, int]:
    """Identity of each file, by name without checksum; a rebuilt file is a new one."""
    paths = sorted(directory.iterdir())
    result = {re.sub(r"\.[0-9a-f]{8}\.", ".", path.name): path.stat().st_ino for path in paths}
    assert len(result) == len(paths)
    return result


class TestRecord:
    def test_content(self, cases, build, capsys):
        records = build(cases)
        for case, record in zip(cases, records, strict=True):
            volume = read_image(case.images)
            expected = preprocess.normalize(volume.voxels)
            assert isinstance(record.image, np.memmap)
            assert record.image.dtype == np.int16
            assert record.image.flags.c_contiguous
            np.testing.assert_array_equal(record.image, expected.voxels)
            np.testing.assert_array_equal(
                record.image * record.scale + record.offset, expected.values()
            )
            np.testing.assert_array_equal(record.background, expected.background)
            assert record.geometry == volume.geometry
            label = nib.load(case.label).get_fdata()
            np.testing.assert_array_equal(record.label, label)
            assert record.label.dtype == np.uint8
        size = sum(record.image.nbytes + record.label.nbytes for record in records)
        assert f"Cache: 3 cases, {size / 2**20:.1f} MiB" in capsys.readouterr().out

    def test_ras_order(self, folder, build):
        folder.case("a")
        voxels = np.random.default_rng(0).normal(100, 20, (6, 7, 8))
        affine = np.array([[0, 0, -2.0, 0], [-1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
        image = folder.save("imagesTr/a.nii.gz", voxels, affine)
        folder.save("labelsTr/a.nii.gz", (voxels > 100).astype(np.uint8), affine)
        (record,) = build(read_data_folder(folder.write()).cases)
        canonical = nib.as_closest_canonical(nib.load(image)).get_fdata()
        np.testing.assert_array_equal(record.label, canonical > 100)
        assert record.image.shape == (*canonical.shape, 1)
        assert record.geometry.spacing_mm == (2, 1, 3)

    def test_foreground(self, cases, build):
        record = build(cases)[0]
        x, y, z, value = record.foreground.T
        np.testing.assert_array_equal(record.label[x, y, z], value)
        assert set(value) == {1, 2}

    def test_foreground_is_what_is_segmented(self, cases, build):
        (record, *_) = build(cases)
        before = stamps(record.directory)
        (segmented, *_) = build(cases, foreground_labels={2})
        of_two = record.foreground[record.foreground[:, 3] == 2]
        assert 0 < len(of_two) < len(record.foreground)
        np.testing.assert_array_equal(segmented.foreground, of_two)
        assert stamps(record.directory) == before  # runs of other regions share the cache


class TestUnlabelled:
    def test_the_label_file_is_never_opened(self, cases, build, opened):
        cases = [cases[0], cases[1].without_label()]
        labelled, unlabelled = build(cases)
        assert labelled.label is not None
        assert unlabelled.label is None
        assert unlabelled.foreground is None
        labels = [path for path in opened if "labelsTr" in path]
        assert labels
        assert all(path.endswith("a.nii.gz") for path in labels)
        assert not [path for path in stamps(unlabelled.directory) if path.startswith("b.label")]

    def test_a_label_of_an_earlier_run_is_not_handed_out(self, cases, build, opened):
        build(cases)
        opened.clear()
        record = build([cases[0].without_label()])[0]
        assert record.label is None
        assert record.foreground is None
        kinds = ("labelsTr", ".label.", ".foreground.")
        assert not [path for path in opened if any(kind in path for kind in kinds)]

    def test_a_broken_label_that_is_not_used_does_no_harm(self, cases, build):
        cases[0].label.write_bytes(b"broken")
        assert build([cases[0].without_label()])[0].label is None


class TestReuse:
    def test_sound_entries_are_kept(self, cases, build, opened):
        (record, *_) = build(cases)
        before = stamps(record.directory)
        opened.clear()
        build(cases)
        assert stamps(record.directory) == before
        assert not [path for path in opened if path.endswith(".nii.gz")]

    def test_a_label_can_be_added(self, cases, build):
        (record,) = build([cases[0].without_label()])
        before = stamps(record.directory)
        (record,) = build(cases[:1])
        assert record.label is not None
        assert before.items() <= stamps(record.directory).items()

    def test_changed_image(self, cases, build, folder):
        build(cases)
        folder.image("a", seed=1)
        record = build(cases)[0]
        expected = preprocess.normalize(read_image(cases[0].images).voxels)
        np.testing.assert_array_equal(record.image, expected.voxels)

    def test_changed_label(self, cases, build, folder):
        build(cases)
        label = np.asarray(nib.load(cases[0].label).dataobj).copy()
        label[label == 2] = 1
        folder.save("labelsTr/a.nii.gz", label)
        assert build(cases)[0].label.max() == 1

    def test_changed_time_alone(self, cases, build):
        (record, *_) = build(cases)
        before = stamps(record.directory)
        status = cases[0].label.stat()
        os.utime(cases[0].label, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        build(cases)
        after = stamps(record.directory)
        rebuilt = {name for name in after if after[name] != before[name]}
        assert rebuilt == {"a.label.npy", "a.foreground.npy", "a.label.json"}

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("VERSION", -1), ("CLIP", 9.0), ("STEP", 1e-3), ("PERCENTILES", (1.0, 99.0)),
         ("BACKGROUND_SHARE", 0.6), ("LOWEST_SHARE", 0.02), ("LEAST_STD", 1e-5)],
    )  # fmt: skip
    def test_changed_preprocessing(self, cases, build, monkeypatch, setting, value):
        (record, *_) = build(cases)
        before = stamps(record.directory)
        monkeypatch.setattr(preprocess, setting, value)
        build(cases)
        after = stamps(record.directory)
        assert after["a.image.npy"] != before["a.image.npy"]
        build(cases)
        assert stamps(record.directory) == after  # the new settings hold

    def test_changed_draw_of_foreground(self, cases, build, monkeypatch):
        assert len(build(cases)[0].foreground) > 6
        monkeypatch.setattr(cache, "FOREGROUND_VOXELS", 3)
        assert len(build(cases)[0].foreground) == 6

    def test_another_original_of_the_same_size_and_time(self, cases, build, folder):
        path = folder.root / "imagesTr/a.nii"
        for seed in (1, 2):
            voxels = np.random.default_rng(seed).normal(size=(9, 9, 9)).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
            os.utime(path, ns=(0, 0))
            (record,) = build([Case("a", (path,))])
            expected = preprocess.normalize(read_image([path]).voxels)
            np.testing.assert_array_equal(record.image, expected.voxels)

    def test_the_entry_of_another_case(self, cases, build):
        records = build(cases)
        for kind in ("image", "label", "foreground"):
            shutil.copy(records[0].path(kind), records[1].path(kind))
        for kind in ("image", "label"):
            entries = (record.directory / f"{record.name}.{kind}.json" for record in records[:2])
            shutil.copy(*entries)
        for case, record in zip(cases, build(cases), strict=True):
            expected = preprocess.normalize(read_image(case.images).voxels)
            np.testing.assert_array_equal(record.image, expected.voxels)

    def test_changed_settings_are_checked_anew(self, cases, build):
        build(cases)
        with pytest.raises(InputErrors, match=r"label value is 2 .* 0\.\.1"):
            build(cases, labels=range(2))
        with pytest.raises(InputErrors, match="number of channels is 1, must be 2"):
            build(cases, num_modalities=2)

    def test_a_run_at_work_does_not_see_the_voxels_of_another(self, cases, build, folder):
        (record, *_) = build(cases)
        folder.image("a", seed=1)
        (other, *_) = build(cases)
        with pytest.raises(FileNotFoundError, match=record.path("image").name):
            np.array(record.image)
        np.testing.assert_array_equal(record.label, other.label)

    def test_an_entry_that_leads_elsewhere(self, cases, build, tmp_path):
        (record, *_) = build(cases)
        elsewhere = tmp_path / "elsewhere.npy"
        shutil.move(record.path("image"), elsewhere)
        path = record.directory / "a.image.json"
        entry = json.loads(path.read_text())["entry"]
        entry["files"]["image"]["name"] = "../elsewhere.npy"
        checksum = cache._entry_checksum(entry)
        path.write_text(json.dumps({"checksum": checksum, "entry": entry}))
        assert build(cases)[0].path("image") == record.path("image")

    @pytest.mark.parametrize("kind", ["image", "label", "foreground"])
    @pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
    def test_damaged_array(self, cases, build, kind, damage):
        path = build(cases)[0].path(kind)
        good = path.read_bytes()
        if damage == "bit":
            path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        elif damage == "cut":
            path.write_bytes(good[:-10])
        else:
            path.unlink()
        build(cases)
        assert path.read_bytes() == good

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"entry": {}, "checksum": 0}'])
    def test_damaged_entry(self, cases, build, content):
        record = build(cases)[0]
        path = record.directory / "a.image.json"
        good = path.read_text()
        path.write_text(content)
        build(cases)
        assert path.read_text() == good

    def test_changed_number_in_the_entry(self, cases, build):
        record = build(cases)[0]
        path = record.directory / "a.image.json"
        stored = json.loads(path.read_text())
        stored["entry"]["scale"] = [1.0]
        path.write_text(json.dumps(stored))
        assert build(cases)[0].scale == record.scale


class TestErrors:
    def test_all_bad_cases_at_once(self, cases, build, folder):
        voxels = np.asarray(nib.load(cases[0].images[0]).dataobj).copy()
        voxels[0, 0, 0] = np.nan
        folder.save("imagesTr/a.nii.gz", voxels)
        cases[2].label.write_bytes(cases[2].label.read_bytes()[:-9])
        with pytest.raises(InputErrors) as caught:
            build(cases)
        files = [error.file for error in caught.value.errors]
        assert files == [str(cases[0].images[0]), str(cases[2].label)]

    def test_a_failed_write_leaves_no_part(self, cases, build, monkeypatch, tmp_path):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.np, "save", full)
        with pytest.raises(OSError, match="No space"):
            build(cases)
        assert stamps(tmp_path / "cache") == {}


def test_foreground_voxels_are_a_fair_draw():
    label = np.zeros((30, 30, 30), np.uint8)
    label[5:25, 5:25, 5:25] = 1  # 8,000 - 27 voxels
    label[10:13, 10:13, 10:13] = 3
    drawn = foreground_voxels(label, seed=0)
    x, y, z, value = drawn.T
    np.testing.assert_array_equal(label[x, y, z], value)
    assert drawn.dtype == np.int32
    assert np.count_nonzero(value == 1) == 1000
    assert np.count_nonzero(value == 3) == 27
    assert len(np.unique(drawn, axis=0)) == len(drawn)
    # uniform over 20 positions: standard error of a mean of 1,000 is 5.8 / sqrt(1000)
    np.testing.assert_allclose(drawn[value == 1, :3].mean(axis=0), 14.5, atol=5 * 0.18)
    np.testing.assert_array_equal(drawn, foreground_voxels(label, seed=0))
    assert foreground_voxels(np.zeros_like(label), seed=0).shape == (0, 4)
