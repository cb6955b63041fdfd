"""The layout of BraTS: a folder of each case."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path

from tfmtseg.data.cases import Case, DataFolder, by_name, repeated
from tfmtseg.data.layouts.root import (
    DataRoot,
    link_outside,
    list_images,
    stem_of,
    usable_files,
    warn_about_other_images,
)
from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.regions import Regions


@dataclass(frozen=True)
class _Form:
    """How files are named, and labels numbered, in some years.

    Args:
        separator: Between the case's name and the rest.
        endings: Of the images, in the order of `_MODALITIES`.
        regions: The preset of `tfmtseg.regions`.
        labels: That may occur.
        subject_regex: What names the patient in a case's name.
    """

    separator: str
    endings: tuple[str, str, str, str]
    regions: str
    labels: tuple[int, ...]
    subject_regex: str = ""

    def find(self, folder: Path, ending: str) -> list[Path]:
        """A file of the case that a folder is named after: none, one, or one of each suffix."""
        names = [f"{folder.name}{self.separator}{ending}{suffix}" for suffix in SUFFIXES]
        paths = [folder / name for name in names]
        return [path for path in paths if path.is_symlink() or path.exists()]

    def is_of_another_case(self, path: Path) -> bool:
        """Whether a file is named like one of a case, but not of that of its folder."""
        endings = (f"{self.separator}{ending}" for ending in (*self.endings, "seg"))
        return stem_of(path).endswith(tuple(endings))


_MODALITIES = ("FLAIR", "T1w", "T1Gd", "T2w")  # names and order of the Decathlon
_FORMS = (
    _Form("_", ("flair", "t1", "t1ce", "t2"), "brats_124", (0, 1, 2, 4)),  # 2017 to 2021
    # 2023, whose names end in the number of the scan of a patient: BraTS-GLI-00000-000.
    _Form("-", ("t2f", "t1n", "t1c", "t2w"), "brats_123", (0, 1, 2, 3), r"^(.+-\d+(?=-\d{3}$)|.+)"),
)


def scan(
    root: DataRoot, regions: Regions | None, images_only: bool
) -> tuple[DataFolder | None, list[InputError]] | None:
    """A folder per case, perhaps in folders by grade; `None` if there is no such case."""
    inner = [path for path in root.path.iterdir() if path.is_dir()]
    inner += [path for outer in filter(root.holds, inner) for path in outer.iterdir()]
    folders = sorted(path for path in inner if path.is_dir())
    outside = [path for path in folders if not root.holds(path)]
    inner = [path for path in folders if root.holds(path)]
    by_form = {
        form: [path for path in inner if any(form.find(path, end) for end in form.endings)]
        for form in _FORMS
    }
    found = [form for form, folders in by_form.items() if folders]
    if not found:
        links = [link_outside(root.path, str(path.relative_to(root.path))) for path in outside]
        return (None, links) if links and not inner else None
    for path in outside:
        warnings.warn(
            f"{path}: leads out of the data folder and is left out; --allow_root takes it in.",
            InputWarning,
            stacklevel=2,
        )
    form, folders = found[0], by_form[found[0]]
    taken = set(itertools.chain(*by_form.values()))
    errors = [
        InputError(
            path, "name", "that of another case than of its folder",
            f"{folder.name}{form.separator} and an ending", "rename the folder, or its files",
        )
        for folder in inner
        if folder not in taken
        for path in [path for path in list_images(folder) if form.is_of_another_case(path)][:1]
    ]  # fmt: skip
    if len(found) > 1:
        errors.append(
            InputError(
                root.path, "names of files",
                " and ".join(f"CASE{f.separator}{f.endings[0]}" for f in found),
                "of one year", "keep each year's cases in a folder of their own",
            )
        )  # fmt: skip
    errors += [
        InputError(
            root.path, f"case {name}", "there twice", "of a name of its own", "rename one"
        )
        for name in repeated([folder.name for folder in folders])
    ]  # fmt: skip
    regions = regions or Regions.parse(form.regions)
    if unknown := regions.labels_beside(form.labels):
        errors.append(
            InputError(
                "--regions", "labels", ", ".join(map(str, unknown)),
                f"among those of BraTS here, {form.labels}",
                f"leave it out, which is {form.regions}, or declare labels in a dataset.json of "
                "nnU-Net's layout",
            )
        )  # fmt: skip
    cases = []
    for folder in folders:
        images = {ending: form.find(folder, ending) for ending in form.endings}
        labels = [] if images_only else form.find(folder, "seg")
        paths = [*images.values(), labels]
        missing = [ending for ending, files in images.items() if not files]
        if not labels and not images_only:
            errors += [
                InputError(
                    path, "name", "that of a label but for its beginning",
                    f"{folder.name}{form.separator}seg{path.name.removeprefix(stem_of(path))}",
                    "rename the file, or take it away",
                )
                for path in list_images(folder)
                if "seg" in path.name.removeprefix(folder.name).casefold()
            ]  # fmt: skip
        files, refused = usable_files(root, itertools.chain(*paths))
        refused += [
            InputError(
                folder, "file", f"there as {one.name} and {other.name}", "there once",
                "remove one of the two",
            )
            for one, other in (pair for pair in paths if len(pair) == 2)
        ]  # fmt: skip
        errors += refused
        warn_about_other_images(folder, SUFFIXES)
        errors += [
            InputError(
                folder, "modality", f"{ending} missing", "there, as of the other cases",
                "add the file, or take the folder away",
            )
            for ending in missing
        ]  # fmt: skip
        if not missing and not refused:
            label = files[-1] if labels else None
            cases.append(Case(folder.name, tuple(files[: len(images)]), label))
    return (
        DataFolder(
            root.path,
            "BraTS",
            _MODALITIES,
            None if images_only else regions,
            () if images_only else form.labels,
            by_name(cases),
            subject_regex=form.subject_regex,
        ),
        errors,
    )
