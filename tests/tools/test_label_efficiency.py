"""The whole experiment on small phantoms, as users call it."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfmtseg.data.phantom import write_phantoms

TOOL = Path(__file__).resolve().parents[2] / "tools" / "label_efficiency.py"
SETTINGS = {
    "regions": "brats_msd", "num_test": 2, "width": 8, "crop": "16,16,16", "dropout": 0.1,
    "steps_per_epoch": 1, "ema_momentum": 0.5, "learning_rate": 0.003,
}  # fmt: skip
ARMS = "--arms=shape_prior,encdec,plain=encdec:dropout=0"
SETS = [f"--set={name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture
def data(tmp_path) -> Path:
    write_phantoms(tmp_path / "data", 4, shape=(24, 24, 24))
    return tmp_path / "data"


def command(data: Path, output_dir: Path, *flags: str) -> list[str]:
    common = [f"--data_dir={data}", f"--output_dir={output_dir}", "--num_labeled=1", "--seeds=0"]
    return [sys.executable, str(TOOL), *common, "--train_steps=2", *SETS, *flags]


@pytest.fixture
def make(call):
    """Calls the tool with the flags of `command`."""
    return lambda *arguments: call("label_efficiency", *command(*arguments)[2:])


def test_the_plan_trains_and_writes_nothing(data, tmp_path, make):
    done = make(data, tmp_path / "out", "--arms=shape_prior,encdec,pasted", "--plan")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:4] == ["encdec/n1_seed0", "2", "to", "do"]
    assert lines[2].split()[:4] == ["pasted/n1_seed0", "2", "to", "do"]
    assert lines[3].startswith("2 of 2 runs to make: ")
    assert not (tmp_path / "out").exists()


def test_a_plan_for_data_that_is_not_there(tmp_path, make):
    done = make(tmp_path / "typo", tmp_path / "out", "--plan")
    assert done.returncode == 2
    assert f"{tmp_path / 'typo'}: data folder is missing, must be a folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_report_on_nothing(tmp_path, make):
    done = make(tmp_path / "none", tmp_path / "out", "--report_only")
    assert done.returncode == 2
    assert f"{tmp_path / 'out'}: experiment is missing, must be" in done.stderr
    assert not (tmp_path / "out").exists()


def scores(output_dir: Path) -> str:
    return (output_dir / "results" / "cases.csv").read_text()


def table(output_dir: Path) -> list[dict[str, str]]:
    """The table without what differs from time to time."""
    with (output_dir / "results" / "table.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds", "memory_mib")}
            for row in csv.DictReader(file)
        ]


def forget_run(output_dir: Path, arm: str) -> None:
    """Makes an experiment of one that is not finished."""
    shutil.rmtree(output_dir / "runs" / arm)
    for name in ("runs.csv", "cases.csv"):
        path = output_dir / "results" / name
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(row for row in rows if not row.startswith(f"{arm},")))
        assert 1 < len(path.read_text().splitlines()) < len(rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # several starts of TensorFlow
def test_a_killed_experiment_gives_the_same_table(data, tmp_path, call, make):
    """kill -9 after the second arm's first checkpoint; beside it two runs side by side."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = make(data, whole, ARMS, "--parallel=2")
    assert done.returncode == 0, done.stderr

    shutil.copytree(whole, broken)
    forget_run(broken, "plain")
    history = broken / "runs" / "plain" / "n1_seed0" / "history.csv"
    checkpoint = history.parent / "checkpoints" / "checkpoint"
    killed = subprocess.Popen(command(data, broken, ARMS), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not checkpoint.exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (history.parent / "result.json").exists()
    encdec = broken / "runs" / "encdec" / "n1_seed0" / "result.json"
    before = encdec.stat().st_mtime_ns

    shutil.rmtree(encdec.parent / "checkpoints")  # a repeated run would miss them
    done = make(data, broken, ARMS)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs to make" in done.stdout
    assert encdec.stat().st_mtime_ns == before
    assert "Going on after step 1" in (history.parent / "log.txt").read_text()
    assert scores(broken) == scores(whole)
    assert table(broken) == table(whole)
    assert {row["arm"] for row in table(whole)} == {"shape_prior", "encdec", "plain"}
    report = (whole / "results" / "report.md").read_text()
    assert str(tmp_path) not in report

    # From the kept results alone.
    kept = tmp_path / "kept"
    shutil.copytree(whole / "results", kept / "results")
    (kept / "results" / "report.md").unlink()
    done = call("label_efficiency", f"--output_dir={kept}", "--report_only")
    assert done.returncode == 0, done.stderr
    assert (kept / "results" / "report.md").read_text() == report
