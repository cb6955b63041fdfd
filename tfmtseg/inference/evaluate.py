"""Scores of a trained model on one split, with tables, label maps and a report.

`evaluate` writes into `MODEL_DIR/evaluation/SPLIT/`:

    metrics.csv                 one row per case
    shape_prior.csv             the same for the shape prior
    summary.json                means, spreads, counts, the shape prior's scores
    predictions/CASE.nii.gz     label maps in the geometry of their images
    report.html                 all of it to look at
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tfmtseg import compat
from tfmtseg.data.cases import Case
from tfmtseg.data.nifti import (
    Geometry,
    read_geometry,
    read_image,
    read_label,
    write_label_map,
)
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.files import read_rows, write_json, write_rows
from tfmtseg.inference.predict import (
    check_flips,
    check_headers,
    predict_case,
    windows_per_call,
)
from tfmtseg.inference.report import CaseVolumes, RunReport, write_report
from tfmtseg.inference.shape_prior import ShapePrior
from tfmtseg.metrics.scores import SURFACE_TOLERANCE_MM, CaseScores, score_case, summarize
from tfmtseg.training.finished_run import Run, load_run

_ONE_BY_ONE = "evaluate them one by one"


def evaluate(
    model_dir: str | os.PathLike[str],
    split: str = "test",
    max_memory_gb: float = 0.0,
    flips: bool = False,
    surface_tolerance_mm: float = SURFACE_TOLERANCE_MM,
    data_dir: str | os.PathLike[str] | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Segments and scores every case of a split; see the module for what is written.

    All headers are checked before the first prediction, and the memory it will take. Scores
    of an earlier evaluation are gone as soon as label maps are replaced.

    Args:
        model_dir: Folder of a finished training run.
        split: `"test"` or `"development"`.
        max_memory_gb: See `windows_per_call`.
        flips: See `predict_volume`.
        surface_tolerance_mm: See `score_case`.
        data_dir: See `load_run`.
        allow_root: See `load_run`.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: If the split is empty, the tolerance no length, or the memory too little.
        InputErrors: With every case that is missing or has a bad header; with all that
            cannot be used, when the others are segmented. Nothing is scored then.
    """
    if not 0 <= surface_tolerance_mm < math.inf:
        raise InputError(
            "--surface_tolerance_mm", "value", surface_tolerance_mm, "a length of 0 mm or more",
            f"choose {SURFACE_TOLERANCE_MM:g}",
        )  # fmt: skip
    run = load_run(model_dir, data_dir=data_dir, allow_root=allow_root)
    cases = cases_of(run, split)
    labelled = cases_of(run, "labeled")
    geometries = check_headers([*cases, *labelled], len(run.modalities))
    images = {str(case.images[0]): geometries[str(case.images[0])] for case in cases}
    batch_size = windows_per_call([run], images, max_memory_gb)
    check_flips([run], flips)
    directory = _directory(run, split)
    prior = _fit_shape_prior(run, labelled, geometries)
    for name in ("summary.json", "metrics.csv", "shape_prior.csv", "report.html"):
        (directory / name).unlink(missing_ok=True)
    start = time.perf_counter()
    scores: list[CaseScores] = []
    prior_scores: list[CaseScores] = []
    errors: list[InputError] = []
    for case in tqdm(cases, desc=f"Evaluating ({split})", unit="case"):
        try:
            label_map, geometry = predict_case([run], case, batch_size, flips)
            write_label_map(_prediction_path(run, split, case), label_map, geometry)
            truth, spacing_mm = _read_truth(run, case, geometry), geometry.spacing_mm
        except InputError as error:
            errors.append(error)
            continue
        guess = prior.predict(truth.shape, spacing_mm)
        how = run.regions, spacing_mm, surface_tolerance_mm
        scores.append(score_case(case.name, label_map, truth, *how))
        prior_scores.append(score_case(case.name, guess, truth, *how))
    if errors:
        raise InputErrors(errors)
    summary = {
        "data": run.folder.root.name,
        "split": split,
        "test_time_flips": flips,
        "surface_tolerance_mm": surface_tolerance_mm,
        **summarize(scores),
        "shape_prior": summarize(prior_scores),
        "seconds": time.perf_counter() - start,
        "versions": compat.versions(),
    }
    _write_metrics(directory / "metrics.csv", scores)
    _write_metrics(directory / "shape_prior.csv", prior_scores)
    write_json(directory / "summary.json", summary)
    write_report(directory / "report.html", [read_run_report(run, split)])
    return summary


def check_runs(
    model_dirs: Sequence[str | os.PathLike[str]],
    split: str = "test",
    same_cases: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> None:
    """Makes sure that runs can be evaluated together, before the first one is.

    Args:
        model_dirs: Folders of training runs.
        split: The split they are to be evaluated on.
        same_cases: Whether they have the same cases, as `compare` wants it, or no case in
            common, as `summarize_runs` wants it.
        data_dir: See `load_run`.
        allow_root: See `load_run`.

    Raises:
        InputError: If there is none, one is named twice or cannot be used, they segment
            other regions, or their cases are not as they should be.
    """
    if not model_dirs:
        raise InputError("--model_dir", "value", "empty", "a folder", "name a training run")
    if len({Path(model_dir).resolve() for model_dir in model_dirs}) < len(model_dirs):
        raise InputError(
            "--model_dir", "value", ",".join(map(str, model_dirs)), "each run once",
            "leave out the second",
        )  # fmt: skip
    first: Run | None = None
    whose: dict[str, Path] = {}
    for model_dir in model_dirs:
        run = load_run(model_dir, data_dir=data_dir, allow_root=allow_root)
        first = first or run
        if run.regions != first.regions:
            raise InputError(
                run.directory, "regions", ", ".join(run.regions.names),
                f"{', '.join(first.regions.names)}, as of {first.directory}", _ONE_BY_ONE,
            )  # fmt: skip
        cases, of_first = getattr(run.splits, split), getattr(first.splits, split)
        if not same_cases:
            _check_apart(run.directory, cases, whose)
        elif set(cases) != set(of_first):
            raise InputError(
                run.directory, f"split '{split}'", "of other cases",
                f"of those of {first.directory}, to be compared",
                _ONE_BY_ONE if set(cases) & set(of_first) else "leave out --comparison",
            )  # fmt: skip
        elif run is not first:
            _check_same_truth(first, run, split)


def _check_apart(directory: Path, cases: Sequence[str], whose: dict[str, Path]) -> None:
    """Makes sure that no case counts twice; adds them to `whose`."""
    for case in cases:
        if case in whose:
            of_other = {name for name, run in whose.items() if run == whose[case]}
            side_by_side = "set runs of the same cases side by side with --comparison=FILE.html"
            raise InputError(
                directory, f"case {case}", f"one of {whose[case]} too",
                "of one run, as all cases together are those of folds",
                side_by_side if of_other == set(cases) else _ONE_BY_ONE,
            )  # fmt: skip
        whose[case] = directory


def _check_same_truth(first: Run, run: Run, split: str) -> None:
    """Makes sure that cases of equal names are the same in two runs' data folders."""
    if first.folder.root.resolve() == run.folder.root.resolve():
        return
    others = {case.name: case for case in cases_of(first, split)}
    for case in cases_of(run, split):
        other = others[case.name]
        like = read_geometry(other.images[0])
        geometry = read_geometry(case.images[0], like=like, image=other.images[0])
        if np.any(_read_truth(run, case, geometry) != _read_truth(first, other, like)):
            raise InputError(
                case.label, "label map", "another", f"that of {other.label}, to be compared",
                _ONE_BY_ONE,
            )  # fmt: skip


def summarize_runs(
    model_dirs: Sequence[str | os.PathLike[str]], split: str = "test"
) -> dict[str, Any]:
    """Scores over the cases of several evaluated runs, such as the folds of one data set.

    Args:
        model_dirs: Folders of runs that `evaluate` has been through.
        split: The split they were evaluated on.

    Returns:
        What `summarize` gives for all cases of all runs.

    Raises:
        InputError: If a run was not evaluated, or otherwise than the first, or has a case of
            another.
    """
    directories = [Path(model_dir) / "evaluation" / split for model_dir in model_dirs]
    summaries = [_read_summary(directory) for directory in directories]
    _check_alike(model_dirs, summaries)
    scores: list[CaseScores] = []
    whose: dict[str, Path] = {}
    for directory, summary in zip(directories, summaries, strict=True):
        of_run = read_metrics(directory / "metrics.csv", list(summary["empty_truth"]))
        _check_apart(directory, [each.case for each in of_run], whose)
        scores += of_run
    return summarize(scores)


def compare(
    model_dirs: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    split: str = "test",
    data_dir: str | os.PathLike[str] | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> None:
    """Writes one report about several evaluated runs.

    Runs are called by their methods, or by their folders if two share a method.

    Args:
        model_dirs: Folders of runs that `evaluate` has been through.
        path: The HTML file.
        split: The split they were evaluated on.
        data_dir: See `load_run`.
        allow_root: See `load_run`.

    Raises:
        InputError: If a run was not evaluated, or on other regions, cases or labels, or
            otherwise than the first.
    """
    runs = [
        load_run(model_dir, data_dir=data_dir, allow_root=allow_root) for model_dir in model_dirs
    ]
    names = [run.config.method for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    reports = [read_run_report(run, split, name) for run, name in zip(runs, names, strict=True)]
    for run, report in zip(runs, reports, strict=True):
        cases = [scores.case for scores in report.scores]
        if report.regions != reports[0].regions or cases != [s.case for s in reports[0].scores]:
            raise InputError(
                run.directory, "evaluation", "of other regions or cases",
                f"of those of {runs[0].directory}", "compare runs with the same split",
            )  # fmt: skip
        _check_same_truth(runs[0], run, split)
    _check_alike(model_dirs, [report.summary for report in reports])
    write_report(path, reports)


def read_run_report(run: Run, split: str, name: str | None = None) -> RunReport:
    """Collects what an evaluated run has written.

    Args:
        run: The run.
        split: The split it was evaluated on.
        name: Its heading in the report; the method by default.

    Raises:
        InputError: If the run was not evaluated on this split.
    """
    directory = _directory(run, split)
    cases = {case.name: case for case in cases_of(run, split)}
    result = _read_json(run.directory / "result.json", "train the model to its end")

    def read_case(case_name: str) -> CaseVolumes:
        return _read_volumes(run, split, cases[case_name])

    return RunReport(
        name=name or run.config.method,
        regions=run.regions,
        result=result,
        summary=_read_summary(directory),
        scores=read_metrics(directory / "metrics.csv", run.regions.names),
        history=_read_history(run.directory / "history.csv"),
        modality=run.modalities[0],
        read_case=read_case,
    )


def read_metrics(path: Path, regions: Sequence[str]) -> list[CaseScores]:
    """Reads `metrics.csv` or `shape_prior.csv`.

    Args:
        path: The file.
        regions: Names of the regions, in their order.
    """
    return [CaseScores.from_columns(row["case"], row, regions) for row in read_rows(path)]


def _directory(run: Run, split: str) -> Path:
    return run.directory / "evaluation" / split


def _prediction_path(run: Run, split: str, case: Case) -> Path:
    return _directory(run, split) / "predictions" / f"{case.name}.nii.gz"


def cases_of(run: Run, split: str) -> list[Case]:
    """The cases of a split, which must all be there and have labels."""
    names = getattr(run.splits, split)
    known = {case.name: case for case in run.folder.cases if case.label is not None}
    missing = [name for name in names if name not in known]
    if missing:
        raise InputErrors(
            InputError(
                run.folder.root, f"case {name}", "missing or without label",
                f"there: it is in the split '{split}' of {run.directory}",
                "restore the data folder the model was trained on",
            )
            for name in missing
        )  # fmt: skip
    if not names:
        raise InputError(
            run.directory, f"split '{split}'", "empty", "at least one case",
            "train with more cases in this split, or evaluate another one",
        )  # fmt: skip
    return [known[name] for name in names]


def _read_truth(run: Run, case: Case, geometry: Geometry) -> np.ndarray:
    """The label map of a case, which `cases_of` has made sure of."""
    assert case.label is not None
    return read_label(case.label, labels=run.folder.labels, like=geometry, image=case.images[0])


def _fit_shape_prior(
    run: Run, labelled: Sequence[Case], geometries: Mapping[str, Geometry]
) -> ShapePrior:
    of_cases = [geometries[str(case.images[0])] for case in labelled]
    return ShapePrior.fit(
        (_read_truth(run, *pair) for pair in zip(labelled, of_cases, strict=True)),
        [geometry.ras_shape for geometry in of_cases],
        [geometry.spacing_mm for geometry in of_cases],
        labels=run.folder.labels,
    )


def _read_volumes(run: Run, split: str, case: Case) -> CaseVolumes:
    """What the report draws. All files have been read before, so nothing warns again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        volume = read_image(case.images)
        return CaseVolumes(
            image=volume.voxels[..., 0],
            truth=_read_truth(run, case, volume.geometry),
            prediction=read_label(
                _prediction_path(run, split, case),
                labels=run.folder.labels,
                like=volume.geometry,
                image=case.images[0],
            ),
            spacing_mm=volume.geometry.spacing_mm,
        )


def _write_metrics(path: Path, scores: Sequence[CaseScores]) -> None:
    """One row per case, in the order given."""
    write_rows(path, [{"case": case.case, **case.columns()} for case in scores])


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Columns of numbers, none of a run without its history; an empty cell is NaN."""
    rows = read_rows(path) if path.exists() else []
    if not rows:
        return {}
    return {
        name: np.array([float(row[name]) if row[name] else np.nan for row in rows])
        for name in rows[0]
    }


def _check_alike(
    model_dirs: Sequence[str | os.PathLike[str]], summaries: Sequence[Mapping[str, Any]]
) -> None:
    """Scores of other tolerances, or of more votes, are no numbers of one kind."""
    for setting in ("surface_tolerance_mm", "test_time_flips"):
        for model_dir, summary in zip(model_dirs, summaries, strict=True):
            if summary[setting] != summaries[0][setting]:
                raise InputError(
                    model_dir, setting, summary[setting],
                    f"{summaries[0][setting]}, that of {model_dirs[0]}", "evaluate all alike",
                )  # fmt: skip


def _read_summary(directory: Path) -> dict[str, Any]:
    return _read_json(directory / "summary.json", "evaluate the model first")


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    if not path.exists():
        raise InputError(path, "file", "missing", "there", fix)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
