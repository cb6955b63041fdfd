"""All that is wrong with a data folder, found before any training starts."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tfmtseg.data.cases import Case
from tfmtseg.data.folder import scan_data_folder
from tfmtseg.data.nifti import Volume, read_geometry, read_image, read_label, size_text
from tfmtseg.data.preprocess import normalize
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.regions import Regions

ODD_SPACING = 2.0  # times the median, or its inverse


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Args:
        num_cases: Cases looked at.
        errors: What keeps a case, or the folder, from being used.
        warnings: What is used although it is odd; each text starts with a path.
        images_only: Whether it is a plain folder, which serves for further images and
            predictions, but not as the data folder of a training.
    """

    num_cases: int
    errors: tuple[InputError, ...]
    warnings: tuple[str, ...]
    images_only: bool = False


@dataclass
class _Facts:
    """What of a case is compared with the other cases."""

    case: Case
    channels: int | None = None
    image_hash: str | None = None
    spacing_mm: tuple[float, float, float] | None = None


def check_data_folder(
    root: str | os.PathLike[str],
    *,
    regions: Regions | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> Findings:
    """Reads every image and every label of a data folder, and writes nothing.

    Every file goes the way it goes before a training.

    Args:
        root: The data folder.
        regions: What will be segmented; by default what the folder declares.
        allow_root: Another folder that links in the data folder may lead into.

    Returns:
        All problems of the folder's structure and of all its files.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        folder, errors = scan_data_folder(root, allow_root, regions)
        cases = folder.cases + folder.test_cases if folder else ()
        num_modalities = len(folder.modalities) or None if folder else None
        labels = folder.labels if folder else ()
        facts: list[_Facts] = []
        for case in tqdm(cases, desc="Checking cases", unit="case"):
            facts.append(_check_case(case, num_modalities, labels, errors))
            # A plain folder does not say; its cases must be alike.
            num_modalities = num_modalities or facts[-1].channels
        _warn_about_copies(Path(root), facts)
        spacings = {str(f.case.images[0]): f.spacing_mm for f in facts if f.spacing_mm}
        if spacings:
            usual = np.median(np.array(list(spacings.values())), axis=0).tolist()
            warn_about_spacing(spacings, usual, "the data set's median")
    texts = [str(item.message) for item in caught if issubclass(item.category, InputWarning)]
    return Findings(len(cases), tuple(errors), tuple(texts), bool(folder and folder.plain))


def _check_case(
    case: Case, num_modalities: int | None, labels: Sequence[int], errors: list[InputError]
) -> _Facts:
    """Reads one case; adds what is wrong to `errors`."""
    facts = _Facts(case)
    volume: Volume | None = None
    try:
        volume = read_image(case.images, num_modalities=num_modalities)
        facts.channels = volume.voxels.shape[-1]
        facts.spacing_mm = volume.geometry.spacing_mm
        facts.image_hash = _hash(volume.voxels)
        normalize(volume.voxels, case.images[0])
    except InputError as error:
        errors.append(error)
    if case.label is not None and labels:
        try:
            # Beside a bad image, the label is still checked for itself.
            like = volume.geometry if volume else read_geometry(case.label)
            read_label(case.label, labels=labels, like=like, image=case.images[0])
        except InputError as error:
            errors.append(error)
    return facts


def _hash(voxels: np.ndarray) -> str:
    digest = hashlib.sha256(repr(voxels.shape).encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()


def _warn(text: str) -> None:
    warnings.warn(text, InputWarning, stacklevel=3)


def _warn_about_copies(root: Path, facts: Sequence[_Facts]) -> None:
    """The same image twice is a leak between splits, or a file saved to a wrong place."""
    description = root / "dataset.json"
    first: dict[str, Case] = {}
    for item in facts:
        if item.image_hash is None:
            continue
        original = first.setdefault(item.image_hash, item.case)
        if original is not item.case:
            _warn(
                f"{description if description.exists() else root}: the images of "
                f"{original.name} and {item.case.name} hold the same voxels; one is a copy."
            )


def warn_about_spacing(
    spacings_mm: Mapping[str, Sequence[float]], usual_mm: Sequence[float], what: str
) -> None:
    """Warns of images in which a network sees other sizes than it is used to.

    Args:
        spacings_mm: Voxel sizes along x, y and z, by image file.
        usual_mm: What the network is used to.
        what: In words.

    Warns:
        InputWarning: For each image whose voxels are more than twice as large along an
            axis, or less than half.
    """
    for path, spacing_mm in spacings_mm.items():
        if _is_far(spacing_mm, usual_mm):
            _warn(
                f"{path}: voxel size {_millimetres(spacing_mm)} is far from {what}, "
                f"{_millimetres(usual_mm)}; a network sees other sizes here."
            )


def warn_about_unlabelled_spacing(
    spacings_mm: Mapping[str, Sequence[float]], usual_mm: Sequence[float]
) -> None:
    """Warns of a training on unlabelled images that show all things in another size.

    Args:
        spacings_mm: Voxel sizes along x, y and z of the unlabelled images, by case.
        usual_mm: Median of the labelled ones.

    Warns:
        InputWarning: Once, if voxels of some are more than twice as large along an axis, or less
            than half.
    """
    far = [case for case, size in spacings_mm.items() if _is_far(size, usual_mm)]
    if far:
        _warn(
            f"case {far[0]}: voxel size {_millimetres(spacings_mm[far[0]])}, as of {len(far)} of "
            f"{len(spacings_mm)} unlabelled images, is far from that of the labelled ones, "
            f"{_millimetres(usual_mm)}; nothing is resampled. Bring them to one size before."
        )


def _is_far(spacing_mm: Sequence[float], usual_mm: Sequence[float]) -> bool:
    ratio = np.divide(spacing_mm, usual_mm)
    return bool(max(ratio.max(), 1 / ratio.min()) > ODD_SPACING)


def _millimetres(sizes: Iterable[float]) -> str:
    return f"{size_text(sizes)} mm"
