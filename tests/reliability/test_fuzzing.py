"""Fuzzing of what is read: a clear refusal, or exactly what the file says.

FUZZ_EXAMPLES=20000 python -m pytest tests/reliability/test_fuzzing.py tries more, and
others each time.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tfmtseg.data.folder import scan_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry, read_image, write_image
from tfmtseg.errors import InputError, InputWarning

# The NIfTI-1 header as its standard lays it out (nifti1.h), as far as it is used.
FIELDS = np.dtype(
    {
        "names": ["sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "slope",
                  "inter", "units", "qform_code", "sform_code", "quatern", "srow", "magic"],
        "formats": ["i4", "8i2", "i2", "i2", "8f4", "f4", "f4", "f4", "u1", "i2", "i2", "6f4",
                    "(3,4)f4", "S4"],
        "offsets": [0, 40, 70, 72, 76, 108, 112, 116, 123, 252, 254, 256, 280, 344],
        "itemsize": 348,
    }
)  # fmt: skip
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
         1024: "i8", 1280: "u8"}  # fmt: skip
SHAPE = (4, 3, 2)
AFFINE = np.array([[-1.5, 0.2, 0, 3], [0.2, -1, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1]])

float32s = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5, 352.0])
int16s = st.integers(-(2**15), 2**15 - 1) | st.sampled_from([0, 1, 2, 3, 4, 5, 16, 32])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "dim": st.lists(st.integers(-1, 5) | int16s, min_size=8, max_size=8),
        "datatype": st.sampled_from([*TYPES, 0, 1, 32, 128, 1536, 2304]) | int16s,
        "bitpix": int16s,
        "pixdim": st.lists(float32s, min_size=8, max_size=8),
        "vox_offset": float32s,
        "slope": float32s,
        "inter": float32s,
        "units": st.integers(0, 255),
        "qform_code": st.integers(-1, 4),
        "sform_code": st.integers(-1, 4),
        "quatern": st.lists(float32s, min_size=6, max_size=6),
        "srow": st.lists(st.lists(float32s, min_size=4, max_size=4), min_size=3, max_size=3),
        "magic": st.sampled_from([b"n+1", b"ni1", b"n+2", b""]),
        "sizeof_hdr": st.sampled_from([348, 540, 0, -1]),
    },
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def expected_voxels(content: bytes) -> np.ndarray:
    """What the standard says that the voxels are, worked out anew; `(x, y, z, channels)`."""
    header = np.frombuffer(content, FIELDS, 1)[0]
    shape = [int(size) for size in header["dim"][1 : header["dim"][0] + 1]]
    x, y, z, channels, *more = [*shape, *[1] * (7 - len(shape))]
    assert set(more) == {1}
    dtype = np.dtype(TYPES[int(header["datatype"])])
    voxels = np.frombuffer(content, dtype, x * y * z * channels, int(header["vox_offset"]))
    slope, inter = np.float64(header["slope"]), np.float64(header["inter"])
    if np.isfinite(slope) and slope != 0 and (slope, inter) != (1, 0):
        voxels = voxels * slope + inter
    return voxels.astype(np.float32).reshape((x, y, z, channels), order="F")


def expected_affine(content: bytes) -> np.ndarray:
    """The sform as it stands, or nibabel's reading of the qform, or the voxel sizes."""
    header = np.frombuffer(content, FIELDS, 1)[0]
    if header["sform_code"] > 0:
        return np.vstack([header["srow"].astype(np.float64), [0, 0, 0, 1]])
    if header["qform_code"] > 0:
        sane = header.copy()
        sane["pixdim"][0] = -1 if header["pixdim"][0] == -1 else 1
        return nib.Nifti1Header(sane.tobytes(), check=False).get_qform()
    return np.diag([*header["pixdim"][1:4].astype(np.float64), 1])


def check_file(path: Path, content: bytes) -> bool:
    """Whether a file is used; if so, as the standard says, and otherwise refused by name."""
    refusal = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            volume = read_image([path])
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"{path}: ")
        assert ", must be " in refusal
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        stored = volume.geometry.from_ras(volume.voxels)
        np.testing.assert_array_equal(stored, expected_voxels(content))
    np.testing.assert_allclose(volume.geometry.affine, expected_affine(content), rtol=1e-6)
    assert np.isfinite(volume.voxels).all()
    return True


@fuzzed
@given(CHANGES, st.binary(max_size=700), st.booleans())
@example({}, b"", False)
@example({"slope": 0.1, "inter": 0.3}, b"\1\2" * 12, True)
@example({"qform_code": 1, "pixdim": [1, 1, 1, -1, 0, 0, 0, 0]}, b"", False)
@example({"dim": [4, 2, 2, 2, 3, 1, 1, 1], "datatype": 4}, b"\1\2" * 24, True)
def test_any_header(tmp_path, changes, tail, compressed):
    header = np.frombuffer(
        nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE).to_bytes()[:348], FIELDS
    )
    header = header.copy()
    for name, value in changes.items():
        header[name] = np.array(value).astype(FIELDS[name].base)
    content = header.tobytes() + bytes(4) + bytes(range(24)) + tail
    path = tmp_path / ("i.nii.gz" if compressed else "i.nii")
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    used = check_file(path, content)
    assert used or changes


@fuzzed
@given(st.binary(max_size=1000), st.sampled_from([".nii", ".nii.gz"]), st.booleans())
def test_any_bytes(tmp_path, content, suffix, compressed):
    path = tmp_path / f"i{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    assert not check_file(path, content)


@fuzzed
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(1, 3),
    st.permutations(range(3)),
    st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
    st.lists(st.floats(0.5, 3), min_size=3, max_size=3),
    st.lists(st.floats(-0.2, 0.2), min_size=9, max_size=9),
    st.lists(st.floats(-200, 200), min_size=3, max_size=3),
)
def test_any_geometry(tmp_path, shape, channels, order, signs, spacing, turn, origin):
    """Written and read again: shape, affine and every voxel as they were."""
    affine = np.eye(4)
    axes = np.eye(3)[list(order)] * signs + np.reshape(turn, (3, 3))  # turned and sheared
    affine[:3] = np.column_stack([axes * spacing, origin])
    path, copy = tmp_path / "i.nii.gz", tmp_path / "copy.nii.gz"
    voxels = np.random.default_rng(0).normal(size=(*shape, channels)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        volume = read_image([path])
        write_image(copy, volume.voxels, volume.geometry)
        assert read_geometry(copy) == volume.geometry
    source, written = nib.load(path), nib.load(copy)
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(written.get_fdata().reshape(voxels.shape), voxels)
    for code in ("qform_code", "sform_code", "xyzt_units"):
        assert written.header[code] == source.header[code]
    assert Geometry.from_config(json.loads(json.dumps(volume.geometry.get_config()))) == (
        volume.geometry
    )


# ------------------------------------------------------------------------- dataset.json

texts = st.text(st.characters(exclude_categories=()), max_size=10)  # surrogates too
PATHS = [
    "imagesTr/a.nii.gz", "./imagesTr/a.nii.gz", "imagesTr//b.nii.gz", "labelsTr/a.nii.gz",
    "imagesTr/../../secret.nii.gz", "../secret.nii.gz", "/etc/passwd", "imagesTr",
    "imagesTr/link.nii.gz", "", ".", "..", "file:///etc/passwd", "a\0b.nii.gz", "x" * 300,
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(PATHS)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts | st.sampled_from(["image", "label", "0", "1"]), inner, max_size=3)
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries({"image": st.sampled_from(PATHS)}, optional={
    "label": st.sampled_from(PATHS) | values}) | values  # fmt: skip
NUMBERED = st.dictionaries(st.sampled_from("0123x"), texts | values, max_size=4)
DESCRIPTIONS = st.fixed_dictionaries(
    {"training": st.lists(entries, max_size=4) | values},
    optional={
        "modality": st.just({"0": "MRI"}) | NUMBERED | values,
        "channel_names": st.just({"0": "MRI"}) | NUMBERED | values,
        "labels": st.just({"0": "background", "1": "a"})
        | st.just({"background": 0, "a": [1, 2], "b": 2})
        | NUMBERED
        | st.dictionaries(texts, st.integers(-1, 300) | st.lists(st.integers(0, 300)), max_size=4)
        | values,
        "test": st.lists(entries, max_size=3) | values,
        "numTraining": values,
        "file_ending": st.sampled_from([".nii.gz", ".nii"]) | values,
        "name": values,
    },
)


@pytest.fixture
def data_folder(tmp_path) -> Path:
    root = tmp_path / "data"
    (tmp_path / "secret.nii.gz").write_bytes(b"secret")
    for name in ("imagesTr/a", "imagesTr/b", "imagesTr/c_0000", "labelsTr/a", "labelsTr/c"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.nii.gz").touch()
    (root / "imagesTr/link.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    return root


def check_folder(root: Path) -> None:
    """Anything but a list of cases inside the folder and of clear problems fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        folder, errors = scan_data_folder(root)
    assert folder is not None or errors
    for error in errors:
        str(error).encode(errors="backslashreplace")  # as standard error does
    for case in (*folder.cases, *folder.test_cases) if folder else ():
        assert case.name.isprintable()
        for path in (*case.images, *([case.label] if case.label else [])):
            assert path.resolve(strict=True).is_relative_to(root)
    if folder and not errors:
        assert "".join(folder.modalities).isprintable()
    if folder and folder.regions:
        assert "".join(folder.regions.names).isprintable()
        assert 1 <= max(set().union(*folder.regions.members)) <= 255


@fuzzed
@given(DESCRIPTIONS)
def test_any_description(data_folder, description):
    (data_folder / "dataset.json").write_text(json.dumps(description))
    check_folder(data_folder)


SOUND = json.dumps(
    {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "a"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTr/b.nii.gz"],
    }
).encode()


@fuzzed
@given(st.integers(0, len(SOUND)), st.integers(0, len(SOUND)), st.binary(max_size=5))
@example(0, len(SOUND), b"9" * 5000)
@example(0, 0, b"\xff")
def test_any_damage_to_a_description(data_folder, start, end, patch):
    (data_folder / "dataset.json").write_bytes(SOUND[:start] + patch + SOUND[end:])
    check_folder(data_folder)
