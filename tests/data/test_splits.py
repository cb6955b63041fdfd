from __future__ import annotations

import itertools
from functools import partial

import pytest

from tfmtseg.data.splits import Splits, make_splits, subject_of
from tfmtseg.errors import InputError, InputWarning

NAMES = [f"hippocampus_{i:03d}" for i in range(1, 61)]
sides = partial(subject_of, regex=r"_(\d+)$", ids_per_subject=2)
patient = partial(subject_of, regex=r"acdc_(\d+)_E[DS]")


class TestSubject:
    @pytest.mark.parametrize("number", range(1, 9))
    def test_two_sides(self, number):
        assert sides(f"hippocampus_{number:03d}") == str((number + 1) // 2)

    def test_two_phases(self):
        assert patient("acdc_004_ED") == patient("acdc_004_ES") == "004"

    def test_default(self):
        assert subject_of("anything") == "anything"

    @pytest.mark.parametrize(
        ("regex", "words"),
        [
            ("(", "regular expression"),
            ("_", "one group"),
            (r"x(\d)", "not found"),
            ("(h)", "number"),
        ],
    )
    def test_bad_pattern(self, regex, words):
        with pytest.raises(InputError, match=words):
            subject_of("hippocampus_001", regex, 2)


class TestMakeSplits:
    def make(self, **kwargs) -> Splits:
        settings = {"subject": sides, "num_labeled": 6, "num_development": 4, "num_test": 10}
        return make_splits(NAMES, **(settings | kwargs))

    def test_counts_and_completeness(self):
        splits = self.make()
        assert [len(splits.labeled), len(splits.development), len(splits.test)] == [6, 4, 10]
        everyone = [*splits.labeled, *splits.unlabeled, *splits.development, *splits.test]
        assert sorted(everyone) == NAMES

    @pytest.mark.parametrize("num_test", [1, 2, 9, 10])
    def test_subjects_stay_whole(self, num_test):
        splits = self.make(num_test=num_test)
        assert len(splits.test) == num_test + num_test % 2
        pool = {sides(name) for name in (*splits.labeled, *splits.unlabeled)}
        development = {sides(name) for name in splits.development}
        test = {sides(name) for name in splits.test}
        assert not pool & development
        assert not pool & test
        assert not development & test

    def test_labelled_subsets_are_nested(self):
        labelled = [self.make(num_labeled=n).labeled for n in (1, 3, 6, 12, 24, 0)]
        for fewer, more in itertools.pairwise(labelled):
            assert more[: len(fewer)] == fewer
        assert len(labelled[-1]) == 46

    def test_each_seed_has_its_own_effect(self):
        splits = self.make()
        assert self.make() == splits
        other = self.make(seed=1)
        assert (other.test, other.development) == (splits.test, splits.development)
        assert other.labeled != splits.labeled
        assert self.make(split_seed=1).test != splits.test

    def test_order_of_the_input_does_not_matter(self):
        expected = self.make()
        settings = {"subject": sides, "num_labeled": 6, "num_development": 4, "num_test": 10}
        assert make_splits(NAMES[::-1], **settings) == expected

    def test_draws_differ_between_seeds_evenly(self):
        counts = dict.fromkeys(NAMES, 0)
        for seed in range(200):
            for name in self.make(num_test=10, split_seed=seed).test:
                counts[name] += 1
        # binomial(200, 1/6): mean 33.3, standard deviation 5.3; 5 of them on either side
        assert all(7 <= count <= 60 for count in counts.values())

    def test_cases_without_label_are_only_unlabelled(self):
        extra = [f"other_{i:03d}" for i in range(101, 105)]
        splits = make_splits(NAMES, extra, subject=sides, num_test=10)
        assert splits.unlabeled == tuple(extra)

    def test_other_side_of_a_test_subject_is_left_out(self):
        with pytest.warns(InputWarning, match=r"1 cases are left out.*hippocampus_002"):
            splits = make_splits(
                NAMES[2:], [NAMES[1]], subject=lambda name: sides(name) if name > NAMES[3] else "x",
                test_list=[NAMES[2], NAMES[3]],
            )  # fmt: skip
        assert NAMES[1] not in splits.unlabeled

    def test_lists(self):
        splits = self.make(labeled_list=[NAMES[5], NAMES[2]], test_list=NAMES[:2], num_labeled=0)
        assert splits.labeled == (NAMES[5], NAMES[2])
        assert splits.test == tuple(NAMES[:2])
        assert self.make(labeled_list=NAMES[:2], num_labeled=1).labeled == (NAMES[0],)

    @pytest.mark.filterwarnings("ignore::tfmtseg.errors.InputWarning")
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"num_test": 61}, "--num_test: value is 61, must be at most 60"),
            ({"num_development": 51}, "--num_development: value is 51"),
            ({"num_labeled": 47}, "--num_labeled: value is 47, must be at most 46"),
            ({"num_test": 60, "num_development": 0}, "--num_labeled"),
            ({"test_list": ["nope"]}, "--test_list: case is nope"),
            ({"labeled_list": [NAMES[0]], "test_list": [NAMES[1]]}, "of a subject that"),
        ],
    )
    def test_what_cannot_be(self, settings, words):
        with pytest.raises(InputError, match=words):
            self.make(**settings)


class TestSplits:
    def test_round_trip(self, tmp_path):
        splits = Splits(("b", "a"), ("c",), (), ("d",))
        splits.write(tmp_path)
        assert (tmp_path / "labeled.txt").read_text() == "b\na\n"
        assert Splits.read(tmp_path) == splits

    def test_one_use_per_case(self):
        with pytest.raises(InputError, match="case a: split is labeled and test"):
            Splits(("a",), (), (), ("a",))
