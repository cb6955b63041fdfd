"""P-values and intervals against hand derivations and slow, independent ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tfmtseg.experiment.statistics import (
    bootstrap_interval,
    holm,
    seed_interval,
    subject_means,
    wilcoxon_p,
)


def test_wilcoxon_by_hand():
    # All five signs alike: 2 of the 2^5 sign patterns are as extreme.
    assert wilcoxon_p(np.array([0.1, 0.4, 0.2, 0.5, 0.3])) == pytest.approx(2 / 32)
    assert wilcoxon_p(np.zeros(6)) == 1


def test_wilcoxon_against_all_sign_patterns():
    differences = np.array([0.31, -0.12, 0.54, 0.07, -0.02, 0.45, 0.23, 0.11, -0.29])
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[differences > 0].sum()
    middle = ranks.sum() / 2
    sums = [ranks[np.array(signs)].sum() for signs in itertools.product([True, False], repeat=9)]
    extreme = np.mean([abs(s - middle) >= abs(observed - middle) - 1e-9 for s in sums])
    assert wilcoxon_p(differences) == pytest.approx(extreme)


@pytest.mark.parametrize("differences", [[0.1, 0.1, -0.2, 0.0], [0.1] * 60])
def test_wilcoxon_with_ties_and_zeros_warns_of_nothing(differences):
    assert 0 < wilcoxon_p(np.array(differences)) <= 1


def test_holm_by_hand():
    # .01 x 3; .03 x 2; .04 x 1 is below the one before and takes its value.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_subject_means():
    means = subject_means(np.array([1.0, 5.0, 3.0, 7.0]), ["b", "a", "b", "c"])
    np.testing.assert_array_equal(means, [2, 5, 7])


def test_interval_of_two_cases_is_known():
    """The mean of two draws from {0, 1} is 0, 1/2, 1/2 or 1."""
    assert bootstrap_interval(np.array([[0.0, 1.0]]), ["a", "b"]) == (0, 1)


def test_interval_of_many_cases_is_binomial():
    values = np.array([[0.0, 1.0] * 50])
    low, high = bootstrap_interval(values, [str(i) for i in range(100)])
    expected = stats.binom(100, 0.5).ppf([0.025, 0.975]) / 100
    # One step of the binomial: a quantile of 10,000 draws may fall to either side of one.
    np.testing.assert_allclose([low, high], expected, atol=0.0101)


def slow_interval(values, subjects, replicates):
    """One draw after the other, as the docstring says it."""
    random = np.random.default_rng(99)
    cases_of = {name: [i for i, s in enumerate(subjects) if s == name] for name in subjects}
    names = list(cases_of)
    means = []
    for _ in range(replicates):
        seeds = [random.integers(len(values)) for _ in values]
        cases = []
        for _ in names:
            own = cases_of[names[random.integers(len(names))]]
            cases += [own[random.integers(len(own))] for _ in own]
        means.append(np.mean([[values[seed][case] for case in cases] for seed in seeds]))
    return np.percentile(means, [2.5, 97.5])


def test_interval_against_a_slow_implementation():
    random = np.random.default_rng(0)
    subjects = ["a", "b", "b", "c", "c", "c", "d", "d", "e", "f", "g", "g"]
    effects = {name: random.normal() for name in subjects}
    values = random.normal(size=(3, 1)) + random.normal(size=(3, 12)) * 0.3
    values += np.array([effects[name] for name in subjects])
    expected = slow_interval(values, subjects, 4000)
    # The 2.5 % quantile of a normal distribution of n draws has a standard error of
    # sqrt(.025 * .975 / n) / .0584 standard deviations: .05 for both together, 1.3 % of
    # the interval's width. Four of these.
    width = expected[1] - expected[0]
    np.testing.assert_allclose(bootstrap_interval(values, subjects), expected, atol=0.05 * width)


def test_equal_seeds_do_not_narrow_the_interval():
    """The chance of test cases is not averaged out by testing on them again."""
    case_values = np.random.default_rng(1).normal(size=(1, 40))
    subjects = [str(i) for i in range(40)]
    one = np.subtract(*bootstrap_interval(case_values, subjects))
    five = np.subtract(*bootstrap_interval(np.repeat(case_values, 5, axis=0), subjects))
    assert five == pytest.approx(one, rel=0.05)  # two quantiles of 10,000 draws, see above


def test_cases_of_one_subject_widen_the_interval():
    """Two equal cases per subject: half as many independent ones, sqrt(2) the width or more."""
    values = np.repeat(np.random.default_rng(1).normal(size=(1, 50)), 2, axis=1)
    alone = np.subtract(*bootstrap_interval(values, [str(i) for i in range(100)]))
    paired = np.subtract(*bootstrap_interval(values, [str(i // 2) for i in range(100)]))
    assert paired / alone == pytest.approx(np.sqrt(2), rel=0.05)


def test_seeds_take_part():
    values = np.array([[0.0] * 10, [1.0] * 10])
    assert bootstrap_interval(values, [str(i) for i in range(10)]) == (0, 1)


def test_interval_over_seeds_by_hand():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.303 of t with two degrees."""
    low, high = seed_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert seed_interval([1.0, 1.0]) == (1, 1)
    assert seed_interval([1.0]) is None
