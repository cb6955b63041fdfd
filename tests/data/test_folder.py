from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tfmtseg.data.cases import Case
from tfmtseg.data.check import check_data_folder
from tfmtseg.data.folder import read_data_folder, scan_data_folder
from tfmtseg.data.layouts import decathlon
from tfmtseg.data.splits import subject_of
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.regions import Regions


def problems(root: Path) -> list[str]:
    with pytest.raises(InputErrors) as caught:
        read_data_folder(root)
    return [str(error) for error in caught.value.errors]


class TestDecathlon:
    def test_a_sound_folder(self, folder):
        folder.case("BRATS_446")
        folder.case("BRATS_002", labelled=False)
        folder.image("BRATS_900", "imagesTs")
        folder.description.update(test=["./imagesTs/BRATS_900.nii.gz"], numTest=1)
        root = folder.write()

        found = read_data_folder(root)
        assert found.modalities == ("MRI",)
        assert found.regions == Regions.exclusive(["a", "b"])
        assert found.cases == (
            Case("BRATS_002", (root / "imagesTr/BRATS_002.nii.gz",), None),
            Case(
                "BRATS_446",
                (root / "imagesTr/BRATS_446.nii.gz",),
                root / "labelsTr/BRATS_446.nii.gz",
            ),
        )
        assert found.test_cases == (Case("BRATS_900", (root / "imagesTs/BRATS_900.nii.gz",)),)
        assert found.cases[1].without_label().label is None

    def test_modalities_in_the_order_of_their_numbers(self, folder):
        folder.case("c")
        folder.description["modality"] = {str(i): f"m{i}" for i in reversed(range(11))}
        assert read_data_folder(folder.write()).modalities == tuple(f"m{i}" for i in range(11))

    def test_names_are_text(self, folder):
        """They stand in messages, tables and file names."""
        folder.case("c")
        folder.description["name"] = "a\x1b[2Jb"
        folder.description["modality"] = {"0": "M\nRI"}
        folder.description["labels"] = {"0": "background", "1": "a\x1b[31m", "2": "b"}
        found = problems(folder.write())
        for text, what in zip(found, ("'modality'", "'labels'", "'name'"), strict=True):
            assert f"dataset.json: {what} is " in text
            assert text.isprintable()

    def test_byte_order_mark(self, folder):
        folder.case("c")
        file = folder.write() / "dataset.json"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert len(read_data_folder(folder.root).cases) == 1

    def test_everything_wrong_is_listed_at_once(self, folder):
        for name in "abcd":
            folder.case(name)
        (folder.root / "imagesTr/a.nii.gz").unlink()
        (folder.root / "labelsTr/b.nii.gz").unlink()
        folder.description["training"].append(folder.description["training"][2])
        folder.description["numTraining"] += 1
        folder.description["labels"] = {"0": "background", "2": "b"}
        del folder.description["modality"]
        found = problems(folder.write())
        expected = [
            "'modality' is missing",
            "'labels' is .* without a gap",
            r"training\[0\]\.image is \./imagesTr/a\.nii\.gz, missing",
            r"training\[1\]\.label is \./labelsTr/b\.nii\.gz, missing",
            r"training\[4\] is c, listed twice",
        ]
        assert len(found) == len(expected)
        for text, pattern in zip(found, expected, strict=True):
            assert re.match(rf"{re.escape(str(folder.root))}/dataset\.json: {pattern}", text)
            assert "Fix: " in text

    @pytest.mark.parametrize(
        "image",
        [5, None, "", ".nii.gz", "imagesTr/c\0.nii.gz", ["x"], "imagesTr/a\nb.nii.gz",
         "imagesTr/ c.nii.gz", "\ud800"],
    )  # fmt: skip
    def test_no_path(self, folder, image):
        folder.case("c")
        folder.description["training"][0]["image"] = image
        (text,) = problems(folder.write())
        assert "must be the path of a file" in text

    def test_a_link_to_itself(self, folder):
        folder.case("c")
        image = folder.root / "imagesTr/c.nii.gz"
        image.unlink()
        image.symlink_to("c.nii.gz")
        (text,) = problems(folder.write())
        assert "link" in text

    def test_image_is_label(self, folder):
        folder.case("c")
        folder.description["training"][0]["image"] = "labelsTr/c.nii.gz"
        (text,) = problems(folder.write())
        assert "same file" in text

    def test_training_case_in_test(self, folder):
        folder.case("c")
        folder.description.update(test=["imagesTr/c.nii.gz"], numTest=1)
        (text,) = problems(folder.write())
        assert "test[0] is c, listed twice (also training[0])" in text

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "empty"),
            ('{"training": [', "bad at line 1, column 15"),
            ("[1]", "JSON is a list, must be an object"),
            ("[" * 100_000 + "]" * 100_000, "nested"),
            ('{"training": ' + "[" * 50 + "]" * 50 + "}", "nested"),
            ('{"training": [1], "training": []}', "holding training twice"),
            ('{"numTraining": ' + "9" * 5000 + "}", "4300 digits"),
            (" " * 2**22 + "{}", "at most 4194304 (the limit)"),
        ],
        ids=["empty", "truncated", "list", "deep", "less deep", "repeated key", "number", "large"],
    )
    def test_bad_json(self, folder, content, words):
        (folder.write() / "dataset.json").write_text(content)
        (text,) = problems(folder.root)
        assert text.startswith(f"{folder.root}/dataset.json: ")
        assert words in text
        assert text.count("Fix: ") == 1

    @pytest.mark.parametrize("target", ["nope", "dataset.json", "../dataset.json"])
    def test_a_description_that_is_a_link(self, folder, target):
        """A folder with labels never becomes a plain one without."""
        folder.case("c")
        (folder.write() / "dataset.json").rename(folder.root.parent / "dataset.json")
        (folder.root / "dataset.json").symlink_to(target)
        (text,) = problems(folder.root)
        assert text.startswith(f"{folder.root}/dataset.json: file is ")

    def test_a_description_that_is_a_pipe(self, folder):
        folder.root.mkdir()
        os.mkfifo(folder.root / "dataset.json")  # opening it would wait for ever
        (text,) = problems(folder.root)
        assert "a regular file" in text

    def test_too_many_cases(self, folder, monkeypatch):
        monkeypatch.setattr(decathlon, "MAX_CASES", 2)
        for name in "abc":
            folder.case(name)
        (text,) = problems(folder.write())
        assert "number of cases is 3, must be at most 2 (the limit)" in text

    def test_a_label_that_no_label_map_can_hold(self, folder):
        folder.case("c")
        folder.description["labels"] = {"background": 0, "a": [1, 256], "b": 1}
        (text,) = problems(folder.write())
        assert "must be in 0..255" in text

    def test_odd_but_usable(self, folder):
        folder.case("c")
        folder.case("d")
        first, second = folder.description["training"]
        first["label"], second["label"] = second["label"], first["label"]
        folder.description["numTraining"] = 9
        with pytest.warns(InputWarning) as caught:
            assert len(read_data_folder(folder.write()).cases) == 2
        texts = [str(item.message) for item in caught]
        assert len(texts) == 3
        assert "'numTraining' is 9, but 2 are listed" in texts[0]
        assert "the label of c is d.nii.gz" in texts[1]


class TestConfinement:
    """Nothing outside the data folder is opened, links only with `allow_root`."""

    @pytest.fixture
    def outside(self, folder):
        """A sound image in a folder beside the data folder."""
        folder.case("c")
        folder.save("../store/secret.nii.gz", np.ones((4, 4, 4)))
        (folder.root / "imagesTr/link.nii.gz").symlink_to("../../store/secret.nii.gz")
        (folder.root / "imagesTr/chain.nii.gz").symlink_to("link.nii.gz")
        (folder.root / "store").symlink_to("../store")
        (folder.root / "imagesTr/inside.nii.gz").symlink_to("c.nii.gz")
        return folder.root.parent / "store"

    def point_to(self, folder, image: str) -> Path:
        folder.description["training"][0] = {
            "image": image.replace("STORE", str(folder.root.parent / "store"))
        }
        return folder.write()

    WRITTEN = ("../store/secret.nii.gz", "imagesTr/../../store/secret.nii.gz",
               "STORE/secret.nii.gz", "file://STORE/secret.nii.gz")  # fmt: skip
    LINKS = ("imagesTr/link.nii.gz", "imagesTr/chain.nii.gz", "store/secret.nii.gz")

    @pytest.mark.parametrize("image", [*WRITTEN, *LINKS])
    def test_refused_and_not_opened(self, folder, outside, opened, image):
        root = self.point_to(folder, image)
        opened.clear()
        (error,) = check_data_folder(root).errors
        assert "not outside" in str(error)
        assert [path for path in opened if path.startswith(str(folder.root.parent))] == [
            str(root / "dataset.json")
        ]

    @pytest.mark.parametrize("image", LINKS)
    def test_links_into_an_allowed_folder(self, folder, outside, image):
        root = self.point_to(folder, image)
        assert read_data_folder(root, outside).cases == (
            Case(Path(image).name[:-7], (root / image,)),
        )
        with pytest.raises(InputErrors, match="not outside"):
            read_data_folder(root, folder.root.parent / "other")

    @pytest.mark.parametrize("image", WRITTEN)
    def test_an_allowed_folder_is_for_links_alone(self, folder, outside, image):
        with pytest.raises(InputErrors, match="not outside"):
            read_data_folder(self.point_to(folder, image), outside)

    def test_a_link_that_stays_inside(self, folder, outside):
        assert len(read_data_folder(self.point_to(folder, "imagesTr/inside.nii.gz")).cases) == 1

    def test_a_data_folder_reached_by_a_link(self, folder, tmp_path):
        folder.case("c")
        (tmp_path / "alias").symlink_to(folder.write())
        assert len(read_data_folder(tmp_path / "alias").cases) == 1


class TestNnunet:
    @pytest.fixture
    def root(self, tmp_path):
        for file in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a", "imagesTs/t_0000",
                     "imagesTs/t_0001", "imagesTr/._a_0000"):  # fmt: skip
            path = tmp_path / f"{file}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        self.describe(tmp_path, {"background": 0, "b": 2, "a": 1})
        return tmp_path

    def describe(self, root: Path, labels) -> None:
        description = {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": labels,
            "numTraining": 1,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(description))

    def test_a_sound_folder(self, root):
        found = read_data_folder(root)
        train = tuple(root / f"imagesTr/a_000{i}.nii.gz" for i in range(2))
        test = tuple(root / f"imagesTs/t_000{i}.nii.gz" for i in range(2))
        assert found.modalities == ("T1", "T2")
        assert found.regions == Regions.exclusive(["a", "b"])
        assert found.cases == (Case("a", train, root / "labelsTr/a.nii.gz"),)
        assert found.test_cases == (Case("t", test),)

    def test_nested_regions(self, root):
        labels = {"background": 0, "core": [2, 3], "whole": [1, 2, 3], "enhancing": 3}
        self.describe(root, labels)
        assert read_data_folder(root).regions == Regions(
            ("whole", "core", "enhancing"), ((1, 2, 3), (2, 3), (3,)), nested=True
        )

    def test_names_of_modalities(self, root):
        found = read_data_folder(root)
        found.check_modalities(("t1", "T2"), "RUN")
        with pytest.raises(InputError, match="modalities is T1, T2, must be T2, T1, as in RUN"):
            found.check_modalities(("T2", "T1"), "RUN")

    def test_regions_that_are_chosen(self, root):
        self.describe(root, {"background": 0, "a": 1, "b": 2, "d": 4})
        assert "without a gap" in problems(root)[0]
        found = read_data_folder(root, regions=Regions.parse("whole=1,2,4;core=4"))
        assert found.regions == Regions(("whole", "core"), ((1, 2, 4), (4,)), nested=True)
        assert found.labels == (0, 1, 2, 4)

    def test_labels_that_no_label_map_can_hold(self, root):
        """As uint8, 1041 would be 17: another label, of those to segment."""
        self.describe(root, {"background": 0, "hippocampus": 17, "cortex": 1041})
        with pytest.raises(InputErrors, match=r"'labels' is .*1041.*, must be in 0\.\.255"):
            read_data_folder(root, regions=Regions.parse("HC=17"))

    def test_images_alone(self, root):
        """Labels do not matter: neither what is declared nor which are there."""
        self.describe(root, {"background": 0, "a": 1, "d": 4, "ignore": 5})
        (root / "labelsTr/a.nii.gz").unlink()
        found = read_data_folder(root, images_only=True)
        assert [(case.name, case.label) for case in found.cases] == [("a", None)]
        assert (found.regions, found.labels) == (None, ())
        with pytest.raises(InputError, match="modalities is T1, T2, must be T2, T1"):
            found.check_modalities(("T2", "T1"), "RUN")

    def test_a_label_of_voxels_to_ignore(self, root):
        self.describe(root, {"background": 0, "core": 1, "ignore": 2})
        (text,) = problems(root)
        assert "must be without 'ignore'" in text

    def test_regions_that_are_not_nested(self, root):
        self.describe(root, {"background": 0, "whole": [1, 2], "other": [3, 4]})
        (text,) = problems(root)
        assert "'labels' is (3, 4) for region other, must be a proper part of (1, 2)" in text

    def test_one_mistake_is_told_once(self, root):
        description = json.loads((root / "dataset.json").read_text())
        description["channel_names"] = ["T1", "T2"]
        (root / "dataset.json").write_text(json.dumps(description))
        (text,) = problems(root)
        assert "'channel_names' is" in text

    def test_no_ending_is_told(self, root):
        description = json.loads((root / "dataset.json").read_text())
        del description["file_ending"]
        (root / "dataset.json").write_text(json.dumps(description))
        (text,) = problems(root)
        assert "Fix: add 'file_ending'" in text

    def test_files_of_another_ending(self, root):
        for file in ("imagesTr/c_0000", "imagesTr/c_0001", "labelsTr/c"):
            (root / f"{file}.nii").touch()
        with pytest.warns(InputWarning) as caught:
            assert [case.name for case in read_data_folder(root).cases] == ["a"]
        texts = [str(item.message) for item in caught]
        assert len(texts) == 2
        assert "imagesTr: 2 images are left out, such as 'c_0000.nii': names have to" in texts[0]
        assert "labelsTr: 1 images are left out, such as 'c.nii'" in texts[1]

    def test_missing_partners(self, root):
        (root / "labelsTr/b.nii.gz").touch()
        (root / "imagesTr/c_0000.nii.gz").touch()
        (root / "imagesTr/c_0001.nii.gz").touch()
        (root / "imagesTr/a_0001.nii.gz").unlink()
        (root / "imagesTr/odd.nii.gz").touch()
        text = "\n".join(problems(root))
        assert "case a in imagesTr is of the channels [0], must be of the channels [0, 1]" in text
        assert "case b is in labelsTr only" in text
        assert "case c is in imagesTr only" in text
        assert "case a is in labelsTr only" not in text  # its images are there, but one
        assert "imagesTr/odd.nii.gz is without channel number" in text


class TestBrats:
    OLD = ("_", ("flair", "t1", "t1ce", "t2"), "brats_124", (0, 1, 2, 4))
    NEW = ("-", ("t2f", "t1n", "t1c", "t2w"), "brats_123", (0, 1, 2, 3))

    def case(self, folder: Path, separator: str, endings, labelled: bool = True) -> None:
        folder.mkdir(parents=True)
        for ending in (*endings, *["seg"] * labelled):
            (folder / f"{folder.name}{separator}{ending}.nii.gz").touch()

    @pytest.mark.parametrize("form", [OLD, NEW], ids=["2020", "2023"])
    @pytest.mark.parametrize("by_grade", [False, True])
    def test_a_folder_per_case(self, tmp_path, form, by_grade):
        separator, endings, preset, labels = form
        self.case(tmp_path / ("HGG" * by_grade) / "b", separator, endings, labelled=False)
        self.case(tmp_path / ("LGG" * by_grade) / "a", separator, endings)
        (tmp_path / "survival.csv").touch()
        found = read_data_folder(tmp_path)
        assert (found.name, found.labels) == ("BraTS", labels)
        assert found.regions == Regions.parse(preset)
        assert found.modalities == ("FLAIR", "T1w", "T1Gd", "T2w")
        a, b = found.cases
        assert [path.name for path in a.images] == [f"a{separator}{e}.nii.gz" for e in endings]
        assert a.label.name == f"a{separator}seg.nii.gz"
        assert (b.name, b.label) == ("b", None)
        images = read_data_folder(tmp_path, images_only=True)
        assert images.cases == (a.without_label(), b)
        assert (images.regions, images.labels) == (None, ())

    def test_everything_wrong_is_listed_at_once(self, tmp_path):
        separator, endings, *_ = self.OLD
        for folder in ("a", "b", "c", "x/c"):
            self.case(tmp_path / folder, separator, endings)
        (tmp_path / "a/a_t1.nii.gz").unlink()
        (tmp_path / "b/b_seg.nii.gz").unlink()
        (tmp_path / "b/b_seg.nii.gz").symlink_to("/etc/hosts")
        texts = problems(tmp_path)
        assert len(texts) == 3
        assert f"{tmp_path}: case c is there twice" in texts[0]
        assert f"{tmp_path}/a: modality is t1 missing" in texts[1]
        assert "b_seg.nii.gz is a link to a file outside" in texts[2]
        with pytest.raises(InputErrors, match="--regions: labels is 3, must be among"):
            read_data_folder(tmp_path, regions=Regions.parse("brats_msd"))

    def test_images_beside_folders_are_a_plain_folder(self, tmp_path):
        self.case(tmp_path / "a", *self.OLD[:2])
        (tmp_path / "b.nii.gz").touch()
        assert [case.name for case in read_data_folder(tmp_path).cases] == ["b"]
        # It does not say what is segmented, whatever is asked for.
        assert read_data_folder(tmp_path, regions=Regions.parse("brats_msd")).regions is None

    def test_label_maps_beside_plain_images(self, tmp_path):
        for name in ("a", "a_seg", "b_0000", "b_0001", "c_seg", "a_mask1"):
            (tmp_path / f"{name}.nii.gz").touch()
        with pytest.warns(InputWarning, match=": 1 files look like .* a_seg of a,"):
            scan_data_folder(tmp_path)
        (tmp_path / "a_seg.nii.gz").rename(tmp_path / "b-label.nii.gz")
        with pytest.warns(InputWarning, match=": 1 files look like .* b-label of b,"):
            scan_data_folder(tmp_path)

    def test_folders_elsewhere_are_not_looked_into(self, tmp_path):
        self.case(tmp_path / "elsewhere/a", *self.OLD[:2])
        (tmp_path / "root").mkdir()
        (tmp_path / "root/a").symlink_to(tmp_path / "elsewhere/a")
        assert "a is a link to a file outside" in problems(tmp_path / "root")[0]
        self.case(tmp_path / "root/b", *self.OLD[:2])
        with pytest.warns(InputWarning, match="root/a: leads out of the data folder"):
            assert [case.name for case in read_data_folder(tmp_path / "root").cases] == ["b"]
        found = read_data_folder(tmp_path / "root", allow_root=tmp_path / "elsewhere")
        assert [case.name for case in found.cases] == ["a", "b"]

    def test_no_case_and_no_label_is_lost(self, tmp_path):
        """BraTS 2020 has a label of another name; a folder without FLAIR is a case too."""
        for name in ("355", "x"):
            self.case(tmp_path / name, *self.OLD[:2])
        (tmp_path / "355/355_seg.nii.gz").rename(tmp_path / "355/W39_1998.09.19_Segm.nii")
        self.case(tmp_path / "unlabelled", *self.OLD[:2], labelled=False)
        (tmp_path / "unlabelled/unlabelled_brainmask.nii.gz").touch()  # nobody's concern
        (tmp_path / "x/x_flair.nii.gz").unlink()
        texts = problems(tmp_path)
        assert len(texts) == 2
        assert "W39_1998.09.19_Segm.nii: name is that of a label but" in texts[0]
        assert "must be 355_seg.nii. Fix" in texts[0]
        assert f"{tmp_path}/x: modality is flair missing" in texts[1]

    @pytest.mark.parametrize("name", ["b_fixed", "B"])
    def test_a_folder_of_another_name_than_its_files(self, tmp_path, name):
        self.case(tmp_path / "a", *self.OLD[:2])
        self.case(tmp_path / "b", *self.OLD[:2])
        (tmp_path / "b").rename(tmp_path / name)
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks/brain.nii.gz").touch()  # nobody's concern
        (text,) = problems(tmp_path)
        assert text.startswith(f"{tmp_path}/{name}/b_flair.nii.gz: name is that of another case")
        assert f"must be {name}_ and an ending. Fix: rename" in text

    @pytest.mark.parametrize("ending", ["seg", "t1"])
    def test_a_file_there_twice(self, tmp_path, ending):
        self.case(tmp_path / "a", *self.OLD[:2])
        (tmp_path / f"a/a_{ending}.nii").touch()
        (text,) = problems(tmp_path)
        assert f"a: file is there as a_{ending}.nii.gz and a_{ending}.nii, must be" in text

    def test_cases_of_two_years(self, tmp_path):
        self.case(tmp_path / "a", *self.OLD[:2])
        self.case(tmp_path / "b", *self.NEW[:2])
        assert "names of files is CASE_flair and CASE-t2f" in problems(tmp_path)[0]

    def test_scans_of_a_patient_are_one_subject(self, tmp_path):
        for name in ("BraTS-GLI-00008-000", "BraTS-GLI-00008-001", "BraTS-GLI-00009-000"):
            self.case(tmp_path / name, *self.NEW[:2])
        found = read_data_folder(tmp_path)
        subjects = [subject_of(case.name, found.subject_regex) for case in found.cases]
        assert subjects == ["BraTS-GLI-00008", "BraTS-GLI-00008", "BraTS-GLI-00009"]
        for name in ("other", "sub-001", "sub-002"):
            assert subject_of(name, found.subject_regex) == name

    def test_the_modalities_are_those_of_the_decathlon(self, tmp_path):
        self.case(tmp_path / "a", *self.NEW[:2])
        read_data_folder(tmp_path).check_modalities(("FLAIR", "T1w", "t1gd", "T2w"), "RUN")


class TestPlain:
    def touch(self, root: Path, *names: str) -> None:
        for name in names:
            (root / name).touch()

    def test_one_file_per_case(self, tmp_path):
        self.touch(tmp_path, "b_2021.nii.gz", "b_2022.nii.gz", "a.nii", "notes.txt", "._a.nii")
        found = read_data_folder(tmp_path)
        assert [case.name for case in found.cases] == ["a", "b_2021", "b_2022"]
        assert found.regions is None
        assert all(case.label is None for case in found.cases)

    def test_one_file_per_modality(self, tmp_path):
        self.touch(tmp_path, *(f"{c}_000{i}.nii.gz" for c in "ab" for i in range(2)))
        found = read_data_folder(tmp_path)
        assert [len(case.images) for case in found.cases] == [2, 2]
        assert len(found.modalities) == 2
        found.check_modalities(("T1", "T2"), "RUN")
        with pytest.raises(InputError, match="files per case is 2, must be 3, one for each of"):
            found.check_modalities(("T1", "T2", "T3"), "RUN")

    @pytest.mark.parametrize("channels", ["0", "02", "013"])
    def test_other_modalities(self, tmp_path, channels):
        """Not only their number counts: the third would be taken for the second."""
        self.touch(tmp_path, *(f"a_000{i}.nii.gz" for i in "01"))
        self.touch(tmp_path, *(f"b_000{i}.nii.gz" for i in channels))
        texts = problems(tmp_path)
        found = ", ".join(channels)
        assert any(f"case b is of the channels [{found}], must be" in text for text in texts)

    def test_cases_that_count_like_channels(self, tmp_path):
        self.touch(tmp_path, *(f"patient_000{i}.nii.gz" for i in (0, 1, 3)))
        (text,) = problems(tmp_path)
        assert "rename files that are no channels of patient" in text

    def test_one_name_twice(self, tmp_path):
        self.touch(tmp_path, "a.nii", "a.nii.gz")
        (text,) = problems(tmp_path)
        assert "case a is there as a.nii and a.nii.gz, must be one file" in text

    def test_label_map_beside_channels(self, tmp_path):
        self.touch(tmp_path, "a.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")
        (text,) = problems(tmp_path)
        assert "case a is there as a.nii.gz and a_0000.nii.gz, must be one file" in text

    def test_link_to_a_file_outside(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        self.touch(tmp_path, "secret.nii.gz")
        self.touch(root, "a.nii.gz")
        (root / "b.nii.gz").symlink_to("../secret.nii.gz")
        (text,) = problems(root)
        assert "b.nii.gz is a link to a file outside" in text

    def test_a_link_to_an_allowed_folder(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        self.touch(tmp_path, "kept.nii.gz")
        (root / "b.nii.gz").symlink_to("../kept.nii.gz")
        assert [case.name for case in read_data_folder(root, tmp_path).cases] == ["b"]

    @pytest.mark.parametrize(
        "name", ["a\nb", "a\x1b[31m", " a", b"\xff".decode(errors="surrogateescape")]
    )
    def test_a_name_that_no_list_of_cases_holds(self, tmp_path, name):
        self.touch(tmp_path, f"{name}.nii.gz")
        (text,) = problems(tmp_path)
        assert "file name is '" in text
        assert text.isprintable()

    def test_a_suffix_in_capitals(self, tmp_path):
        self.touch(tmp_path, "a.nii.gz", "b.NII.GZ", "._c.NII")
        with pytest.warns(InputWarning, match="1 images are left out, such as 'b.NII.GZ'"):
            assert [case.name for case in read_data_folder(tmp_path).cases] == ["a"]

    def test_nothing_there(self, tmp_path):
        assert "without images" in problems(tmp_path)[0]
        assert "data folder is missing" in problems(tmp_path / "nope")[0]
