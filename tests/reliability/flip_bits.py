"""Flips single bits of .nii.gz files and reads them.

    python tests/reliability/flip_bits.py FLIPS [SEED]

Prints how many were refused, how many were read with every voxel and the geometry as
before (bits of the gzip header that mean nothing), and how many gave a wrong volume:
one of those is a failure, and so is any exception but InputError.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from tfmtseg.data.nifti import Volume, read_image
from tfmtseg.errors import InputError, InputWarning

SHAPE = (11, 9, 7)
# The gzip header (10 bytes) and trailer (8 bytes) are a small part of a file and half of
# what can go wrong; every second flip is in one of them.
ENDS = 10, 8


def contents(random: np.random.Generator) -> list[bytes]:
    """NIfTI files of several kinds."""
    affine = np.array([[-1.5, 0.2, 0, 3], [0.2, -1, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1]])
    voxels = random.normal(100, 20, SHAPE)
    scaled = nib.Nifti1Image(voxels.astype(np.int16), affine)
    scaled.header.set_slope_inter(0.5, -3)
    return [
        nib.Nifti1Image(voxels.astype(np.float32), affine).to_bytes(),
        scaled.to_bytes(),
        nib.Nifti1Image((voxels > 110).astype(np.uint8), affine).to_bytes(),
        nib.Nifti1Image(random.normal(size=(*SHAPE, 3)).astype(np.float32), affine).to_bytes(),
        nib.Nifti1Image(
            voxels.astype(np.float32), affine, nib.Nifti1Header(endianness=">")
        ).to_bytes(),
        nib.Nifti2Image(voxels, affine).to_bytes(),
    ]


def flip_bit(content: bytes, random: np.random.Generator) -> bytes:
    start, end = ENDS
    if random.uniform() < 0.5:
        byte = int(random.integers(len(content)))
    else:
        byte = int(random.integers(-end, start)) % len(content)
    result = bytearray(content)
    result[byte] ^= 1 << int(random.integers(8))
    return bytes(result)


def is_equal(found: Volume, expected: Volume) -> bool:
    return found.geometry == expected.geometry and np.array_equal(found.voxels, expected.voxels)


def flip(num_flips: int, seed: int, folder: Path) -> Counter[str]:
    """Counts `refused`, `equal` and `wrong` reads of `num_flips` damaged files."""
    random = np.random.default_rng(seed)
    path = folder / "image.nii.gz"
    sound = []
    for content in contents(random):
        for level in (0, 1, 9):  # 0 stores the voxels as they are: a bit is a bit
            path.write_bytes(gzip.compress(content, compresslevel=level, mtime=0))
            sound.append((path.read_bytes(), read_image([path])))
    counts: Counter[str] = Counter(refused=0, equal=0, wrong=0)
    for _ in range(num_flips):
        content, volume = sound[random.integers(len(sound))]
        path.write_bytes(flip_bit(content, random))
        try:
            counts["equal" if is_equal(read_image([path]), volume) else "wrong"] += 1
        except InputError:
            counts["refused"] += 1
    return counts


def main(num_flips: int, seed: int = 0) -> int:
    warnings.simplefilter("ignore", InputWarning)
    with tempfile.TemporaryDirectory() as folder:
        counts = flip(num_flips, seed, Path(folder))
    print(
        f"{num_flips} flips: {counts['refused']} refused, {counts['equal']} read as before, "
        f"{counts['wrong']} wrong volumes"
    )
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
