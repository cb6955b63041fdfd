"""The precision of a run."""

from __future__ import annotations

import tensorflow as tf

PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


def choose_precision(asked: str) -> str:
    """The dtype policy of `asked`, one of `PRECISIONS`.

    `"auto"` is float32 on CPUs, so that a result does not depend on the processor
    (bfloat16 is faster on those that have it, docs/results/performance.md); on GPUs
    mixed_bfloat16 from compute capability 8 on, before which they have only float16.
    """
    if asked != "auto":
        return asked
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return "float32"
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        for gpu in gpus
    ]
    return "mixed_bfloat16" if min(capabilities) >= (8, 0) else "mixed_float16"
