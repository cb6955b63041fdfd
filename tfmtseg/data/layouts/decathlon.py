"""The layout of the Medical Segmentation Decathlon: `dataset.json` lists the files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tfmtseg.data.cases import Case, DataFolder, by_name
from tfmtseg.data.layouts.dataset_json import (
    PRINTABLE,
    Description,
    read_name,
    read_numbered,
    read_regions,
    shown_value,
)
from tfmtseg.data.layouts.root import DataRoot, is_proper_name, stem_of
from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.regions import Regions

MAX_CASES = 50_000


def scan(
    root: DataRoot, description: Description, regions: Regions | None, images_only: bool
) -> DataFolder:
    """The folder with its sound cases; what is wrong with others is noted in `description`."""
    modalities = read_numbered(description, "modality")
    regions, labels = read_regions(description, regions, images_only)
    training = description.entry("training", list, "a list of cases with an image and a label")
    test = description.content.get("test", [])
    if not isinstance(test, list):
        description.problem(
            "'test'", shown_value(test), "a list of images", "correct the entry 'test'"
        )
        test = []
    if training:
        _warn_about_count(description, "numTraining", training)
    _warn_about_count(description, "numTest", test)
    if len(training) + len(test) > MAX_CASES:
        description.problem(
            "number of cases", len(training) + len(test), f"at most {MAX_CASES} (the limit)",
            "split the data",
        )  # fmt: skip
        training = test = []
    entries = [
        (f"{key}[{i}]", _read_entry(root, description, f"{key}[{i}]", entry, images_only))
        for key, listed in (("training", training), ("test", test))
        for i, entry in enumerate(listed)
    ]
    cases = _unique_cases(description, [(where, case) for where, case in entries if case])
    _warn_about_swapped_labels(description, cases.values())
    return DataFolder(
        root.path,
        read_name(description),
        modalities,
        regions,
        labels,
        by_name(case for where, case in cases.items() if where.startswith("training")),
        by_name(case.without_label() for where, case in cases.items() if where.startswith("test")),
    )


def _read_entry(
    root: DataRoot, description: Description, where: str, entry: Any, images_only: bool
) -> Case | None:
    """One element of `training` or `test`: an object, or the image's path alone."""
    if not isinstance(entry, dict):
        entry = {"image": entry}
    image = _listed_file(root, description, f"{where}.image", entry.get("image"))
    label = None
    if entry.get("label") is not None and not images_only:
        label = _listed_file(root, description, f"{where}.label", entry["label"])
        if label is None:
            return None
    if image is None:
        return None
    if label is not None and label.resolve() == image.resolve():
        description.problem(
            where, entry["image"], "an image other than its label; both are the same file",
            "list the right files",
        )  # fmt: skip
        return None
    return Case(stem_of(image), (image,), label)


def _listed_file(root: DataRoot, description: Description, where: str, text: Any) -> Path | None:
    """The file that `text` names below `root`; `None` and a problem if it is none."""
    proper = isinstance(text, str) and text.isprintable() and is_proper_name(stem_of(Path(text)))
    if not proper:
        description.problem(
            where, shown_value(text), f"the path of a file, {PRINTABLE}", "correct the path"
        )
        return None
    path = root.path / text
    if "://" in text or not root.holds(path):
        description.problem(
            where, text, "a file in the data folder, not outside it",
            "copy the file into the folder, or allow links out of it with --allow_root",
        )  # fmt: skip
        return None
    try:
        path.stat()  # follows links
        if path.name.endswith(SUFFIXES):
            return path
        found = "no .nii.gz or .nii file"
    except FileNotFoundError:
        found = "missing"
    except OSError as error:
        found = f"no usable file or link ({error.strerror})"
    description.problem(
        where, f"{text}, {found}", "an existing NIfTI file",
        "add the file, or remove the entry from the list",
    )  # fmt: skip
    return None


def _unique_cases(description: Description, entries: Sequence[tuple[str, Case]]) -> dict[str, Case]:
    """Cases by their place in the file; a name that came before is a problem."""
    seen: dict[str, str] = {}
    result = {}
    for where, case in entries:
        if case.name in seen:
            description.problem(
                where, f"{case.name}, listed twice (also {seen[case.name]})",
                "a case with a name of its own", "remove or rename one of the two",
            )  # fmt: skip
        else:
            seen[case.name] = where
            result[where] = case
    return result


def _warn_about_count(description: Description, key: str, listed: Sequence[Any]) -> None:
    declared = description.content.get(key, len(listed))
    if declared != len(listed):
        description.warn(
            f"'{key}' is {shown_value(declared)}, but {len(listed)} are listed; the list is used"
        )


def _warn_about_swapped_labels(description: Description, cases: Iterable[Case]) -> None:
    cases = tuple(cases)
    names = {case.name for case in cases}
    for case in cases:
        if case.label and (stem := stem_of(case.label)) != case.name and stem in names:
            description.warn(
                f"the label of {case.name} is {case.label.name}, which looks like that of "
                "another case"
            )
