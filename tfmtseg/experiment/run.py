"""Makes the runs of an experiment, several side by side, and goes on after a break."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tfmtseg.errors import InputError
from tfmtseg.experiment.estimate import Estimates
from tfmtseg.experiment.plan import THREAD_VARIABLES, Experiment, Run, steps_made
from tfmtseg.experiment.results import Results, collect, keep_splits
from tfmtseg.files import lock

_POLL_SECONDS = 0.5
# Runs must not outlive an experiment that is killed: the next call would go on with them
# at the same time. Linux ends them (prctl 1 is PR_SET_PDEATHSIG, signal 9); elsewhere the
# lock, which they inherit, keeps the next call off until they are done.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)


@dataclass
class _Job:
    """A run at work.

    Args:
        run: The run.
        stages: Commands that are still to come.
        process: The command at work.
        memory_mib: Highest memory of the commands so far.
        side_by_side: The most runs that were at work with it, itself included.
    """

    run: Run
    stages: list[list[str]]
    process: subprocess.Popen[bytes]
    memory_mib: int = 0
    side_by_side: int = 1


def make_runs(
    experiment: Experiment, runs: Sequence[Run], *, parallel: int, tools: Path
) -> list[Run]:
    """Makes those of `runs` that are not in the results yet, and adds them there.

    A run that fails, or has other test or labelled cases than those in the results, is
    told of and does not stop the others. Whatever happens, what is finished is not
    repeated by the next call, and what is not goes on from its last checkpoint.

    Args:
        experiment: The experiment.
        runs: Runs of it, in the order in which they are started.
        parallel: Runs at work at once.
        tools: Folder of train.py and evaluate.py.

    Returns:
        The runs that failed.

    Raises:
        InputError: If another process makes runs of this experiment.
    """
    with lock(experiment.directory, "experiment") as held:
        experiment.write()
        results = Results.read(experiment.results)
        waiting = [run for run in runs if run.key not in results.runs]
        progress = _Progress(experiment, results, waiting, len(runs))
        at_work: list[_Job] = []
        failed: list[Run] = []
        try:
            while waiting or at_work:
                while waiting and len(at_work) < parallel:
                    at_work.append(_start(experiment, waiting.pop(0), tools, held))
                for job in at_work:
                    job.side_by_side = max(job.side_by_side, len(at_work))
                time.sleep(_POLL_SECONDS)
                for job in list(at_work):
                    code = _poll(job)
                    if code == 0 and job.stages:
                        job.process = _launch(experiment, job.run, job.stages.pop(0), held)
                    elif code is not None:
                        at_work.remove(job)
                        progress.ended.append(job.run)
                        try:
                            results = _take_in(experiment, results, job, code)
                        except (InputError, _RunFailed) as error:
                            failed.append(job.run)
                            progress.tell(str(error))
                progress.update([job.run for job in at_work])
        finally:
            progress.bar.close()
            for job in at_work:
                job.process.kill()
                job.process.wait()
    return failed


class _Progress:
    """One bar over all runs, with the time left.

    The bar counts estimated seconds of single runs, and the time left follows from its
    pace, so that only the proportions of the estimates matter.

    Args:
        experiment: The experiment.
        results: Its finished runs.
        waiting: Runs to make.
        total: Number of runs, the finished ones included.
    """

    def __init__(self, experiment: Experiment, results: Results, waiting: list[Run], total: int):
        self.experiment = experiment
        self.total = total
        self.finished_before = total - len(waiting)
        self.ended: list[Run] = []
        estimates = Estimates(experiment, results)
        self.seconds = {run: estimates.seconds(run) for run in waiting}
        self.bar = tqdm(
            total=sum(self.seconds.values()),
            initial=sum(self._made(run) for run in waiting),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            # A file gets a line now and then, a terminal a live bar.
            mininterval=0.5 if sys.stderr.isatty() else 60.0,
            disable=not waiting,
        )

    def _made(self, run: Run) -> float:
        """Seconds of a run's estimate that belong to the updates it has made."""
        made = steps_made(self.experiment.run_directory(run))
        return self.seconds[run] * made / self.experiment.steps(run.arm)

    def update(self, at_work: Sequence[Run]) -> None:
        """Moves the bar."""
        ended = self.finished_before + len(self.ended)
        self.bar.set_description_str(f"Runs {ended}/{self.total}", refresh=False)
        self.bar.set_postfix_str(", ".join(map(str, at_work)), refresh=False)
        done = sum(self.seconds[run] for run in self.ended)
        done += sum(self._made(run) for run in self.seconds if run not in self.ended)
        self.bar.update(done - self.bar.n)

    def tell(self, text: str) -> None:
        """Prints lines above the bar."""
        self.bar.write(text, file=sys.stderr)


def _start(experiment: Experiment, run: Run, tools: Path, held: int) -> _Job:
    """Starts the training of a run, or goes on with it."""
    directory = experiment.run_directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    root = str(experiment.directory.resolve())
    data_dir = str(Path(experiment.data_dir).resolve())
    train = [str(tools / "train.py"), *experiment.train_flags(run, data_dir, root)]
    evaluate = [str(tools / "evaluate.py"), f"--model_dir={directory.resolve()}"]
    evaluate.append(f"--data_dir={data_dir}")
    if experiment.settings.allow_root:
        evaluate.append(f"--allow_root={experiment.settings.allow_root}")
    return _Job(run, [evaluate], _launch(experiment, run, train, held))


def _launch(
    experiment: Experiment, run: Run, command: list[str], held: int
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if experiment.threads:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(experiment.threads))
    with open(experiment.run_directory(run) / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(held,),
        )


def _poll(job: _Job) -> int | None:
    """The exit status of the command at work, once it has ended; notes its memory."""
    process, status, usage = os.wait4(job.process.pid, os.WNOHANG)
    if process == 0:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    job.memory_mib = max(job.memory_mib, usage.ru_maxrss // unit)
    job.process.returncode = os.waitstatus_to_exitcode(status)
    return job.process.returncode


class _RunFailed(Exception):
    """A command of a run ended with another status than 0."""


def _take_in(experiment: Experiment, results: Results, job: _Job, code: int) -> Results:
    """The results with those of a run that has ended; written."""
    if code != 0:
        raise _RunFailed(_failure(experiment, job.run, code))
    directory = experiment.run_directory(job.run)
    results = collect(
        results, job.run, directory, memory_mib=job.memory_mib, side_by_side=job.side_by_side
    )
    keep_splits(job.run, directory, experiment.results)
    results.write(experiment.results)
    return results


def _failure(experiment: Experiment, run: Run, code: int) -> str:
    path = experiment.run_directory(run) / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    last = "\n".join(f"    {line}" for line in lines[-5:])
    return f"{run} failed with exit status {code}. Its log, {path}, ends in\n{last}"
