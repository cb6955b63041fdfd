"""Label maps of whole cases from a trained model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfmtseg.data.cases import Case, DataFolder, read_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry, read_image, write_label_map
from tfmtseg.data.preprocess import WORKING_BYTES, Normalized, normalize
from tfmtseg.errors import InputError, InputErrors
from tfmtseg.inference.sliding_window import host_bytes, sliding_window_logits
from tfmtseg.memory import GB, available_memory_gb, resident_memory_gb
from tfmtseg.training.run import Run, load_run

CALL_VOXELS = 96**3
# What a call takes at its peak: in arrays of the size of the first level's features, and
# for graph and threads whatever its size (measured: 4.1 to 5.7, and 0.1 to 0.4 GB).
LIVE_FEATURES, CALL_GB = 6, 0.4
# Of a voxel of one channel: while it is read, float32 of a part and of the whole; as it was
# read and normalised; and as the network sees it, int16 and float32.
READ_BYTES, BOTH_BYTES, SEEN_BYTES = 4 + 4, 4 + 2, 2 + 4


def predict_folder(
    model_dir: str | os.PathLike[str],
    images_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_root: str | os.PathLike[str] | None = None,
    max_memory_gb: float = 0.0,
) -> list[Path]:
    """Segments every image of a folder.

    All headers are checked before the first prediction, and the memory it will take.
    Each label map appears at once and whole; one that is there already is replaced.

    Args:
        model_dir: Folder of a finished training run.
        images_dir: Folder of images, or a data folder (all its images).
        output_dir: Gets `CASE.nii.gz`, each in its image's shape and affine.
        allow_root: Another folder that links in `images_dir` may lead into.
        max_memory_gb: See `windows_per_call`.

    Returns:
        The files written, one per case.

    Raises:
        InputErrors: With everything that is wrong with the folder or the headers.
        InputError: If `output_dir` lies in `images_dir`, or is where links in it lead: a
            label map could replace an image there; if the images have other modalities
            than the model or cannot be used, or the memory is too little.
    """
    images_dir, output_dir = Path(images_dir), Path(output_dir)
    folder = read_data_folder(images_dir, allow_root)
    _keep_off(folder, output_dir)
    cases = [case.without_label() for case in (*folder.cases, *folder.test_cases)]
    geometries = check_headers(cases)
    run = load_run(model_dir)
    folder.check_modalities(run.modalities, model_dir)
    batch_size = windows_per_call(run, geometries, max_memory_gb)
    written = []
    for case in tqdm(cases, desc="Predicting", unit="case"):
        label_map, geometry = predict_case(run, case, batch_size)
        written.append(output_dir / f"{case.name}.nii.gz")
        write_label_map(written[-1], label_map, geometry)
    return written


def _keep_off(folder: DataFolder, output_dir: Path) -> None:
    """Refuses to write where files of `folder` are, be it by links."""
    files = [
        path
        for case in (*folder.cases, *folder.test_cases)
        for path in (*case.images, *([case.label] if case.label else []))
    ]
    output = output_dir.resolve()
    if output.is_relative_to(folder.root.resolve()):
        where = "in the folder of images"
    elif output in {path.resolve().parent for path in files}:
        where = "a folder that links among the images lead to"
    else:
        return
    raise InputError(output_dir, "output folder", where, "another folder", "name a new folder")


def predict_case(run: Run, case: Case, batch_size: int = 1) -> tuple[np.ndarray, Geometry]:
    """Reads and segments one case.

    Args:
        run: A trained run.
        case: Its image is read, its label is not.
        batch_size: Windows in one call of the network.

    Returns:
        The label map, `uint8` `(x, y, z)` in RAS+, and the geometry of its file.

    Raises:
        InputError: If the image cannot be used.
    """
    volume = read_image(case.images, num_modalities=len(run.modalities))
    normalized, geometry = normalize(volume.voxels, case.images[0]), volume.geometry
    del volume  # as large as what the network sees
    return predict_volume(run, normalized, batch_size), geometry


def predict_volume(run: Run, volume: Normalized, batch_size: int = 1) -> np.ndarray:
    """Segments a normalised volume; returns its label map, `uint8` `(x, y, z)`.

    Where the run's regions are one piece each (`largest_component`), others are left out.
    """
    logits = sliding_window_logits(
        run.predict_logits,
        volume.values(),
        run.config.crop,
        background=volume.background,
        overlap=run.config.overlap,
        batch_size=batch_size,
    )
    label_map = run.regions.label_map(logits)
    if run.config.largest_component:
        label_map = run.regions.largest_components(label_map)
    return label_map


def windows_per_call(
    run: Run, geometries: Mapping[str, Geometry], max_memory_gb: float = 0.0
) -> int:
    """How many windows the network gets at a time, so that every case fits into memory.

    One on CPUs, where several together take as long as one after the other; on GPUs as
    many as have `CALL_VOXELS` together.

    Args:
        run: A trained run.
        geometries: Those of the images, by file.
        max_memory_gb: What the process may take at its peak, in 10^9 bytes, this
            package and TensorFlow included; 0 stands for what the machine has free.

    Raises:
        InputError: With the largest image, if not even one window at a time would fit.
    """
    window, channels, outputs = run.config.crop, len(run.modalities), run.regions.num_outputs
    present = resident_memory_gb()
    limit = max_memory_gb or present + available_memory_gb()

    def needed_gb(path: str) -> float:
        """Of one image with one window: as read and normalised, the sums, the network."""
        shape = geometries[path].ras_shape
        voxels = math.prod(shape)
        before = voxels * max(READ_BYTES * channels, BOTH_BYTES * channels + WORKING_BYTES)
        after = voxels * SEEN_BYTES * channels + host_bytes(shape, window, channels, outputs)
        return present + max(before / GB, after / GB + CALL_GB + window_gb)

    voxels = math.prod(window)
    window_gb = 4 * voxels * (LIVE_FEATURES * run.config.width + channels + outputs) / GB
    largest = max(geometries, key=needed_gb)
    needed = needed_gb(largest)
    if needed > limit:
        raise InputError(
            largest, "memory to segment it", f"{needed:.1f} GB",
            f"at most {limit:.1f} GB ({'--max_memory_gb' if max_memory_gb else 'what is free'})",
            f"allow {math.ceil(needed)} GB, resample the image to larger voxels, or train with a "
            "smaller --crop",
        )  # fmt: skip
    wanted = CALL_VOXELS // voxels if tf.config.list_physical_devices("GPU") else 1
    return max(1, min(wanted, 1 + int(min((limit - needed) / window_gb, CALL_VOXELS))))


def check_headers(cases: Iterable[Case]) -> dict[str, Geometry]:
    """Reads the headers of all files of `cases`, labels included.

    Returns:
        The geometry of each case's first image, by its path.

    Raises:
        InputErrors: With every header that cannot be used.
    """
    errors, geometries = [], {}
    for case in cases:
        for path in (*case.images, *([case.label] if case.label else [])):
            try:
                geometry = read_geometry(path)
            except InputError as error:
                errors.append(error)
            else:
                if path == case.images[0]:
                    geometries[str(path)] = geometry
    if errors:
        raise InputErrors(errors)
    return geometries
