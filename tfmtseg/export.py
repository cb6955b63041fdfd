"""A trained model as a SavedModel, which needs TensorFlow alone.

`export_model` writes `OUTPUT_DIR/VERSION/`, as TensorFlow Serving looks for it:

    saved_model.pb, variables/    the model
    assets.extra/model.json       names of modalities and regions, and how windows lie

All of the way from a volume in any units to its label map lies in the graph: normalising,
the network, averaging windows, resolving regions. There are two signatures, whose outputs
are `labels`, `uint8`, and `probabilities`, float32, one channel per region:

    serving_default   `images` (batch, x, y, z, modalities), each seen in one piece
    volume            `images` (x, y, z, modalities), seen in windows as `tfmtseg-predict`
                      does: for volumes too large for one piece
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.errors import InputError
from tfmtseg.inference.in_graph import (
    crop,
    largest_components,
    normalize,
    pad_around,
    region_probabilities,
    sliding_window_logits,
)
from tfmtseg.ops import library
from tfmtseg.ops.regions import label_map
from tfmtseg.saving import finite, trace, write_saved_model
from tfmtseg.training.finished_run import Run, load_run
from tfmtseg.training.sizes import total_strides


def export_model(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    precision: str | None = None,
) -> Path:
    """Writes the model of a run as the next version of a SavedModel.

    The version's folder appears at once and whole. Earlier versions stay.

    Args:
        model_dir: Folder of a finished training run.
        output_dir: Folder of all versions; its name is the model's for TensorFlow Serving.
        precision: What the graph computes in, such as `"float32"` for servers without the
            training's GPU; by default as in the training.

    Returns:
        The folder written.

    Raises:
        InputError: If the run cannot be read, or `output_dir` is no folder.
        OSError: If the files cannot be written, the disk being full, say.
    """
    run = load_run(model_dir, precision=precision)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(
            output_dir, "output folder", "a file", "a folder, or a new name", "name another folder"
        )
    network, signatures = served(run)
    path = output_dir / str(_next_version(output_dir))
    write_saved_model(path, signatures, network.variables, _description(run))
    return path


def served(run: Run) -> tuple[Any, dict[str, Any]]:
    """The graphs of a run's model.

    Args:
        run: A trained run.

    Returns:
        That of the network, and the signatures, which call it, by name.
    """
    volume = (None, None, None, len(run.modalities))
    with library.disabled():
        network = trace(lambda images: run.model(images, training=False), (None, *volume))
    signatures = {
        "serving_default": trace(
            lambda images: _serve_batch(run, network, images), (None, *volume)
        ),
        "volume": trace(lambda images: _serve_volume(run, network, images), volume),
    }
    return network, signatures


def _serve_batch(run: Run, network: Any, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """Volumes that are seen in one piece, padded to what the strides divide."""
    images = finite(images)
    strides = total_strides(run.model.encoder.strides)
    shape = tf.shape(images)[1:4]
    padded_shape = -(-shape // strides) * strides

    def prepare(volume: tf.Tensor) -> tf.Tensor:
        normalized, background = normalize(volume)
        return pad_around(normalized, padded_shape, background)[0]

    signature = tf.TensorSpec((None, None, None, images.shape[-1]), tf.float32)
    logits = network(tf.map_fn(prepare, images, fn_output_signature=signature))
    return _answer(crop(logits, (padded_shape - shape) // 2, shape), run)


def _serve_volume(run: Run, network: Any, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """One volume, seen in windows."""
    normalized, background = normalize(finite(images))
    logits = sliding_window_logits(
        network,
        normalized,
        run.config.crop,
        background=background,
        num_outputs=run.regions.num_outputs,
        overlap=run.config.overlap,
    )
    return {name: values[0] for name, values in _answer(logits[None], run).items()}


def _answer(logits: tf.Tensor, run: Run) -> dict[str, tf.Tensor]:
    labels = label_map(logits, run.regions)
    if run.config.largest_component:
        labels = tf.map_fn(lambda each: largest_components(each, run.regions), labels)
    return {
        "probabilities": region_probabilities(logits, run.regions),
        "labels": tf.cast(labels, tf.uint8),
    }


def _next_version(output_dir: Path) -> int:
    names = [path.name for path in output_dir.glob("*")]
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def _description(run: Run) -> dict[str, Any]:
    return {
        "modalities": list(run.modalities),
        "regions": run.regions.get_config(),
        "axes": "x, y, z in RAS+ order",
        "window": list(run.config.crop),
        "overlap": run.config.overlap,
        "versions": compat.versions(),
    }
