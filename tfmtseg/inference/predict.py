"""Label maps of whole cases from a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tfmtseg.data.cases import Case, read_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry, read_image, write_label_map
from tfmtseg.data.preprocess import Normalized, normalize
from tfmtseg.errors import InputError, InputErrors
from tfmtseg.inference.sliding_window import sliding_window_logits
from tfmtseg.training.run import Run, load_run


def predict_folder(
    model_dir: str | os.PathLike[str],
    images_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_root: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Segments every image of a folder.

    All headers are checked before the first prediction. Each label map appears
    at once and whole; one that is there already is replaced.

    Args:
        model_dir: Folder of a finished training run.
        images_dir: Folder of images, or a data folder (all its images).
        output_dir: Gets `CASE.nii.gz`, each in its image's shape and affine.
        allow_root: Another folder that links in `images_dir` may lead into.

    Returns:
        The files written, one per case.

    Raises:
        InputErrors: With everything that is wrong with the folder or the headers.
        InputError: If `output_dir` lies in `images_dir`, where a label map could
            replace an image, or if an image cannot be used.
    """
    images_dir, output_dir = Path(images_dir), Path(output_dir)
    if output_dir.resolve().is_relative_to(images_dir.resolve()):
        raise InputError(
            output_dir, "output folder", "in the folder of images", "another folder",
            "name a new folder",
        )  # fmt: skip
    folder = read_data_folder(images_dir, allow_root)
    cases = [case.without_label() for case in (*folder.cases, *folder.test_cases)]
    check_headers(cases)
    run = load_run(model_dir)
    written = []
    for case in tqdm(cases, desc="Predicting", unit="case"):
        label_map, geometry = predict_case(run, case)
        written.append(output_dir / f"{case.name}.nii.gz")
        write_label_map(written[-1], label_map, geometry)
    return written


def predict_case(run: Run, case: Case) -> tuple[np.ndarray, Geometry]:
    """Reads and segments one case.

    Args:
        run: A trained run.
        case: Its image is read, its label is not.

    Returns:
        The label map, `uint8` `(x, y, z)` in RAS+, and the geometry of its file.

    Raises:
        InputError: If the image cannot be used.
    """
    volume = read_image(case.images, num_modalities=len(run.modalities))
    normalized = normalize(volume.voxels, case.images[0])
    return predict_volume(run, normalized), volume.geometry


def predict_volume(run: Run, volume: Normalized) -> np.ndarray:
    """Segments a normalised volume; returns its label map, `uint8` `(x, y, z)`."""
    logits = sliding_window_logits(
        run.predict_logits,
        volume.values(),
        run.config.crop,
        background=volume.background,
        overlap=run.config.overlap,
    )
    return run.regions.label_map(logits)


def check_headers(cases: Iterable[Case]) -> None:
    """Reads the headers of all files of `cases`, labels included.

    Raises:
        InputErrors: With every header that cannot be used.
    """
    errors = []
    for case in cases:
        for path in (*case.images, *([case.label] if case.label else [])):
            try:
                read_geometry(path)
            except InputError as error:
                errors.append(error)
    if errors:
        raise InputErrors(errors)
