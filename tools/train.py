"""Trains a model; run it again with the same flags to go on after a break.

Settings come from the defaults, then from a settings file (`--config_file`, or the
shipped one for a known data set), then from flags.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.data.cases import peek_data_folder
from tfmtseg.training.config import TrainConfig, find_preset, read_settings
from tfmtseg.training.run import train
from tfmtseg.training.strategy import WorkerLost

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
        origin = find_preset(folder.name if folder else "")
        if origin is not None:
            print(f"Settings: {origin} (made for this data set; flags win)")
    settings = read_settings(origin) if origin is not None else {}
    TrainConfig.from_mapping(settings, str(origin))  # names the file, should it be wrong
    return TrainConfig.from_mapping({**settings, **chosen}, "flags")


def _train() -> None:
    config = _read_config()
    try:
        result = train(config)
    except WorkerLost as error:
        # TensorFlow cannot take a worker back into a running cluster: all begin again, and
        # wait for each other at the start.
        print(f"A worker was lost, starting again: {str(error).splitlines()[0]}", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if config.mode == "pretrain":
        further = f"train.py --init_checkpoint={config.model_dir}"
    elif result.get("num_test"):
        further = f"evaluate.py --model_dir={config.model_dir}"
    else:
        further = f"predict.py --model_dir={config.model_dir}"
    print(f"Trained in {result['seconds']:.0f} s. Next: python tools/{further}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_train)


def run() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    run()
