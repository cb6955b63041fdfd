"""One self-contained HTML page about one run, or several beside each other."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmtseg.files import write_text
from tfmtseg.inference.figures import (
    Curve,
    cut,
    draw_case_scores,
    draw_curves,
    draw_slice,
    region_colors,
    run_color,
    slice_places,
)
from tfmtseg.inference.report_style import STYLE
from tfmtseg.metrics.scores import CaseScores
from tfmtseg.regions import Regions

_PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}  # by the axis that is cut
_LOSS_NAMES = {
    "seg_loss": "Segmentation loss",
    "mix_loss": "Segmentation loss of mixed volumes",
    "cpc_loss": "Contrastive loss (InfoNCE)",
    "vae_loss": "Variational loss (reconstruction and KL divergence)",
    "boundary_loss": "Boundary loss (soft Dice and cross-entropy)",
    "dense_loss": "Contrastive loss between voxels (InfoNCE)",
    "class_loss": "Contrastive loss between classes",
}


@dataclass(frozen=True)
class CaseVolumes:
    """What the overlays of one case are drawn from, all in RAS+.

    Args:
        image: One modality, `(x, y, z)`.
        truth: Label map, the same shape.
        prediction: Label map, the same shape.
        spacing_mm: Voxel size along x, y and z.
    """

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing_mm: Sequence[float]


@dataclass(frozen=True)
class RunReport:
    """What the report says about one run.

    Args:
        name: Heading of the run, different for each run of a page.
        regions: What was segmented.
        result: Content of `result.json`.
        summary: Content of `summary.json`.
        scores: One per case, in the order of `metrics.csv`.
        history: Columns of `history.csv`; NaN where a cell is empty. May be empty.
        modality: Name of the modality in the overlays.
        read_case: Gives a case's volumes; called only for the cases shown.
    """

    name: str
    regions: Regions
    result: Mapping[str, Any]
    summary: Mapping[str, Any]
    scores: Sequence[CaseScores]
    history: Mapping[str, np.ndarray]
    modality: str
    read_case: Callable[[str], CaseVolumes]


def write_report(path: str | os.PathLike[str], runs: Sequence[RunReport]) -> None:
    """Writes the page: what was run, the results, curves, overlays and every case.

    The page needs no network, no script and no other file. Text that comes from
    files is escaped.

    Args:
        path: The HTML file.
        runs: At least one; all of the same regions and test cases.

    Raises:
        ValueError: If the runs have different regions or cases, or one name.
    """
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"Expected runs of different names. Received: {_names(runs)}.")
    for run in runs[1:]:
        if run.regions != runs[0].regions or _case_names(run) != _case_names(runs[0]):
            raise ValueError(f"Expected runs of the same regions and cases. Received: {run.name}.")
    title = "Segmentation report"
    body = "".join(
        [
            _header(title, runs),
            _tiles(runs),
            _results(runs),
            _curves(runs),
            _overlays(runs),
            _cases(runs),
            _what_was_run(runs),
        ]
    )
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: {_escape(_names(runs))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
    )


def shown_cases(runs: Sequence[Sequence[CaseScores]]) -> list[tuple[str, str]]:
    """The cases a report shows: the worst, the median and the best.

    Cases are ordered by their mean Dice score over all runs, so that no run
    chooses. Fewer than three cases are all shown.

    Args:
        runs: Scores of each run, of the same cases in the same order.

    Returns:
        Pairs (what the case is, its name); no case twice.
    """
    means = np.mean([[case.mean_dice for case in scores] for scores in runs], axis=0)
    order = np.argsort(means, kind="stable")
    last = len(order) - 1
    ranks = {last // 2: "median", 0: "worst", last: "best"}
    return [(what, runs[0][order[rank]].case) for rank, what in sorted(ranks.items())]


# The sections of the page, in their order.


def _header(title: str, runs: Sequence[RunReport]) -> str:
    summary, regions = runs[0].summary, runs[0].regions
    keys = "".join(
        f'<li><i style="background:{color}"></i>{_escape(name)}</li>'
        for name, color in zip(regions.names, region_colors(len(regions.names)), strict=True)
    )
    facts = [
        str(summary.get("data", "")),
        _count(len(runs[0].scores), f"{summary.get('split', '')} case".strip()),
        " vs. ".join(run.name for run in runs) if len(runs) > 1 else runs[0].name,
    ]
    line = " · ".join(_escape(fact) for fact in facts if fact)
    return f'<header><h1>{title}</h1><p>{line}</p><ul class="keys">{keys}</ul></header>\n'


def _tiles(runs: Sequence[RunReport]) -> str:
    tiles = []
    for index, run in enumerate(runs):
        hd95_mm = np.mean([_column(run.summary, f"hd95_mm_{n}")["mean"] for n in run.regions.names])
        result = run.result
        facts = [
            f"{result['num_labeled']} labelled" if "num_labeled" in result else "",
            f"{result['num_unlabeled']} unlabelled" if result.get("num_unlabeled") else "",
            f"{result['train_steps']} steps" if "train_steps" in result else "",
            _duration(result["seconds"]) if "seconds" in result else "",
        ]
        tiles.append(
            f'<div class="tile" style="--run:{run_color(index)}"><h2>{_escape(run.name)}</h2>'
            f'<p class="number">{run.summary["mean_dice"]:.3f}<small>mean Dice score</small></p>'
            f'<p class="number">{hd95_mm:.2f} mm<small>mean HD95</small></p>'
            f'<p class="facts">{"".join(f"<span>{_escape(fact)}</span>" for fact in facts if fact)}'
            "</p></div>"
        )
    return f'<section class="tiles">{"".join(tiles)}</section>\n'


def _results(runs: Sequence[RunReport]) -> str:
    names = runs[0].regions.names
    rows = [
        (f'<i style="background:{run_color(i)}"></i>{_escape(run.name)}', "", run.summary)
        for i, run in enumerate(runs)
    ]
    for prior in _distinct(run.summary.get("shape_prior") for run in runs):
        rows.append(("shape prior<br><small>sees no image</small>", "muted", prior))

    dots = draw_case_scores([run.name for run in runs], [run.scores for run in runs])
    heads = "".join(f"<th>{_escape(name)}</th>" for name in names)
    lines = []
    for label, kind, summary in rows:
        cells = [_spread(_column(summary, f"dice_{name}"), 3) for name in names]
        cells.append(f"<b>{_spread(_column(summary, 'dice_mean'), 3)}</b>")
        cells += [_spread(_column(summary, f"hd95_mm_{name}"), 2) for name in names]
        cells += [_spread(_column(summary, f"surface_dice_{name}"), 3) for name in names]
        lines.append(f'<tr class="{kind}"><th>{label}</th>{_cells(cells)}</tr>')
    return _section(
        "Results",
        f'<div class="scroll"><table><thead><tr><th rowspan="2"></th>'
        f'<th colspan="{len(names) + 1}">Dice score (higher is better)</th>'
        f'<th colspan="{len(names)}">HD95 in mm (lower is better)</th>'
        f'<th colspan="{len(names)}">{_surface_dice(runs[0])} (higher is better)</th></tr>'
        f"<tr>{heads}<th>mean</th>{heads}{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<div class="figures">{_figure(dots, "Every case is a dot, their mean a bar.")}'
        f'<ul class="notes">{"".join(f"<li>{note}</li>" for note in _notes(runs))}</ul></div>',
    )


def _notes(runs: Sequence[RunReport]) -> Iterable[str]:
    """What a reader has to know about the numbers; escaped."""
    yield "Mean ± standard deviation over the cases. Nothing was left out."
    yield (
        "A region absent from truth and prediction scores Dice 1 and HD95 0; absent from "
        "one of them, Dice 0 and the length of the volume&rsquo;s diagonal. Surface Dice is the "
        "share of both surfaces that lies within the tolerance of the other."
    )
    for run in runs:
        for name in run.regions.names:
            predicted = run.summary["empty_prediction"][name]
            true = run.summary["empty_truth"][name]
            if predicted or true:
                yield (
                    f"{_escape(run.name)}, {_escape(name)}: nothing predicted in "
                    f"{_count(predicted, 'case')}, nothing to find in {_count(true, 'case')}."
                )
    if any(run.summary.get("shape_prior") for run in runs):
        yield (
            "The shape prior is the majority vote of the labelled cases&rsquo; label maps, laid on "
            "each volume&rsquo;s centre: what can be scored without looking at the image."
        )


def _curves(runs: Sequence[RunReport]) -> str:
    trained = [(i, run) for i, run in enumerate(runs) if len(run.history.get("step", ())) > 0]
    if not trained:
        return ""
    pictures = []
    for column in _loss_columns(run for _, run in trained):
        curves = _loss_curves(trained, column, single=len(runs) == 1)
        if curves:
            caption = _LOSS_NAMES.get(column, column.replace("_", " "))
            caption += "; dashed: chance" * any(curve.dashed for curve in curves)
            pictures.append((caption, draw_curves(curves, "loss")))
    dice = _dice_curves(trained, single=len(runs) == 1)
    if dice:
        caption = "Dice score on training patches"
        if any(curve.dashed for curve in dice):
            caption = "Dice score on patches of development cases; dashed: on training patches"
        pictures.append((caption, draw_curves(dice, "Dice score", unit_range=True)))
    figures = "".join(_figure(png, caption) for caption, png in pictures)
    return _section("Curves", f'<div class="figures">{figures}</div>')


def _loss_columns(runs: Iterable[RunReport]) -> list[str]:
    """The loss terms of any run, segmentation first; the weighted sum and `val_*` left out."""
    columns = [name for run in runs for name in run.history if name.endswith("_loss")]
    terms = dict.fromkeys(name for name in columns if not name.startswith("val_"))
    return sorted(terms, key=lambda name: name != "seg_loss")


def _loss_curves(
    trained: Sequence[tuple[int, RunReport]], column: str, single: bool
) -> list[Curve]:
    """One loss term of every run that has it, and the loss of guessing where it is known."""
    curves = []
    for index, run in trained:
        steps, loss = run.history["step"], _mean_column(run, [column])
        if loss is None:
            continue
        curves.append(Curve("" if single else run.name, run_color(index), steps, loss))
        chance = _mean_column(run, [f"{column.removesuffix('_loss')}_chance"])
        if chance is not None:
            curves.append(Curve("", run_color(index), steps, chance, dashed=True))
    return curves


def _dice_curves(trained: Sequence[tuple[int, RunReport]], single: bool) -> list[Curve]:
    """Dice scores over steps: one colour per region of a single run, else one per run.

    Those on training patches are dashed where any run has scores of development cases.
    """
    curves = []
    watched = any(
        _mean_column(run, [f"val_dice_{name}" for name in run.regions.names]) is not None
        for _, run in trained
    )
    for index, run in trained:
        names = run.regions.names
        groups: list[tuple[str, str, Sequence[str]]] = [(run.name, run_color(index), names)]
        if single:
            colors = region_colors(len(names))
            groups = [(name, color, [name]) for name, color in zip(names, colors, strict=True)]
        for label, color, members in groups:
            development = _mean_column(run, [f"val_dice_{name}" for name in members])
            training = _mean_column(run, [f"dice_{name}" for name in members])
            steps = run.history["step"]
            if development is not None:
                curves.append(Curve(label, color, steps, development))
            if training is not None:
                name = label if development is None else ""
                curves.append(Curve(name, color, steps, training, dashed=watched))
    return curves


def _mean_column(run: RunReport, names: Sequence[str]) -> np.ndarray | None:
    """The mean of columns of the history; `None` if one is missing or nothing is known."""
    columns = [run.history[name] for name in names if name in run.history]
    if len(columns) < len(names) or not np.isfinite(columns).all(axis=0).any():
        return None
    return np.mean(columns, axis=0)


def _overlays(runs: Sequence[RunReport]) -> str:
    cards = []
    for what, case in shown_cases([run.scores for run in runs]):
        dice = [next(s.mean_dice for s in run.scores if s.case == case) for run in runs]
        heads = ["image", "truth"] + [
            f"{_escape(run.name)} <small>Dice {score:.3f}</small>"
            for run, score in zip(runs, dice, strict=True)
        ]
        cards.append(
            f'<article><h3><span class="pill {what}">{what}</span>{_escape(case)}</h3>'
            f'<div class="scroll"><div class="grid" style="--columns:{len(heads)}">'
            f'<span class="plane"></span>{"".join(f"<span>{head}</span>" for head in heads)}'
            f"{_overlay_rows(runs, case)}</div></div></article>"
        )
    return _section(
        "Overlays",
        f"<p>{_escape(runs[0].modality)}, each slice where the truth is largest. The "
        "patient&rsquo;s right (in sagittal slices: anterior) is on the left. Cases are ranked by "
        f"their mean Dice score{' over all runs' if len(runs) > 1 else ''}.</p>{''.join(cards)}",
    )


def _overlay_rows(runs: Sequence[RunReport], case: str) -> str:
    """For each plane: image, truth and the prediction of every run."""
    volumes = [run.read_case(case) for run in runs]
    image, truth, spacing_mm = volumes[0].image, volumes[0].truth, volumes[0].spacing_mm
    label_maps = {"truth": truth}
    label_maps.update(
        (run.name, volume.prediction) for run, volume in zip(runs, volumes, strict=True)
    )
    black = float(np.percentile(image, 1))
    is_content = np.logical_or.reduce([image > black, *(m > 0 for m in label_maps.values())])
    white = float(np.percentile(image[is_content], 99.5)) if is_content.any() else black

    rows = ""
    for axis, plane in _PLANES.items():
        place = slice_places(truth)[axis]
        width_mm, height_mm = np.delete(spacing_mm, axis)
        box = _bounding_box(cut(is_content.any(axis=axis, keepdims=True), axis, 0))
        rows += (
            f'<span class="plane">{plane} '
            f"<small>slice {place + 1} of {truth.shape[axis]}</small></span>"
        )
        for what, label_map in {"image": None, **label_maps}.items():
            labels = None if label_map is None else cut(label_map, axis, place)[box]
            picture = cut(image, axis, place)[box]
            png = draw_slice(
                picture, labels, runs[0].regions, (black, white), (height_mm, width_mm)
            )
            rows += _image(png, f"{case}, {plane}: {what}")
    return rows


def _cases(runs: Sequence[RunReport]) -> str:
    return _section(
        "Every case",
        "".join(
            f"<details{' open' if len(runs) == 1 and len(run.scores) <= 60 else ''}>"
            f'<summary><i style="background:{run_color(index)}"></i>{_escape(run.name)}</summary>'
            f"{_case_table(run)}</details>"
            for index, run in enumerate(runs)
        ),
    )


def _case_table(run: RunReport) -> str:
    names = run.regions.names
    rows = []
    for case in sorted(run.scores, key=lambda scores: scores.mean_dice):
        regions = [case.regions[name] for name in names]
        dice = "".join(
            f'<td class="bar" style="--share:{100 * value:.1f}%">{value:.3f}</td>'
            for value in [*(region.dice for region in regions), case.mean_dice]
        )
        hd95 = _cells(f"{region.hd95_mm:.2f}" for region in regions)
        surface_dice = _cells(f"{region.surface_dice:.3f}" for region in regions)
        remarks = []
        for name in names:
            empty = case.regions[name].empty_prediction, case.regions[name].empty_truth
            remark = {
                (True, True): "absent, rightly nothing predicted",
                (True, False): "nothing predicted",
                (False, True): "absent, yet predicted",
            }.get(empty)
            if remark:
                remarks.append(f"{_escape(name)}: {remark}")
        rows.append(
            f"<tr><th>{_escape(case.case)}</th>{dice}{hd95}{surface_dice}"
            f'<td class="remark">{"; ".join(remarks)}</td></tr>'
        )
    heads = "".join(f"<th>{_escape(name)}</th>" for name in names)
    return (
        '<div class="scroll"><table><thead><tr><th rowspan="2">case</th>'
        f'<th colspan="{len(names) + 1}">Dice score</th><th colspan="{len(names)}">HD95 in mm</th>'
        f'<th colspan="{len(names)}">{_surface_dice(run)}</th>'
        f'<th rowspan="2"></th></tr><tr>{heads}<th>mean</th>{heads}{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _surface_dice(run: RunReport) -> str:
    return f"Surface Dice at {run.summary['surface_tolerance_mm']:g} mm"


def _what_was_run(runs: Sequence[RunReport]) -> str:
    facts = [_run_facts(run) for run in runs]
    lines = "".join(
        f"<tr><th>{label}</th>{_cells(_escape(fact[label]) for fact in facts)}</tr>"
        for label in facts[0]
    )
    heads = "".join(f"<th>{_escape(run.name)}</th>" for run in runs)
    return _section(
        "What was run",
        f'<div class="scroll"><table class="facts"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>",
    )


def _run_facts(run: RunReport) -> dict[str, str]:
    """What is known about a run, by the same labels for every run."""
    result, summary = run.result, run.summary
    parameters = [
        f"{part} {count / 1e6:.2f} M"
        for part, count in result.get("parameters", {}).items()
        if count
    ]
    seconds = {"training": result.get("seconds"), "evaluation": summary.get("seconds")}
    facts = {
        "Method": result.get("method"),
        "Labelled cases": result.get("num_labeled"),
        "Unlabelled cases": result.get("num_unlabeled"),
        "Optimizer steps": result.get("train_steps"),
        "Parameters": ", ".join(parameters),
        "Implementation of the ops": result.get("ops_implementation"),
        "Mirrored images vote": "yes" if summary.get("test_time_flips") else "no",
        "Time": ", ".join(f"{what} {_duration(s)}" for what, s in seconds.items() if s is not None),
        "Trained with": _versions(result),
        "Evaluated with": _versions(summary.get("versions", {})),
    }
    return {name: "not known" if fact in (None, "") else str(fact) for name, fact in facts.items()}


def _versions(versions: Mapping[str, Any]) -> str:
    names = {"tensorflow": "TensorFlow", "keras": "Keras"}
    return ", ".join(f"{name} {versions[key]}" for key, name in names.items() if key in versions)


# Small parts.


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _cells(contents: Iterable[str]) -> str:
    return "".join(f"<td>{content}</td>" for content in contents)


def _figure(png: bytes, caption: str) -> str:
    return f"<figure>{_image(png, caption)}<figcaption>{_escape(caption)}</figcaption></figure>"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{_escape(description)}" src="data:image/png;base64,{data}">'


def _spread(column: Mapping[str, float], digits: int) -> str:
    return f"{column['mean']:.{digits}f}<small> ± {column['std']:.{digits}f}</small>"


def _column(summary: Mapping[str, Any], name: str) -> Mapping[str, float]:
    column: Mapping[str, float] = summary["columns"][name]
    return column


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns with anything in them; the whole if there is nothing."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return slice(None), slice(None)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The values that are not `None`, each once, in their order."""
    result: list[Any] = []
    for value in values:
        if value is not None and value not in result:
            result.append(value)
    return result


def _case_names(run: RunReport) -> list[str]:
    return [scores.case for scores in run.scores]


def _names(runs: Sequence[RunReport]) -> str:
    return ", ".join(run.name for run in runs)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
