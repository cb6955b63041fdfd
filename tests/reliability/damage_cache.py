"""Damages a cache in four ways and looks at what is given out.

    python tests/reliability/damage_cache.py TIMES [SEED]

TIMES times: a bit of a file is flipped, a file is cut, a file is missing, or the cache
was made with other settings. The next run must get the very arrays and numbers that a
new cache gives, and the damaged file must have been made anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from tfmtseg.data import preprocess
from tfmtseg.data.cache import Record, build_cache
from tfmtseg.data.cases import Case
from tfmtseg.data.phantom import write_phantoms

KINDS = ("bit flipped", "file cut", "file missing", "other settings")


def build(case: Case, directory: Path) -> Record:
    return build_cache([case], directory, num_modalities=4, labels=range(4))[0]


def content(record: Record) -> dict[str, np.ndarray]:
    names = ("image", "label", "foreground", "scale", "offset", "background")
    values = {name: np.array(getattr(record, name)) for name in names}
    return {**values, "affine": np.array(record.geometry.affine)}


def damage(kind: str, case: Case, directory: Path, random: np.random.Generator) -> None:
    if kind == "other settings":
        for path in directory.iterdir():
            path.unlink()
        clip = preprocess.CLIP
        preprocess.CLIP = clip * random.uniform(0.5, 0.9)
        build(case, directory)
        preprocess.CLIP = clip
        return
    paths = sorted(directory.iterdir())
    path = paths[random.integers(len(paths))]
    data = bytearray(path.read_bytes())
    if kind == "bit flipped":
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
    elif kind == "file cut":
        path.write_bytes(data[: random.integers(len(data))])
    else:
        path.unlink()


def main(times: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        data, directory = Path(folder, "data"), Path(folder, "cache")
        write_phantoms(data, 1, seed=seed, shape=(20, 20, 20))
        name = "PHANTOM_001.nii.gz"
        case = Case("case", (data / "imagesTr" / name,), data / "labelsTr" / name)
        expected = content(build(case, directory))
        sound = {path.name: path.read_bytes() for path in directory.iterdir()}
        for index in range(times):
            kind = KINDS[index % len(KINDS)]
            damage(kind, case, directory, random)
            found = content(build(case, directory))
            for field, values in expected.items():
                np.testing.assert_array_equal(found[field], values, f"{kind}: {field}")
            for path in directory.iterdir():
                assert path.read_bytes() == sound[path.name], f"{kind}: {path.name} stayed"
            counts[kind] += 1
    print("; ".join(f"{kind}: {n} of {n} made anew" for kind, n in counts.items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
