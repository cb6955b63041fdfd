"""Claims, tables and text, from results with known differences."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tfmtseg.errors import InputError
from tfmtseg.experiment.claims import Comparison, Contest
from tfmtseg.experiment.report import write_report
from tfmtseg.experiment.results import Results
from tfmtseg.experiment.statistics import bootstrap_interval, holm, wilcoxon_p

GAINS = {"encdec": 0.0, "cpcseg": 0.01, "sscpcseg": 0.05, "bcp": 0.01, "bcpcpcseg": 0.02}


@pytest.fixture
def report(make_experiment, make_results):
    """Writes the report of made-up results; returns its text and its folder."""

    def write(gains, few=(3, 6), arms=(), **options) -> tuple[str, Path]:
        experiment = make_experiment(*(arms or gains), few=few)
        make_results(gains, **options).write(experiment.results)
        write_report(experiment)
        return (experiment.results / "report.md").read_text(), experiment.results

    return write


def claim(text: str, number: int) -> str:
    """The verdict on a claim."""
    line = next(line for line in text.splitlines() if line.startswith(f"**S{number}: "))
    return line.rstrip("*.").rpartition(": ")[2]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_claims_that_hold(report):
    text, _ = report(GAINS)
    assert claim(text, 1) == "not decided"  # three methods of the paper were not run
    assert "vaeseg at 3 labelled" in text
    assert claim(text, 2) == "holds"
    assert claim(text, 3) == "holds"
    assert "(best: `sscpcseg`)" in text


def test_claims_that_do_not_hold(report):
    """The second task gives nothing, and the best method gains 1.4 points, not 1.5."""
    text, _ = report({"encdec": 0.0, "sscpcseg": 0.014}, spread=0.0001)
    assert [claim(text, number) for number in (1, 2, 3)] == [
        "not decided", "holds", "does not hold for the best of those run",
    ]  # fmt: skip
    text, _ = report({"encdec": 0.0, "sscpcseg": 0.0}, spread=0.01)
    assert claim(text, 2) == "not shown"
    text, _ = report({"encdec": 0.02, "sscpcseg": 0.014}, spread=0.001)
    assert [claim(text, number) for number in (1, 2)] == ["does not hold"] * 2


def test_a_difference_that_may_be_chance_is_not_shown(report):
    """.016 are above the margin, but scores of single cases spread by .2."""
    text, _ = report({"encdec": 0.0, "cpcseg": 0.016}, spread=0.2)
    assert claim(text, 3) == "not shown"


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.016, "holds"), (0.014, "does not hold for the best of those run")]
)
def test_the_margin_of_the_third_claim(report, gain, expected):
    text, _ = report({"encdec": 0.0, "cpcseg": gain}, spread=0.0001)
    assert claim(text, 3) == expected


def test_one_number_of_labels_can_refute(make_experiment, make_results):
    experiment = make_experiment("encdec", "sscpcseg")
    good, bad = (
        make_results({"encdec": 0, "sscpcseg": gain}, counts=(count,))
        for gain, count in ((0.05, 3), (-0.05, 6))
    )
    results = type(good)({**good.runs, **bad.runs}, {**good.scores, **bad.scores})
    results.write(experiment.results)
    write_report(experiment)
    assert claim((experiment.results / "report.md").read_text(), 2) == "does not hold"
    write_report(dataclasses.replace(experiment, few=(3,)))
    assert claim((experiment.results / "report.md").read_text(), 2) == "holds"


def test_a_number_of_labels_that_was_not_run_decides_nothing(report):
    text, _ = report(GAINS, counts=(3,))
    assert [claim(text, number) for number in (1, 2, 3)] == ["not decided"] * 3
    assert "Not run: sscpcseg against encdec at 6 labelled." in text
    assert "a method beside `encdec` at 3 and 6 labelled" in text


def test_a_wider_network_is_no_rival(report):
    """Its gain is not that of a second task."""
    arms = ["encdec", "cpcseg", "wide=bcpcpcseg:width=16", "weak=cpcseg:branch_weight=.01"]
    text, _ = report({"encdec": 0, "cpcseg": 0.02, "wide": 0.1, "weak": 0.03}, arms=arms)
    assert "(best: `weak`)" in text


def test_notes_by_hand_and_several_versions(make_experiment, make_results):
    experiment = make_experiment("encdec", "cpcseg", few=(3,), count_subjects=True)
    results = make_results({"encdec": 0, "cpcseg": 0.1}, counts=(3,), num_seeds=2)
    old = {key: dataclasses.replace(run, code="def") for key, run in results.runs.items()
           if key[2] == 1}  # fmt: skip
    dataclasses.replace(results, runs={**results.runs, **old}).write(experiment.results)
    (experiment.results / "notes.md").write_text("Seed 1 came first.\n")
    write_report(experiment)
    text = (experiment.results / "report.md").read_text()
    assert "\n\nSeed 1 came first.\n\n## Claims" in text
    for code in ("abc", "def"):
        assert f"* TensorFlow 0.0, none, float32, code {code}: 2\n" in text
    assert "Judged with 3 labelled subjects" in text


def test_the_control_has_the_arms_own_teacher(report):
    """`slow` is better than `bcp`, but only because of its teacher."""
    arms = [
        "encdec", "bcp", "pasted", "bcp_slow=bcp:teacher_momentum=0.999",
        "slow=bcpcpcseg:teacher_momentum=0.999:contrastive_form=classes",
    ]  # fmt: skip
    gains = {"encdec": 0.0, "bcp": 0.01, "pasted": 0.0, "bcp_slow": 0.06, "slow": 0.05}
    text, folder = report(gains, arms=arms, spread=0.001)
    pairs = {(row["arm"], row["reference"]) for row in rows(folder / "comparisons.csv")}
    assert {pair for pair in pairs if pair[0] == "slow"} == {
        ("slow", "encdec"),
        ("slow", "bcp_slow"),
    }
    assert claim(text, 3) == "holds"  # of bcp_slow, the best
    without = {name: gain for name, gain in gains.items() if name != "bcp_slow"}
    text, _ = report(without, arms=[*arms[:3], arms[4]], spread=0.001)
    assert "(best: `slow`)" in text
    assert claim(text, 3) == "not decided"
    assert "Not run: slow against bcp:teacher_momentum=0.999 at 3 labelled" in text


def test_arms_of_fewer_seeds(report, make_experiment, make_results):
    """Seeds differ more than arms; the best is the best against `encdec` on the same ones."""
    experiment = make_experiment("encdec", "cpcseg", "vaeseg")
    results = make_results({"encdec": 0.0, "cpcseg": 0.03, "vaeseg": 0.04}, spread=0.001)
    one = {key for key in results.runs if key[0] == "vaeseg" and key[2] > 0}
    runs, scores = (
        {key: value for key, value in each.items() if key not in one}
        for each in (results.runs, results.scores)
    )
    dataclasses.replace(results, runs=runs, scores=scores).write(experiment.results)
    write_report(experiment)
    text = (experiment.results / "report.md").read_text()
    assert "(best: `cpcseg`)" in text  # `vaeseg` has too few seeds to decide anything
    assert claim(text, 3) == "holds"


def test_a_lucky_seed_does_not_choose_the_best(make_experiment, make_results):
    experiment = make_experiment("encdec", "cpcseg", "vaeseg")
    first = make_results({"encdec": 0.2, "vaeseg": 0.2}, num_seeds=1)  # an easy seed
    rest = make_results({"encdec": 0.0, "cpcseg": 0.03}, num_seeds=2)
    runs = {**{k: r for k, r in rest.runs.items() if k[2] == 1}, **first.runs}
    scores = {key: {**rest.scores, **first.scores}[key] for key in runs}
    results = dataclasses.replace(rest, runs=runs, scores=scores)
    best = Contest(experiment, results).best()
    assert best is not None
    assert best.name == "cpcseg"


def test_costs_by_processor(make_experiment, make_results):
    experiment = make_experiment("encdec", "cpcseg")
    results = make_results({"encdec": 0, "cpcseg": 0.1}, counts=(3,), cpu_seconds={"cpcseg": 20.0})
    key = ("cpcseg", 3, 1)
    other = dataclasses.replace(results.runs[key], cpu_seconds=50.0, processor="slow")
    key = ("cpcseg", 3, 2)
    longer = dataclasses.replace(results.runs[key], cpu_seconds=30.0)
    dataclasses.replace(results, runs={**results.runs, other.key: other, longer.key: longer}).write(
        experiment.results
    )
    write_report(experiment)
    text = (experiment.results / "report.md").read_text()
    assert "| `cpcseg` | 4 | 2 | none, 1 | 10 (10 to 10) | 25 (20 to 30) | 1000 |" in text
    assert "| `cpcseg` | 4 | 1 | slow, 1 | 10 | 50 | 1000 |" in text
    (comparison,) = Contest(experiment, Results.read(experiment.results)).equal_steps
    assert comparison.time_ratio == 25 / 8


def test_two_seeds_decide_nothing(report):
    text, _ = report(GAINS, num_seeds=2)
    assert {claim(text, number) for number in (1, 2, 3)} == {"not decided"}


def test_too_few_seeds_do_not_count_in_the_correction(make_experiment, make_results):
    experiment = make_experiment("encdec", "cpcseg", "bcp")
    results = make_results({"encdec": 0.0, "cpcseg": 0.02, "bcp": 0.001}, counts=(3,))

    def corrected(results: Results) -> dict[str, float | None]:
        contest = Contest(experiment, results)
        return {c.arm: c.p_holm for c in contest.equal_steps if c.reference == "encdec"}

    both = corrected(results)
    few = {key: run for key, run in results.runs.items() if key[0] != "bcp" or key[2] == 0}
    alone = corrected(dataclasses.replace(results, runs=few))
    assert alone["bcp"] is None
    assert alone["cpcseg"] * 2 == pytest.approx(both["cpcseg"])


def test_the_control_of_copy_paste_is_without_a_teacher(report):
    """Mixed labelled patches alone give all that `bcp` gains."""
    gains = {"encdec": 0.0, "bcp": 0.05, "pasted": 0.05}
    text, folder = report(gains, arms=["encdec", "bcp", "pasted"], spread=0.01)
    pairs = {(row["arm"], row["reference"]) for row in rows(folder / "comparisons.csv")}
    assert pairs == {("bcp", "encdec"), ("bcp", "pasted"), ("pasted", "encdec")}
    assert claim(text, 3) == "not shown"
    assert "(best: `bcp`)" in text  # a control is no method


def test_methods_that_were_not_run_are_named_with_the_best(report):
    text, _ = report({"encdec": 0.0, "sscpcseg": 0.014}, spread=0.0001)
    assert claim(text, 3) == "does not hold for the best of those run"
    untried = ["vaeseg", "boundseg", "cpcseg", "ssvaeseg", "bcp", "bcpcpcseg"]
    line = next(line for line in text.splitlines() if line.startswith("Not run at these"))
    assert all(f"`{name}`" in line for name in untried)
    assert "sscpcseg" not in line


def test_comparisons(report, make_results):
    """Against `encdec`, control and, for `sscpcseg`, every method of the paper."""
    _, folder = report(GAINS, cpu_seconds={"bcpcpcseg": 16.0})
    found = rows(folder / "comparisons.csv")
    at_steps = [row for row in found if row["at_equal"] == "steps"]
    pairs = {(row["arm"], row["reference"]) for row in at_steps}
    assert pairs == {
        ("cpcseg", "encdec"), ("sscpcseg", "encdec"), ("sscpcseg", "cpcseg"), ("bcp", "encdec"),
        ("bcpcpcseg", "encdec"), ("bcpcpcseg", "bcp"),
    }  # fmt: skip
    assert len(at_steps) == 3 * len(pairs)

    results = make_results(GAINS, cpu_seconds={"bcpcpcseg": 16.0})
    row = next(
        row for row in at_steps
        if (row["arm"], row["reference"], row["num_labeled"]) == ("bcpcpcseg", "bcp", "all")
    )  # fmt: skip
    difference = results.dice("bcpcpcseg", 0, range(3)) - results.dice("bcp", 0, range(3))
    assert float(row["difference"]) == pytest.approx(difference.mean())
    assert float(row["time_ratio"]) == 2
    by_seed = [float(value) for value in row["by_seed"].split()]
    assert by_seed == pytest.approx(difference.mean(axis=1))
    per_subject = difference.mean(axis=0).reshape(20, 2).mean(axis=1)
    assert float(row["p"]) == pytest.approx(wilcoxon_p(per_subject))
    # One family: those at equal time are of the same pairs here.
    assert len(found) > len(at_steps)
    corrected = holm([float(row["p"]) for row in at_steps])
    assert [float(row["p_holm"]) for row in at_steps] == pytest.approx(corrected)
    by_key = {(r["arm"], r["reference"], r["num_labeled"]): r["p_holm"] for r in at_steps}
    for each in found:
        assert each["p_holm"] == by_key[each["arm"], each["reference"], each["num_labeled"]]
    # Two cases each of 20 subjects: 20 independent ones, and not 40.
    subjects = [case.split("_")[0] for case in results.cases]
    assert (float(row["low"]), float(row["high"])) == bootstrap_interval(difference, subjects)
    (scores,) = (
        each for each in rows(folder / "table.csv")
        if (each["arm"], each["num_labeled"]) == ("bcp", "all")
    )  # fmt: skip
    interval = bootstrap_interval(results.dice("bcp", 0, range(3)), subjects)
    assert (float(scores["dice_low"]), float(scores["dice_high"])) == interval


@pytest.mark.parametrize(
    ("low", "p", "p_holm", "gain"),
    [
        (0.001, 0.01, 0.04, True),
        (0.001, 0.03, 0.06, False),  # not after the correction
        (-0.001, 0.005, 0.01, False),  # not by its interval
        (0.001, 0.01, None, False),  # too few seeds
    ],
)
def test_a_gain_is_shown_by_interval_and_corrected_test(low, p, p_holm, gain):
    comparison = Comparison(
        arm="bcp", reference="encdec", num_labeled=3, reference_num_labeled=3, seeds=3,
        difference=0.02, by_seed=(0.02,) * 3, low=low, high=0.04, low_seeds=0.01,
        high_seeds=0.03, p=p, p_holm=p_holm, time_ratio=2.0,
    )  # fmt: skip
    assert comparison.is_gain == gain


@pytest.mark.parametrize(("seconds", "equal"), [(8.7, True), (9.5, False)])
def test_times_that_are_equal(seconds, equal, make_experiment, make_results):
    """Against 8 s: a tenth more at most."""
    experiment = make_experiment("encdec", "cpcseg", few=(3,))
    results = make_results({"encdec": 0, "cpcseg": 0.1}, counts=(3,), num_seeds=1,
                           cpu_seconds={"cpcseg": seconds})  # fmt: skip
    contest = Contest(experiment, results)
    assert bool(contest.equal_time) == equal
    assert bool(contest.lacking) != equal


def test_equal_time(report):
    """bcpcpcseg takes twice as long as encdec and as long as its control and encdec_long."""
    gains = GAINS | {"encdec_long": 0.03}
    options = {
        "cpu_seconds": {"bcpcpcseg": 16.0, "bcp": 15.0, "encdec_long": 15.5},
        "steps": {"encdec_long": 8},
        "arms": [*GAINS, "encdec_long=encdec:train_steps=8"],
    }
    text, folder = report(gains, **options)
    pairs = {
        (row["arm"], row["reference"])
        for row in rows(folder / "comparisons.csv")
        if row["at_equal"] == "time"
    }
    assert pairs == {
        ("cpcseg", "encdec"), ("sscpcseg", "encdec"), ("bcp", "encdec_long"),
        ("bcpcpcseg", "encdec_long"), ("bcpcpcseg", "bcp"),
    }  # fmt: skip
    assert "Without a partner" not in text


def test_times_of_different_processors_are_not_compared(make_experiment, make_results):
    """Seed 0 of `cpcseg` took 3 times as long as `encdec`, seed 1 ran on another processor."""
    experiment = make_experiment("encdec", "cpcseg")
    results = make_results(
        {"encdec": 0, "cpcseg": 0.1}, counts=(3,), num_seeds=2, cpu_seconds={"cpcseg": 24.0}
    )
    key = ("cpcseg", 3, 1)
    run = dataclasses.replace(results.runs[key], cpu_seconds=1000.0, processor="another")
    results = dataclasses.replace(results, runs={**results.runs, key: run})
    (comparison,) = Contest(experiment, results).equal_steps
    assert comparison.seeds == 2
    assert comparison.time_ratio == 3
    key = ("cpcseg", 3, 0)
    run = dataclasses.replace(results.runs[key], processor="another")
    results = dataclasses.replace(results, runs={**results.runs, key: run})
    contest = Contest(experiment, results)
    assert contest.equal_steps[0].time_ratio is None
    assert contest.equal_time == contest.lacking == []


def test_what_equal_time_lacks(report):
    text, _ = report({"encdec": 0.0, "wide": 0.1}, arms=["encdec", "wide=cpcseg:width=16"],
                     cpu_seconds={"wide": 20.0})  # fmt: skip
    # 20 s against 8 s for 4 steps: 10 steps.
    suggested = "no `encdec` took as long; `--arms=encdec_10=encdec:train_steps=10` would"
    assert f"`wide` against `encdec` at 3, 6, all labelled: {suggested}" in text


def test_what_is_suggested_has_no_name_of_another_arm(report):
    """A longer `pasted` is a `bcp` too."""
    gains = {"encdec": 0.0, "pasted": 0.0, "bcp": 0.1}
    text, _ = report(gains, arms=[*gains], cpu_seconds={"encdec": 20.0, "bcp": 20.0})
    assert "; `--arms=pasted_10=bcp:teacher_start=1:train_steps=10` would" in text


def test_table(report, make_results):
    _, folder = report({"encdec": 0.0, "sscpcseg": 0.1}, num_seeds=2)
    table = {(row["arm"], row["num_labeled"]): row for row in rows(folder / "table.csv")}
    assert len(table) == 9
    row = table["sscpcseg", "3"]
    dice = make_results({"encdec": 0.0, "sscpcseg": 0.1}, num_seeds=2).dice("sscpcseg", 3, [0, 1])
    assert float(row["dice_mean"]) == pytest.approx(dice.mean())
    # The standard deviation of two values is their distance over the square root of 2.
    assert float(row["dice_std"]) == pytest.approx(
        abs(dice[0].mean() - dice[1].mean()) / np.sqrt(2)
    )
    assert float(row["dice_a"]) == pytest.approx(dice.mean() - 0.005)
    assert float(row["hd95_mm_mean"]) == 3
    assert float(row["dice_low"]) < dice.mean() < float(row["dice_high"])
    assert (row["seeds"], row["train_steps"], row["parameters"]) == ("2", "4", "1000000")


def test_labels_saved(report):
    """The number of labels itself gives .003 at 6 and .097 at all; the best method .05."""
    text, _ = report({"encdec": 0.0, "cpcseg": 0.05})
    lines = text.partition("**Labels saved.**")[2].partition("##")[0].splitlines()
    found = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): float(line.split("|")[3])
        for line in lines
        if line.startswith(("| 3", "| 6"))
    }
    expected = {("3", "6"): 4.7, ("3", "all"): -4.7, ("6", "all"): -4.4}
    assert found == pytest.approx(expected, abs=0.3)  # noise of 3 x 40 draws of 1 point


def test_commands_make_the_finished_runs(report, make_experiment, make_results):
    text, _ = report(GAINS | {"control_a": 0}, num_seeds=1, counts=(3, 0))
    command = next(line for line in text.splitlines() if "label_efficiency.py" in line)
    assert command.endswith(
        "--few=3,6 --arms=encdec,cpcseg,sscpcseg,bcp,bcpcpcseg,control_a --num_labeled=3,all "
        "--seeds=0"
    )
    assert "--method=sscpcseg --num_labeled=3 --seed=0 --branch_weight=0" in text


def test_no_path_of_this_machine_and_the_same_bytes_again(report, tmp_path):
    text, folder = report(GAINS)
    assert str(tmp_path) not in text
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {
        "settings.yaml", "experiment.yaml", "runs.csv", "cases.csv", "table.csv",
        "comparisons.csv", "dice.png", "report.md",
    }  # fmt: skip
    assert all(str(tmp_path).encode() not in content for content in before.values())
    report(GAINS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_one_arm_alone(report):
    text, folder = report({"encdec": 0.0}, num_seeds=1, counts=(0,))
    assert {claim(text, number) for number in (1, 2, 3)} == {"not decided"}
    assert not (folder / "comparisons.csv").exists()


def test_nothing_finished(make_experiment):
    with pytest.raises(InputError, match=r"runs\.csv is missing"):
        write_report(make_experiment("encdec"))


def test_runs_of_an_arm_that_the_experiment_lost(report):
    """As when experiment.yaml alone was put back: no report without them."""
    with pytest.raises(InputError, match=r"experiment\.yaml: arms is without bcp, must be all"):
        report(GAINS, arms=[arm for arm in GAINS if arm != "bcp"])


def test_the_best_method_is_no_control(make_experiment, make_results):
    experiment = make_experiment("encdec", "cpcseg", "sscpcseg", "control_a")
    results = make_results({"encdec": 0.9, "cpcseg": 0.1, "sscpcseg": 0.2, "control_a": 0.3})
    best = Contest(experiment, results).best()
    assert best is not None
    assert best.name == "sscpcseg"
