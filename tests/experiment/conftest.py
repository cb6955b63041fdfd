"""Results without training: scores drawn from a seed, and tools that only pretend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.experiment.plan import FEW, Experiment, parse_arms
from tfmtseg.experiment.results import Results, RunResult
from tfmtseg.metrics.scores import CaseScores, RegionScores
from tfmtseg.training.config import TrainConfig

FAKE_TRAIN = """
import csv, json, os, pathlib, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
here = pathlib.Path(__file__).parent
run = pathlib.Path(flags["model_dir"])
name = "/".join(run.parts[-2:])

def named_in(file):
    path = here / file
    return path.exists() and name in path.read_text().split()

history = run / "history.csv"
first = len(history.read_text().splitlines()) - 1 if history.exists() else 0
(run / "pid").write_text(str(os.getpid()))
with (here / "calls").open("a") as calls:
    calls.write(f"{name} from {first} threads {os.environ.get('TF_NUM_INTRAOP_THREADS')}\\n")
(here / "active").mkdir(exist_ok=True)
mark = here / "active" / name.replace("/", "-")
mark.touch()
with (here / "most").open("a") as most:
    most.write(f"{len(list((here / 'active').iterdir()))}\\n")
for step in range(first, 4):
    deadline = time.time() + 60
    while step == 2 and named_in("block") and time.time() < deadline:
        time.sleep(0.02)
    rows = history.read_text() if history.exists() else "step,seconds\\n"
    whole = run / "history.tmp"
    whole.write_text(rows + f"{step + 1},1\\n")
    whole.rename(history)
mark.unlink()
if named_in("fail"):
    sys.exit("a made-up failure")
labelled = f"{flags['num_labeled']} {flags['seed']}"
(run / "splits").mkdir(exist_ok=True)
for name in ("labeled", "unlabeled", "development", "test"):
    (run / "splits" / f"{name}.txt").write_text(f"{name} of {labelled}\\n")
(run / "result.json").write_text(json.dumps({
    "method": flags["method"], "train_steps": 4, "seconds": 2.0, "cpu_seconds": 1.5,
    "parameters": {"encoder": 10, "decoder": 5}, "precision": "float32", "tensorflow": "0.0",
    "processor": "none", "code": "abc", "labelled": labelled,
}))
"""

FAKE_EVALUATE = """
import json, pathlib, random, sys
run = pathlib.Path(sys.argv[1].split("=", 1)[1])
folder = run / "evaluation" / "test"
folder.mkdir(parents=True, exist_ok=True)
labelled = json.loads((run / "result.json").read_text())["labelled"]
heads = [
    "dice_a", "dice_mean", "hd95_mm_a", "surface_dice_a", "empty_prediction_a", "empty_truth_a",
]

def write(file, draws):
    lines = [",".join(["case", *heads])]
    for case in ("p1_1", "p1_2", "p2_1", "p3_1"):
        dice = draws.random()
        lines.append(f"{case},{dice!r},{dice!r},{draws.random()!r},{dice!r},0,0")
    (folder / file).write_text("\\n".join(lines) + "\\n")

write("metrics.csv", random.Random("/".join(run.parts[-2:])))
write("shape_prior.csv", random.Random(labelled))
(folder / "summary.json").write_text(json.dumps({"seconds": 1.0, "empty_truth": {"a": 0}}))
"""


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder of fake tools; files in it tell runs to `block` or to `fail`, by name."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    (folder / "evaluate.py").write_text(FAKE_EVALUATE)
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A data folder of 12 cases, of 40 x 32 x 24 voxels of 1 mm, with three nested regions."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 12, shape=(40, 32, 24))
    return folder


@pytest.fixture
def make_experiment(tmp_path, phantoms):
    """Makes an experiment of 4 steps with the given arms."""

    def make(
        *texts: str, name: str = "experiment", data: Path = phantoms, few=FEW, **settings
    ) -> Experiment:
        arms = {arm.name: arm for arm in parse_arms(texts)}
        config = TrainConfig(
            **{"train_steps": 4, "steps_per_epoch": 1, "num_test": 4,
               "subject_regex": r"(\d+)", **settings}
        )  # fmt: skip
        experiment = Experiment(tmp_path / name, config, arms, 1, str(data), few)
        experiment.write()
        return experiment

    return make


@pytest.fixture
def make_results():
    """Makes results; see `_make_results`."""
    return _make_results


def _make_results(
    gains: dict[str, float],
    *,
    counts=(3, 6, 0),
    num_seeds=3,
    subjects=20,
    spread=0.01,
    cpu_seconds: dict[str, float] | None = None,
    steps: dict[str, int] | None = None,
) -> Results:
    """Runs of two cases per subject whose Dice scores differ by `gains` and some noise."""
    random = np.random.default_rng(3)
    results = Results({}, {})
    cases = [f"p{subject}_{side}" for subject in range(subjects) for side in (1, 2)]
    difficulty = random.normal(0, 0.05, len(cases))
    for count in counts:
        for seed in range(num_seeds):
            prior = _scores(cases, 0.3 + difficulty)
            for arm, gain in gains.items():
                dice = 0.7 + (count or 100) / 1000 + gain + difficulty
                run = RunResult(
                    arm=arm, num_labeled=count, seed=seed, train_steps=(steps or {}).get(arm, 4),
                    seconds=10.0, cpu_seconds=(cpu_seconds or {}).get(arm, 8.0),
                    evaluation_seconds=2.0, memory_mib=1000, parameters=1_000_000,
                    side_by_side=1, precision="float32", tensorflow="0.0", processor="none",
                    code="abc",
                )  # fmt: skip
                scores = _scores(cases, dice + random.normal(0, spread, len(cases)))
                results = results.with_run(run, scores, prior)
    return results


def _scores(cases: list[str], dice: np.ndarray) -> list[CaseScores]:
    """Two classes, half a point below and above `dice`."""
    return [
        CaseScores(
            case,
            {
                "a": RegionScores(float(value - 0.005), 2.0, False, False),
                "b": RegionScores(float(value + 0.005), 4.0, False, False),
            },
        )
        for case, value in zip(cases, dice, strict=True)
    ]
