"""nnU-Net's layout: `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

import re
from pathlib import Path

from tfmtseg.data.cases import Case, DataFolder, by_name
from tfmtseg.data.layouts.dataset_json import (
    Description,
    read_name,
    read_numbered,
    read_regions,
    shown_value,
)
from tfmtseg.data.layouts.root import (
    DataRoot,
    list_images,
    stem_of,
    usable_files,
    warn_about_other_images,
)
from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.regions import Regions

MODALITY_FILE = re.compile(r"(.+)_(\d{4})")  # CASE_0000, without the suffix


def scan(
    root: DataRoot, description: Description, regions: Regions | None, images_only: bool
) -> DataFolder:
    """The folder with its sound cases; what is wrong with others is noted in `description`."""
    modalities = read_numbered(description, "channel_names")
    regions, labels = read_regions(description, regions, images_only)
    suffix = description.content.get("file_ending")
    if suffix not in SUFFIXES:
        fix = "convert the files to NIfTI"
        if suffix is None:
            fix = "add 'file_ending', the end of the files' names"
        description.problem("'file_ending'", shown_value(suffix), "'.nii.gz' or '.nii'", fix)
        return DataFolder(root.path, "", modalities, regions, labels, ())
    if not modalities:  # which has been told; the files cannot be grouped
        return DataFolder(root.path, "", modalities, regions, labels, ())
    images = _group_modalities(root, description, "imagesTr", suffix, len(modalities))
    label_maps: dict[str, Path] = {}
    unpaired: set[str] = set()
    if not images_only:
        label_maps = _files_by_stem(root, description, "labelsTr", suffix)
        unpaired = set(images) ^ set(label_maps)
    for name in sorted(unpaired):
        here, there = ("imagesTr", "labelsTr") if name in images else ("labelsTr", "imagesTr")
        description.problem(
            f"case {name}", f"in {here} only", f"in {there} too",
            "add its partner, or take it out (images without labels go to a folder of their own)",
        )  # fmt: skip
    test = _group_modalities(root, description, "imagesTs", suffix, len(modalities))
    for name in sorted(set(images) & set(test)):
        description.problem(
            f"case {name}", "in imagesTr and imagesTs", "in one of them", "remove or rename one"
        )
    cases = [
        Case(name, files, label_maps.get(name))
        for name, files in images.items()
        if files and name not in unpaired
    ]
    if not images:
        description.problem("imagesTr", "without images", "a folder with images", "add images")
    return DataFolder(
        root.path,
        read_name(description),
        modalities,
        regions,
        labels,
        by_name(cases),
        by_name(Case(name, files) for name, files in test.items() if files),
    )


def _files_by_stem(
    root: DataRoot, description: Description, folder: str, suffix: str
) -> dict[str, Path]:
    """The NIfTI files of a folder that may be read, by name without suffix."""
    files, errors = usable_files(root, list_images(root.path / folder, (suffix,)))
    description.errors.extend(errors)
    warn_about_other_images(root.path / folder, (suffix,))
    return {stem_of(path): path for path in files}


def _group_modalities(
    root: DataRoot, description: Description, folder: str, suffix: str, num_modalities: int
) -> dict[str, tuple[Path, ...]]:
    """The files `CASE_0000`, `CASE_0001`, ... of a folder by case; none if one is missing."""
    groups: dict[str, dict[int, Path]] = {}
    for stem, path in _files_by_stem(root, description, folder, suffix).items():
        match = MODALITY_FILE.fullmatch(stem)
        if match:
            groups.setdefault(match[1], {})[int(match[2])] = path
        else:
            description.problem(
                f"{folder}/{path.name}", "without channel number", f"like CASE_0000{suffix}",
                "rename the file",
            )  # fmt: skip
    result: dict[str, tuple[Path, ...]] = {}
    for name, files in groups.items():
        if sorted(files) == list(range(num_modalities)):
            result[name] = tuple(files[number] for number in sorted(files))
        else:
            result[name] = ()
            description.problem(
                f"case {name} in {folder}", f"of the channels {sorted(files)}",
                f"of the channels {list(range(num_modalities))}", "add the missing channel's file",
            )  # fmt: skip
    return result
