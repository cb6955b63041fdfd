"""Times whole-volume inference of tfmtseg and of MONAI, and compares what comes out.

    python benchmarks/sliding_window.py --monai_python=.venv-bench/bin/python

A volume of the size of BraTS, windows of 96^3 that overlap by half, Gaussian weights; the
same network with the same weights on both sides.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from interleave import TUNED, Worker, machine, measure, memory_mib, ratio, seconds, serve

_MONAI_PYTHON = flags.DEFINE_string("monai_python", sys.executable, "Python that has MONAI.")
_SHAPE = flags.DEFINE_list("shape", ["240", "240", "155"], "Voxels of the volume.")
_WINDOW = flags.DEFINE_integer("window", 96, "Voxels of a window along each axis.")
_PRECISIONS = flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Which of both.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed volumes of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the script itself.")
_FOLDER = flags.DEFINE_string("folder", "", "Used by the script itself: weights and logits.")

WIDTH, MODALITIES, OUTPUTS = 8, 4, 4
TOLERANCE = 1e-4


def volume() -> np.ndarray:
    """Float32, `(x, y, z, modalities)`; no window of it is all background."""
    shape = (*map(int, _SHAPE.value), MODALITIES)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prepare_tfmtseg(folder: Path, precision: str):
    """See `interleave.serve`. Leaves the weights behind."""
    import tfmtseg  # noqa: I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.compat import keras
    from tfmtseg.inference.sliding_window import sliding_window_logits

    imported = memory_mib("VmRSS")
    keras.mixed_precision.set_global_policy(precision)
    keras.utils.set_random_seed(0)
    window = (_WINDOW.value,) * 3
    model = tfmtseg.Segmenter(regions=OUTPUTS - 1, method="encdec", width=WIDTH)
    model.build((None, *window, MODALITIES))
    random = np.random.default_rng(1)  # weights of a fresh model hide errors behind 0 and 1
    for part in ("encoder", "decoder", "head"):
        layer = getattr(model, part)
        layer.set_weights(
            [w + random.normal(scale=0.02, size=w.shape) for w in layer.get_weights()]
        )
        np.savez(folder / f"{part}.npz", *_in_order_of_calls(layer))
    signature = [tf.TensorSpec((None, *window, MODALITIES), tf.float32)]
    network = tf.function(lambda images: model(images, training=False), signature)
    image = volume()

    def call() -> np.ndarray:
        return sliding_window_logits(
            lambda batch: network(batch).numpy(),
            image,
            window,
            background=(np.inf,) * MODALITIES,
            batch_size=1,
        )

    np.save(folder / "tfmtseg.npy", call())
    return call, {"import_mib": imported}


def _in_order_of_calls(layer) -> list[np.ndarray]:
    """Weights of encoder, decoder or head as `monai_twin.copy_weights` takes them."""
    if hasattr(layer, "entries"):
        stages = [part for entry, blocks in layer._stages() for part in (entry, *blocks)]
        parts = [layer.first, *stages]
    elif hasattr(layer, "reduce"):
        pairs = zip(reversed(layer.reduce), reversed(layer.blocks), strict=True)
        parts = [part for pair in pairs for part in pair]
    else:
        parts = [layer]
    found = []
    for part in parts:
        if hasattr(part, "norm1"):
            inner = (part.norm1, part.conv1, part.norm2, part.conv2)
            found += [weight for each in inner for weight in each.get_weights()]
        else:
            found += part.get_weights()
    return found


def prepare_monai(folder: Path, precision: str):
    """See `interleave.serve`. Reads the weights that tfmtseg left."""
    import monai_twin
    import torch
    from monai.inferers import sliding_window_inference

    imported = memory_mib("VmRSS")
    net = monai_twin.network(WIDTH, MODALITIES, OUTPUTS).eval()
    weights = {}
    for part in ("encoder", "decoder", "head"):
        with np.load(folder / f"{part}.npz", allow_pickle=False) as file:
            weights[part] = [file[name] for name in file.files]
    monai_twin.copy_weights(net, weights)
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume(), -1, 0)[None]))
    mirrored = False

    def network(windows: torch.Tensor) -> torch.Tensor:
        if mirrored:  # see `copy_weights`
            return net(windows.flip((2, 3, 4))).flip((2, 3, 4))
        return net(windows)

    def call() -> torch.Tensor:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"),
        ):
            return sliding_window_inference(
                images, (_WINDOW.value,) * 3, 1, network, overlap=0.5, mode="gaussian"
            )

    mirrored = True
    logits = np.moveaxis(call()[0].numpy(), 0, -1)
    mirrored = False
    np.save(folder / "monai.npy", logits)
    return call, {"import_mib": imported}


def compare(precision: str, folder: Path) -> str:
    """Measures at one precision; returns its line of the table."""
    arguments = [__file__, f"--precisions={precision}", f"--folder={folder}"]
    arguments += [f"--shape={','.join(_SHAPE.value)}", f"--window={_WINDOW.value}"]
    workers = {
        "tfmtseg": Worker([*arguments, "--worker=tfmtseg"]),
        "monai": Worker([*arguments, "--worker=monai"], _MONAI_PYTHON.value, TUNED),
    }
    results = measure(workers, _ROUNDS.value)
    ours, theirs = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in workers)
    difference = float(np.abs(ours - theirs).max())
    assert precision != "float32" or difference <= TOLERANCE * max(1, np.abs(theirs).max()), (
        f"logits differ by {difference}"
    )
    peaks = {name: found[-1]["peak_mib"] for name, found in results.items()}
    return (
        f"| {precision.removeprefix('mixed_')} | {seconds(results['tfmtseg']):.2f} s "
        f"| {seconds(results['monai']):.2f} s | {ratio(results['tfmtseg'], results['monai']):.2f} "
        f"| {seconds(results['tfmtseg'], 'cpu_seconds'):.1f} s "
        f"| {seconds(results['monai'], 'cpu_seconds'):.1f} s "
        f"| {difference:.1e} of {np.abs(theirs).max():.1f} "
        f"| {peaks['tfmtseg']:.0f} ({workers['tfmtseg'].facts['import_mib']:.0f}) "
        f"| {peaks['monai']:.0f} |"
    )


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        prepare = {"tfmtseg": prepare_tfmtseg, "monai": prepare_monai}[_WORKER.value]
        serve(lambda: prepare(Path(_FOLDER.value), _PRECISIONS.value[0]))
        return
    lines = [
        "| precision | tfmtseg | MONAI | tfmtseg's part of MONAI's time | processor time of "
        "tfmtseg | of MONAI | largest difference of logits "
        "| tfmtseg's peak memory, MiB (its import) | MONAI's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join([machine(), *lines]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for precision in _PRECISIONS.value:
            lines.append(compare(precision, Path(folder)))
            print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
