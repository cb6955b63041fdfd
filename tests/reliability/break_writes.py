"""Kills processes inside writes, and lets disks be full, and looks at what is left.

    python tests/reliability/break_writes.py ROUNDS [SEED]

For the cache, a prediction and a page of text (reports, tables, settings and lists of
cases are written like it), ROUNDS times each: a process that writes without end is
killed with signal 9 at a random moment; and a process whose files may not grow beyond a
random size writes once. Then every file must be what it was or what it was to become,
and the cache must give out either of the two cases it holds exactly. Prints how often a
write was under way; a part of a file is a failure.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from runs import copy, wait
from tqdm import tqdm

from tfmtseg.data.cache import build_cache
from tfmtseg.data.cases import Case
from tfmtseg.data.nifti import Geometry, write_image, write_label_map
from tfmtseg.files import write_text

SHAPE = (48, 48, 48)
GEOMETRY = Geometry.from_affine(SHAPE, np.diag([-1.0, -1, 2.5, 1]))
NO_SPACE = 3  # exit status of a process whose write failed with an OSError


@dataclass
class Target:
    """Something that is written again and again, in one of two versions.

    Args:
        folder: Where it is written.
        write: Writes version 0 or 1.
        check: Checks further what is on the disk.
    """

    folder: Path
    write: Callable[[int], object]
    check: Callable[[], None] = lambda: None
    versions: dict[str, set[bytes]] = field(default_factory=dict)

    def learn(self) -> float:
        """Writes both versions to know them; returns the seconds of a write."""
        start = time.perf_counter()
        for version in (1, 0):
            self.write(version)
            for path in self.folder.iterdir():
                self.versions.setdefault(path.name, set()).add(path.read_bytes())
        return (time.perf_counter() - start) / 2

    def examine(self) -> int:
        """Checks that all files are whole; removes and counts temporary ones."""
        left = 0
        for path in self.folder.iterdir():
            if path.name.startswith(".tmp-"):
                path.unlink()
                left += 1
            elif path.read_bytes() not in self.versions[path.name]:
                raise AssertionError(f"{path.name} is a part, or a mixture")
        self.check()
        return left


def make_targets(folder: Path, random: np.random.Generator) -> dict[str, Target]:
    folders = [folder / name for name in ("cache", "prediction", "text")]
    for path in folders:
        path.mkdir()
    labels = [random.integers(0, 3, SHAPE).astype(np.uint8) for _ in range(2)]
    texts = ["".join(map(chr, random.integers(32, 1000, 2**20))) for _ in range(2)]
    cases = []
    for version in (0, 1):
        image, label = (folder / f"{kind}{version}.nii" for kind in ("image", "label"))
        write_image(image, random.normal(size=(*SHAPE, 1)).astype(np.float32), GEOMETRY)
        write_label_map(label, labels[version], GEOMETRY)
        cases.append(Case("case", (image,), label))

    def cache(version: int):
        return build_cache([cases[version]], folders[0], num_modalities=1, labels=range(3))[0]

    images = [np.array(cache(version).image) for version in (0, 1)]

    def check_cache() -> None:
        for version in (1, 0):
            record = cache(version)
            np.testing.assert_array_equal(record.image, images[version])
            np.testing.assert_array_equal(record.label, labels[version])

    prediction = folders[1] / "case.nii.gz"
    return {
        "cache": Target(folders[0], cache, check_cache),
        "prediction": Target(
            folders[1],
            lambda version: write_label_map(prediction, labels[version], GEOMETRY),
        ),
        "text": Target(
            folders[2], lambda version: write_text(folders[2] / "report.html", texts[version])
        ),
    }


def kill_while_writing(target: Target, delay: float) -> None:
    def write_without_end() -> int:
        for count in itertools.count():
            target.write(count % 2)
        return 0

    with copy(write_without_end, os.devnull) as process:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        status = wait(process)
    if status != -signal.SIGKILL:
        raise AssertionError("the writing process failed by itself")


def write_on_a_full_disk(target: Target, size: int) -> None:
    def write() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            target.write(1)
        except OSError:
            return NO_SPACE
        return 0

    with copy(write, os.devnull) as process:
        status = wait(process)
    if status != NO_SPACE:
        raise AssertionError("a write beyond the limit was not reported")


def main(rounds: int, seed: int = 0) -> None:
    # tqdm's own lock is shared by all copies of a process: one killed holding it stops all.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # no second thread in a process that is copied
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        inside = {}
        for name, target in make_targets(Path(folder), random).items():
            seconds = target.learn()
            inside[name] = 0
            for _ in range(rounds):
                kill_while_writing(target, random.uniform(0, 4 * seconds))
                inside[name] += target.examine() > 0
            largest = max(path.stat().st_size for path in target.folder.iterdir())
            for _ in range(rounds):
                target.write(0)
                before = {path.name: path.read_bytes() for path in target.folder.iterdir()}
                write_on_a_full_disk(target, int(random.integers(largest)))
                if {path.name: path.read_bytes() for path in target.folder.iterdir()} != before:
                    raise AssertionError(f"{name}: a failed write left something behind")
                target.examine()
    if not any(inside.values()):
        raise AssertionError("no kill fell into a write: this shows nothing")
    counts = ", ".join(f"{name} ({count} inside a write)" for name, count in inside.items())
    print(f"{rounds} kills and {rounds} full disks each, {counts}: 0 partial files")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
