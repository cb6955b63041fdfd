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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.errors import InputError
from tfmtseg.files import atomic_folder, write_json
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
from tfmtseg.training.checkpoint import whole_or_not
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
    module, signatures = served(run)
    path = output_dir / str(_next_version(output_dir))
    # Who serves a model does not train it.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    with atomic_folder(path) as temporary, whole_or_not(path):
        tf.saved_model.save(module, str(temporary), signatures, options)
        write_json(temporary / "assets.extra" / "model.json", _description(run))
    return path


def served(run: Run) -> tuple[tf.Module, dict[str, Any]]:
    """The graphs of a run's model.

    Args:
        run: A trained run.

    Returns:
        What holds the weights that inference needs, and the signatures by name.
    """
    channels = len(run.modalities)
    with library.disabled():
        network = _concrete(
            lambda images: run.model(images, training=False), (None, None, None, None, channels)
        )
    signatures = {
        "serving_default": _concrete(
            lambda images: _serve_batch(run, network, images), (None, None, None, None, channels)
        ),
        "volume": _concrete(
            lambda images: _serve_volume(run, network, images), (None, None, None, channels)
        ),
    }
    module = tf.Module()
    module.weights = network.variables
    return module, signatures


def _concrete(function: Callable[[tf.Tensor], Any], shape: Sequence[int | None]) -> Any:
    # Nothing in these graphs hangs on Python's `if` or `for`; looking for it takes seconds.
    traced = tf.function(function, autograph=False)
    return traced.get_concrete_function(tf.TensorSpec(shape, tf.float32, "images"))


def _serve_batch(run: Run, network: Any, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """Volumes that are seen in one piece, padded to what the strides divide."""
    images = _finite(images)
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
    normalized, background = normalize(_finite(images))
    logits = sliding_window_logits(
        network,
        normalized,
        run.config.crop,
        background=background,
        num_outputs=run.regions.num_outputs,
        overlap=run.config.overlap,
    )
    return {name: values[0] for name, values in _answer(logits[None], run).items()}


def _finite(images: tf.Tensor) -> tf.Tensor:
    """Fails as reading a file does: one such voxel would spoil the whole volume."""
    return tf.debugging.check_numerics(images, "images: values must be finite;")


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
