"""Synthetic brain-like volumes with a nested tumour, for demonstrations and tests.

They are made to be learnable in minutes and yet not trivial: size, place and shape
of everything vary, as do contrasts, units and the field's bias, and some spots look
like a tumour in one modality only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from tfmtseg.data.nifti import Geometry, write_image, write_label_map
from tfmtseg.files import write_json

MODALITIES = ("FLAIR", "T1", "T1Gd", "T2")
LABELS = ("background", "oedema", "non-enhancing core", "enhancing tumour")

# Relative brightness by tissue, one row per modality.
_TISSUES = ("fluid", "grey", "white", "oedema", "core", "enhancing")
_CONTRAST = np.array(
    [
        [0.25, 0.55, 0.45, 0.95, 0.60, 0.80],
        [0.25, 0.55, 0.75, 0.50, 0.35, 0.55],
        [0.25, 0.55, 0.75, 0.52, 0.35, 1.10],
        [1.00, 0.60, 0.45, 0.90, 0.85, 0.70],
    ]
)
_CONTRAST_SPREAD = 0.06  # of one tissue's brightness from case to case
_BIAS_SPREAD = 0.12  # of the field, as a logarithm
_NOISE = 0.07  # standard deviation
_NUM_SPOTS = 6


def make_phantom(
    seed: int | Sequence[int], shape: tuple[int, int, int] = (48, 48, 48)
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one phantom.

    Args:
        seed: The same seed gives the same phantom.
        shape: Voxels along x, y, z.

    Returns:
        The image, float32 `(x, y, z, 4)` of whole numbers, modalities as in
        `MODALITIES`, 0 outside the head; and the label map, uint8 `(x, y, z)`,
        numbered as in `LABELS`.
    """
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), axis=-1)
    radii = random.uniform(0.75, 0.9, 3)
    head = _distance(grid, np.zeros(3), radii) + _dents(random, grid, 0.04) < 1
    label = _tumour(random, grid, head)
    tissue = _anatomy(random, grid)
    tissue[label > 0] = label[label > 0] + _TISSUES.index("oedema") - 1
    image = _scan(random, tissue, _spots(random, grid))
    return image * head[..., None], label


def write_phantoms(
    directory: str | os.PathLike[str],
    num_cases: int,
    *,
    seed: int = 0,
    shape: tuple[int, int, int] = (48, 48, 48),
) -> None:
    """Writes a data folder of phantoms in the Decathlon's layout.

    Args:
        directory: The folder; created when missing.
        num_cases: Phantoms, named `PHANTOM_001`, `PHANTOM_002`, ...
        seed: The same seed gives the same files.
        shape: Voxels along x, y, z, of 1 mm.
    """
    root = Path(directory)
    geometry = Geometry.from_affine(shape, np.eye(4))
    training = []
    for number in range(1, num_cases + 1):
        image, label = make_phantom((seed, number), shape)
        file = f"PHANTOM_{number:03d}.nii.gz"
        write_image(root / "imagesTr" / file, image.astype(np.int16), geometry)
        write_label_map(root / "labelsTr" / file, label, geometry)
        training.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    description = {
        "name": "Phantoms",
        "description": "Synthetic brain-like volumes with a nested tumour; no patient data",
        "tensorImageSize": "4D",
        "modality": {str(i): name for i, name in enumerate(MODALITIES)},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "numTraining": num_cases,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    write_json(root / "dataset.json", description)


def _smooth_noise(random: np.random.Generator, shape: Sequence[int], sigma: float) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1 that varies over about `sigma` voxels."""
    white = random.standard_normal(shape, np.float32)
    noise = ndimage.gaussian_filter(white, sigma, truncate=2)
    return (noise - noise.mean()) / noise.std()


def _distance(grid: np.ndarray, center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Distance from the centre of an ellipsoid, 1 at its surface."""
    return np.sqrt((((grid - center) / radii) ** 2).sum(axis=-1))


def _dents(random: np.random.Generator, grid: np.ndarray, depth: float) -> np.ndarray:
    """What added to a distance makes a surface uneven by about `depth` of its radius."""
    return depth * _smooth_noise(random, grid.shape[:3], grid.shape[0] / 16)


def _anatomy(random: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """Indices into `_TISSUES`: folded grey and white matter, and two ventricles."""
    folds = _smooth_noise(random, grid.shape[:3], grid.shape[0] / 24)
    depth = _distance(grid, np.zeros(3), np.ones(3))
    tissue = np.where(folds > 2.5 * depth - 1.2, _TISSUES.index("white"), _TISSUES.index("grey"))
    for side in (-1, 1):
        center = np.array([side * random.uniform(0.1, 0.16), random.uniform(-0.1, 0.1), 0.05])
        radii = random.uniform([0.06, 0.2, 0.1], [0.12, 0.35, 0.2])
        tissue[_distance(grid, center, radii) < 1] = _TISSUES.index("fluid")
    return tissue


def _tumour(random: np.random.Generator, grid: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The label map: oedema around an enhancing rim around a non-enhancing core."""
    direction = random.standard_normal(3)
    center = direction / np.linalg.norm(direction) * random.uniform(0.2, 0.5)
    radii = random.uniform(0.26, 0.44) * random.uniform(0.8, 1.2, 3)
    oedema = _distance(grid, center, radii) + _dents(random, grid, 0.15)
    core_center = center + random.uniform(-0.12, 0.12, 3) * radii
    core_radii = radii * random.uniform(0.55, 0.7)
    core = _distance(grid, core_center, core_radii) + _dents(random, grid, 0.08)
    label = np.zeros(head.shape, np.uint8)
    label[oedema < 1] = 1
    label[core < 1] = 3
    label[core < random.uniform(0.45, 0.7)] = 2
    return label * head


def _spots(random: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """What looks like a tumour in one modality only: `(x, y, z, modalities)` to add."""
    result = np.zeros((*grid.shape[:3], len(MODALITIES)), np.float32)
    for _ in range(_NUM_SPOTS):
        center = random.uniform(-0.6, 0.6, 3)
        inside = _distance(grid, center, random.uniform(0.05, 0.12, 3)) < 1
        result[inside, random.integers(len(MODALITIES))] = random.uniform(0.2, 0.4)
    return result


def _scan(random: np.random.Generator, tissue: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """Brightness with partial volume, bias, noise and arbitrary units."""
    channels = []
    for i, contrast in enumerate(_CONTRAST):
        levels = contrast + random.normal(0, _CONTRAST_SPREAD, contrast.shape)
        clean = ndimage.gaussian_filter(levels[tissue] + spots[..., i], 0.6)
        bias = np.exp(_BIAS_SPREAD * _smooth_noise(random, tissue.shape, tissue.shape[0] / 5))
        noisy = clean * bias + random.normal(0, _NOISE, tissue.shape)
        unit = random.uniform(300, 1500)
        channels.append(np.rint(unit * np.maximum(noisy, 1e-2)))
    return np.stack(channels, axis=-1).astype(np.float32)
