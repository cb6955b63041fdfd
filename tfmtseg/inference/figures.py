"""The pictures of the report, as PNG bytes; made without a display."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tfmtseg.metrics.scores import CaseScores
from tfmtseg.regions import Regions

_REGION_COLORS = ("#14b8a6", "#f59e0b", "#e11d48", "#8b5cf6", "#3b82f6", "#84cc16")
_RUN_COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#be123c", "#0891b2", "#a16207")
# Marker and line; the next for each time that the colours are used up.
_STYLES = (("o", "-"), ("s", "-."), ("D", ":"), ("^", (0, (6, 1))), ("v", (0, (6, 1, 1, 1, 1, 1))))
_INK, _MUTED, _GRID = "#1e293b", "#64748b", "#e2e8f0"
_DPI = 220
_LABEL_LENGTH = 32  # characters of a legend's entry
_LEGEND_ROW = 0.23  # inches


def region_colors(count: int) -> list[str]:
    """One colour per region; beyond the chosen ones, hues evenly apart."""
    if count <= len(_REGION_COLORS):
        return list(_REGION_COLORS[:count])
    hues = (colorsys.hsv_to_rgb(index / count, 0.75, 0.9) for index in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in hues]


def run_color(index: int) -> str:
    """The colour of the run at `index` in curves and headings."""
    return _RUN_COLORS[index % len(_RUN_COLORS)]


@dataclass(frozen=True)
class Curve:
    """One line of a diagram.

    Args:
        label: Its name in the legend; empty for none.
        color: Matplotlib colour.
        x: Places; optimizer steps.
        y: Values; NaN where there is none.
        dashed: Whether the line is dashed.
    """

    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    dashed: bool = False


def draw_curves(curves: Sequence[Curve], y_label: str, *, unit_range: bool = False) -> bytes:
    """A diagram of values over optimizer steps.

    Args:
        curves: At least one.
        y_label: What the values are.
        unit_range: Whether the values are shares, shown from 0 to 1.
    """
    figure, axes = _diagram((3.7, 2.5))
    for curve in curves:
        known = np.isfinite(curve.y)
        axes.plot(
            curve.x[known],
            curve.y[known],
            label=_plain(curve.label),
            color=curve.color,
            linewidth=1.3 if curve.dashed else 1.8,
            linestyle=(0, (3, 2)) if curve.dashed else "-",
            marker="o" if known.sum() == 1 else None,
            alpha=0.75 if curve.dashed else 1,
            solid_capstyle="round",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=1.02 if unit_range else None)
    if any(curve.label for curve in curves):
        axes.legend(frameon=False, labelcolor=_INK, handlelength=1.6)
    return _png(figure)


def draw_case_scores(names: Sequence[str], runs: Sequence[Sequence[CaseScores]]) -> bytes:
    """One dot per case and region: Dice scores of every run, with their means.

    Args:
        names: One per run.
        runs: The cases of each run, all with the same regions.
    """
    regions = list(runs[0][0].regions)
    rows = len(regions) * len(runs)
    longest = min(max(map(len, names)), _LABEL_LENGTH)
    columns = max(1, min(4, 44 // (longest + 4)))  # as many as the width of the figure holds
    legend_rows = -(-len(runs) // columns) if len(runs) > 1 else 0
    figure, axes = _diagram((5.0, 0.5 + 0.26 * max(rows, 3) + _LEGEND_ROW * legend_rows))
    height = 0.8 / len(runs)
    for index, (name, scores) in enumerate(zip(names, runs, strict=True)):
        for row, region in enumerate(regions):
            dice = np.sort([case.regions[region].dice for case in scores])
            middle = row - 0.4 + (index + 0.5) * height
            # Neighbours in rank are spread over the row, so that dots do not hide each other.
            spread = (np.arange(len(dice)) * 0.618 % 1 - 0.5) * height * 0.6
            axes.scatter(
                dice, middle + spread, s=11, color=run_color(index), alpha=0.55, linewidths=0,
                label=_plain(name) if row == 0 else None,
            )  # fmt: skip
            axes.plot(
                [dice.mean()] * 2, [middle - 0.42 * height, middle + 0.42 * height],
                color=_INK, linewidth=1.8, solid_capstyle="round",
            )  # fmt: skip
    axes.set_yticks(range(len(regions)), [_plain(region) for region in regions])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("Dice score")
    if len(runs) > 1:
        figure.legend(
            frameon=False, labelcolor=_INK, loc="outside upper left", ncols=columns,
            handletextpad=0.1,
        )  # fmt: skip
    return _png(figure)


@dataclass(frozen=True)
class ScoreLine:
    """The scores of one method at several numbers of labelled cases.

    Args:
        label: Its name in the legend.
        places: Indices into the axis of numbers of cases.
        means: Mean score at each place.
        intervals: Lower and upper end at each place.
        hollow: Whether the dot at each place is hollow.
        dashed: Whether the line is dashed.
    """

    label: str
    places: Sequence[int]
    means: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    hollow: Sequence[bool]
    dashed: bool = False


def draw_label_efficiency(
    lines: Sequence[ScoreLine], counts: Sequence[str], x_label: str, y_label: str
) -> bytes:
    """A diagram of scores over the number of labelled cases, with their intervals.

    Args:
        lines: At least one.
        counts: Names of the places on the x axis, evenly apart.
        x_label: What they count.
        y_label: What the scores are.
    """
    figure, axes = _diagram((6.4, max(4.0, 0.3 + _LEGEND_ROW * len(lines))))
    for index, line in enumerate(lines):
        # Beside each other, so that intervals do not hide each other.
        x = np.array(line.places) + 0.4 * ((index + 0.5) / len(lines) - 0.5)
        color = _MUTED if line.dashed else run_color(index)
        marker, style = _STYLES[index // len(_RUN_COLORS) % len(_STYLES)]
        low, high = np.transpose(line.intervals)
        axes.plot(
            x, line.means, color=color, label=_plain(line.label), marker=marker, markersize=4,
            linewidth=1.2, linestyle=(0, (3, 2)) if line.dashed else style,
        )  # fmt: skip
        few = np.array(line.hollow, bool)
        axes.plot(
            x[few], np.array(line.means)[few], color=color, marker=marker, markersize=4,
            linestyle="", markerfacecolor="white", zorder=3,
        )  # fmt: skip
        axes.vlines(x, low, high, color=color, linewidth=1.2, alpha=0.7)
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(frameon=False, labelcolor=_INK, loc="outside right upper", handlelength=1.6)
    return _png(figure)


def slice_places(truth: np.ndarray) -> tuple[int, int, int]:
    """Along each axis, the slice with the most labelled voxels; the middle if there are none."""
    filled = truth > 0
    if not filled.any():
        x, y, z = truth.shape
        return x // 2, y // 2, z // 2
    x, y, z = (
        int(filled.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(filled.ndim)
    )
    return x, y, z


def cut(volume: np.ndarray, axis: int, place: int) -> np.ndarray:
    """One slice of an RAS+ volume as a picture: rows from the top, columns from the left.

    Radiological view: superior (in axial slices anterior) is up, and the
    patient's right (in sagittal slices anterior) is on the left.
    """
    return np.take(volume, place, axis=axis).T[::-1, ::-1]


def draw_slice(
    picture: np.ndarray,
    label_map: np.ndarray | None,
    regions: Regions,
    value_range: tuple[float, float],
    pixel_mm: tuple[float, float],
) -> bytes:
    """A grey slice, with its regions in transparent colour and outlined.

    Args:
        picture: Intensities `(rows, columns)`.
        label_map: Labels of the same shape, or `None` for the bare slice.
        regions: What to colour; nested regions lie upon each other.
        value_range: Intensities shown as black and as white.
        pixel_mm: Height and width of a pixel.
    """
    height_mm, width_mm = (
        count * size for count, size in zip(picture.shape, pixel_mm, strict=True)
    )
    inches = 1.6 / max(height_mm, width_mm)
    size = max(0.2, width_mm * inches), max(0.2, height_mm * inches)
    figure = Figure(size, dpi=_DPI, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    black, white = value_range
    grey = np.clip((picture - black) / max(white - black, 1e-12), 0, 1)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="bilinear", aspect="auto")
    if label_map is not None:
        masks = regions.masks(label_map)
        for index, color in enumerate(region_colors(len(regions.names))):
            _draw_mask(axes, masks[..., index], color)
        axes.set(xlim=(-0.5, masks.shape[1] - 0.5), ylim=(masks.shape[0] - 0.5, -0.5))
    return _png(figure)


def _draw_mask(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Fills and outlines `mask`."""
    if not mask.any():
        return
    fill = np.zeros((*mask.shape, 4))
    fill[mask] = (*to_rgb(color), 0.4)
    axes.imshow(fill, interpolation="nearest", aspect="auto")
    # A border of zeros closes the outlines of masks that reach the slice's edge.
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    axes.contour(columns, rows, np.pad(mask, 1).astype(float), [0.5], colors=color, linewidths=1.1)


def _diagram(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty diagram in the report's style, `inches` wide and high."""
    figure = Figure(inches, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    return figure, axes


def _plain(text: str) -> str:
    """`text` for a legend: its end, where it is long, and nothing that Matplotlib interprets.

    A dollar sign begins a formula, and a leading `_` hides an entry. A legend as wide as a
    path would leave no room for the picture.
    """
    if len(text) > _LABEL_LENGTH:
        text = "\u2026" + text[1 - _LABEL_LENGTH :]
    return ("\u200b" + text if text.startswith("_") else text).replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    """The finished picture. No date or version is stored, so equal data give equal bytes."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()
