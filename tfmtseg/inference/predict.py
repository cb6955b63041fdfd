"""Label maps of whole cases from a trained model."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfmtseg.data.cases import Case, DataFolder
from tfmtseg.data.check import warn_about_spacing
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry, read_image, write_label_map
from tfmtseg.data.preprocess import WORKING_BYTES, Normalized, normalize
from tfmtseg.errors import InputError, InputErrors
from tfmtseg.inference.sliding_window import host_bytes, sliding_window_logits, with_flips
from tfmtseg.memory import GB, available_memory_gb, resident_memory_gb
from tfmtseg.training.finished_run import Run, load_run

CALL_VOXELS = 96**3
# What a call takes at its peak: in arrays of the size of the first level's features, and
# for graph and threads whatever its size (measured: 4.1 to 5.7, and 0.1 to 0.4 GB).
LIVE_FEATURES, CALL_GB = 6, 0.4
# Of a voxel of one channel: while it is read, float32 of a part and of the whole; as it was
# read and normalised; and as the network sees it, int16 and float32.
READ_BYTES, BOTH_BYTES, SEEN_BYTES = 4 + 4, 4 + 2, 2 + 4


def predict_folder(
    model_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    images_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_root: str | os.PathLike[str] | None = None,
    max_memory_gb: float = 0.0,
    flips: bool = False,
) -> list[Path]:
    """Segments every image of a folder.

    All headers are checked before the first prediction, and the memory it will take.
    Each label map appears at once and whole; one that is there already is replaced. An
    image whose voxels cannot be used keeps no other from its label map.

    Args:
        model_dirs: Folder of a finished training run; or of several, an ensemble: then the
            mean of their logits counts.
        images_dir: Folder of images, or a data folder (all its images, whatever its labels).
        output_dir: Gets `CASE.nii.gz`, each in its image's shape and affine.
        allow_root: Another folder that links in `images_dir` may lead into.
        max_memory_gb: See `windows_per_call`.
        flips: See `predict_volume`.

    Returns:
        The files written, one per case.

    Raises:
        InputErrors: With everything that is wrong with the folder or the headers; with the
            images that cannot be used, when all others have their label maps.
        InputError: If `output_dir` is no place for label maps: in `images_dir`, or where
            links in it lead, one could replace an image, and in a data set's `labelsTr` an
            annotation; if the images have other modalities than the model, the runs do not
            fit each other, or the memory is too little.

    Warns:
        InputWarning: If voxels are of quite another size than in training.
    """
    images_dir, output_dir = Path(images_dir), Path(output_dir)
    folder = read_data_folder(images_dir, allow_root, images_only=True)
    cases = (*folder.cases, *folder.test_cases)
    _keep_off(folder, output_dir)
    runs = load_runs([model_dirs] if isinstance(model_dirs, (str, os.PathLike)) else model_dirs)
    folder.check_modalities(runs[0].modalities, runs[0].directory)
    geometries = check_headers(cases, len(runs[0].modalities))
    batch_size = windows_per_call(runs, geometries, max_memory_gb)
    check_flips(runs, flips)
    spacings_mm = {path: geometry.spacing_mm for path, geometry in geometries.items()}
    for run in runs:
        warn_about_spacing(spacings_mm, run.spacing_mm, f"that {run.directory} was trained on")
    written: list[Path] = []
    errors: list[InputError] = []
    for case in tqdm(cases, desc="Predicting", unit="case"):
        try:
            label_map, geometry = predict_case(runs, case, batch_size, flips)
        except InputError as error:
            errors.append(error)
            continue
        written.append(output_dir / f"{case.name}.nii.gz")
        write_label_map(written[-1], label_map, geometry)
    if errors:
        raise InputErrors(errors)
    return written


def _keep_off(folder: DataFolder, output_dir: Path) -> None:
    """Refuses to write where files of `folder` are, be it by links, or a data set's labels."""
    files = {path for case in (*folder.cases, *folder.test_cases) for path in case.files}
    for pattern in ("*/*.nii*", "*/*/*.nii*"):  # the labels too, which nobody has read
        files.update(folder.root.glob(pattern))
    output = output_dir.resolve()
    if output.exists() and not output.is_dir():
        where = "a file"
    elif output.is_relative_to(folder.root.resolve()):
        where = "in the folder of images"
    elif output in {path.resolve().parent for path in files}:
        where = "a folder that links among the images lead to"
    elif output.name in ("labelsTr", "labelsTs") and (output.parent / "dataset.json").exists():
        where = "a folder of annotations"
    else:
        return
    raise InputError(output_dir, "output folder", where, "another folder", "name a new folder")


def load_runs(model_dirs: Sequence[str | os.PathLike[str]]) -> tuple[Run, ...]:
    """Trained runs that can predict together.

    Args:
        model_dirs: Folders of finished training runs.

    Raises:
        InputError: If there is none, or one cannot be used, or segments something else, from
            other modalities or in other pieces than the first.
    """
    if not model_dirs:
        raise InputError("--model_dir", "value", "empty", "a folder", "name a training run")
    runs = tuple(load_run(model_dir) for model_dir in model_dirs)
    for run in runs[1:]:
        for name, value, first in (
            ("modalities", run.modalities, runs[0].modalities),
            ("regions", run.regions, runs[0].regions),
            ("largest_component", run.config.largest_component, runs[0].config.largest_component),
        ):
            if value != first:
                raise InputError(
                    run.directory, name, value, f"{first}, as of {runs[0].directory}",
                    "name runs that segment the same from the same",
                )  # fmt: skip
    return runs


def check_flips(runs: Sequence[Run], flips: bool) -> None:
    """Makes sure that mirrored images can vote, if they are asked to.

    Raises:
        InputError: If a run's training mirrored no axis: it has never seen such images.
    """
    for run in runs:
        if flips and not any(run.config.flips):
            raise InputError(
                "--test_time_flips", "value", "true",
                f"false: the training of {run.directory} mirrored no axis", "leave it out",
            )  # fmt: skip


def predict_case(
    runs: Sequence[Run], case: Case, batch_size: int = 1, flips: bool = False
) -> tuple[np.ndarray, Geometry]:
    """Reads and segments one case.

    Args:
        runs: From `load_runs`.
        case: Its image is read, its label is not.
        batch_size: Windows in one call of the network.
        flips: See `predict_volume`.

    Returns:
        The label map, `uint8` `(x, y, z)` in RAS+, and the geometry of its file.

    Raises:
        InputError: If the image cannot be used.
    """
    volume = read_image(case.images, num_modalities=len(runs[0].modalities))
    normalized, geometry = normalize(volume.voxels, case.images[0]), volume.geometry
    del volume  # as large as what the network sees
    try:
        return predict_volume(runs, normalized, batch_size, flips), geometry
    except FloatingPointError:
        raise InputError(
            case.images[0], "prediction", "NaN", "a number",
            "look at the image; or train with --precision=float32, where half precision overflows",
        ) from None  # fmt: skip


def predict_volume(
    runs: Sequence[Run], volume: Normalized, batch_size: int = 1, flips: bool = False
) -> np.ndarray:
    """Segments a normalised volume.

    Args:
        runs: From `load_runs`; the mean of their logits counts.
        volume: The volume.
        batch_size: Windows in one call of the network.
        flips: Whether the mean is over mirrored windows too, along the axes that were
            mirrored in training (test-time augmentation). Each doubles the time.

    Returns:
        The label map, `uint8` `(x, y, z)`. Where the runs' regions are one piece each
        (`largest_component`), others are left out.

    Raises:
        FloatingPointError: If a network's logits are NaN.
    """
    values = volume.values()
    logits: np.ndarray | None = None
    for run in runs:
        more = sliding_window_logits(
            with_flips(run.predict_logits, run.config.flips) if flips else run.predict_logits,
            values,
            run.config.crop,
            background=volume.background,
            overlap=run.config.overlap,
            batch_size=batch_size,
        )
        logits = more if logits is None else np.add(logits, more, out=logits)
    assert logits is not None  # there is a run; the sum has the label map of the mean
    label_map = runs[0].regions.label_map(logits)
    del values, logits, more  # pieces take as much
    if runs[0].config.largest_component:
        label_map = runs[0].regions.largest_components(label_map)
    return label_map


def windows_per_call(
    runs: Sequence[Run], geometries: Mapping[str, Geometry], max_memory_gb: float = 0.0
) -> int:
    """How many windows the network gets at a time, so that every case fits into memory.

    One on CPUs, where several together take as long as one after the other; on GPUs as
    many as have `CALL_VOXELS` together.

    Args:
        runs: From `load_runs`.
        geometries: Those of the images, by file.
        max_memory_gb: What the process may take at its peak, in 10^9 bytes, this
            package and TensorFlow included; 0 stands for what the machine has free.

    Raises:
        InputError: With the largest image, if not even one window at a time would fit.
    """
    channels, outputs = len(runs[0].modalities), runs[0].regions.num_outputs
    present = resident_memory_gb()
    if not math.isfinite(max_memory_gb):
        raise InputError("--max_memory_gb", "value", max_memory_gb, "a number", "leave it out")
    limit = max_memory_gb or present + available_memory_gb()

    def window_gb(run: Run) -> float:
        """Of the network, for one window."""
        features = LIVE_FEATURES * run.config.width + channels + outputs
        return 4 * math.prod(run.config.crop) * features / GB

    def needed_gb(run: Run, path: str) -> float:
        """Of one image with one window: as read and normalised; the sums, the network."""
        shape = geometries[path].ras_shape
        voxels = math.prod(shape)
        before = voxels * max(READ_BYTES * channels, BOTH_BYTES * channels + WORKING_BYTES)
        after = voxels * SEEN_BYTES * channels
        after += host_bytes(shape, run.config.crop, channels, outputs)
        after += 4 * voxels * outputs * (len(runs) > 1)  # the logits of the runs before
        return present + max(before / GB, after / GB + CALL_GB + window_gb(run))

    pairs = itertools.product(runs, geometries)
    run, largest = max(pairs, key=lambda pair: needed_gb(*pair))
    needed = needed_gb(run, largest)
    if needed > limit:
        raise InputError(
            largest, "memory to segment it", f"{needed:.1f} GB",
            f"at most {limit:.1f} GB ({'--max_memory_gb' if max_memory_gb else 'what is free'})",
            f"allow {math.ceil(needed)} GB, resample the image to larger voxels, or train with a "
            "smaller --crop",
        )  # fmt: skip
    wanted = 1
    if tf.config.get_visible_devices("GPU"):
        wanted = CALL_VOXELS // max(math.prod(run.config.crop) for run in runs)
    further = (limit - needed) / max(map(window_gb, runs))
    return max(1, min(wanted, 1 + int(min(further, CALL_VOXELS))))


def check_headers(cases: Iterable[Case], num_modalities: int) -> dict[str, Geometry]:
    """Reads the headers of all files of `cases`, labels included.

    Args:
        cases: Their images have one file, or one for each modality.
        num_modalities: Channels of an image.

    Returns:
        The geometry of each case's first image, by its path.

    Raises:
        InputErrors: With every header that cannot be used, or does not fit its case.
    """
    errors: list[InputError] = []
    geometries: dict[str, Geometry] = {}
    for case in cases:
        first: Geometry | None = None
        for path in case.files:
            channels = num_modalities if len(case.images) == 1 else 1
            try:
                geometry = read_geometry(
                    path,
                    channels=None if path == case.label else channels,
                    like=first,
                    image=case.images[0],
                )
            except InputError as error:
                errors.append(error)
                continue
            if path == case.images[0]:
                first = geometries[str(path)] = geometry
    if errors:
        raise InputErrors(errors)
    return geometries
