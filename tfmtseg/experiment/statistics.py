"""Paired comparison of two arms, and what chance alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

REPLICATES = 10_000
CONFIDENCE = 0.95


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the signed-rank test that differences centre on 0.

    Args:
        differences: `(n,)`, independent of each other.

    Returns:
        As SciPy chooses: exact for few differences (up to 50 without ties and zeros), by the
        normal approximation for many; 1 if all are 0.

    Reference:
        Wilcoxon, 1945. Individual comparisons by ranking methods.
    """
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of one family of tests, corrected for their number.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below
    one before it, and none exceeds 1.

    Reference:
        Holm, 1979. A simple sequentially rejective multiple test procedure.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def subject_means(values: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """Means over the cases of each subject.

    Args:
        values: `(cases,)`.
        subjects: Whose each case is.

    Returns:
        `(subjects,)`, in the order in which subjects first come.
    """
    names = np.array(subjects)
    return np.array([values[names == name].mean() for name in dict.fromkeys(subjects)])


def bootstrap_interval(
    values: np.ndarray,
    subjects: Sequence[str],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a mean over seeds and cases.

    Each replicate draws seeds, with replacement; subjects, with replacement; and as
    many cases of each drawn subject as it has, with replacement. All drawn seeds meet
    the same drawn cases, because the test cases are the same in all runs: drawing cases
    anew for each seed would average out their chance, and give too narrow an interval.
    With one seed the interval tells nothing of the chance of seeds.

    Args:
        values: Scores, or differences of scores, `(seeds, cases)`.
        subjects: Whose each case is.
        replicates: Draws.
        seed: Of the draws.

    Returns:
        The lower and the upper end.

    Reference:
        Owen, 2007. The pigeonhole bootstrap. Annals of Applied Statistics 1(2), 386-411.
    """
    seed_counts, case_counts = _draw(len(values), tuple(subjects), replicates, seed)
    sums = ((seed_counts @ values) * case_counts).sum(axis=1)
    means = sums / (len(values) * case_counts.sum(axis=1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds, the test cases taken as given.

    Unlike the bootstrap's, which with few seeds can hardly reach beyond the lowest and the
    highest of them, it allows for how little a few seeds tell of their spread.

    Args:
        differences: One of each seed.

    Returns:
        The lower and the upper end; `None` for one seed.

    Reference:
        Student, 1908. The probable error of a mean. Biometrika 6(1), 1-25.
    """
    if len(differences) < 2:
        return None
    half = float(stats.sem(differences) * stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    mean = float(np.mean(differences))
    return mean - half, mean + half


@lru_cache(maxsize=8)  # nearly all intervals of a report are of the same seeds and cases
def _draw(
    num_seeds: int, subjects: tuple[str, ...], replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each replicate draws each seed and each case, `(replicates, ...)`."""
    random = np.random.default_rng(seed)
    distinct = list(dict.fromkeys(subjects))
    seed_counts = random.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=replicates)
    subject_counts = random.multinomial(
        len(distinct), [1 / len(distinct)] * len(distinct), size=replicates
    )
    case_counts = np.zeros((replicates, len(subjects)))
    for index, name in enumerate(distinct):
        cases = np.flatnonzero(np.array(subjects) == name)
        drawn = len(cases) * subject_counts[:, index]
        case_counts[:, cases] = random.multinomial(drawn, [1 / len(cases)] * len(cases))
    return seed_counts, case_counts
