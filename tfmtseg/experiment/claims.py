"""Comparisons of arms, and what they say about the claims S1, S2 and S3.

S1: `sscpcseg` is better than every other method of the paper.
S2: `sscpcseg` is better than itself without its contrastive loss, which is `encdec`.
S3: the best method is at least 1.5 points better than `encdec`, and better than its own
control, see `Arm.control`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from tfmtseg.experiment.plan import (
    BASELINE,
    KNOWN_ARMS,
    Arm,
    Experiment,
    Kind,
    count_text,
    kind_text,
    parse_settings,
)
from tfmtseg.experiment.results import Results
from tfmtseg.experiment.statistics import (
    bootstrap_interval,
    holm,
    seed_interval,
    subject_means,
    wilcoxon_p,
)
from tfmtseg.models.methods import METHODS
from tfmtseg.training.run_data import subject_by

PAPER_METHODS = ("encdec", "vaeseg", "boundseg", "cpcseg", "ssvaeseg", "sscpcseg")
CLAIMED = "sscpcseg"
MARGIN = 0.015  # of S3, mean Dice
SIGNIFICANCE = 0.05
MIN_SEEDS = 3  # with fewer, nothing is decided
TIME_TOLERANCE = 0.1  # arms whose processor times differ by less took equal time


@dataclass(frozen=True)
class Comparison:
    """An arm minus another, in mean Dice score over the classes.

    Args:
        arm: The arm.
        reference: What it is compared with.
        num_labeled: Labelled cases of the arm; 0 stands for all.
        reference_num_labeled: Those of the reference.
        seeds: Seeds that both have.
        difference: Mean over seeds and cases.
        by_seed: Means over cases, of each seed.
        low: Lower end of its 95 % interval.
        high: Upper end.
        low_seeds: Lower end of that over seeds alone, see `seed_interval`; `None` with one.
        high_seeds: Upper end.
        p: Of the signed-rank test over subjects, each averaged over seeds and cases.
        p_holm: Corrected for the number of comparisons that have seeds enough to decide
            something; `None` for the others.
        time_ratio: Processor time of the arm's trainings over that of the reference's, see
            `time_ratio`.
    """

    arm: str
    reference: str
    num_labeled: int
    reference_num_labeled: int
    seeds: int
    difference: float
    by_seed: tuple[float, ...]
    low: float
    high: float
    low_seeds: float | None
    high_seeds: float | None
    p: float
    p_holm: float | None
    time_ratio: float | None

    @property
    def is_gain(self) -> bool:
        """Whether the arm is better: by its interval, and by the corrected test."""
        return self.low > 0 and self.p_holm is not None and self.p_holm < SIGNIFICANCE


def compare(
    results: Results,
    subject: Callable[[str], str],
    arm: str,
    reference: str,
    num_labeled: int,
    reference_num_labeled: int | None = None,
) -> Comparison | None:
    """Compares two arms on the seeds that both have; `None` if there is none.

    Args:
        results: Finished runs.
        subject: Gives the subject of a case.
        arm: The arm.
        reference: What it is compared with.
        num_labeled: Labelled cases.
        reference_num_labeled: Those of the reference; the same by default.
    """
    other = num_labeled if reference_num_labeled is None else reference_num_labeled
    seeds = sorted({*results.seeds(arm, num_labeled)} & {*results.seeds(reference, other)})
    if not seeds:
        return None
    differences = results.dice(arm, num_labeled, seeds) - results.dice(reference, other, seeds)
    subjects = [subject(case) for case in results.cases]
    low, high = bootstrap_interval(differences, subjects)
    by_seed = tuple(map(float, differences.mean(axis=1)))
    low_seeds, high_seeds = seed_interval(by_seed) or (None, None)
    p = wilcoxon_p(subject_means(differences.mean(axis=0), subjects))
    return Comparison(
        arm=arm,
        reference=reference,
        num_labeled=num_labeled,
        reference_num_labeled=other,
        seeds=len(seeds),
        difference=float(differences.mean()),
        by_seed=by_seed,
        low=low,
        high=high,
        low_seeds=low_seeds,
        high_seeds=high_seeds,
        p=p,
        p_holm=None,
        time_ratio=time_ratio(results, arm, reference),
    )


def time_ratio(results: Results, arm: str, reference: str) -> float | None:
    """Processor time of a training of one arm over that of another.

    The median over all runs of each, whatever their labels and seeds, because what else a
    machine does shows in single ones; mean over the places (a processor's name, and how many
    runs it did at once) where both were run. `None` if there are none.
    """
    medians = [
        {
            place: np.median([run.cpu_seconds for run in runs])
            for place, runs in results.by_place(name).items()
        }
        for name in (arm, reference)
    ]
    ratios = [seconds / medians[1][place] for place, seconds in medians[0].items()
              if place in medians[1]]  # fmt: skip
    return float(np.mean(ratios)) if ratios else None


class Contest:
    """The finished runs of an experiment, compared.

    Args:
        experiment: The experiment.
        results: Its finished runs.
    """

    def __init__(self, experiment: Experiment, results: Results):
        self.experiment = experiment
        self.results = results
        self.subject = subject_by(experiment.settings)
        finished = {arm for arm, _, _ in results.runs}
        self.arms = [arm for name, arm in experiment.arms.items() if name in finished]
        equal_steps = self._equal_steps()
        equal_time, self.lacking = self._equal_time()
        corrected = _corrected([*equal_steps, *equal_time])
        self.equal_steps = corrected[: len(equal_steps)]
        self.equal_time = corrected[len(equal_steps) :]

    def find(self, kind: Kind, steps: int) -> Arm | None:
        """The arm of a kind that made so many updates."""
        for arm in self.arms:
            if arm.kind == kind and self.experiment.steps(arm) == steps:
                return arm
        return None

    def name_of(self, kind: Kind, steps: int) -> str:
        """The name of the arm of a kind that made so many updates; what it would be, without."""
        arm = self.find(kind, steps)
        return arm.name if arm else kind_text(kind)

    def _equal_steps(self) -> list[Comparison]:
        comparisons: list[Comparison | None] = []
        for arm in self.arms:
            steps = self.experiment.steps(arm)
            kinds = references(arm)
            if arm.kind == kind_of(CLAIMED):
                others = map(kind_of, PAPER_METHODS)
                kinds += [kind for kind in others if kind not in (arm.kind, *kinds)]
            for kind in kinds:
                reference = self.find(kind, steps)
                if reference is not None:
                    comparisons += [
                        compare(self.results, self.subject, arm.name, reference.name, count)
                        for count in self.results.counts(arm.name)
                    ]
        return [comparison for comparison in comparisons if comparison is not None]

    def _equal_time(self) -> tuple[list[Comparison], list[str]]:
        """Comparisons with the reference that took as long, and what would be needed for more."""
        comparisons: list[Comparison] = []
        lacking: list[str] = []
        for arm in self.arms:
            for kind in references(arm):
                candidates = [other for other in self.arms if other.kind == kind]
                alone = []
                for count in self.results.counts(arm.name):
                    found = [
                        compare(self.results, self.subject, arm.name, other.name, count)
                        for other in candidates
                    ]
                    ratios = {c: c.time_ratio for c in found if c is not None and c.time_ratio}
                    if not ratios:
                        continue
                    closest = min(ratios, key=lambda c: abs(log(ratios[c])))
                    if abs(ratios[closest] - 1) <= TIME_TOLERANCE:
                        comparisons.append(closest)
                    else:
                        alone.append((closest, ratios[closest]))
                if alone:
                    lacking.append(self._suggestion(alone))
        return comparisons, lacking

    def _suggestion(self, closest: Sequence[tuple[Comparison, float]]) -> str:
        """A copy of the reference that would take as long as the arm of these comparisons."""
        arms = self.experiment.arms
        reference = arms[closest[0][0].reference]
        every = self.experiment.settings.steps_per_epoch
        equal = np.mean([self.experiment.steps(arms[c.reference]) * ratio for c, ratio in closest])
        steps = max(every, round(float(equal) / every) * every)
        settings = {**reference.settings, "train_steps": steps}
        plain = self.find(reference.kind, self.experiment.settings.train_steps) or reference
        copy = Arm(f"{plain.name}_{steps}", reference.method, settings)
        counts = ", ".join(count_text(c.num_labeled) for c, _ in closest)
        known = kind_text(reference.kind)
        return (
            f"`{closest[0][0].arm}` against `{known}` at {counts} labelled: no `{known}` took as "
            f"long; `--arms={copy.definition}` would"
        )

    def best(self) -> Arm | None:
        """The arm that gains most over `encdec` at few labels, at the steps of the settings.

        Gains are over the seeds that both have; where an arm has enough seeds to decide
        something, those with fewer do not count.

        It is chosen by the test cases it is then judged on; the correction for the
        number of comparisons covers this, the intervals do not.
        """
        complete = self._rivals()
        decided = {
            arm: comparisons
            for arm, comparisons in complete.items()
            if min(c.seeds for c in comparisons) >= MIN_SEEDS
        }
        candidates = decided or complete
        return max(
            candidates,
            key=lambda arm: float(np.mean([c.difference for c in candidates[arm]])),
            default=None,
        )

    def untried(self) -> list[str]:
        """Methods beside `encdec` that `best` could not choose."""
        tried = {BASELINE, *(arm.method for arm in self._rivals())}
        return [method for method in METHODS if method not in tried]

    def _rivals(self) -> dict[Arm, Sequence[Comparison]]:
        """What the arms that may be the best gain over `encdec` at all numbers of few labels."""
        controls = [kind_of(name) for name in KNOWN_ARMS]
        steps = self.experiment.settings.train_steps
        baseline = self.name_of(kind_of(BASELINE), steps)
        found = {
            arm: self.at_few(arm.name, [baseline])
            for arm in self.arms
            if self.experiment.steps(arm) == steps
            and arm.method != BASELINE
            and arm.kind not in controls
            and arm.differs_in_task_alone
        }
        return {
            arm: evidence.comparisons
            for arm, evidence in found.items()
            if evidence.comparisons and not evidence.missing
        }

    def at_few(self, arm: str, references: Iterable[str]) -> Evidence:
        """The equal-steps comparisons of an arm that a claim rests on."""
        known = {(c.arm, c.reference, c.num_labeled): c for c in self.equal_steps}
        wanted = [
            (arm, reference, count) for reference in references for count in self.experiment.few
        ]
        return Evidence(
            [known[key] for key in wanted if key in known],
            [
                f"{a} against {r} at {count_text(n)} labelled"
                for a, r, n in wanted
                if (a, r, n) not in known
            ],
        )


@dataclass(frozen=True)
class Evidence:
    """What a claim rests on.

    Args:
        comparisons: Those there are.
        missing: Those there are not, in words.
    """

    comparisons: Sequence[Comparison]
    missing: Sequence[str]

    def verdict(self, margin: Callable[[Comparison], float]) -> str:
        """In words: whether the claim holds, by all comparisons.

        One comparison whose interval lies below the margin refutes it, and one that is no
        gain, or one below the margin, leaves it not shown; without such, all must be there.

        Args:
            margin: What a comparison's difference must be at least.
        """
        decided = [c for c in self.comparisons if c.seeds >= MIN_SEEDS]
        if any(c.high < margin(c) for c in decided):
            return "does not hold"
        if any(not c.is_gain or c.difference < margin(c) for c in decided):
            return "not shown"
        if self.missing or len(decided) < len(self.comparisons) or not decided:
            return "not decided"
        return "holds"


def references(arm: Arm) -> list[Kind]:
    """Kinds of arms that an arm is measured against: `encdec`, and its control."""
    return [kind for kind in dict.fromkeys([kind_of(BASELINE), arm.control]) if kind != arm.kind]


def kind_of(known: str) -> Kind:
    """The kind of a known arm, or of a method."""
    method, *settings = KNOWN_ARMS.get(known, known).split(":")
    return Arm(known, method, parse_settings(settings, known)).kind


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With their p-values corrected as one family.

    Comparisons without enough seeds decide nothing: they neither need a correction nor add to
    that of the others. One that stands in the list twice counts once.
    """
    family = {_key(c): c.p for c in comparisons if c.seeds >= MIN_SEEDS}
    corrected = dict(zip(family, holm(list(family.values())), strict=True))
    return [dataclasses.replace(c, p_holm=corrected.get(_key(c))) for c in comparisons]


def _key(comparison: Comparison) -> tuple[str, str, int]:
    return comparison.arm, comparison.reference, comparison.num_labeled
