"""The results of finished runs, kept in tables and lists that need no other file.

`results/runs.csv` has one row per run: steps, wall-clock and processor seconds of the
training, seconds of the evaluation, memory, parameters, versions. `results/cases.csv`
has one row per run, test case and class. The shape prior's rows stand among them as an
arm of its own. `results/splits/` lists the cases: `test.txt`, `development.txt`, and
`labeled_nN_seedS.txt` for each number of labelled cases and seed; the others are the
unlabelled ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tfmtseg.data.cases import write_case_list
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError
from tfmtseg.experiment.plan import SHAPE_PRIOR, Run, by_count, count_text, parse_counts
from tfmtseg.files import read_rows, write_rows
from tfmtseg.inference.evaluate import read_metrics
from tfmtseg.metrics.scores import CaseScores, RegionScores

Key = tuple[str, int, int]  # arm, labelled cases (0: all), seed


@dataclass(frozen=True)
class RunResult:
    """What is known of a finished run, beside its scores.

    Args:
        arm: Name of the arm.
        num_labeled: Labelled cases; 0 stands for all.
        seed: Of the run.
        train_steps: Updates.
        seconds: Wall-clock time of the training.
        cpu_seconds: Its processor time. Other work on the machine, with which it shares
            caches, makes it longer too, though less than the wall-clock time.
        evaluation_seconds: Wall-clock time of the evaluation.
        memory_mib: Highest memory of the two; 0 if unknown.
        parameters: Trainable weights, the second task's included.
        side_by_side: Runs that the machine did at once.
        precision: Of the training, such as `float32`.
        tensorflow: Its version.
        processor: Of the machine.
        code: Version of this package, see `code_version`, when it began or last went on.
    """

    arm: str
    num_labeled: int
    seed: int
    train_steps: int
    seconds: float
    cpu_seconds: float
    evaluation_seconds: float
    memory_mib: int
    parameters: int
    side_by_side: int
    precision: str
    tensorflow: str
    processor: str
    code: str

    @property
    def key(self) -> Key:
        """What names the run."""
        return self.arm, self.num_labeled, self.seed


_AS_BEFORE = (
    "those of the other runs",
    "use the data folder the experiment began with, or another --output_dir",
)


@dataclass(frozen=True)
class Results:
    """All finished runs.

    Args:
        runs: By key.
        scores: Of every test case, by key.
    """

    runs: Mapping[Key, RunResult]
    scores: Mapping[Key, tuple[CaseScores, ...]]

    def counts(self, arm: str | None = None) -> list[int]:
        """Numbers of labelled cases, in rising order."""
        return sorted({k[1] for k in self.runs if arm in (None, k[0])}, key=by_count)

    def seeds(self, arm: str, num_labeled: int) -> list[int]:
        """Seeds of the runs of an arm with so many labelled cases."""
        return sorted(key[2] for key in self.runs if key[:2] == (arm, num_labeled))

    def of(self, arm: str, num_labeled: int, seeds: Iterable[int]) -> list[RunResult]:
        """The runs of an arm with so many labelled cases."""
        return [self.runs[arm, num_labeled, seed] for seed in seeds]

    def by_place(self, arm: str) -> dict[tuple[str, int], list[RunResult]]:
        """The runs of an arm by processor and runs side by side."""
        found: dict[tuple[str, int], list[RunResult]] = {}
        for run in self.runs.values():
            if run.arm == arm:
                found.setdefault((run.processor, run.side_by_side), []).append(run)
        return found

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(next(iter(self.scores.values()))[0].regions)

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the test cases."""
        return tuple(scores.case for scores in next(iter(self.scores.values())))

    def dice(self, arm: str, num_labeled: int, seeds: Sequence[int]) -> np.ndarray:
        """Mean Dice scores over the classes, `(seeds, cases)`."""
        return np.array(
            [[case.mean_dice for case in self.scores[arm, num_labeled, seed]] for seed in seeds]
        )

    def check_test_cases(self, cases: Sequence[str]) -> None:
        """Refuses other test cases than those of the finished runs, if there are any.

        Raises:
            InputError: If they are others.
        """
        if self.scores and set(cases) != set(self.cases):
            raise InputError("--data_dir", "test cases", "others", *_AS_BEFORE)

    def with_run(
        self, run: RunResult, scores: Sequence[CaseScores], prior: Sequence[CaseScores]
    ) -> Results:
        """These results and those of one more run.

        Args:
            run: The run.
            scores: Its test cases.
            prior: Those of the shape prior made from the same labelled cases.

        Raises:
            InputError: If the test cases or classes are not those of the other runs, or the
                shape prior tells that the labelled cases are not.
        """
        prior_key = (SHAPE_PRIOR, run.num_labeled, run.seed)
        known = self.scores.get(prior_key, tuple(prior))
        cases = tuple(case.case for case in scores)
        same = {
            "test cases": not self.scores or cases == self.cases,
            "classes": not self.scores or tuple(scores[0].regions) == self.regions,
            "labelled cases": _alike(known, prior),
        }
        for what, holds in same.items():
            if holds:
                continue
            raise InputError(
                f"run {run.arm}, {count_text(run.num_labeled)} labelled, seed {run.seed}", what,
                "others", *_AS_BEFORE,
            )  # fmt: skip
        empty = RunResult(
            SHAPE_PRIOR, run.num_labeled, run.seed, 0, 0.0, 0.0, 0.0, 0, 0,
            run.side_by_side, run.precision, run.tensorflow, run.processor, run.code,
        )  # fmt: skip
        return Results(
            {prior_key: empty, **self.runs, run.key: run},
            {prior_key: known, **self.scores, run.key: tuple(scores)},
        )

    def write(self, directory: Path) -> None:
        """Writes `cases.csv`, then `runs.csv`: a run without a row in the latter is not there.

        Rows are sorted, so that they do not depend on which run was finished first.
        """
        keys = sorted(self.runs, key=lambda k: (k[0] != SHAPE_PRIOR, k[0], by_count(k[1]), k[2]))
        case_rows = [
            {
                "arm": arm, "num_labeled": count_text(num_labeled), "seed": seed,
                "case": case.case, "class": name, "dice": score.dice, "hd95_mm": score.hd95_mm,
                "empty_prediction": int(score.empty_prediction),
                "empty_truth": int(score.empty_truth),
            }
            for arm, num_labeled, seed in keys
            for case in self.scores[arm, num_labeled, seed]
            for name, score in case.regions.items()
        ]  # fmt: skip
        run_rows = [{**vars(self.runs[key]), "num_labeled": count_text(key[1])} for key in keys]
        write_rows(directory / "cases.csv", case_rows)
        write_rows(directory / "runs.csv", run_rows)

    @classmethod
    def read(cls, directory: Path) -> Results:
        """The inverse of `write`; nothing if there are no files yet.

        Raises:
            InputError: If a file is damaged.
        """
        if not (directory / "runs.csv").exists():
            return cls({}, {})
        try:
            return cls._read(directory)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                directory, "runs.csv or cases.csv", f"damaged ({type(error).__name__}: {error})",
                "as tools/label_efficiency.py wrote them", "bring back the files, as from git",
            ) from None  # fmt: skip

    @classmethod
    def _read(cls, directory: Path) -> Results:
        kinds = {"str": str, "int": int, "float": float}
        runs = {}
        for row in read_rows(directory / "runs.csv"):
            values: dict[str, Any] = {f.name: kinds[str(f.type)](row[f.name]) for f in
                                      fields(RunResult) if f.name != "num_labeled"}  # fmt: skip
            run = RunResult(num_labeled=parse_counts([row["num_labeled"]])[0], **values)
            runs[run.key] = run
        cases: dict[Key, dict[str, dict[str, RegionScores]]] = {key: {} for key in runs}
        for row in read_rows(directory / "cases.csv"):
            key = (row["arm"], parse_counts([row["num_labeled"]])[0], int(row["seed"]))
            if key in cases:
                cases[key].setdefault(row["case"], {})[row["class"]] = RegionScores(
                    dice=float(row["dice"]),
                    hd95_mm=float(row["hd95_mm"]),
                    empty_prediction=row["empty_prediction"] == "1",
                    empty_truth=row["empty_truth"] == "1",
                )
        scores = {
            key: tuple(CaseScores(case, regions) for case, regions in by_case.items())
            for key, by_case in cases.items()
        }
        return cls(runs, scores)


def collect(
    results: Results, run: Run, directory: Path, *, memory_mib: int, side_by_side: int
) -> Results:
    """Adds a run that was trained and evaluated.

    Args:
        results: What is there already.
        run: The run.
        directory: Its folder.
        memory_mib: Highest memory; 0 if unknown.
        side_by_side: Runs that the machine did at once.

    Raises:
        InputError: If its files cannot be read, or it does not belong to the others.
    """
    evaluation = directory / "evaluation" / "test"
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        summary = json.loads((evaluation / "summary.json").read_text(encoding="utf-8"))
        made = RunResult(
            arm=run.arm.name,
            num_labeled=run.num_labeled,
            seed=run.seed,
            train_steps=result["train_steps"],
            seconds=result["seconds"],
            cpu_seconds=result["cpu_seconds"],
            evaluation_seconds=round(summary["seconds"], 1),
            memory_mib=memory_mib,
            parameters=sum(result["parameters"].values()),
            side_by_side=side_by_side,
            precision=result["precision"],
            tensorflow=result["tensorflow"],
            processor=result["processor"],
            code=result["code"],
        )
        regions = list(summary["empty_truth"])
        scores = read_metrics(evaluation / "metrics.csv", regions)
        prior = read_metrics(evaluation / "shape_prior.csv", regions)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            directory, "finished run", f"unreadable ({type(error).__name__}: {error})",
            "as this version trains and evaluates it", "remove the folder, to train it again",
        ) from None  # fmt: skip
    return results.with_run(made, scores, prior)


def _alike(one: Sequence[CaseScores], other: Sequence[CaseScores]) -> bool:
    """Whether two shape priors are one: counts of voxels are exact on every machine."""
    return [(case.case, case.mean_dice) for case in one] == [
        (case.case, case.mean_dice) for case in other
    ]


def keep_splits(run: Run, directory: Path, results: Path) -> None:
    """Writes the lists of a run's cases into `results/splits/`.

    Args:
        run: The run.
        directory: Its folder.
        results: Of the experiment.
    """
    splits = Splits.read(directory / "splits")
    labeled = f"labeled_n{count_text(run.num_labeled)}_seed{run.seed}.txt"
    lists = {
        "test.txt": splits.test, "development.txt": splits.development, labeled: splits.labeled,
    }  # fmt: skip
    for name, cases in lists.items():
        write_case_list(results / "splits" / name, cases)
