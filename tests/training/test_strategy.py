"""Runs on several replicas: the same curves as on one, and workers that die."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf
from tfmtseg.tools import train as train_tool

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.errors import InputError
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.run import train
from tfmtseg.training.strategy import WorkerLost, make_strategy

ROOT = Path(__file__).resolve().parents[2]

# Three held-out cases in batches of two: in the last batch, one replica has none.
CONFIG = TrainConfig(
    method="encdec", regions="brats_msd", num_labeled=2, num_development=3, width=8,
    crop=(16, 16, 16), train_steps=4, steps_per_epoch=2, strategy="one_device",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    root = tmp_path_factory.mktemp("strategy")
    write_phantoms(root / "data", 5, seed=1, shape=(20, 20, 20))
    places = {"data_dir": root / "data", "cache_dir": root / "cache", "model_dir": root / "run"}
    return dataclasses.replace(CONFIG, **{name: str(path) for name, path in places.items()})


def curve(config: TrainConfig) -> list[dict[str, float]]:
    """The losses and scores of a run."""
    with (Path(config.model_dir) / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    times = ("seconds", "cpu_seconds")
    return [{k: float(v) for k, v in row.items() if k not in times} for row in rows]


def same_curves(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert [row["step"] for row in one] == [2, 4]
    for ours, theirs in zip(one, other, strict=True):
        # Adam turns rounding of gradients near 0 into updates; four of them.
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def alone(config) -> list[dict[str, float]]:
    """The curve of one replica."""
    train(config)
    return curve(config)


def test_two_replicas_have_the_curve_of_one(config, alone, tmp_path):
    mirrored = dataclasses.replace(
        config, model_dir=str(tmp_path / "run"), strategy="mirrored", num_replicas=2
    )
    (tmp_path / "config.yaml").write_text(mirrored.to_yaml())
    # In a process of its own, as for users: the processor is divided before all else.
    command = [sys.executable, "tools/train.py", f"--config_file={tmp_path / 'config.yaml'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["num_replicas"] == 2
    same_curves(curve(mirrored), alone)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


DIES_AFTER_AN_EPOCH = """
import os, signal, sys
from tfmtseg.training import callbacks
def die(self, epoch, logs=None): os.kill(os.getpid(), signal.SIGKILL)
callbacks.Checkpoints.on_epoch_end = die
from tfmtseg.tools import train
train.run()
"""


class Workers:
    """Two workers of a training, in processes of their own."""

    def __init__(self, config: TrainConfig, run: Path, folder: Path):
        changes = {**dataclasses.asdict(config), "model_dir": str(run), "strategy": "auto"}
        self.settings = folder / "config.yaml"
        self.settings.write_text(TrainConfig(**changes).to_yaml())
        self.hosts = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.processes: list[subprocess.Popen] = []

    def output(self, place: int) -> Path:
        return self.settings.with_name(f"worker{place}.txt")

    def start(self, index: int, *command: str) -> None:
        """Starts the worker of that index; the first process that was started is number 0."""
        task = {"type": "worker", "index": index}
        cluster = json.dumps({"cluster": {"worker": self.hosts}, "task": task})
        with self.output(len(self.processes)).open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command, f"--config_file={self.settings}"], stdout=file,
                stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "TF_CONFIG": cluster},
            )  # fmt: skip
        self.processes.append(process)

    def wait(self, place: int) -> int:
        return self.processes[place].wait(timeout=300)

    def said(self, place: int) -> str:
        return self.output(place).read_text()

    def end(self) -> None:
        """Reaps all, whatever happened: a process that is left would fail a later test."""
        for process in self.processes:
            process.kill()
            process.wait()


def test_a_worker_dies_and_comes_back(config, alone, tmp_path):
    """kill -9 of the second of two workers; it is started again, and the run finishes."""
    run = tmp_path / "run"
    workers = Workers(config, run, tmp_path)
    try:
        workers.start(0, "tools/train.py")
        workers.start(1, "-c", DIES_AFTER_AN_EPOCH)
        assert workers.wait(1) == -signal.SIGKILL, workers.said(1)[-2000:]
        assert not (run / "result.json").exists()
        workers.start(1, "tools/train.py")
        for place in (2, 0):
            assert workers.wait(place) == 0, workers.said(place)[-2000:]
            assert "Going on after step 2" in workers.said(place)
    finally:
        workers.end()
    assert "A worker was lost, starting again" in workers.said(0)
    same_curves(curve(dataclasses.replace(config, model_dir=str(run))), alone)
    assert json.loads((run / "result.json").read_text())["num_replicas"] == 2


ASKED_TO_END_AFTER_STEP_3 = """
import os, signal
from tfmtseg.training import callbacks
count = callbacks.Checkpoints.on_train_batch_end
def ask(self, batch, logs=None):
    count(self, batch, logs)
    if self.step == 3: os.kill(os.getpid(), signal.SIGTERM)
callbacks.Checkpoints.on_train_batch_end = ask
from tfmtseg.tools import train
train.run()
"""


def test_a_worker_is_asked_to_end(config, tmp_path):
    """SIGTERM at the second of two workers, amid an epoch: the first one saves, and both end."""
    run = tmp_path / "run"
    workers = Workers(config, run, tmp_path)
    try:
        workers.start(0, "tools/train.py")
        workers.start(1, "-c", ASKED_TO_END_AFTER_STEP_3)
        assert [workers.wait(place) for place in range(2)] == [143, 143]
    finally:
        workers.end()
    assert "Another worker was asked to end: saved after step 3." in workers.said(0)
    assert "Asked to end. Repeat" in workers.said(1)
    latest = tf.train.latest_checkpoint(run / "checkpoints")
    assert tf.train.load_variable(latest, "step/.ATTRIBUTES/VARIABLE_VALUE") == 3


class _StartedAgain(Exception):
    pass


def test_a_worker_gives_up_where_starting_again_does_not_help(tmp_path, monkeypatch, capsys):
    """Such as an error of its own, which looks like that of another."""
    checkpoints: list[str | None] = [None, None, "step-1", "step-1", "step-2"]
    checkpoints += ["step-3"] * 6
    monkeypatch.delenv(train_tool._LOST, raising=False)
    monkeypatch.setattr(train_tool, "latest_checkpoint", lambda folder: checkpoints.pop(0))

    def again(*command):
        raise _StartedAgain

    monkeypatch.setattr(os, "execv", again)
    config, error = TrainConfig(model_dir=str(tmp_path)), WorkerLost("gone\ntrace")
    for _ in range(len(checkpoints) - 1):
        with pytest.raises(_StartedAgain):
            train_tool._start_again(config, error)
    assert train_tool._start_again(config, error) == 1
    assert "lost 6 times without a new checkpoint, giving up: gone." in capsys.readouterr().err


def test_auto_is_one_device_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])
    assert make_strategy(TrainConfig()) is tf.distribute.get_strategy()


@pytest.mark.parametrize(
    ("gpus", "method", "labeled", "unlabeled", "used"),
    [
        (1, "encdec", 2, 1, 1),
        (2, "encdec", 2, 1, 2),
        (3, "encdec", 2, 1, 2),  # the default of labelled patches
        (8, "encdec", 6, 1, 6),
        (4, "sscpcseg", 6, 4, 2),
        (4, "sscpcseg", 4, 3, 1),
    ],
)
def test_auto_takes_as_many_gpus_as_share_a_step(
    gpus, method, labeled, unlabeled, used, monkeypatch, recwarn
):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(
        tf.config, "get_visible_devices", lambda kind: [None] * (gpus if kind == "GPU" else 1)
    )
    strategy = SimpleNamespace(num_replicas_in_sync=used)
    made = []
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda on: made.append(on) or strategy)
    make_strategy(
        TrainConfig(method=method, labeled_per_step=labeled, unlabeled_per_step=unlabeled)
    )
    assert made == ([[f"GPU:{i}" for i in range(used)]] if used > 1 else [])
    warned = [f"{used} of {gpus} GPUs train" in str(each.message) for each in recwarn]
    assert warned == [True] * (used < gpus)


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("name", ["auto", "multi_worker"])
def test_a_cluster_is_used(name, gpus, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["one:1", "two:1"]}}')
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [None] * gpus)
    workers = SimpleNamespace(num_replicas_in_sync=2)
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda: workers)
    assert make_strategy(TrainConfig(strategy=name)) is workers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "mirrored"}, r"num_replicas: value is 0, must be 1 or more where there is"),
        (
            {"strategy": "one_device", "num_replicas": 2},
            r"num_replicas: value is 2, must be 1, as --strategy=one_device",
        ),
        ({"strategy": "mirrored", "num_replicas": 16}, r"must be 1 once TensorFlow runs"),
        ({"strategy": "auto", "num_replicas": 16}, r"must be 1 once TensorFlow runs"),
        (
            {"strategy": "mirrored", "num_replicas": 2, "labeled_per_step": 3},
            r"labeled_per_step: value is 3, must be a multiple of the 2 replicas.*choose 4",
        ),
        (
            {"strategy": "mirrored", "num_replicas": 2, "unlabeled_per_step": 5},
            r"unlabeled_per_step: value is 5, must be a multiple of the 2 replicas.*choose 6",
        ),
        ({"strategy": "multi_worker"}, r"TF_CONFIG: cluster of workers is missing"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tf.zeros(())  # TensorFlow runs
    with pytest.raises(InputError, match=message):
        make_strategy(TrainConfig(**changes))


def test_a_cluster_that_is_no_json_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(InputError, match="TF_CONFIG: value is unreadable"):
        make_strategy(TrainConfig())
