from __future__ import annotations

import html
import html.parser
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tfmtseg.inference import figures as pictures
from tfmtseg.inference import report
from tfmtseg.inference.figures import (
    ScoreLine,
    cut,
    draw_case_scores,
    draw_label_efficiency,
    region_colors,
    slice_places,
)
from tfmtseg.inference.report import CaseVolumes, RunReport, shown_cases, write_report
from tfmtseg.metrics.scores import CaseScores, RegionScores, summarize
from tfmtseg.regions import Regions

EVIL = "<script>alert('x')</script>&\"$_"
REGIONS = Regions.exclusive(["Anterior", EVIL])


def case(name: str, *dice: float, hd95_mm: float = 1.5, empty: bool = False) -> CaseScores:
    return CaseScores(
        name,
        {
            region: RegionScores(value, hd95_mm, empty, empty_truth=False, surface_dice=value / 2)
            for region, value in zip(REGIONS.names, dice, strict=True)
        },
    )


def make_run(name: str, scores: list[CaseScores], **changes) -> RunReport:
    """A run of scores made up, on volumes with two labelled blocks."""
    truth = np.zeros((12, 10, 8), np.uint8)
    truth[3:7, 2:6, 2:5], truth[7:9, 2:6, 2:5] = 1, 2
    image = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
    steps = np.array([10.0, 20, 30])
    fields = {
        "name": name,
        "regions": REGIONS,
        "result": {
            "method": name,
            "num_labeled": 6,
            "num_unlabeled": 134,
            "train_steps": 600,
            "seconds": 84.0,
            "parameters": {"encoder": 1_100_000, "decoder": 80_000, "branch": 0},
            "tensorflow": "2.99.0",
            "keras": "3.98.0",
            "ops_implementation": "native",
        },
        "summary": {
            "data": "Task04",
            "split": "test",
            "surface_tolerance_mm": 2.5,
            **summarize(scores),
            "shape_prior": summarize([case("a", 0.123, 0.123)]),
            "seconds": 12.0,
            "versions": {"tensorflow": "2.97.0", "keras": "3.96.0"},
        },
        "scores": scores,
        "history": {
            "step": steps,
            "loss": 2 / steps,
            "seg_loss": 1 / steps,
            "cpc_loss": 3 / steps,
            "cpc_chance": np.full(3, 5.36),
            **{f"dice_{region}": steps / 40 for region in REGIONS.names},
            **{f"val_dice_{region}": np.array([np.nan, 0.5, np.nan]) for region in REGIONS.names},
        },
        "modality": "MRI",
        "read_case": lambda _: CaseVolumes(image, truth, np.roll(truth, 1, 0), (1, 1, 2)),
        **changes,
    }
    return RunReport(**fields)


SCORES = [case("a", 0.9, 0.8), case("b", 0.5, 0.0, empty=True), case("c", 0.7, 0.6)]


class Parser(html.parser.HTMLParser):
    """Collects tags, links and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def render(tmp_path, *runs: RunReport) -> tuple[str, Parser]:
    write_report(tmp_path / "report.html", runs)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    return page, parser


def test_self_contained(tmp_path):
    page, parser = render(tmp_path, make_run("encdec", SCORES), make_run("sscpcseg", SCORES))
    assert "script" not in parser.tags
    assert "link" not in parser.tags
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    without_images = re.sub(r"base64,[\w+/=]+", "", page)
    assert "http" not in without_images
    assert "url(" not in without_images
    assert "@import" not in without_images


def test_text_from_files_is_escaped(tmp_path):
    scores = [case(EVIL, 0.9, 0.8)]
    run = make_run(EVIL, scores, modality=EVIL, result={"method": EVIL, "tensorflow": EVIL})
    page, parser = render(tmp_path, run)
    assert "<script" not in page
    assert html.escape(EVIL) in page
    assert "script" not in parser.tags


def test_numbers(tmp_path):
    _, parser = render(tmp_path, make_run("sscpcseg", SCORES))
    # Mean of .9 .5 .7 and its deviation sqrt(.08 / 3); mean of .8 0 .6; mean of .85 .25 .65.
    for number in ("0.700", "± 0.163", "0.467", "0.583", "1.50 mm", "0.123"):
        assert number in parser.text
    for fact in ("6 labelled", "134 unlabelled", "600 steps", "1 min 24 s", "3 test cases"):
        assert fact in parser.text
    for fact in ("TensorFlow 2.99.0, Keras 3.98.0", "TensorFlow 2.97.0, Keras 3.96.0", "native"):
        assert fact in parser.text
    assert "encoder 1.10 M, decoder 0.08 M" in parser.text
    assert "Anterior: nothing predicted in 1 case, nothing to find in 0 cases." in parser.text


def test_runs_beside_each_other(tmp_path):
    better = [case("a", 1.0, 1.0), case("b", 1.0, 1.0), case("c", 1.0, 1.0)]
    page, parser = render(tmp_path, make_run("encdec", SCORES), make_run("sscpcseg", better))
    assert "encdec vs. sscpcseg" in parser.text
    assert "1.000" in parser.text
    # Three cases, three planes; image, truth and two predictions each.
    assert len(re.findall(r'alt="[abc], \w+:', page)) == 3 * 3 * 4
    assert page.count("sees no image") == 1  # the same shape prior of both


def test_no_history(tmp_path):
    _, parser = render(tmp_path, make_run("encdec", SCORES, history={}))
    assert "Curves" not in parser.text
    assert "Every case" in parser.text


def test_scores_of_training_patches_are_dashed_beside_held_out_ones(tmp_path, monkeypatch):
    """One run watched development cases, the other has none."""
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda curves, *_, **__: drawn.append(curves) or b"")
    watching = make_run("encdec", SCORES)
    history = {k: v for k, v in watching.history.items() if not k.startswith("val_")}
    _, parser = render(tmp_path, watching, make_run("sscpcseg", SCORES, history=history))
    found = [(curve.label, curve.dashed) for curve in drawn[-1]]
    assert found == [("encdec", False), ("", True), ("sscpcseg", True)]
    assert "development cases; dashed: on training patches" in parser.text


def test_legends_lie_within_their_figures(monkeypatch):
    """With many arms, and with names of runs that are long and alike at their beginning."""
    figures = []
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or b"")
    lines = [ScoreLine(f"arm_{i}", [0], [0.5], [(0.4, 0.6)], [False]) for i in range(30)]
    draw_label_efficiency(lines, ["3"], "labelled", "Dice")
    names = [f"experiment/runs/sscpcseg/n7_seed{i}" for i in range(5)]
    draw_case_scores(names, [SCORES] * 5)
    draw_case_scores(["encdec", "bcp", "classes"], [SCORES] * 3)
    for figure, rows in zip(figures, (30, 5, 1), strict=True):
        FigureCanvasAgg(figure).draw()
        box, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        assert len({text.get_window_extent().y0 for text in figure.legends[0].get_texts()}) == rows
    drawn = figures[0].legends[0].get_lines()
    looks = {(line.get_color(), line.get_marker()) for line in drawn}
    assert len(looks) == 30


def test_absent_facts_are_said_to_be_unknown(tmp_path):
    _, parser = render(tmp_path, make_run("encdec", SCORES, result={}))
    assert "not known" in parser.text


def test_equal_data_give_equal_bytes(tmp_path):
    first, _ = render(tmp_path, make_run("encdec", SCORES))
    second, _ = render(tmp_path, make_run("encdec", SCORES))
    assert first == second


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    runs = [make_run("encdec", SCORES), make_run("sscpcseg", SCORES[:2])]
    with pytest.raises(ValueError, match="same regions and cases"):
        write_report(tmp_path / "report.html", runs)
    with pytest.raises(ValueError, match="different names"):
        write_report(tmp_path / "report.html", runs[:1] * 2)


def test_shown_cases():
    assert shown_cases([SCORES]) == [("worst", "b"), ("median", "c"), ("best", "a")]
    assert shown_cases([SCORES[:2]]) == [("worst", "b"), ("best", "a")]
    assert shown_cases([SCORES[:1]]) == [("best", "a")]


def test_all_runs_choose_the_shown_cases():
    """Means over two runs: a .5, b .6, c .4."""
    first = [case("a", 0.9, 0.9), case("b", 0.6, 0.6), case("c", 0.0, 0.0)]
    second = [case("a", 0.1, 0.1), case("b", 0.6, 0.6), case("c", 0.8, 0.8)]
    assert shown_cases([first, second]) == [("worst", "c"), ("median", "a"), ("best", "b")]


def test_slices_lie_where_the_truth_is_largest():
    truth = np.zeros((6, 7, 8), np.uint8)
    truth[1, 2, 3] = 1
    truth[4, 5, 3:7] = 2
    assert slice_places(truth) == (4, 5, 3)
    assert slice_places(np.zeros((6, 7, 8), np.uint8)) == (3, 3, 4)


def test_slices_are_seen_from_the_feet_and_from_the_front():
    """Top left of an axial slice is the front of the patient's right side."""
    volume = np.zeros((3, 4, 5))
    volume[2, 3, 1] = 1  # right, anterior
    volume[2, 0, 4] = 2  # right, superior
    assert cut(volume, 2, 1)[0, 0] == 1
    assert cut(volume, 1, 0)[0, 0] == 2
    assert cut(volume, 0, 2).shape == (5, 4)
    assert cut(volume, 0, 2)[3, 0] == 1  # anterior on the left, z = 1 of 0 to 4 counted from above


@pytest.mark.parametrize("count", [1, 6, 20])
def test_regions_have_different_colors(count):
    colors = region_colors(count)
    assert len(set(colors)) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
