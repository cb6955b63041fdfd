"""Preprocessed cases on the disk, ready to be cut into patches.

A volume lies in the cache as uncompressed channels-last int16, so that a patch is
read through a memory map without the rest of its volume. Image and label are
separate entries: a case that is unlabelled in one run has an image entry only, and
its label file is never opened.

    CASE.12345678.image.npy         int16 (x, y, z, channels), RAS+
    CASE.image.json                 scale, offset, background, geometry
    CASE.12345678.label.npy         uint8 (x, y, z)
    CASE.12345678.foreground.npy    int32 (k, 4): x, y, z, label value
    CASE.label.json

An entry's JSON file is its manifest and is written last. It holds the settings of
the preprocessing, what tells a source file from any other, and names and checksums of
the arrays. All is compared whenever a run starts; an entry that differs is built anew.
Arrays are named after their content: when another run replaces an entry, a run that
uses it stops for want of its file, and never goes on with other voxels.
"""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tfmtseg.data import preprocess
from tfmtseg.data.cases import Case
from tfmtseg.data.nifti import Geometry, read_image, read_label
from tfmtseg.errors import InputError, InputErrors
from tfmtseg.files import atomic_path, write_json

FOREGROUND_VOXELS = 1000  # per label value
FORMAT = 2  # raise when entries are written otherwise


@dataclass(frozen=True)
class Record:
    """A case in the cache.

    The arrays are opened on access, because a memory map holds a file handle and
    there may be more cases than a process may have handles.

    Args:
        name: The case's name.
        directory: The cache's folder.
        files: Names of its arrays: `image`, and `label` and `foreground` if the label may be
            used.
        foreground_labels: The label values that patches are centred on.
        scale: float32 `(channels,)`.
        offset: float32 `(channels,)`; `image * scale + offset` is the normalised
            volume.
        background: float32 `(channels,)`, the normalised value to pad with.
        geometry: Of the case's file.
    """

    name: str
    directory: Path
    files: Mapping[str, str]
    foreground_labels: tuple[int, ...]
    scale: np.ndarray
    offset: np.ndarray
    background: np.ndarray
    geometry: Geometry

    @property
    def labelled(self) -> bool:
        """Whether the label may be used."""
        return "label" in self.files

    def without_label(self) -> Record:
        """This case with its label left out."""
        return replace(self, files={"image": self.files["image"]})

    @property
    def image(self) -> np.ndarray:
        """int16 `(x, y, z, channels)`, memory-mapped."""
        return np.load(self.path("image"), mmap_mode="r", allow_pickle=False)

    @property
    def label(self) -> np.ndarray | None:
        """uint8 `(x, y, z)`, memory-mapped; `None` for an unlabelled case."""
        if not self.labelled:
            return None
        return np.load(self.path("label"), mmap_mode="r", allow_pickle=False)

    @property
    def foreground(self) -> np.ndarray | None:
        """int32 `(k, 4)`: x, y, z and value of up to 1,000 voxels per foreground label."""
        if not self.labelled:
            return None
        voxels = np.load(self.path("foreground"), allow_pickle=False)
        return voxels[np.isin(voxels[:, 3], self.foreground_labels)]

    def path(self, kind: str) -> Path:
        """The file of an array: of `image`, `label` or `foreground`."""
        return self.directory / self.files[kind]


def build_cache(
    cases: Sequence[Case],
    directory: Path,
    *,
    num_modalities: int,
    labels: Sequence[int],
    foreground_labels: Collection[int] | None = None,
) -> list[Record]:
    """Brings the cache of `cases` up to date.

    Entries that still match their source files are kept. A case without label gets
    no label, even if an earlier run left one in the folder.

    Args:
        cases: With their labels only where these may be used.
        directory: The cache's folder; created when missing.
        num_modalities: Channels that every image must have.
        labels: The label values that may occur.
        foreground_labels: Those that patches are centred on; by default all.

    Returns:
        One record per case, in order.

    Raises:
        InputErrors: With the problems of all cases, after all were tried.
    """
    records: list[Record] = []
    errors: list[InputError] = []
    wanted = tuple(sorted(labels if foreground_labels is None else foreground_labels))
    for case in tqdm(cases, desc="Preparing cases", unit="case"):
        try:
            records.append(_refresh(case, directory, num_modalities, labels, wanted))
        except InputError as error:
            errors.append(error)
    if errors:
        raise InputErrors(errors)
    size = sum(record.path(kind).stat().st_size for record in records for kind in record.files)
    print(f"Cache: {len(records)} cases, {size / 2**20:.1f} MiB in {directory}")
    return records


def _refresh(
    case: Case,
    directory: Path,
    num_modalities: int,
    labels: Sequence[int],
    foreground_labels: tuple[int, ...],
) -> Record:
    """The record of a case, its entries rebuilt where they are missing or stale."""
    entry = _entry(
        directory / f"{case.name}.image.json",
        {"preprocessing": preprocess.fingerprint(), "modalities": num_modalities},
        case.images,
        lambda: _build_image(case, directory, num_modalities),
    )
    geometry = Geometry.from_config(entry["geometry"])
    files = _names(entry)
    label = case.label
    if label is not None:
        files |= _names(
            _entry(
                directory / f"{case.name}.label.json",
                {
                    "labels": list(labels),
                    "geometry": entry["geometry"],
                    "foreground_voxels": FOREGROUND_VOXELS,
                },
                (label,),
                lambda: _build_label(case, label, directory, geometry, labels),
            )
        )
    return Record(
        name=case.name,
        directory=directory,
        files=files,
        foreground_labels=foreground_labels,
        scale=np.array(entry["scale"], np.float32),
        offset=np.array(entry["offset"], np.float32),
        background=np.array(entry["background"], np.float32),
        geometry=geometry,
    )


def _names(entry: Mapping[str, Any]) -> dict[str, str]:
    return {kind: file["name"] for kind, file in entry["files"].items()}


def _entry(
    path: Path,
    settings: Mapping[str, Any],
    sources: Sequence[Path],
    build: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """The JSON content of an entry: the one on the disk if it holds, else a new one.

    Args:
        path: The entry's JSON file.
        settings: What else the content depends on.
        sources: The files that it is made from.
        build: Writes the arrays; returns what to remember, with `files`.
    """
    origin = {"format": FORMAT, "settings": dict(settings), "sources": _signatures(sources)}
    stored = _read_entry(path)
    if stored is not None and stored["origin"] == origin and _is_intact(path.parent, stored):
        return stored
    entry = {"origin": origin, **build()}
    write_json(path, {"checksum": _entry_checksum(entry), "entry": entry})
    case = path.name.removesuffix(".json").rpartition(".")[0]
    for kind, name in _names(entry).items():
        for old in path.parent.glob(f"{glob.escape(case)}.????????.{kind}.npy"):
            if old.name != name:
                old.unlink(missing_ok=True)
    return entry


def _signatures(sources: Sequence[Path]) -> list[list[Any]]:
    """What changes when a source file does.

    A file put in another's place may have its size and its time of modification,
    which copies keep; the time of change (`ctime`) and the inode it cannot choose.
    """
    result = []
    for path in sources:
        try:
            status = path.stat()
            signs = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
            result.append([str(path.resolve()), *signs])
        except OSError:
            result.append([str(path), "unreadable"])  # building the entry says why
    return result


def _read_entry(path: Path) -> dict[str, Any] | None:
    """An entry as it was written; `None` if it is missing or damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        entry = stored["entry"]
        return entry if stored["checksum"] == _entry_checksum(entry) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _entry_checksum(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def _is_intact(directory: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return all(
            file["name"] == Path(file["name"]).name  # in this folder, whoever wrote the entry
            and _checksum(directory / file["name"]) == file["checksum"]
            for file in entry["files"].values()
        )
    except OSError:
        return False


def _checksum(path: Path) -> int:
    result = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            result = zlib.crc32(part, result)
    return result


def _save(directory: Path, case: Case, kind: str, array: np.ndarray) -> dict[str, Any]:
    """Writes an array; returns its file's name and checksum, by the array's kind."""
    content = zlib.crc32(np.ascontiguousarray(array).data)
    path = directory / f"{case.name}.{content:08x}.{kind}.npy"
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
        checksum = _checksum(temporary)
    return {kind: {"name": path.name, "checksum": checksum}}


def _build_image(case: Case, directory: Path, num_modalities: int) -> dict[str, Any]:
    volume = read_image(case.images, num_modalities=num_modalities)
    normalized = preprocess.normalize(volume.voxels, case.images[0])
    return {
        "files": _save(directory, case, "image", normalized.voxels),
        "scale": normalized.scale.tolist(),
        "offset": normalized.offset.tolist(),
        "background": normalized.background.tolist(),
        "geometry": volume.geometry.get_config(),
    }


def _build_label(
    case: Case, path: Path, directory: Path, geometry: Geometry, labels: Sequence[int]
) -> dict[str, Any]:
    label = read_label(path, labels=labels, like=geometry, image=case.images[0])
    foreground = foreground_voxels(label, seed=zlib.crc32(case.name.encode()))
    return {
        "files": {
            **_save(directory, case, "label", label),
            **_save(directory, case, "foreground", foreground),
        }
    }


def foreground_voxels(label_map: np.ndarray, seed: int) -> np.ndarray:
    """Draws voxels around which a patch shows foreground.

    Args:
        label_map: Integers `(x, y, z)`.
        seed: Of the draw.

    Returns:
        int32 `(k, 4)`: x, y, z and label value of up to 1,000 voxels per value above
        0, by value.
    """
    random = np.random.default_rng(seed)
    rows = []
    for value in np.unique(label_map[label_map > 0]):
        places = np.argwhere(label_map == value)
        count = min(len(places), FOREGROUND_VOXELS)
        chosen = places[np.sort(random.choice(len(places), count, replace=False))]
        rows.append(np.column_stack([chosen, np.full(count, value)]))
    return np.concatenate([*rows, np.empty((0, 4))]).astype(np.int32)
