"""Where a training step is computed: on one device, on several, on several machines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfmtseg.data.pipeline import Share
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.training.config import TrainConfig

# What TensorFlow raises in one worker when another one has died.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.FailedPreconditionError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)


class WorkerLost(Exception):
    """Another worker of this training has died."""


def make_strategy(config: TrainConfig) -> tf.distribute.Strategy:
    """The strategy that `config` asks for. Comes before all other use of TensorFlow.

    `auto` is several workers where `TF_CONFIG` names a cluster, else as many replicas as are
    asked for, else as many GPUs as can share the patches of a step evenly, else one device.
    Without a GPU, replicas share the processor: no faster than one, but the same steps as
    on as many GPUs.

    Raises:
        InputError: If there are fewer devices than replicas, or the patches of a step
            cannot be shared out evenly.
    """
    gpus = tf.config.get_visible_devices("GPU")
    shared = {}  # patches of a step
    if config.mode == "train":
        shared["labeled_per_step"] = config.labeled_per_step
    if config.uses_unlabelled:
        shared["unlabeled_per_step"] = config.unlabeled_per_step
    name, count = config.strategy, config.num_replicas or len(gpus)
    if name == "auto" and _cluster():
        name = "multi_worker"
    elif name == "auto":
        if not config.num_replicas:
            together = math.gcd(*shared.values())
            count = max(n for n in range(1, max(len(gpus), 1) + 1) if together % n == 0)
            if count < len(gpus):
                warnings.warn(
                    f"{' and '.join(f'--{key}={value}' for key, value in shared.items())}: "
                    f"{count} of {len(gpus)} GPUs train; no more can share these patches evenly.",
                    InputWarning,
                    stacklevel=2,
                )
        name = "mirrored" if count > 1 else "one_device"
    if name == "one_device":
        strategy = tf.distribute.get_strategy()
    elif name == "multi_worker":
        if not _cluster():
            raise InputError(
                "TF_CONFIG", "cluster of workers", "missing",
                "set for --strategy=multi_worker, naming all workers and this one's task",
                'set it, such as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
                '"task": {"type": "worker", "index": 0}}',
            )  # fmt: skip
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        if gpus and count > len(gpus):
            raise InputError(
                "--num_replicas", "value", count, f"at most {len(gpus)}, the number of GPUs",
                "choose fewer, or 0 for all",
            )  # fmt: skip
        if not gpus:
            _divide_processor(count)
        kind = "GPU" if gpus else "CPU"
        strategy = tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(count)])
    replicas = strategy.num_replicas_in_sync
    if config.num_replicas not in (0, replicas):
        raise InputError(
            "--num_replicas", "value", config.num_replicas,
            f"{replicas}, as --strategy={name} comes to", "leave it out, or change --strategy",
        )  # fmt: skip
    for setting, value in shared.items():
        if value % replicas:
            raise InputError(
                f"--{setting}", "value", value,
                f"a multiple of the {replicas} replicas, which share a step's patches evenly",
                f"choose {-(-value // replicas) * replicas}, or another --num_replicas",
            )  # fmt: skip
    return strategy


def _cluster() -> dict[str, Any]:
    """The cluster that `TF_CONFIG` describes, empty without one."""
    try:
        return dict(json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {}))
    except (ValueError, AttributeError, TypeError):
        raise InputError(
            "TF_CONFIG", "value", "unreadable", "JSON with cluster and task", "correct or unset it"
        ) from None


def _divide_processor(count: int) -> None:
    """Makes `count` devices of the processor, unless there are as many already."""
    if count < 1:
        raise InputError(
            "--num_replicas", "value", count, "1 or more where there is no GPU", "choose 2"
        )
    (cpu,) = tf.config.list_physical_devices("CPU")
    if len(tf.config.get_logical_device_configuration(cpu) or ()) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        raise InputError(
            "--num_replicas", "value", count, "1 once TensorFlow runs, where there is no GPU",
            "train in a process of its own",
        ) from None  # fmt: skip


def distribute(strategy: tf.distribute.Strategy, make: Any) -> Any:
    """A dataset for `fit` of which each replica gets its share.

    Args:
        strategy: Who trains.
        make: Maps a `Share` to the dataset of those replicas' batches.
    """

    def of_pipeline(context: tf.distribute.InputContext) -> tf.data.Dataset:
        total = strategy.num_replicas_in_sync
        count = total // context.num_input_pipelines
        return make(Share(context.input_pipeline_id * count, count, total))

    return strategy.distribute_datasets_from_function(of_pipeline)


def several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


@contextlib.contextmanager
def lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Within it, what TensorFlow raises when another worker has died is a `WorkerLost`."""
    try:
        yield
    except LOST as error:
        if several_workers(strategy):
            raise WorkerLost(error.message) from error
        raise


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Returns once all workers have come here."""
    strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: tf.ones(())), axis=None)


def anywhere(strategy: tf.distribute.Strategy, here: bool) -> bool:
    """Whether something is so in any worker; all of them come here, with what is so in theirs."""
    if not several_workers(strategy):
        return here
    counted = strategy.run(lambda: tf.cast(here, tf.float32))
    return float(strategy.reduce(tf.distribute.ReduceOp.SUM, counted, axis=None)) > 0


def writes(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the run's files: the first worker does."""
    return bool(strategy.extended.should_checkpoint)
