"""Data folders to cases: which files belong together, and what their labels mean.

Four layouts are told apart by what lies in the folder:

* Medical Segmentation Decathlon: a `dataset.json` with `modality` and `training`;
* nnU-Net: a `dataset.json` with `channel_names`, and `imagesTr/CASE_0000.nii.gz`;
* BraTS: a folder of each case, with `CASE/CASE_flair.nii.gz` and so on, and
  `CASE/CASE_seg.nii.gz` where it has a label; or with the names of 2023, `CASE-t2f.nii.gz`;
* plain: NIfTI images and no `dataset.json`; none has a label.

Only names and `dataset.json` are looked at here; no image is opened. What they name
is not trusted: files outside of the data folder are refused.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from tfmtseg.data.cases import DataFolder
from tfmtseg.data.layouts import brats, decathlon, nnunet, plain
from tfmtseg.data.layouts.dataset_json import Description, read_json
from tfmtseg.data.layouts.root import DataRoot, list_images
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.regions import Regions


def read_data_folder(
    root: str | os.PathLike[str],
    allow_root: str | os.PathLike[str] | None = None,
    regions: Regions | None = None,
    images_only: bool = False,
) -> DataFolder:
    """Reads the structure of a data folder.

    Args:
        root: The folder.
        allow_root: Another folder that links in it may lead into.
        regions: What is segmented, of labels that `dataset.json` declares. By default each
            label by itself, or the regions it declares.
        images_only: Whether labels do not matter: no case has one then, whatever is declared
            and whichever are missing.

    Raises:
        InputErrors: With everything that is wrong with the structure.

    Warns:
        InputWarning: If something is odd but clear enough to go on.
    """
    folder, errors = scan_data_folder(root, allow_root, regions, images_only)
    if folder is None or errors:
        raise InputErrors(errors)
    return folder


def peek_data_folder(
    root: str | os.PathLike[str], allow_root: str | os.PathLike[str] | None = None
) -> DataFolder:
    """What is sound of a data folder, for its name; whoever reads it is told of the rest.

    Raises:
        InputErrors: If there is nothing to go on with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        folder, errors = scan_data_folder(root, allow_root)
    if folder is None:
        raise InputErrors(errors)
    return folder


def scan_data_folder(
    root: str | os.PathLike[str],
    allow_root: str | os.PathLike[str] | None = None,
    regions: Regions | None = None,
    images_only: bool = False,
) -> tuple[DataFolder | None, list[InputError]]:
    """Like `read_data_folder`, but returns what is sound beside what is not.

    Returns:
        The folder with its sound cases (`None` if there is nothing to go on with)
        and the problems.
    """
    data_root = DataRoot(Path(root), Path(allow_root) if allow_root else None)
    try:
        if not data_root.path.is_dir():
            raise InputError(
                data_root.path, "data folder", "missing", "a folder", "correct the path"
            )
        description_file = data_root.path / "dataset.json"
        if not (description_file.is_symlink() or description_file.exists()):
            # With images at the top it is plain, whatever lies beside them.
            if not list_images(data_root.path) and (
                found := brats.scan(data_root, regions, images_only)
            ):
                return found
            return plain.scan(data_root)
        description = Description(description_file, read_json(data_root, description_file))
        layout = nnunet if "channel_names" in description.content else decathlon
        return layout.scan(data_root, description, regions, images_only), description.errors
    except InputError as error:
        return None, [error]
    except OSError as error:
        where = error.filename or data_root.path
        return None, [
            InputError(
                where, "folder", f"unreadable ({error.strerror})", "readable",
                "check its permissions, its links and the disk",
            )
        ]  # fmt: skip
