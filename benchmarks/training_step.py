"""Times a training step of tfmtseg and of MONAI, of the same network on the same patches.

    python benchmarks/training_step.py --monai_python=.venv-bench/bin/python

Both sides run a whole step as a user's training does: forward, Dice and cross-entropy,
backward, AdamW. tfmtseg's also averages the weights, checks for NaN and counts Dice.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from interleave import TUNED, Worker, machine, measure, memory_mib, ratio, seconds, serve

_MONAI_PYTHON = flags.DEFINE_string("monai_python", sys.executable, "Python that has MONAI.")
_SHAPES = flags.DEFINE_list("shapes", ["i", "ii", "iii"], "Which of the shapes.")
_PRECISIONS = flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Which of both.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed steps of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the script itself.")

REGIONS = 3
# Width, method, and the shape of a batch of patches: (batch, x, y, z, modalities).
SHAPES = {
    "i": (32, "encdec", (1, 64, 64, 64, 4)),
    "ii": (16, "encdec", (4, 40, 56, 40, 1)),
    "iii": (16, "vaeseg", (4, 32, 48, 32, 1)),
}


def patches(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images `(batch, x, y, z, modalities)` and label maps `(batch, x, y, z)`."""
    random = np.random.default_rng(0)
    images = random.normal(size=shape).astype(np.float32)
    labels = random.integers(0, REGIONS + 1, shape[:-1])
    return images, labels.astype(np.int32)


def prepare_tfmtseg(shape: str, precision: str):
    """See `interleave.serve`."""
    import tfmtseg  # noqa: I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.compat import keras, versions
    from tfmtseg.training.config import TrainConfig
    from tfmtseg.training.optimizers import make_optimizer

    imported = memory_mib("VmRSS")
    keras.mixed_precision.set_global_policy(precision)
    width, method, size = SHAPES[shape]
    model = tfmtseg.Segmenter(regions=REGIONS, method=method, width=width)
    model.build((None, *size[1:]))
    model.compile(make_optimizer(TrainConfig()))
    model.optimizer.build(model.trainable_variables)
    batches = iter(tf.data.Dataset.from_tensors(patches(size)).repeat())
    model.make_train_function()  # what `fit` calls
    parameters = sum(model.count_parameters().values())
    facts = {"parameters": parameters, "import_mib": imported, "versions": versions()}
    return lambda: float(model.train_function(batches)["loss"]), facts


def prepare_monai(shape: str, precision: str):
    """See `interleave.serve`."""
    import monai
    import monai_twin
    import torch

    imported = memory_mib("VmRSS")
    width, method, size = SHAPES[shape]
    vae_size = size[1:4] if method == "vaeseg" else None
    net = monai_twin.network(width, size[-1], REGIONS + 1, vae_size)
    images, labels = patches(size)
    images = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    call = monai_twin.training_step(net, images, labels[:, None], precision != "float32")
    facts = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "import_mib": imported,
        "versions": {"monai": monai.__version__, "torch": torch.__version__},
    }
    return call, facts


def compare(shape: str, precision: str) -> str:
    """Measures one shape; returns its line of the table."""
    arguments = [__file__, f"--shapes={shape}", f"--precisions={precision}"]
    workers = {
        "tfmtseg": Worker([*arguments, "--worker=tfmtseg"]),
        "monai": Worker([*arguments, "--worker=monai"], _MONAI_PYTHON.value, TUNED),
    }
    facts = {name: worker.facts for name, worker in workers.items()}
    ours, theirs = facts["tfmtseg"]["parameters"], facts["monai"]["parameters"]
    assert abs(ours / theirs - 1) < 0.01, f"{ours} parameters against {theirs}"
    results = measure(workers, _ROUNDS.value, warm_up=2)
    peaks = {name: found[-1]["peak_mib"] for name, found in results.items()}
    imported = facts["tfmtseg"]["import_mib"]
    faster = 1 / ratio(results["tfmtseg"], results["monai"])
    width, method, size = SHAPES[shape]
    return (
        f"| ({shape}) {method}, width {width}, {' x '.join(map(str, size))}, {ours / 1e6:.2f} M "
        f"| {precision.removeprefix('mixed_')} | {seconds(results['tfmtseg']):.3f} s "
        f"| {seconds(results['monai']):.3f} s | {faster:.2f} x "
        f"| {seconds(results['tfmtseg'], 'cpu_seconds'):.2f} s "
        f"| {seconds(results['monai'], 'cpu_seconds'):.2f} s "
        f"| {peaks['tfmtseg']:.0f} ({imported:.0f}) | {peaks['monai']:.0f} |"
    )


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        prepare = {"tfmtseg": prepare_tfmtseg, "monai": prepare_monai}[_WORKER.value]
        serve(lambda: prepare(_SHAPES.value[0], _PRECISIONS.value[0]))
        return
    lines = [
        "| shape, parameters | precision | tfmtseg | MONAI | faster | processor time of tfmtseg "
        "| of MONAI | tfmtseg's peak memory, MiB (its import) | MONAI's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join([machine(), *lines]), flush=True)
    for precision in _PRECISIONS.value:
        for shape in _SHAPES.value:
            lines.append(compare(shape, precision))
            print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
