"""The plain layout: images side by side, and no `dataset.json`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from tfmtseg.data.cases import Case, DataFolder, by_name
from tfmtseg.data.layouts.nnunet import MODALITY_FILE
from tfmtseg.data.layouts.root import (
    DataRoot,
    list_images,
    stem_of,
    usable_files,
    warn_about_other_images,
)
from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.errors import InputError, InputWarning

_MASK_FILE = re.compile(r"(.+?)[_-](?:seg|segmentation|label|labels|mask|gt)", re.IGNORECASE)


def scan(root: DataRoot) -> tuple[DataFolder | None, list[InputError]]:
    """Images side by side; `CASE_0000`, `CASE_0001`, ... are one case's modalities."""
    files, errors = usable_files(root, list_images(root.path))
    warn_about_other_images(root.path, SUFFIXES)
    if not files and not errors:
        raise InputError(
            root.path, "data folder", "without dataset.json and without images",
            "of the Decathlon's or nnU-Net's layout, or full of .nii.gz images",
            "correct the path, or add the dataset.json",
        )  # fmt: skip
    stems = [stem_of(path) for path in files]
    known = set(stems)
    groups: dict[str, dict[int, Path]] = {}  # by the number of the channel
    for stem, path in zip(stems, files, strict=True):
        match = MODALITY_FILE.fullmatch(stem)
        if match and f"{match[1]}_0000" in known:
            name, channel = match[1], int(match[2])
        else:
            name, channel = stem, 0
        group = groups.setdefault(name, {})
        if channel in group:
            errors.append(
                InputError(
                    root.path, f"case {name}", f"there as {group[channel].name} and {path.name}",
                    "one file", "remove one of the two, or rename it",
                )
            )  # fmt: skip
        group[channel] = path
    masks = [
        (stem, found[1])
        for stem in stems
        if (found := _MASK_FILE.fullmatch(stem)) and known & {found[1], f"{found[1]}_0000"}
    ]
    if masks:
        warnings.warn(
            f"{root.path}: {len(masks)} files look like label maps, such as {masks[0][0]} of "
            f"{masks[0][1]}, but without a dataset.json every file counts as an image. Move label "
            "maps elsewhere.",
            InputWarning,
            stacklevel=2,
        )
    most = 1 + max((max(group) for group in groups.values()), default=0)
    errors += [
        InputError(
            root.path, f"case {name}", f"of the channels {sorted(group)}",
            f"of the channels {list(range(most))}, like the other cases",
            f"add the missing channel's file, or rename files that are no channels of {name}",
        )
        for name, group in groups.items()
        if sorted(group) != list(range(most))
    ]  # fmt: skip
    modalities = tuple(f"channel {i}" for i in range(most)) if most > 1 else ()
    cases = by_name(
        Case(name, tuple(group[number] for number in sorted(group)))
        for name, group in groups.items()
    )
    return DataFolder(root.path, "", modalities, None, (), cases, plain=True), errors
