"""Times training steps that read and augment their patches, and steps on one fixed batch.

    python benchmarks/input_pipeline.py

The pipeline runs beside the step, so it costs what it takes of the processor from it, and
holds the step up where it is too slow. A call is several steps: a pipeline fills its buffer
while the other side has its turn, and that must not count for much.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import app, flags
from interleave import Worker, machine, measure, ratio, seconds, serve

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Timed calls of each.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 6, "Steps of a call.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the script itself.")
_SETTING = flags.DEFINE_string("setting", "", "Used by the script itself.")
_FOLDER = flags.DEFINE_string("folder", "", "Used by the script itself: volumes and cache.")

# Width, crop, labelled patches in a step.
SETTINGS = {"large": (32, (64, 64, 64), 1), "small": (16, (40, 56, 40), 4)}
VOLUMES, VOLUME_SHAPE = 6, (72, 72, 72)


def prepare(folder: Path, setting: str, fixed: bool):
    """See `interleave.serve`."""
    import tfmtseg  # noqa: I001  before tensorflow

    from tfmtseg.data.cache import build_cache
    from tfmtseg.data.cases import read_data_folder
    from tfmtseg.data.pipeline import training_batches
    from tfmtseg.training.config import TrainConfig
    from tfmtseg.training.optimizers import make_optimizer

    width, crop, patches = SETTINGS[setting]
    data = read_data_folder(folder / "data")
    regions = tfmtseg.Regions.parse("brats_msd")
    channels = len(data.modalities)
    records = build_cache(
        data.cases, folder / "cache", num_modalities=channels, max_label=regions.max_label
    )
    config = TrainConfig()
    batches = training_batches(
        records,
        [],
        crop,
        labeled_per_step=patches,
        unlabeled_per_step=0,
        steps=(0, 10**6),
        augmentation=config.augmentation,
        foreground_probability=config.foreground_probability,
        seed=0,
    )
    iterator = iter(batches.take(1).cache().repeat() if fixed else batches)
    model = tfmtseg.Segmenter(regions=regions, method="encdec", width=width)
    model.build((None, *crop, channels))
    model.compile(make_optimizer(config))
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()  # what `fit` calls
    float(model.train_function(iterator)["loss"])

    def call() -> None:
        for _ in range(_STEPS.value):
            float(model.train_function(iterator)["loss"])

    return call, {}


def compare(folder: Path, setting: str) -> str:
    """Measures one setting; returns its line of the table."""
    arguments = [__file__, f"--setting={setting}", f"--folder={folder}", f"--steps={_STEPS.value}"]
    names = ("pipeline", "fixed")
    workers = {name: Worker([*arguments, f"--worker={name}"]) for name in names}
    results = measure(workers, _ROUNDS.value, warm_up=1)
    width, crop, patches = SETTINGS[setting]
    step = {name: seconds(found) / _STEPS.value for name, found in results.items()}
    return (
        f"| width {width}, {patches} x {' x '.join(map(str, crop))} x 4 "
        f"| {step['pipeline']:.3f} s | {step['fixed']:.3f} s "
        f"| {100 * (ratio(results['pipeline'], results['fixed']) - 1):+.1f} % |"
    )


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        folder = Path(_FOLDER.value)
        serve(lambda: prepare(folder, _SETTING.value, _WORKER.value == "fixed"))
        return
    from tfmtseg.data.phantom import write_phantoms

    lines = ["| step | with the pipeline | on a fixed batch | difference |", "|---|---|---|---|"]
    print("\n".join([machine(), *lines]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms(Path(folder) / "data", VOLUMES, seed=0, shape=VOLUME_SHAPE)
        for setting in SETTINGS:
            lines.append(compare(Path(folder), setting))
            print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
