"""Estimates what many GPUs would do to a training step: nothing here is measured.

    python tools/estimate_scaling.py

prints the tables of `docs/scaling.md`: how the contrastive batch grows with the replicas, and how
long machines would wait for each other. Formulas and assumptions stand there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tfmtseg  # noqa: F401  # isort: skip  before tensorflow
from absl import app, flags

from tfmtseg.console import flags_only
from tfmtseg.models.contrastive_branch import grid_shape
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.regions import Regions

_CROP = flags.DEFINE_list("crop", ["96"] * 3, "Voxels of a patch.")
_CUBE_SIZE = flags.DEFINE_list("cube_size", ["32"] * 3, "Voxels of a contrastive cube.")
_LABELED = flags.DEFINE_integer("labeled", 2, "Labelled patches of a replica in a step.")
_UNLABELED = flags.DEFINE_integer("unlabeled", 2, "Unlabelled patches of a replica in a step.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of the first level.")
_MODALITIES = flags.DEFINE_integer("modalities", 4, "Input channels.")
_GBIT_PER_S = flags.DEFINE_float("gbit_per_s", 100, "Of each machine's network.")

REPLICAS = (1, 8, 64)
MACHINES = 8  # among which the most replicas are shared out
STEPS_S = (0.1, 0.3, 1.0)


def contrast_size(
    crop: Sequence[int], cube_size: Sequence[int], unlabeled: int, replicas: int, length: int
) -> tuple[int, int, float]:
    """The repaired contrast with `--negatives=global`.

    Args:
        crop: Voxels of a patch.
        cube_size: Voxels of a cube.
        unlabeled: Unlabelled patches of a replica in a step.
        replicas: Replicas in all.
        length: Numbers in a code.

    Returns:
        Queries of a replica, candidates of a query, and MiB of all keys.
    """
    grid = grid_shape(crop, cube_size)
    places = math.prod(grid)
    queries = sum(2 * ((size - 1) // 2) * places // size for size in grid)
    cases = unlabeled * replicas
    return unlabeled * queries, cases * (places - 1) + 1, cases * places * length * 4 / 2**20


def patches_mib(crop: Sequence[int], modalities: int, labeled: int, replicas: int) -> float:
    """MiB of the labelled patches, float32, and their `int32` labels, of all replicas.

    Copy-paste (`bcp`) gathers them on each.
    """
    return labeled * replicas * math.prod(crop) * 4 * (modalities + 1) / 2**20


def exchange_s(num_bytes: float, machines: int, gbit_per_s: float) -> float:
    """Seconds that a ring of machines takes to sum `num_bytes`, by bandwidth alone."""
    return 2 * (machines - 1) / machines * num_bytes / (gbit_per_s / 8 * 1e9)


def main(argv: list[str]) -> None:
    flags_only(argv)
    crop, cube_size = ([int(size) for size in flag.value] for flag in (_CROP, _CUBE_SIZE))
    length = 8 * _WIDTH.value
    print("| replicas | queries of a replica | candidates of a query | ln | keys, MiB |")
    print("|---|---|---|---|---|")
    keys_mib = 0.0
    for replicas in REPLICAS:
        queries, candidates, keys_mib = contrast_size(
            crop, cube_size, _UNLABELED.value, replicas, length
        )
        chance = math.log(candidates)
        print(f"| {replicas} | {queries} | {candidates} | {chance:.1f} | {keys_mib:.1f} |")
    print()
    header = " | ".join(f"of {step_s:g} s" for step_s in STEPS_S)
    print(f"| method | parameters, million | exchanged, MiB | exchange, ms | {header} |")
    print("|" + "---|" * (4 + len(STEPS_S)))
    patches = patches_mib(crop, _MODALITIES.value, _LABELED.value, REPLICAS[-1])
    for method in ("encdec", "bcp", "sscpcseg"):
        model = Segmenter(Regions.parse("brats_msd"), method, width=_WIDTH.value)
        model.build((None, *crop, _MODALITIES.value))
        count = sum(model.count_parameters().values())
        # The keys go round too, and so does their gradient; patches need none.
        gathered = 0 if model.branch is None else 1.5 * keys_mib
        gathered += 0 if model.teacher is None else 0.5 * patches
        num_bytes = 4 * count + gathered * 2**20
        seconds = exchange_s(num_bytes, MACHINES, _GBIT_PER_S.value)
        shares = " | ".join(f"{step_s / (step_s + seconds):.0%}" for step_s in STEPS_S)
        print(
            f"| {method} | {count / 1e6:.1f} | {num_bytes / 2**20:.0f} | {1e3 * seconds:.0f} "
            f"| {shares} |"
        )


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
