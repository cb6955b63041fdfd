"""The report of an experiment: tables, a diagram and what they show.

`write_report` writes into the experiment's `results/`, besides what is there already:

    table.csv         one row per arm and number of labelled cases
    comparisons.csv   differences with intervals and p-values
    dice.png          Dice score over the number of labelled cases
    report.md         all of it, to read

A file `notes.md` in it, written by hand, stands near the top of the report: what a reader
has to know that no table says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfmtseg.errors import InputError
from tfmtseg.experiment.claims import (
    CLAIMED,
    MARGIN,
    MIN_SEEDS,
    PAPER_METHODS,
    TIME_TOLERANCE,
    Comparison,
    Contest,
    Evidence,
    compare,
    kind_of,
    references,
)
from tfmtseg.experiment.plan import (
    BASELINE,
    SHAPE_PRIOR,
    THREAD_VARIABLES,
    Arm,
    Experiment,
    Run,
    by_count,
    count_text,
)
from tfmtseg.experiment.results import Results
from tfmtseg.experiment.statistics import REPLICATES, bootstrap_interval
from tfmtseg.files import atomic_path, write_rows, write_text
from tfmtseg.inference.figures import ScoreLine, draw_label_efficiency


def write_report(experiment: Experiment) -> None:
    """Writes tables, diagram and report from the finished runs.

    Raises:
        InputError: If no run is finished, or one is of an arm that the experiment does not have.
    """
    results = Results.read(experiment.results)
    if not results.runs:
        raise InputError(
            experiment.results, "runs.csv", "missing", "there: at least one finished run",
            "repeat the command without --report_only",
        )  # fmt: skip
    unknown = {run.arm for run in results.runs.values()} - {SHAPE_PRIOR, *experiment.arms}
    if unknown:
        raise InputError(
            experiment.results / "experiment.yaml", "arms", f"without {', '.join(sorted(unknown))}",
            "all arms that runs.csv has", "bring back the file, as from git",
        )  # fmt: skip
    contest = Contest(experiment, results)
    rows = _table(contest)
    write_rows(experiment.results / "table.csv", rows)
    comparisons = [
        {"at_equal": what, **_comparison_row(comparison)}
        for what, made in (("steps", contest.equal_steps), ("time", contest.equal_time))
        for comparison in made
    ]
    if comparisons:
        write_rows(experiment.results / "comparisons.csv", comparisons)
    with atomic_path(experiment.results / "dice.png") as path:
        path.write_bytes(_diagram(contest, rows))
    notes = experiment.results / "notes.md"
    text = notes.read_text(encoding="utf-8").strip() if notes.exists() else ""
    write_text(experiment.results / "report.md", _report(contest, rows, text))


def _table(contest: Contest) -> list[dict[str, Any]]:
    """One row per arm and number of labelled cases; means over seeds and cases."""
    results = contest.results
    subjects = [contest.subject(case) for case in results.cases]
    rows = []
    for arm in _arm_names(contest):
        for count in results.counts(arm):
            seeds = results.seeds(arm, count)
            dice = results.dice(arm, count, seeds)
            low, high = bootstrap_interval(dice, subjects)
            runs = results.of(arm, count, seeds)
            row: dict[str, Any] = {
                "arm": arm, "num_labeled": count_text(count), "seeds": len(seeds),
                "train_steps": runs[0].train_steps, "dice_mean": float(dice.mean()),
                "dice_std": _spread(dice), "dice_low": low, "dice_high": high,
            }  # fmt: skip
            hd95_mm = []
            for region in results.regions:
                scores = [
                    [case.regions[region] for case in results.scores[arm, count, seed]]
                    for seed in seeds
                ]
                region_dice = np.array([[score.dice for score in run] for run in scores])
                region_hd95_mm = np.array([[score.hd95_mm for score in run] for run in scores])
                hd95_mm.append(region_hd95_mm)
                row |= {
                    f"dice_{region}": float(region_dice.mean()),
                    f"dice_{region}_std": _spread(region_dice),
                    f"hd95_mm_{region}": float(region_hd95_mm.mean()),
                    f"hd95_mm_{region}_std": _spread(region_hd95_mm),
                    f"present_{region}": sum(not s.empty_truth for r in scores for s in r),
                    f"missed_{region}": sum(
                        s.empty_prediction and not s.empty_truth for r in scores for s in r
                    ),
                }
            row |= {
                "hd95_mm_mean": float(np.mean(hd95_mm)),
                "hd95_mm_std": _spread(np.mean(hd95_mm, axis=0)),
                "memory_mib": max(run.memory_mib for run in runs),
                "parameters": runs[0].parameters,
            }
            rows.append(row)
    return rows


def _spread(values: np.ndarray) -> float | str:
    """Standard deviation over seeds of the means over cases; nothing for one seed."""
    return float(values.mean(axis=1).std(ddof=1)) if len(values) > 1 else ""


def _comparison_row(comparison: Comparison) -> dict[str, Any]:
    return {
        **dataclasses.asdict(comparison),
        "by_seed": " ".join(map(str, comparison.by_seed)),
        "num_labeled": count_text(comparison.num_labeled),
        "reference_num_labeled": count_text(comparison.reference_num_labeled),
    }


def _arm_names(contest: Contest) -> list[str]:
    """The arms in the order in which they were first asked for, after the shape prior."""
    return [SHAPE_PRIOR, *(arm.name for arm in contest.arms)]


def _diagram(contest: Contest, rows: Sequence[dict[str, Any]]) -> bytes:
    counts = [count_text(count) for count in contest.results.counts()]
    most = {n: max(row["seeds"] for row in rows if row["num_labeled"] == n) for n in counts}
    lines = []
    for arm in _arm_names(contest):
        mine = [row for row in rows if row["arm"] == arm]
        lines.append(
            ScoreLine(
                label=arm,
                places=[counts.index(row["num_labeled"]) for row in mine],
                means=[row["dice_mean"] for row in mine],
                intervals=[(row["dice_low"], row["dice_high"]) for row in mine],
                dashed=arm == SHAPE_PRIOR,
                hollow=[row["seeds"] < most[row["num_labeled"]] for row in mine],
            )
        )
    x_label = f"labelled {_unit(contest)}"
    if any(any(line.hollow) for line in lines):
        x_label += " (hollow: fewer seeds than other arms)"
    return draw_label_efficiency(lines, counts, x_label, "mean Dice score, 95 % interval")


# The sections of report.md, in their order.


def _report(contest: Contest, rows: Sequence[dict[str, Any]], notes: str) -> str:
    sections = [
        _head(contest),
        *([notes] if notes else []),
        _claims(contest),
        _scores(contest, rows),
        _differences(contest),
        _costs(contest),
        _method(contest),
        _commands(contest),
    ]
    return "\n\n".join(sections) + "\n"


def _head(contest: Contest) -> str:
    results, settings = contest.results, contest.experiment.settings
    subjects = {contest.subject(case) for case in results.cases}
    trained = [run for run in results.runs.values() if run.arm != SHAPE_PRIOR]
    crop = " x ".join(map(str, settings.crop)) if all(settings.crop) else "chosen from the data"
    made = Counter(
        f"TensorFlow {run.tensorflow}, {run.processor}, {run.precision}, code {run.code}"
        for run in trained
    )
    return "\n".join(
        [
            "# Label efficiency",
            "",
            f"{len(trained)} finished runs; {len(results.cases)} test cases of {len(subjects)} "
            f"subjects; classes {', '.join(results.regions)}. {settings.train_steps} steps where "
            f"an arm does not say otherwise, width {settings.width}, crop {crop}, "
            f"{settings.labeled_per_step} labelled patches per step, and "
            f"{settings.unlabeled_per_step} unlabelled ones for the arms that use them; all "
            "settings are in `settings.yaml`. Numbers of labelled ones are those of "
            f"{_unit(contest)}.",
            "",
            "Made with, and how many runs:",
            "",
            *[f"* {what}: {number}" for what, number in sorted(made.items())],
            "",
            "Arms:",
            "",
            *[f"* `{arm.definition}`" for arm in contest.arms],
            f"* `{SHAPE_PRIOR}`: majority vote of the labelled label maps, laid on the volume's "
            "centre; sees no image",
        ]
    )


def _unit(contest: Contest) -> str:
    return "subjects" if contest.experiment.settings.count_subjects else "cases"


def _claims(contest: Contest) -> str:
    lines = ["## Claims", ""]
    few = " and ".join(map(count_text, contest.experiment.few))
    steps = contest.experiment.settings.train_steps
    ours = contest.name_of(kind_of(CLAIMED), steps)
    others = [contest.name_of(kind_of(name), steps) for name in PAPER_METHODS if name != CLAIMED]
    s1 = contest.at_few(ours, others)
    s2 = contest.at_few(ours, [contest.name_of(kind_of(BASELINE), steps)])
    lines += [
        f"Judged with {few} labelled {_unit(contest)}, at equal steps. A difference counts as a "
        "gain if its 95 % interval lies above 0 and its corrected p-value is below .05. A claim "
        f"holds if all its differences are gains (and in S3 those to `{BASELINE}` are "
        f"{100 * MARGIN:g} points or more), does not hold if the interval of one lies below "
        "what is claimed, and is not shown if neither is so; with fewer than "
        f"{MIN_SEEDS} seeds nothing is decided.",
        "",
        *_claim(
            f"S1: `{CLAIMED}` is better than every other method of the paper",
            s1.verdict(lambda c: 0), s1,
        ),
        *_claim(
            f"S2: `{CLAIMED}` is better than itself without its contrastive loss, which learns "
            f"what `{BASELINE}` learns, to the last bit",
            s2.verdict(lambda c: 0), s2,
        ),
    ]  # fmt: skip
    return "\n".join([*lines, *_third_claim(contest)])


def _third_claim(contest: Contest) -> list[str]:
    title = f"S3: the best method is at least {100 * MARGIN:g} points better than `encdec`, and "
    title += "better than its own control"
    best = contest.best()
    if best is None:
        few = " and ".join(map(count_text, contest.experiment.few))
        missing = [f"a method beside `encdec` at {few} labelled"]
        return _claim(title, "not decided", Evidence([], missing))
    steps = contest.experiment.steps(best)
    baseline = contest.name_of(kind_of(BASELINE), steps)
    evidence = contest.at_few(best.name, [contest.name_of(k, steps) for k in references(best)])
    verdict = evidence.verdict(lambda c: MARGIN if c.reference == baseline else 0)
    untried = contest.untried()
    if untried and verdict == "does not hold":
        verdict += " for the best of those run"
    lines = _claim(f"{title} (best: `{best.name}`)", verdict, evidence)
    if untried:
        lines += [f"Not run at these numbers: {', '.join(f'`{name}`' for name in untried)}.", ""]
    return lines + _labels_saved(contest, best)


def _labels_saved(contest: Contest, best: Arm) -> list[str]:
    """The best method with few labels against `encdec` with more."""
    baseline = contest.name_of(kind_of(BASELINE), contest.experiment.steps(best))
    found = [
        compare(contest.results, contest.subject, best.name, baseline, count, more)
        for count in contest.experiment.few
        for more in contest.results.counts(baseline)
        if by_count(more) > by_count(count)
    ]
    known = [comparison for comparison in found if comparison is not None]
    if not known:
        return []
    return [
        f"**Labels saved.** `{best.name}` with few labels minus `encdec` with more. Where the "
        "interval lies below 0 it falls short; where the interval includes 0 the two were not "
        "told apart:",
        "",
        "| labelled | `encdec` labelled | points | 95 % interval | seeds |",
        "|---|---|---|---|---|",
        *[
            f"| {count_text(c.num_labeled)} | {count_text(c.reference_num_labeled)} "
            f"| {_points(c.difference)} | {_interval(c.low, c.high)} | {c.seeds} |"
            for c in known
        ],
    ]


def _claim(title: str, verdict: str, evidence: Evidence) -> list[str]:
    lines = [f"**{title}: {verdict}.**", ""]
    if evidence.comparisons:
        lines += [*_comparison_table(evidence.comparisons), ""]
    if evidence.missing:
        lines += [f"Not run: {', '.join(evidence.missing)}.", ""]
    return lines


def _scores(contest: Contest, rows: Sequence[dict[str, Any]]) -> str:
    results = contest.results
    counts = [count_text(count) for count in results.counts()]
    cells = {(row["arm"], row["num_labeled"]): row for row in rows}
    lines = [
        "## Scores",
        "",
        "Mean Dice score over the classes: mean ± standard deviation over seeds (number of seeds). "
        "Seeds differ, in the labelled cases that they draw above all: arms with other numbers of "
        "seeds are compared under Differences, on the seeds that both have, and not here.",
        "",
        f"| arm | {' | '.join(counts)} |",
        "|---|" + "---|" * len(counts),
    ]
    for arm in _arm_names(contest):
        mine = [cells.get((arm, count)) for count in counts]
        lines.append(f"| `{arm}` | {' | '.join(_score(row) for row in mine)} |")
    lines += ["", "![Dice score over the number of labelled cases](dice.png)", ""]
    heads = [f"Dice {name}" for name in results.regions]
    heads += [f"HD95 {name}, mm" for name in results.regions]
    lines += [
        "By class. Missed: nothing was predicted where there is something; the HD95 is the "
        "volume's diagonal then.",
        "",
        f"| arm | labelled | {' | '.join(heads)} | missed |",
        "|---|---|" + "---|" * (len(heads) + 1),
    ]
    for row in rows:
        names = results.regions
        values = [_with_spread(row[f"dice_{n}"], row[f"dice_{n}_std"], 3) for n in names]
        values += [_with_spread(row[f"hd95_mm_{n}"], row[f"hd95_mm_{n}_std"], 2) for n in names]
        missed, present = (
            sum(row[f"{what}_{name}"] for name in names) for what in ("missed", "present")
        )
        values.append(f"{missed} of {present}")
        lines.append(f"| `{row['arm']}` | {row['num_labeled']} | {' | '.join(values)} |")
    return "\n".join(lines)


def _differences(contest: Contest) -> str:
    lines = [
        "## Differences",
        "",
        "Every arm minus `encdec` and minus its control, in points of mean Dice; gains, losses and "
        "nulls alike. The control of `bcpcpcseg` is the same without the contrast, `bcp`; that "
        "of `bcp` is the same with a teacher that labels nothing, `pasted`; that of the others "
        "is `encdec`. `bcp`, `pasted` and `bcpcpcseg` train on mixed patches besides, parts of "
        "which are labelled volumes. Beside the interval, the difference of each seed.",
        "",
        "### At equal steps",
        "",
        *(_comparison_table(contest.equal_steps) or ["None."]),
        "",
        "### At equal time",
        "",
        f"With the reference whose training took as much processor time, to "
        f"{100 * TIME_TOLERANCE:g} % of the medians over all runs; longer or shorter copies of the "
        "reference count, each with its own learning rate schedule.",
        "",
        *(_comparison_table(contest.equal_time) or ["None."]),
    ]
    if contest.lacking:
        lines += ["", "Without a partner:", "", *[f"* {text}" for text in contest.lacking]]
    return "\n".join(lines)


def _comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    return [
        "| arm | against | labelled | points | 95 % interval | by seed | over seeds alone | p "
        "| corrected | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *[
            f"| `{c.arm}` | `{c.reference}` | {count_text(c.num_labeled)} "
            f"| {_points(c.difference)} | {_interval(c.low, c.high)} "
            f"| {' '.join(map(_points, c.by_seed))} | {_interval(c.low_seeds, c.high_seeds)} "
            f"| {_p(c.p)} | {_p(c.p_holm)} "
            f"| {f'x {c.time_ratio:.2f}' if c.time_ratio else ''} |"
            for c in comparisons
        ],
    ]


def _costs(contest: Contest) -> str:
    lines = [
        "## Costs",
        "",
        "Of one training, the median over runs, and from the least to the most. Only rows of one "
        "processor and as many runs side by side compare; comparisons at equal time go by their "
        "processor seconds.",
        "",
        "| arm | steps | runs | processor, side by side | seconds | processor seconds "
        "| memory, MiB | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in contest.arms:
        for place, here in sorted(contest.results.by_place(arm.name).items()):
            lines.append(
                f"| `{arm.name}` | {here[0].train_steps} | {len(here)} | {place[0]}, {place[1]} "
                f"| {_range([run.seconds for run in here])} "
                f"| {_range([run.cpu_seconds for run in here])} "
                f"| {max(run.memory_mib for run in here)} "
                f"| {here[0].parameters / 1e6:.2f} million |"
            )
    return "\n".join(lines)


def _method(contest: Contest) -> str:
    averaging = contest.experiment.settings.weight_averaging
    weights = "those" if averaging == "none" else f"the averaged ones ({averaging})"
    return (
        "## How this was computed\n\n"
        "All arms of one seed and number of labelled cases train on the same labelled cases, and "
        "a smaller number is part of a larger one; test cases are the same throughout, and no "
        f"label of them is opened in training. Weights are {weights} after the last step: "
        "no training was stopped early, and no weights were chosen by a score. Intervals: "
        "hierarchical bootstrap with "
        f"{REPLICATES:,} replicates, which draws seeds, then subjects, then cases of each subject; "
        "all drawn seeds meet the same drawn cases. With one seed an interval says nothing of the "
        "chance of seeds; with few it is too narrow where seeds differ more than test cases do, "
        "as it can hardly reach beyond the lowest and the highest of them. Over seeds alone: "
        "Student's t interval, which allows for that, and takes the test cases as given; no "
        "verdict above rests on it. p: two-sided Wilcoxon signed-rank test over subjects, scores "
        "averaged over seeds and over the subject's cases, because cases of one subject are not "
        "independent; it is about the networks that were trained, and knows nothing of other "
        "seeds. Corrected: Holm, over all differences at equal steps and at equal time that "
        f"{MIN_SEEDS} seeds or more have. The best method of S3 is "
        "chosen by the test cases it is judged on, which flatters its interval.\n\n"
        "`cases.csv` holds every score of every test case, `runs.csv` every run, `table.csv` the "
        "scores above and `comparisons.csv` the differences at equal steps and time, all digits. "
        "`splits/` lists the test, development and labelled cases."
    )


def _commands(contest: Contest) -> str:
    experiment, results = contest.experiment, contest.results
    lines = [
        "## Commands",
        "",
        "In a folder EXPERIMENT whose `results/` is empty but for this `settings.yaml`; DATA is "
        "the data folder.",
        "",
        "```",
    ]
    shared = (
        "python tools/label_efficiency.py --data_dir=DATA --output_dir=EXPERIMENT "
        "--config_file=EXPERIMENT/results/settings.yaml"
    )
    shared += f" --few={','.join(map(count_text, contest.experiment.few))}"
    if experiment.threads != 1:
        shared += f" --threads={experiment.threads}"
    for (counts, seeds), arms in _grids(contest).items():
        lines.append(
            f"{shared} --arms={','.join(arm.definition for arm in arms)} "
            f"--num_labeled={','.join(map(count_text, counts))} "
            f"--seeds={','.join(map(str, seeds))}"
        )
    arm = contest.arms[-1]
    count = results.counts(arm.name)[0]
    run = Run(arm, count, results.seeds(arm.name, count)[0])
    flags = experiment.train_flags(run, "DATA", "EXPERIMENT")
    model_dir = next(flag for flag in flags if flag.startswith("--model_dir="))
    threads = experiment.threads
    limits = "".join(f"{name}={threads} " for name in THREAD_VARIABLES) if threads else ""
    lines += [
        "```",
        "",
        f"One run alone, `{run}`, with the same scores to the last digit by the same code on the "
        "same kind of processor:",
        "",
        "```",
        f"{limits}python tools/train.py {' '.join(flags)}",
        f"{limits}python tools/evaluate.py {model_dir}",
        "```",
    ]
    return "\n".join(lines)


def _grids(contest: Contest) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[Arm]]:
    """Commands that make all finished runs: arms by (numbers of labelled cases, seeds)."""
    grids: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Arm]] = {}
    for arm in contest.arms:
        by_seeds: dict[tuple[int, ...], list[int]] = {}
        for count in contest.results.counts(arm.name):
            seeds = tuple(contest.results.seeds(arm.name, count))
            by_seeds.setdefault(seeds, []).append(count)
        for seeds, counts in by_seeds.items():
            grids.setdefault((tuple(counts), seeds), []).append(arm)
    return grids


# Numbers as text.


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{_with_spread(row['dice_mean'], row['dice_std'], 3)} ({row['seeds']})"


def _with_spread(mean: float, spread: float | str, digits: int) -> str:
    text = f"{mean:.{digits}f}"
    return text if isinstance(spread, str) else f"{text} ± {spread:.{digits}f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_points(low)} to {_points(high)}"


def _range(values: Sequence[float]) -> str:
    text = f"{np.median(values):.0f}"
    return text if len(values) == 1 else f"{text} ({min(values):.0f} to {max(values):.0f})"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
