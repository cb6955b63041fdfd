"""What the runs of an experiment will cost: time and memory, told before they start."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from statistics import mean, median

from tfmtseg.experiment.plan import Arm, Experiment, Run, steps_made
from tfmtseg.experiment.results import Results, RunResult
from tfmtseg.memory import GB, available_memory_gb
from tfmtseg.models.methods import METHODS
from tfmtseg.processor import processor_name
from tfmtseg.training.memory import training_memory_gb

# The rule for arms without a finished run, from trials on one core of a two-core server
# with crops of 32 x 48 x 32 and 96 x 96 x 8 and a width of 8.
_SECONDS_PER_VOXEL = 2e-6  # of every patch of a step, at a width of 8, in proportion to it
_BRANCH_FACTOR = 2  # for a second task
_START_SECONDS = 60  # TensorFlow's start and graphs, in training and evaluation
_SECONDS_PER_TEST_CASE = 0.5
_PARAMETERS = 48e6  # of the largest method at a width of 32

RULE = (
    f"patches of a step x voxels x width / 8 x {_SECONDS_PER_VOXEL * 1e6:g} microseconds, "
    f"x {_BRANCH_FACTOR} with a second task, and {_START_SECONDS} s; easily wrong by a factor of "
    "3; memory: at most about that"
)


class Estimates:
    """Time and memory of runs, from finished ones where there are any.

    Args:
        experiment: The experiment.
        results: Its finished runs.
    """

    def __init__(self, experiment: Experiment, results: Results):
        self.experiment = experiment
        self.by_kind: dict[object, list[RunResult]] = {}
        ratios = []
        for run in results.runs.values():
            arm = experiment.arms.get(run.arm)
            if arm is not None:  # the shape prior is none
                self.by_kind.setdefault(arm.kind, []).append(run)
                seconds = run.seconds + run.evaluation_seconds
                ratios.append(seconds / self._rule_seconds(arm))
        self.scale = median(ratios) if ratios else 1.0

    def seconds(self, run: Run) -> float:
        """Seconds of training and evaluation."""
        finished = self.by_kind.get(run.arm.kind)
        if not finished:
            return self.scale * self._rule_seconds(run.arm)
        here = [other for other in finished if other.processor == processor_name()] or finished
        per_step = mean(other.seconds / other.train_steps for other in here)
        rest = mean(other.evaluation_seconds for other in here)
        return per_step * self.experiment.steps(run.arm) + rest

    def memory_mib(self, run: Run) -> float:
        """Highest memory."""
        finished = self.by_kind.get(run.arm.kind, [])
        measured = max((other.memory_mib for other in finished), default=0)
        if measured:
            return measured
        config = self.experiment.sized(run)
        parameters = round(_PARAMETERS * (config.width / 32) ** 2)
        outputs = self.experiment.num_outputs
        return training_memory_gb(config, parameters, outputs) * GB / 2**20

    def source(self, run: Run) -> str:
        """Where the figures of a run come from."""
        count = len(self.by_kind.get(run.arm.kind, []))
        if count:
            return f"{count} finished"
        return "rule" if self.scale == 1 else f"rule x {self.scale:.2g}"

    def _rule_seconds(self, arm: Arm) -> float:
        config = self.experiment.sized(Run(arm, 0, 0))
        factor = _BRANCH_FACTOR if METHODS[arm.method].branch else 1
        voxels = config.patches_per_step() * prod(config.crop)
        per_step = _SECONDS_PER_VOXEL * factor * voxels * config.width / 8
        return (
            per_step * config.train_steps / max(self.experiment.threads, 1)
            + _START_SECONDS
            + _SECONDS_PER_TEST_CASE * self.experiment.num_test
        )


def describe_plan(
    experiment: Experiment, runs: Sequence[Run], results: Results, parallel: int
) -> str:
    """All runs with their state and what they will cost, and the sum.

    Args:
        experiment: The experiment.
        runs: Runs of it.
        results: Its finished runs.
        parallel: Runs at work at once.
    """
    estimates = Estimates(experiment, results)
    width = max(len(str(run)) for run in runs)
    lines = [f"{'run':{width}}  {'steps':>6}  {'state':14}  {'time':>9}  {'memory':>9}  from"]
    total, memory = 0.0, []
    for run in runs:
        if run.key in results.runs:
            state, cost = "finished", ""
        else:
            made = steps_made(experiment.run_directory(run))
            state = f"after step {made}" if made else "to do"
            seconds = estimates.seconds(run) * (1 - made / experiment.steps(run.arm))
            memory.append(estimates.memory_mib(run))
            total += seconds
            cost = f"{duration(seconds):>9}  {memory[-1] / 1024:5.1f} GiB  {estimates.source(run)}"
        lines.append(f"{run!s:{width}}  {experiment.steps(run.arm):6}  {state:14}  {cost}".rstrip())
    side_by_side = min(parallel, len(memory))
    lines.append(
        f"{len(memory)} of {len(runs)} runs to make: {duration(total)} one after the other; "
        f"--parallel={parallel}: {duration(total / max(side_by_side, 1))} or somewhat more, "
        f"{sum(sorted(memory)[-side_by_side:]) / 1024 if memory else 0:.1f} GiB of "
        f"{available_memory_gb() * GB / 2**30:.1f} GiB free memory."
    )
    if any(estimates.source(run).startswith("rule") for run in runs if run.key not in results.runs):
        lines.append(f"Rule: {RULE}.")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} m" if hours else f"{minutes} m {rest:02} s"
