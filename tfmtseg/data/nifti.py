"""NIfTI files to voxels and geometry, and label maps back to NIfTI files.

Inside tfmtseg every volume lies in RAS+ axis order (x to the right, y to the
front, z to the top of the patient); `Geometry` remembers how the file on the disk
lay. A file is read to its last byte, because only then is the checksum of its
gzip stream verified, and nothing is allocated before the header was checked.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError

from tfmtseg.errors import InputError, InputWarning
from tfmtseg.files import atomic_path

SUFFIXES = (".nii.gz", ".nii")

MAX_VOXELS = 2**28  # all channels; 1 GiB as float32, 512 x 512 x 1024
MAX_EXTENSION_BYTES = 2**26  # header extensions, between header and voxels
MAX_TAIL_BYTES = 2**26  # whatever follows the voxels
MAX_COMPRESSION = 1032  # deflate cannot shrink more than this many times
CHUNK_VOXELS = 2**20
SPACING_LIMITS_MM = (1e-3, 100.0)
MAX_SLOPE = 1e30  # a larger one takes ordinary integers out of float32
MAX_ORDINARY_VALUE = 1e18  # the square of a larger one overflows float32
SMALL_AXIS = 8  # voxels; shorter along every axis is hardly a medical image
LABEL_TOLERANCE = 1e-3  # from the next integer
AFFINE_TOLERANCE = 0.1  # voxels; less cannot move a boundary visibly
PIXDIM_TOLERANCE = 0.01  # of the voxel size; some writers round
SHEAR_TOLERANCE = 1e-3  # cosine between two axes

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
    1024: "i8", 1280: "u8",
}  # fmt: skip
_REFUSED_DTYPES = {32: "complex", 1792: "complex", 2048: "complex", 128: "RGB", 2304: "RGBA"}
_MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}  # metre, millimetre, micrometre

# What places the voxels in space. Kept bit by bit, so that a label map is written
# in exactly the space of its image.
_SPATIAL_FIELDS = (
    "sizeof_hdr", "pixdim", "xyzt_units", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a file's voxels lie on the disk and in space.

    Args:
        shape: Voxels along the three spatial axes, as stored.
        fields: The header's spatial fields, each a list of numbers.
    """

    shape: tuple[int, int, int]
    fields: Mapping[str, list[float]]

    @classmethod
    def from_affine(cls, shape: Sequence[int], affine: np.ndarray) -> Geometry:
        """The geometry of a file that stores `affine` (4, 4), in mm, as its sform."""
        header = nib.Nifti1Header()
        header.set_sform(affine, code="scanner")
        header.set_qform(affine, code="scanner")
        header.set_xyzt_units("mm")
        return cls._from_header(shape, header)

    @classmethod
    def _from_header(cls, shape: Sequence[int], header: nib.Nifti1Header) -> Geometry:
        fields = {}
        for name in _SPATIAL_FIELDS:
            values = np.atleast_1d(header[name]).astype(np.float64)
            # What is not finite here is not used either: see `_read_geometry`.
            fields[name] = np.where(np.isfinite(values), values, 0).tolist()
        if fields["pixdim"][0] not in (-1, 1):
            fields["pixdim"][0] = 1.0  # so says the standard
        x, y, z = (int(size) for size in shape)
        return cls((x, y, z), fields)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """The inverse of `get_config`."""
        x, y, z = config["shape"]
        return cls((x, y, z), dict(config["fields"]))

    def get_config(self) -> dict[str, Any]:
        """JSON-ready arguments of this object."""
        return {"shape": list(self.shape), "fields": dict(self.fields)}

    def header(self) -> nib.Nifti1Header:
        """A new NIfTI header (version 1 or 2, as the file's) with this geometry."""
        is_nifti2 = self.fields["sizeof_hdr"] == [540]
        header = nib.Nifti2Header() if is_nifti2 else nib.Nifti1Header()
        header.set_data_shape(self.shape)
        for name in _SPATIAL_FIELDS[1:]:
            values = self.fields[name]
            header[name] = values if len(values) > 1 else values[0]
        return header

    @property
    def affine(self) -> np.ndarray:
        """`(4, 4)` from stored voxel indices to the file's space: sform, else qform.

        Without either, the axes are taken as stored, at the voxel sizes.
        """
        header = self.header()
        if header["sform_code"] > 0:
            return header.get_sform()
        if header["qform_code"] > 0:
            return header.get_qform()
        return np.diag([*self.fields["pixdim"][1:4], 1.0])

    @property
    def orientation(self) -> np.ndarray:
        """`(3, 2)`, nibabel's orientation of the stored axes."""
        return orientations.io_orientation(self.affine)

    @property
    def ras_affine(self) -> np.ndarray:
        """`(4, 4)` from RAS+ voxel indices to the file's space."""
        return self.affine @ orientations.inv_ornt_aff(self.orientation, self.shape)

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """Voxels along the RAS+ axes."""
        result = [0, 0, 0]
        for stored, ras in enumerate(self.orientation[:, 0].astype(int)):
            result[ras] = self.shape[stored]
        return result[0], result[1], result[2]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along the RAS+ axes."""
        unit = _MM_PER_UNIT.get(int(self.fields["xyzt_units"][0]) & 7, 1.0)
        x, y, z = np.linalg.norm(self.ras_affine[:3, :3], axis=0) * unit
        return float(x), float(y), float(z)

    def to_ras(self, voxels: np.ndarray) -> np.ndarray:
        """Stored axis order to RAS+; further axes at the end are kept."""
        return np.ascontiguousarray(orientations.apply_orientation(voxels, self.orientation))

    def from_ras(self, voxels: np.ndarray) -> np.ndarray:
        """RAS+ axis order to the stored one; further axes at the end are kept."""
        identity = orientations.io_orientation(np.eye(4))
        back = orientations.ornt_transform(identity, self.orientation)
        return np.ascontiguousarray(orientations.apply_orientation(voxels, back))


@dataclass(frozen=True)
class Volume:
    """Voxels in RAS+ order and the geometry of their file.

    Args:
        voxels: `(x, y, z, modalities)` float32.
        geometry: Of the file, or of the first modality's file.
    """

    voxels: np.ndarray
    geometry: Geometry


def read_image(paths: Sequence[Path], *, num_modalities: int | None = None) -> Volume:
    """Reads one image: a 3-D or 4-D file, or one 3-D file per modality.

    Args:
        paths: The image's files, modalities in order.
        num_modalities: How many channels there must be; `None` takes any number.

    Returns:
        The volume, float32, scaled as its header says, all values finite.

    Raises:
        InputError: If a file cannot be used; it names the file and the mend.

    Warns:
        InputWarning: If a file is used although it is odd.
    """
    geometry: Geometry | None = None
    channels = []
    for path in paths:
        header, voxels = _read(path)
        if geometry is None:
            geometry = header.geometry
            if len(paths) * voxels.size > MAX_VOXELS:  # the others are as large, or refused
                raise InputError(
                    path, "image", f"{len(paths)} files of {voxels.size} voxels",
                    f"at most {MAX_VOXELS} voxels together (the limit)",
                    "crop or resample the image, or leave modalities out",
                )  # fmt: skip
        else:
            _check_same_space(path, header.geometry, paths[0], geometry)
        if len(paths) > 1:
            _check_channels(path, header.channels, 1)
        _warn_about_values(path, voxels)
        channels.append(voxels)
    if geometry is None:
        raise InputError("image", "files", "none", "at least one", "list the image's files")
    voxels = channels[0] if len(channels) == 1 else np.concatenate(channels, axis=-1)
    if num_modalities is not None:
        _check_channels(paths[0], voxels.shape[-1], num_modalities)
    return Volume(voxels, geometry)


def read_label(path: Path, *, labels: Sequence[int], like: Geometry, image: object) -> np.ndarray:
    """Reads the label map that belongs to an image.

    Args:
        path: The label map's file.
        labels: The label values that may occur, in 0..255.
        like: The image's geometry. The file's axes may be stored in another order,
            as long as its voxels lie at the same places.
        image: The image's name or path, for messages.

    Returns:
        uint8 `(x, y, z)` in RAS+ order.

    Raises:
        InputError: If the file cannot be used, lies elsewhere than the image, or
            holds other values.

    Warns:
        InputWarning: If there is only background.
    """
    header, voxels = _read(path)
    if header.channels != 1:
        raise InputError(
            path, "label map", f"4-D with {header.channels} channels", "3-D",
            "store one label value per voxel",
        )  # fmt: skip
    _check_same_space(path, header.geometry, image, like)
    values = voxels[..., 0]
    rounded = np.rint(values)
    wrong = (np.abs(values - rounded) > LABEL_TOLERANCE) | ~np.isin(rounded, labels)
    if wrong.any():
        found = np.unique(values[wrong])
        shown = ", ".join(f"{value:g}" for value in found[:5]) + (", ..." if found.size > 5 else "")
        raise InputError(
            path, "label value", f"{shown} in {np.count_nonzero(wrong)} voxels",
            _values_text(labels),
            "correct the label map (resample it by nearest neighbour only) or the declared labels",
        )  # fmt: skip
    if not rounded.any():
        _warn(path, "every label is background, so the case teaches that nothing is there")
    return rounded.astype(np.uint8)


def _values_text(labels: Sequence[int]) -> str:
    if list(labels) == list(range(len(labels))):
        return f"an integer in 0..{len(labels) - 1}"
    return f"one of {', '.join(map(str, labels))}"


def read_geometry(
    path: Path,
    *,
    channels: int | None = None,
    like: Geometry | None = None,
    image: object = None,
) -> Geometry:
    """Reads a file's header only.

    Args:
        path: The file.
        channels: How many it must have; `None` takes any number.
        like: The geometry that its voxels must have too.
        image: The file which that is of, for the message.

    Raises:
        InputError: If the header cannot be used, or tells of other channels or places.
    """
    with _open(path) as stream:
        header = _read_header(path, stream)
    if channels is not None:
        _check_channels(path, header.channels, channels)
    if like is not None:
        _check_same_space(path, header.geometry, image, like)
    return header.geometry


def write_label_map(path: Path, label_map: np.ndarray, geometry: Geometry) -> None:
    """Writes a label map in the space of the image it was predicted from.

    The same arguments give the same bytes. A failed write leaves the old file.

    Args:
        path: The file to write, ending in `.nii.gz` or `.nii`.
        label_map: uint8 `(x, y, z)` in RAS+ order.
        geometry: The image's geometry.

    Raises:
        ValueError: If the label map has another shape or type than it must have.
    """
    if label_map.shape != geometry.ras_shape or label_map.dtype != np.uint8:
        raise ValueError(
            f"Expected a uint8 label map of shape {geometry.ras_shape}. "
            f"Received: {label_map.dtype} {label_map.shape}."
        )
    _write(path, label_map, geometry)


def write_image(path: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    """Writes an image as one file, without scaling.

    The same arguments give the same bytes. A failed write leaves the old file.

    Args:
        path: The file to write, ending in `.nii.gz` or `.nii`.
        voxels: `(x, y, z, modalities)` in RAS+ order, of any type that is read.
        geometry: Where the voxels lie.

    Raises:
        ValueError: If the shape is not the geometry's.
    """
    if voxels.ndim != 4 or voxels.shape[:3] != geometry.ras_shape:
        raise ValueError(
            f"Expected voxels of shape {geometry.ras_shape} and a channel axis. "
            f"Received: {voxels.shape}."
        )
    _write(path, voxels, geometry)


def _write(path: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    stored = geometry.from_ras(voxels)
    header = geometry.header()
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4  # 4 zeros: no extension follows
    content = header.binaryblock + bytes(4) + stored.tobytes(order="F")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(
                filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0
            ) as stream:
                stream.write(content)
        else:
            file.write(content)


# ---------------------------------------------------------------- reading a file


@dataclass(frozen=True)
class _Header:
    """What a checked header says."""

    geometry: Geometry
    channels: int
    dtype: np.dtype
    slope: float
    intercept: float
    voxel_offset: int

    @property
    def num_voxels(self) -> int:
        x, y, z = self.geometry.shape
        return x * y * z * self.channels


def _read(path: Path) -> tuple[_Header, np.ndarray]:
    """The header and the float32 voxels `(x, y, z, channels)` in RAS+ order."""
    with _open(path) as stream:
        header = _read_header(path, stream)
        flat = _read_voxels(path, stream, header)
        _drain(path, stream)
    stored = flat.reshape((*header.geometry.shape, header.channels), order="F")
    return header, header.geometry.to_ras(stored)


def _warn(path: object, text: str) -> None:
    warnings.warn(f"{path}: {text}.", InputWarning, stacklevel=3)


def _damaged(path: Path, field: str, value: object, rule: str) -> InputError:
    return InputError(path, field, value, rule, "copy, download or export the file again")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed; what goes wrong inside names the file."""
    try:
        _check_container(path)
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile has all that is used
    except EOFError:
        raise _damaged(path, "gzip stream", "truncated", "complete") from None
    except gzip.BadGzipFile as error:
        what = "followed by other bytes" if "Not a gzipped file" in str(error) else f"bad ({error})"
        raise _damaged(path, "gzip stream", what, "intact, with a matching CRC") from None
    except zlib.error as error:
        raise _damaged(path, "gzip stream", f"bad ({error})", "intact") from None
    except FileNotFoundError:
        raise InputError(
            path, "file", "missing", "there", "add the file or correct its name"
        ) from None
    except OSError as error:
        raise InputError(
            path, "file", f"unreadable ({error.strerror})", "readable",
            "check the file's permissions, its links and the disk",
        ) from None  # fmt: skip


def _check_container(path: Path) -> None:
    """Regular file, right suffix, not empty, compressed exactly if its name says so."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            path, "file type", path.suffix or "unknown", "NIfTI, .nii.gz or .nii",
            "convert it (a .hdr and .img pair into one file)",
        )  # fmt: skip
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(path, "file", "a folder or a pipe", "a regular file", "give a NIfTI file")
    if status.st_size == 0:
        raise _damaged(path, "file", "empty (0 bytes)", "a NIfTI file")
    with path.open("rb") as file:
        start = file.read(348)
    is_gzip = start[:2] == b"\x1f\x8b"
    if path.name.endswith(".gz") and not is_gzip:
        if start.startswith(b"version https://git-lfs"):
            fix = "fetch the data with git lfs pull"
        elif start[344:347] in (b"n+1", b"ni1") or start[4:7] == b"n+2":
            fix = "rename it to .nii"
        else:
            fix = "copy, download or export the file again"
        raise InputError(path, "content", "not gzip", "gzip-compressed NIfTI", fix)
    if is_gzip and not path.name.endswith(".gz"):
        raise InputError(path, "content", "gzip", "uncompressed NIfTI", "rename it to .nii.gz")


def _read_up_to(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only at the stream's end."""
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _read_voxels(path: Path, stream: BinaryIO, header: _Header) -> np.ndarray:
    """All voxels in stored order, scaled, float32 and finite."""
    _check_claimed_size(path, header)
    result = np.empty(header.num_voxels, np.float32)
    not_numbers = infinite = 0
    for start in range(0, result.size, CHUNK_VOXELS):
        chunk = result[start : start + CHUNK_VOXELS]
        raw = _read_up_to(stream, chunk.size * header.dtype.itemsize)
        if len(raw) < chunk.size * header.dtype.itemsize:
            found = start + len(raw) // header.dtype.itemsize
            raise _damaged(
                path, "voxel data", f"truncated after {found} voxels", f"{result.size} voxels"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            chunk[:] = _scaled(np.frombuffer(raw, header.dtype), header)
        not_numbers += np.count_nonzero(np.isnan(chunk))
        infinite += np.count_nonzero(np.isinf(chunk))
    if not_numbers or infinite:
        counts = [f"{not_numbers} NaN"] * bool(not_numbers) + [f"{infinite} Inf"] * bool(infinite)
        raise InputError(
            path, "voxel values", " and ".join(counts), "finite (float32)",
            "replace these voxels, for example by the background value",
        )  # fmt: skip
    return result


def _check_claimed_size(path: Path, header: _Header) -> None:
    """Refuses a header that claims more voxels than its file can hold."""
    size = path.stat().st_size * (MAX_COMPRESSION if path.name.endswith(".gz") else 1)
    most = max(size - header.voxel_offset, 0) // header.dtype.itemsize
    if most < header.num_voxels:
        raise _damaged(
            path, "voxel data", f"truncated, {most} voxels at most", f"{header.num_voxels} voxels"
        )


def _scaled(stored: np.ndarray, header: _Header) -> np.ndarray:
    if header.slope == 1 and header.intercept == 0:
        return stored
    return stored.astype(np.float64) * header.slope + header.intercept


def _drain(path: Path, stream: BinaryIO) -> None:
    """Reads what follows the voxels: a gzip stream is verified only at its end."""
    left = MAX_TAIL_BYTES
    while part := stream.read(2**20):
        left -= len(part)
        if left < 0:
            raise _damaged(
                path, "data after the voxels", f"over {MAX_TAIL_BYTES} bytes", "within this limit"
            )


def _warn_about_values(path: Path, voxels: np.ndarray) -> None:
    if max(voxels.shape[:3]) < SMALL_AXIS:
        _warn(path, f"the volume is very small, {voxels.shape[:3]} voxels; most of a patch is pad")
    highest = max(float(voxels.max()), -float(voxels.min()))  # np.abs would copy
    if highest > MAX_ORDINARY_VALUE:
        _warn(path, f"the value range reaches {highest:.3g}, which no scanner gives")


def _check_channels(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            path, "number of channels", found, f"{expected}, one per declared modality",
            "correct the list of modalities or store the declared ones",
        )  # fmt: skip


def _displacement(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> float:
    """The farthest apart that two affines place a corner voxel, in their unit."""
    corners = [(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))]
    offsets = np.array(corners) @ (a - b)[:3].T
    return float(np.linalg.norm(offsets, axis=-1).max())


def _check_same_space(path: Path, found: Geometry, image: object, like: Geometry) -> None:
    """The voxels of two files lie at the same places, whatever their stored order."""
    if found.ras_shape != like.ras_shape:
        raise InputError(
            path, "shape", found.ras_shape, f"{like.ras_shape} as of {image}",
            "resample one of the two, or pair the right files",
        )  # fmt: skip
    distance = _displacement(found.ras_affine, like.ras_affine, like.ras_shape)
    if distance > AFFINE_TOLERANCE * np.linalg.norm(like.ras_affine[:3, :3], axis=0).min():
        raise InputError(
            path, "affine", f"{distance:.4g} mm off", f"that of {image}",
            "resample one of the two, or copy the right header",
        )  # fmt: skip


# -------------------------------------------------------------- checking a header


def _read_header(path: Path, stream: BinaryIO) -> _Header:
    """Reads and checks the header, and moves the stream to the first voxel."""
    raw = _parse_header(path, stream)
    shape, channels = _read_shape(path, raw)
    header = _Header(
        geometry=_read_geometry(path, shape, raw),
        channels=channels,
        dtype=_read_dtype(path, raw),
        slope=_read_slope(path, raw),
        intercept=_read_intercept(path, raw),
        voxel_offset=_read_voxel_offset(path, raw),
    )
    gap = header.voxel_offset - int(raw["sizeof_hdr"])
    if len(_read_up_to(stream, gap)) < gap:
        raise _damaged(path, "vox_offset", header.voxel_offset, "within the file; it is truncated")
    return header


def _parse_header(path: Path, stream: BinaryIO) -> nib.Nifti1Header:
    """The header's bytes as nibabel's structure, of either version and byte order."""
    block = _read_up_to(stream, 348)
    if not block:
        raise _damaged(path, "content", "empty (0 bytes)", "NIfTI")
    if len(block) < 348:
        raise _damaged(path, "NIfTI header", f"truncated after {len(block)} bytes", "348 bytes")
    for order in "<>":
        (size,) = struct.unpack(order + "i", block[:4])
        if size == 348:
            magic, expected, kind = block[344:348], b"n+1\0", nib.Nifti1Header
            break
        if size == 540:
            block += _read_up_to(stream, 540 - 348)
            magic, expected, kind = block[4:8], b"n+2\0", nib.Nifti2Header
            break
    else:
        (size,) = struct.unpack("<i", block[:4])
        raise _damaged(
            path, "header size", f"{size} bytes", "348 (NIfTI-1) or 540 (NIfTI-2); is this NIfTI?"
        )
    if magic != expected:
        raise _damaged(path, "header magic", magic, f"{expected!r}, a NIfTI file in one piece")
    return kind(block, endianness=order, check=False)


def _read_shape(path: Path, raw: nib.Nifti1Header) -> tuple[tuple[int, ...], int]:
    """Spatial shape and number of channels."""
    dim = [int(value) for value in raw["dim"]]
    sizes = dim[1 : dim[0] + 1]
    if not 1 <= dim[0] <= 7 or min(sizes) < 1:
        raise _damaged(path, "dim", dim, "1 to 7 axes of at least one voxel")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 3 or len(sizes) > 4:
        raise InputError(
            path, "image", f"{len(sizes)}-D {tuple(sizes)}", "3-D, or 4-D with channels last",
            "store one volume, modalities along the fourth axis",
        )  # fmt: skip
    num_voxels = int(np.prod(np.array(sizes, object)))
    if num_voxels > MAX_VOXELS:
        raise InputError(
            path, "dim", f"{tuple(sizes)}, {num_voxels} voxels",
            f"at most {MAX_VOXELS} voxels (the limit)",
            "crop or resample the image; if it is smaller, the file is truncated or damaged",
        )  # fmt: skip
    return tuple(sizes[:3]), sizes[3] if len(sizes) == 4 else 1


def _read_dtype(path: Path, raw: nib.Nifti1Header) -> np.dtype:
    code = int(raw["datatype"])
    if code not in _DTYPES:
        raise InputError(
            path, "datatype", f"{code} ({_REFUSED_DTYPES.get(code, 'unknown')})",
            "real integers or floats of up to 64 bits", "convert the image to float32",
        )  # fmt: skip
    dtype = np.dtype(_DTYPES[code]).newbyteorder(raw.endianness)
    if int(raw["bitpix"]) != 8 * dtype.itemsize:
        _warn(path, f"bitpix is {int(raw['bitpix'])}, but the datatype has {8 * dtype.itemsize}; "
              "the datatype is used")  # fmt: skip
    return dtype


def _read_slope(path: Path, raw: nib.Nifti1Header) -> float:
    """The factor of the stored values; 0 and NaN mean that there is none."""
    slope = float(raw["scl_slope"])
    if abs(slope) > MAX_SLOPE:  # also infinity
        raise _damaged(path, "scl_slope", f"{slope:g}", f"at most {MAX_SLOPE:g}")
    return 1.0 if slope == 0 or np.isnan(slope) else slope


def _read_intercept(path: Path, raw: nib.Nifti1Header) -> float:
    """What is added to the scaled values; only a slope gives it a meaning."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 0.0
    if not abs(intercept) <= MAX_SLOPE:
        raise _damaged(path, "scl_inter", f"{intercept:g}", f"at most {MAX_SLOPE:g}")
    return intercept


def _read_voxel_offset(path: Path, raw: nib.Nifti1Header) -> int:
    offset, least = float(raw["vox_offset"]), int(raw["sizeof_hdr"]) + 4
    most = least + MAX_EXTENSION_BYTES
    if not (least <= offset <= most and offset == int(offset)):
        raise _damaged(path, "vox_offset", offset, f"an integer in {least}..{most}")
    return int(offset)


def size_text(sizes: Iterable[float]) -> str:
    """Sizes along axes in words, such as `1 x 1 x 2.5`."""
    return " x ".join(f"{size:.3g}" for size in sizes)


def _read_geometry(path: Path, shape: Sequence[int], raw: nib.Nifti1Header) -> Geometry:
    """Checks that the voxels have a place in space, and warns where it is doubtful."""
    has_sform, has_qform = int(raw["sform_code"]) > 0, int(raw["qform_code"]) > 0
    sizes = raw["pixdim"][1:4]
    if not has_sform and not np.all(sizes > 0):  # NaN is not > 0 either
        raise _damaged(path, "voxel size", sizes.tolist(), "positive")
    used = (
        [raw["srow_x"], raw["srow_y"], raw["srow_z"]]
        if has_sform
        else [raw[name] for name in _SPATIAL_FIELDS[5:11]] * has_qform
    )
    if not np.all(np.isfinite(np.array(used, np.float64))):
        raise _damaged(path, "affine", "not finite", "finite")
    geometry = Geometry._from_header(shape, raw)
    try:
        matrix = geometry.affine[:3, :3]
    except ValueError as error:
        raise _damaged(path, "affine (qform)", f"no rotation ({error})", "a rotation") from None
    _check_matrix(path, matrix, geometry)
    if not has_sform and not has_qform:
        _warn(path, "the orientation is unknown (no qform or sform); axes are taken as stored")
    if has_sform and has_qform:
        _warn_about_qform(path, geometry)
    elif has_sform:
        _warn_about_pixdim(path, sizes, np.array(used, np.float64))
    return geometry


def _check_matrix(path: Path, matrix: np.ndarray, geometry: Geometry) -> None:
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.all(lengths > 0) or abs(np.linalg.det(matrix / lengths)) < 1e-6:
        raise _damaged(path, "affine", "singular", "invertible")
    low, high = SPACING_LIMITS_MM
    if not all(low <= size <= high for size in geometry.spacing_mm):
        raise InputError(
            path, "voxel size", f"{geometry.spacing_mm} mm", f"within limits, {low} to {high} mm",
            "correct the header's unit or affine, or resample the image",
        )  # fmt: skip
    cosines = (matrix / lengths).T @ (matrix / lengths) - np.eye(3)
    if np.abs(cosines).max() > SHEAR_TOLERANCE:
        _warn(path, "the affine holds shear; distances in mm are approximate")


def _warn_about_pixdim(path: Path, sizes: np.ndarray, sform: np.ndarray) -> None:
    """With a qform, `_warn_about_qform` sees to it."""
    lengths = np.linalg.norm(sform[:, :3], axis=0)
    if np.all(sizes > 0) and np.abs(sizes / lengths - 1).max() > PIXDIM_TOLERANCE:
        _warn(path, f"the voxel size of pixdim, {size_text(sizes)}, and that of the sform, "
              f"{size_text(lengths)}, disagree; the sform is used")  # fmt: skip


def _warn_about_qform(path: Path, geometry: Geometry) -> None:
    try:
        distance = _displacement(geometry.header().get_qform(), geometry.affine, geometry.shape)
    except (ValueError, HeaderDataError):  # no rotation, or a negative voxel size
        distance = np.inf
    if distance > AFFINE_TOLERANCE * np.linalg.norm(geometry.affine[:3, :3], axis=0).min():
        _warn(path, f"qform and sform disagree by {distance:.3g} mm; the sform is used")
