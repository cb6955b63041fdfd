"""Trains and tests every arm at every number of labelled cases, and writes what it shows.

An arm is a method, or NAME=METHOD:SETTING=VALUE:..., such as
long=encdec:train_steps=6000:crop=32/48/32. Run it again with the same flags to go on
after a break, or with further arms, numbers or seeds to add to the experiment.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.experiment.estimate import describe_plan
from tfmtseg.experiment.plan import (
    FEW,
    KNOWN_ARMS,
    SHAPE_PRIOR,
    Experiment,
    open_experiment,
    parse_arms,
    parse_counts,
    parse_seeds,
    parse_settings,
    plan_runs,
    read_base_settings,
)
from tfmtseg.experiment.report import write_report
from tfmtseg.experiment.results import Results
from tfmtseg.experiment.run import make_runs

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Data folder, as for tools/train.py.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder of the experiment.", required=True)
_CONFIG_FILE = flags.DEFINE_string(
    "config_file", None, "YAML file of settings. Default: the one made for the data set, if any."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "NAME=VALUE, a setting of tools/train.py for all runs; may be repeated."
)
_ARMS = flags.DEFINE_list(
    "arms",
    [SHAPE_PRIOR, "encdec", "sscpcseg"],
    f"Arms: methods, NAME=METHOD:SETTING=VALUE:..., or {', '.join(KNOWN_ARMS)}.",
)
_NUM_LABELED = flags.DEFINE_list(
    "num_labeled", ["3", "6", "all"], "Numbers of labelled cases, or all."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", None, "Short for --set train_steps=.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at work side by side.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "threads", 1, "Threads of each run; 0 leaves it to TensorFlow.", lower_bound=0
)
_FEW = flags.DEFINE_list(
    "few",
    None,
    f"Numbers of labelled cases that the claims are about. Default: as before, at first {FEW}.",
)
_PLAN = flags.DEFINE_bool("plan", False, "Only print the runs, with estimates of time and memory.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Only write the report again.")

SOME_RUN_FAILED = 1  # exit status


def _label_efficiency() -> int:
    directory = Path(_OUTPUT_DIR.value)
    few = parse_counts(_FEW.value, "--few") if _FEW.value else []
    if _REPORT_ONLY.value:
        experiment = Experiment.read(directory)
        if few:
            experiment = dataclasses.replace(experiment, few=tuple(few))
            experiment.write()
        _report(experiment)
        return 0
    changes = list(_SET.value)
    if _TRAIN_STEPS.value is not None:
        changes.append(f"train_steps={_TRAIN_STEPS.value}")
    settings = read_base_settings(
        _DATA_DIR.value, _CONFIG_FILE.value, parse_settings(changes, "--set")
    )
    arms = parse_arms(_ARMS.value)
    experiment = open_experiment(directory, _DATA_DIR.value, settings, arms, _THREADS.value, few)
    runs = plan_runs(experiment, arms, parse_counts(_NUM_LABELED.value), parse_seeds(_SEEDS.value))
    results = Results.read(experiment.results)
    results.check_test_cases(experiment.splits(runs[0]).test)
    print(describe_plan(experiment, runs, results, _PARALLEL.value))
    if _PLAN.value:
        return 0
    failed = make_runs(
        experiment, runs, parallel=_PARALLEL.value, tools=Path(__file__).resolve().parent
    )
    if len(failed) < len(runs):
        _report(experiment)
    return SOME_RUN_FAILED if failed else 0


def _report(experiment: Experiment) -> None:
    write_report(experiment)
    print(f"Report: {experiment.results / 'report.md'}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    try:
        return report_problems(_label_efficiency)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
