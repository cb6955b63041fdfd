"""Making runs: order, breaks, failures, side by side; with tools that only pretend."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfmtseg import files
from tfmtseg.errors import InputError
from tfmtseg.experiment import run as run_module
from tfmtseg.experiment.plan import Experiment, Run, open_experiment, parse_arms, plan_runs
from tfmtseg.experiment.results import Results
from tfmtseg.experiment.run import make_runs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_module, "_POLL_SECONDS", 0.02)


def all_runs(experiment: Experiment, counts=(3,), seeds=(0,)) -> list[Run]:
    return plan_runs(experiment, list(experiment.arms.values()), counts, seeds)


def calls(tools: Path) -> list[str]:
    path = tools / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_run_once(make_experiment, tools):
    experiment = make_experiment("encdec", "sscpcseg")
    runs = all_runs(experiment, seeds=(0, 1))
    assert make_runs(experiment, runs, parallel=1, tools=tools) == []
    assert calls(tools) == [f"{run} from 0 threads 1" for run in runs]
    results = Results.read(experiment.results)
    trained = {run.key for run in runs}
    assert set(results.runs) == trained | {("shape_prior", 3, 0), ("shape_prior", 3, 1)}
    run = results.runs["encdec", 3, 0]
    assert (run.train_steps, run.seconds, run.cpu_seconds, run.parameters) == (4, 2.0, 1.5, 15)
    assert run.memory_mib > 1
    assert results.cases == ("p1_1", "p1_2", "p2_1", "p3_1")
    splits = experiment.results / "splits"
    assert {path.name for path in splits.iterdir()} == {
        "test.txt", "development.txt", "labeled_n3_seed0.txt", "labeled_n3_seed1.txt",
    }  # fmt: skip
    assert (splits / "labeled_n3_seed1.txt").read_text() == "labeled of 3 1\n"

    before = {path: path.read_bytes() for path in experiment.results.glob("*.*")}
    assert make_runs(experiment, runs, parallel=1, tools=tools) == []
    assert len(calls(tools)) == 4
    assert {path: path.read_bytes() for path in experiment.results.glob("*.*")} == before


def test_results_alone_are_enough_to_go_on(make_experiment, tools):
    experiment = make_experiment("encdec", "sscpcseg")
    first, second = all_runs(experiment)
    make_runs(experiment, [first], parallel=1, tools=tools)
    (experiment.directory / "runs").rename(experiment.directory / "gone")
    make_runs(experiment, [first, second], parallel=1, tools=tools)
    assert len(calls(tools)) == 2
    assert {first.key, second.key} <= set(Results.read(experiment.results).runs)


def test_side_by_side(make_experiment, tools):
    """The first two runs wait until both are at work; a third never is."""
    experiment = make_experiment("encdec", "sscpcseg")
    runs = all_runs(experiment, seeds=(0, 1))
    (tools / "block").write_text(f"{runs[0]} {runs[1]}")
    program = start_experiment(experiment, runs, tools, parallel=2)
    wait_for(lambda: all(steps(experiment, run) == 2 for run in runs[:2]))
    (tools / "block").unlink()
    assert program.wait(60) == 0
    assert set((tools / "most").read_text().split()) <= {"1", "2"}
    results = Results.read(experiment.results)
    assert {run.key for run in runs} <= set(results.runs)
    assert all(results.runs[run.key].side_by_side == 2 for run in runs[:2])


def test_a_run_that_has_the_machine_to_itself(make_experiment, tools):
    experiment = make_experiment("encdec")
    (run,) = all_runs(experiment)
    make_runs(experiment, [run], parallel=2, tools=tools)
    assert Results.read(experiment.results).runs[run.key].side_by_side == 1


def steps(experiment: Experiment, run: Run) -> int:
    path = experiment.run_directory(run) / "history.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def start_experiment(
    experiment: Experiment, runs: list[Run], tools: Path, parallel: int, system: str = "linux"
) -> subprocess.Popen:
    """Makes the runs in another process; `system` may pretend that this is no Linux."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tfmtseg.experiment import run\n"
        "from tfmtseg.experiment.plan import Experiment, Run\n"
        "import dataclasses\n"
        "run._POLL_SECONDS = 0.02\n"
        f"run._LAUNCHER = run._LAUNCHER.replace('linux', {system!r})\n"
        "experiment = dataclasses.replace(Experiment.read(Path(sys.argv[1])),\n"
        f"    data_dir={experiment.data_dir!r})\n"
        "runs = [Run(experiment.arms[a], int(n), int(s)) for a, n, s in\n"
        "        (text.split(',') for text in sys.argv[4:])]\n"
        "failed = run.make_runs(experiment, runs, parallel=int(sys.argv[3]),\n"
        "                       tools=Path(sys.argv[2]))\n"
        "sys.exit(len(failed))\n"
    )
    keys = [",".join(map(str, run.key)) for run in runs]
    return subprocess.Popen(
        [sys.executable, "-c", code, str(experiment.directory), str(tools), str(parallel), *keys]
    )


def test_a_killed_experiment_goes_on(make_experiment, tools):
    """kill -9 while the second of three runs is at step 2."""
    whole = make_experiment("encdec", "sscpcseg", "cpcseg", name="whole")
    make_runs(whole, all_runs(whole), parallel=1, tools=tools)
    (tools / "calls").unlink()

    experiment = make_experiment("encdec", "sscpcseg", "cpcseg", name="broken")
    runs = all_runs(experiment)
    (tools / "block").write_text(str(runs[1]))
    program = start_experiment(experiment, runs, tools, parallel=1)
    wait_for(lambda: steps(experiment, runs[1]) == 2)
    program.send_signal(signal.SIGKILL)
    program.wait(60)
    left_behind = int((experiment.run_directory(runs[1]) / "pid").read_text())
    wait_for(lambda: not at_work(left_behind))
    (tools / "active" / str(runs[1]).replace("/", "-")).unlink()
    (tools / "block").unlink()

    assert make_runs(experiment, runs, parallel=1, tools=tools) == []
    assert calls(tools) == [
        f"{runs[0]} from 0 threads 1",
        f"{runs[1]} from 0 threads 1",
        f"{runs[1]} from 2 threads 1",
        f"{runs[2]} from 0 threads 1",
    ]
    cases = [(e.results / "cases.csv").read_bytes() for e in (whole, experiment)]
    assert cases[0] == cases[1]


def test_runs_that_outlive_their_experiment_keep_the_next_call_off(
    make_experiment, tools, monkeypatch
):
    """Where runs do not end with the experiment, they hold its lock."""
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0)
    experiment = make_experiment("encdec")
    (run,) = all_runs(experiment)
    (tools / "block").write_text(str(run))
    program = start_experiment(experiment, [run], tools, parallel=1, system="unknown")
    wait_for(lambda: steps(experiment, run) == 2)
    program.kill()
    program.wait(60)
    with pytest.raises(InputError, match="experiment is at work in another process"):
        make_runs(experiment, [run], parallel=1, tools=tools)
    (tools / "block").unlink()
    left_behind = int((experiment.run_directory(run) / "pid").read_text())
    wait_for(lambda: not at_work(left_behind))
    assert make_runs(experiment, [run], parallel=1, tools=tools) == []
    assert calls(tools) == [f"{run} from {step} threads 1" for step in (0, 4)]


def at_work(process: int) -> bool:
    """Whether a process lives; one that waits for its parent to notice its end does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_failed_runs_are_told_and_do_not_stop_the_others(make_experiment, tools, capsys):
    experiment = make_experiment("encdec", "sscpcseg")
    runs = all_runs(experiment)
    (tools / "fail").write_text(str(runs[0]))
    assert make_runs(experiment, runs, parallel=1, tools=tools) == [runs[0]]
    log = experiment.run_directory(runs[0]) / "log.txt"
    told = capsys.readouterr().err
    assert f"{runs[0]} failed with exit status 1. Its log, {log}, ends in" in told
    assert "a made-up failure" in told
    assert runs[1].key in Results.read(experiment.results).runs
    (tools / "fail").unlink()
    assert make_runs(experiment, runs, parallel=1, tools=tools) == []
    assert runs[0].key in Results.read(experiment.results).runs


def test_other_cases_are_told_and_do_not_stop_the_others(make_experiment, tools, capsys):
    """The second arm's labelled cases are not those of the first."""
    experiment = make_experiment("encdec", "sscpcseg", "cpcseg")
    runs = all_runs(experiment)
    train = (tools / "train.py").read_text()
    (tools / "train.py").write_text(
        train.replace('labelled = f"', "labelled = (flags['method'] == 'sscpcseg') * 'x' + f\"")
    )
    assert make_runs(experiment, runs, parallel=1, tools=tools) == [runs[1]]
    assert "run sscpcseg, 3 labelled, seed 0: labelled cases is others" in capsys.readouterr().err
    assert {runs[0].key, runs[2].key} <= set(Results.read(experiment.results).runs)


def test_a_run_of_an_earlier_version_does_not_stop_the_others(make_experiment, tools, capsys):
    """Its result.json lacks what this version wants to know."""
    experiment = make_experiment("encdec", "sscpcseg")
    runs = all_runs(experiment)
    train = (tools / "train.py").read_text()
    (tools / "train.py").write_text(
        train.replace(
            '"code": "abc"', '**({"code": "abc"} if flags["method"] == "sscpcseg" else {})'
        )
    )
    assert make_runs(experiment, runs, parallel=2, tools=tools) == [runs[0]]
    assert "finished run is unreadable (KeyError: 'code')" in capsys.readouterr().err
    assert runs[1].key in Results.read(experiment.results).runs


def test_one_experiment_at_a_time(make_experiment, tools, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0)
    experiment = make_experiment("encdec")
    further = parse_arms(["sscpcseg"])
    experiment = open_experiment(
        experiment.directory, experiment.data_dir, experiment.settings, further, 1
    )
    with open(experiment.directory / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="experiment is at work in another process"):
            make_runs(experiment, all_runs(experiment), parallel=1, tools=tools)
    assert calls(tools) == []
    assert "sscpcseg" not in (experiment.results / "experiment.yaml").read_text()


def test_runs_end_with_an_interrupted_experiment(make_experiment, tools, monkeypatch):
    experiment = make_experiment("encdec")
    (run,) = all_runs(experiment)
    (tools / "block").write_text(str(run))

    def interrupt(self, at_work):
        if steps(experiment, run) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module._Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_runs(experiment, [run], parallel=1, tools=tools)
    assert not at_work(int((experiment.run_directory(run) / "pid").read_text()))


def test_threads_may_be_left_to_tensorflow(make_experiment, tools, monkeypatch):
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    experiment = make_experiment("encdec")
    object.__setattr__(experiment, "threads", 0)
    make_runs(experiment, all_runs(experiment), parallel=1, tools=tools)
    assert calls(tools) == ["encdec/n3_seed0 from 0 threads None"]
    assert "TF_NUM_INTRAOP_THREADS" not in os.environ
