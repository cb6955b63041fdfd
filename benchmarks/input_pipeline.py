"""Times training steps that read and augment their patches, and steps on one fixed batch.

    python benchmarks/input_pipeline.py

The pipeline runs beside the step, so it costs what it takes of the processor from it, and
holds the step up where it is too slow. A call is several steps: a pipeline fills its buffer
while the other side has its turn, and that must not count for much.
"""

from __future__ import annotations

import json
import shutil
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

# Width, method, and the shape of a batch of patches: those of training_step.py, and one more
# that is harder on the pipeline.
SETTINGS = {
    "i": (32, "encdec", (1, 64, 64, 64, 4)),
    "ii": (16, "encdec", (4, 40, 56, 40, 1)),
    "iii": (16, "vaeseg", (4, 32, 48, 32, 1)),
    "iv": (16, "encdec", (4, 40, 56, 40, 4)),
}
VOLUMES, VOLUME_SHAPE = 6, (72, 72, 72)


def prepare(folder: Path, setting: str, fixed: bool):
    """See `interleave.serve`."""
    import tfmtseg  # noqa: I001  before tensorflow

    from tfmtseg.data.cache import build_cache
    from tfmtseg.data.folder import read_data_folder
    from tfmtseg.data.pipeline import training_batches
    from tfmtseg.training.config import TrainConfig
    from tfmtseg.training.optimizers import make_optimizer

    width, method, (patches, *crop, channels) = SETTINGS[setting]
    data = read_data_folder(folder / f"data{channels}")
    regions = tfmtseg.Regions.parse("brats_msd")
    records = build_cache(
        data.cases,
        folder / f"cache{channels}",
        num_modalities=channels,
        labels=data.labels,
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
    model = tfmtseg.Segmenter(regions=regions, method=method, width=width)
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
    width, method, shape = SETTINGS[setting]
    step = {name: seconds(found) / _STEPS.value for name, found in results.items()}
    return (
        f"| ({setting}) {method}, width {width}, {' x '.join(map(str, shape))} "
        f"| {step['pipeline']:.3f} s | {step['fixed']:.3f} s "
        f"| {100 * (ratio(results['pipeline'], results['fixed']) - 1):+.1f} % |"
    )


def write_data(folder: Path) -> None:
    """Writes phantoms of four modalities, and the same with only the first of them."""
    import nibabel as nib

    from tfmtseg.data.phantom import write_phantoms
    from tfmtseg.files import write_json

    write_phantoms(folder / "data4", VOLUMES, seed=0, shape=VOLUME_SHAPE)
    shutil.copytree(folder / "data4", folder / "data1")
    for path in (folder / "data1" / "imagesTr").iterdir():
        image = nib.load(path)
        nib.save(image.slicer[..., 0], path)
    description = json.loads((folder / "data1" / "dataset.json").read_text(encoding="utf-8"))
    description["modality"] = {"0": description["modality"]["0"]}
    write_json(folder / "data1" / "dataset.json", description)


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        folder = Path(_FOLDER.value)
        serve(lambda: prepare(folder, _SETTING.value, _WORKER.value == "fixed"))
        return
    lines = ["| step | with the pipeline | on a fixed batch | difference |", "|---|---|---|---|"]
    print("\n".join([machine(), *lines]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for setting in SETTINGS:
            lines.append(compare(Path(folder), setting))
            print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
