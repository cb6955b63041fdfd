"""Trains a model; run it again with the same flags to go on after a break.

Settings come from the defaults, then from a settings file (`--config_file`, or the
shipped one for a known data set), then from flags.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from tfmtseg.console import BAD_SYSTEM, command, flags_only, report_problems
from tfmtseg.data.folder import peek_data_folder
from tfmtseg.training.checkpoint import latest_checkpoint
from tfmtseg.training.config import TrainConfig, find_preset, read_settings
from tfmtseg.training.run import train
from tfmtseg.training.strategy import WorkerLost

_LOST = "TFMTSEG_WORKER_LOST"  # environment: how often in a row, and after which checkpoint
_MOST_STARTS = 5

_CONFIG_FILE = flags.DEFINE_string("config_file", None, "YAML file of settings, by flag names.")


def _define_flags() -> None:
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            flags.DEFINE_bool(field.name, field.default, text)
        elif isinstance(field.default, tuple):
            flags.DEFINE_list(field.name, [_item(value) for value in field.default], text)
        elif isinstance(field.default, int):
            flags.DEFINE_integer(field.name, field.default, text)
        elif isinstance(field.default, float):
            flags.DEFINE_float(field.name, field.default, text)
        else:
            flags.DEFINE_string(field.name, field.default, text)


def _item(value: Any) -> str:
    """An item of a list: a value, or a tuple of them as 2x2x1."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_config() -> TrainConfig:
    chosen: dict[str, Any] = {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(TrainConfig)
        if flags.FLAGS[field.name].present
    }
    origin = _CONFIG_FILE.value
    if origin is None and chosen.get("data_dir"):
        folder = peek_data_folder(chosen["data_dir"], chosen.get("allow_root"))
        origin = find_preset(folder.name)
        if origin is not None:
            print(f"Settings: {origin} (made for this data set; flags win)")
    settings = read_settings(origin) if origin is not None else {}
    TrainConfig.from_mapping(settings, str(origin))  # names the file, should it be wrong
    return TrainConfig.from_mapping({**settings, **chosen}, "flags")


def _start_again(config: TrainConfig, error: WorkerLost) -> int:
    """Begins anew in this process's place, unless that has not helped; returns BAD_SYSTEM then.

    TensorFlow cannot take a worker back into a running cluster: all begin again, and wait for
    each other at the start.
    """
    reason = str(error).splitlines()[0]
    checkpoint = str(latest_checkpoint(Path(config.model_dir) / "checkpoints"))
    times, _, before = os.environ.get(_LOST, "").partition(" ")
    count = int(times) + 1 if before == checkpoint else 1
    if count > _MOST_STARTS:
        print(
            f"A worker was lost {count} times without a new checkpoint, giving up: {reason}. "
            "Look at what the others wrote last, then start all of them again.",
            file=sys.stderr,
        )
        return BAD_SYSTEM
    print(f"A worker was lost, starting again: {reason}", flush=True)
    os.environ[_LOST] = f"{count} {checkpoint}"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _train() -> int:
    config = _read_config()
    try:
        result = train(config)
    except WorkerLost as error:
        return _start_again(config, error)
    if config.mode == "pretrain":
        further = f"{command('train')} --init_checkpoint={config.model_dir}"
    elif result.get("num_test"):
        further = f"{command('evaluate')} --model_dir={config.model_dir}"
    else:
        further = f"{command('predict')} --model_dir={config.model_dir}"
    print(f"Trained in {result['seconds']:.0f} s. Next: {further}")
    return 0


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_train)


def run() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    run()
