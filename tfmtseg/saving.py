"""What TensorFlow saves, whole or not at all, and what all SavedModels have in common."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfmtseg.files import atomic_folder, write_json


@contextlib.contextmanager
def whole_or_not(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, TensorFlow saves to `folder`, and leaves no part when it fails.

    TensorFlow writes to a temporary folder and moves the files of a save when all are
    written; what is left of a save that failed or was killed stays, as large as a whole one.

    Raises:
        OSError: If the files cannot be written, the disk being full, say.
    """
    try:
        yield
    except tf.errors.OpError as error:
        reason = error.message.rsplit("; ", 1)[-1]
        raise OSError(errno.EIO, reason, str(folder)) from None
    finally:
        for part in Path(folder).glob("*_temp"):
            shutil.rmtree(part)


def trace(function: Callable[[tf.Tensor], Any], shape: Sequence[int | None]) -> Any:
    """The graph of a function of float32 `images` of this shape."""
    # Nothing in these graphs hangs on Python's `if` or `for`; looking for it takes seconds.
    traced = tf.function(function, autograph=False)
    return traced.get_concrete_function(tf.TensorSpec(shape, tf.float32, "images"))


def finite(images: tf.Tensor) -> tf.Tensor:
    """Fails as reading a file does: one such voxel would make all of the volume background."""
    return tf.debugging.check_numerics(images, "images: values must be finite;")


def write_saved_model(
    folder: str | os.PathLike[str],
    signatures: Mapping[str, Any],
    weights: Sequence[Any],
    description: Mapping[str, Any] | None = None,
) -> None:
    """Writes a SavedModel, which appears at once and whole.

    Args:
        folder: A new folder.
        signatures: What `trace` gave, by name.
        weights: Variables that their graphs use.
        description: Content of `assets.extra/model.json`, if any.

    Raises:
        OSError: If the folder cannot be written, or is there and not empty.
    """
    module = tf.Module()
    module.weights = weights
    # Who serves a model does not train it.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    with atomic_folder(folder) as temporary, whole_or_not(folder):
        tf.saved_model.save(module, str(temporary), dict(signatures), options)
        if description is not None:
            write_json(temporary / "assets.extra" / "model.json", description)
