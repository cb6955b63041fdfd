from __future__ import annotations

import itertools
import os
from collections import Counter
from functools import partial

import pytest

from tfmtseg.data.splits import Splits, make_splits, read_groups, subject_of
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

    def test_folds_test_everybody_once(self):
        groups = {name: "odd" if int(sides(name)) % 2 else "even" for name in NAMES}
        folds = [self.make(num_folds=7, fold=fold, num_test=0, groups=groups) for fold in range(7)]
        assert sorted(name for splits in folds for name in splits.test) == NAMES
        for splits in folds:
            subjects = {sides(name) for name in splits.test}
            assert len(subjects) in (4, 5)  # of 30
            mix = Counter(int(subject) % 2 for subject in subjects)
            assert abs(mix[0] - mix[1]) <= 1
            assert len(splits.test) == 2 * len(subjects)
            assert (len(splits.labeled), len(splits.development)) == (6, 4)
            assert not subjects & {sides(n) for n in (*splits.labeled, *splits.unlabeled)}
        other = self.make(num_folds=7, fold=0, num_test=0, split_seed=1)
        assert other.test != folds[0].test

    def test_more_folds_than_subjects(self):
        with pytest.raises(InputError, match="--num_folds: value is 31, must be at most 30"):
            self.make(num_folds=31, num_test=0)

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

    def test_other_side_of_a_development_subject_is_left_out(self):
        drawn, *_ = make_splits(NAMES, num_development=5).development
        with pytest.warns(InputWarning, match=r"1 cases are left out.*: again"):
            splits = make_splits(
                NAMES, ["again"], num_development=5,
                subject=lambda name: drawn if name == "again" else name,
            )  # fmt: skip
        assert drawn in splits.development
        assert "again" not in splits.unlabeled

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

    def test_images_alone(self):
        assert make_splits([], ["b", "a"], needs_labels=False) == Splits((), ("a", "b"), (), ())
        with pytest.raises(InputError, match="--num_labeled"):
            make_splits([], ["b", "a"])
        with pytest.raises(InputError, match="--num_labeled"):
            make_splits([], ["b", "a"], num_labeled=1, needs_labels=False)


HEARTS = [f"acdc_{i:03d}_{phase}" for i in range(1, 24) for phase in ("ED", "ES")]
# Patients 1-7 are of group a, 8-14 of b, 15-23 of c: sorted, as in the real data.
GROUPS = {name: "abc"[min((int(patient(name)) - 1) // 7, 2)] for name in HEARTS}


class TestSubjectsAndGroups:
    def make(self, **kwargs) -> Splits:
        settings = {
            "subject": patient, "groups": GROUPS, "count_subjects": True,
            "num_labeled": 4, "num_development": 3, "num_test": 7,
        }  # fmt: skip
        return make_splits(HEARTS, **(settings | kwargs))

    def test_subjects_are_counted_and_whole(self):
        splits = self.make()
        assert [len(splits.labeled), len(splits.development), len(splits.test)] == [8, 6, 14]
        assert len(splits.unlabeled) == 2 * (23 - 4 - 3 - 7)
        for names in (splits.labeled, splits.development, splits.test, splits.unlabeled):
            assert all(Counter(map(patient, names))[patient(name)] == 2 for name in names)

    def test_any_first_part_is_balanced(self):
        for seed in range(10):
            order = self.make(num_labeled=0, seed=seed).labeled
            groups = [GROUPS[name] for name in order[::2]]  # one for each subject
            pool = Counter(groups)
            for end in range(len(groups) + 1):
                counts = Counter(groups[:end])
                most = max(counts.values(), default=0)
                # A group may fall behind only when it has no more.
                assert all(counts[g] >= min(most - 1, pool[g]) for g in "abc")

    def test_held_out_cases_are_balanced(self):
        splits = self.make()
        assert sorted(Counter(GROUPS[name] for name in splits.test).values()) == [4, 4, 6]
        assert Counter(GROUPS[name] for name in splits.development) == {"a": 2, "b": 2, "c": 2}

    def test_labelled_subsets_are_nested(self):
        labelled = [self.make(num_labeled=n).labeled for n in (1, 3, 7, 0)]
        assert [len(names) for names in labelled] == [2, 6, 14, 26]
        for fewer, more in itertools.pairwise(labelled):
            assert more[: len(fewer)] == fewer

    def test_seeds_draw_different_groups_and_subjects(self):
        first = [self.make(num_labeled=1, seed=seed).labeled[0] for seed in range(40)]
        assert {GROUPS[name] for name in first} == set("abc")
        assert len(set(first)) > 6

    def test_cases_in_turn(self):
        order = self.make(num_labeled=9, count_subjects=False).labeled
        assert [sorted(GROUPS[name] for name in order[i : i + 3]) for i in (0, 3, 6)] == [
            ["a", "b", "c"]
        ] * 3

    def test_numbers_of_cases_take_whole_subjects(self):
        splits = self.make(count_subjects=False, num_test=13, num_development=5)
        assert [len(splits.test), len(splits.development)] == [14, 6]

    def test_one_group_for_all_changes_nothing(self):
        alike = self.make(groups=dict.fromkeys(HEARTS, "same"))
        assert alike == self.make(groups=None)

    def test_a_list_in_subjects(self):
        splits = self.make(labeled_list=[HEARTS[7], HEARTS[0], HEARTS[6]], num_labeled=1)
        assert splits.labeled == (HEARTS[7], HEARTS[6])

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"num_test": 24}, "--num_test: value is 24, must be at most 23, the subjects"),
            ({"num_labeled": 14}, "--num_labeled: value is 14, must be at most 13"),
            ({"groups": {HEARTS[0]: "a"}}, f"case {HEARTS[1]} is missing"),
            ({"groups": GROUPS | {HEARTS[1]: "b"}}, f"case {HEARTS[1]} is in the group b"),
        ],
    )
    def test_what_cannot_be(self, settings, words):
        with pytest.raises(InputError, match=words):
            self.make(**settings)


class TestGroupsFile:
    def test_other_columns_and_a_byte_order_mark_do_not_matter(self, tmp_path):
        path = tmp_path / "patients.csv"
        path.write_text("case,phase,group\nx_1,ED,DCM\nx_2,ES,NOR\n", encoding="utf-8-sig")
        assert read_groups(path) == {"x_1": "DCM", "x_2": "NOR"}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "groups file is missing, .*--groups_file="),
            ("case,disease\nx,DCM\n", "without a value in the column group"),
            ("patient,group\nx,DCM\n", "without a value in the column case"),
            ("case,group\nx,\n", "without a value in the column group"),
            ("case,group\nx\n", "without a value in the column group"),
            ("case,group\nx,a\nx,b\n", "case is x twice"),
        ],
    )
    def test_bad_files(self, tmp_path, text, words):
        path = tmp_path / "groups.csv"
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=rf"groups\.csv: .*{words}"):
            read_groups(path)

    def test_stays_in_the_data_folder(self, tmp_path):
        root, outside = tmp_path / "data", tmp_path / "outside.csv"
        root.mkdir()
        outside.write_text("case,group\nx,a\n")
        (root / "link.csv").symlink_to(outside)
        os.mkfifo(root / "pipe.csv")
        assert read_groups(outside) == read_groups(root / "link.csv", root, tmp_path)
        for name, words in (
            ("link.csv", "is a link to a file outside"),
            ("../outside.csv", "is a link to a file outside"),
            ("pipe.csv", "is a folder or a pipe"),
        ):
            with pytest.raises(InputError, match=f"file {words}"):
                read_groups(root / name, root)

    def test_real_data(self, shared_data):
        groups = read_groups(shared_data / "Task27_ACDC_2p5mm" / "patients.csv")
        # Counts of its README, two volumes each.
        assert Counter(groups.values()) == {"DCM": 26, "HCM": 26, "MINF": 28, "NOR": 26, "RV": 26}
        splits = make_splits(
            groups, subject=partial(subject_of, regex=r"acdc_(\d+)_E[DS]"), groups=groups,
            count_subjects=True, num_labeled=14, num_development=4, num_test=16, split_seed=2027,
        )  # fmt: skip
        assert [len(splits.labeled), len(splits.unlabeled)] == [28, 2 * (46 - 14)]
        for names, fewest in ((splits.labeled, 4), (splits.test, 6)):
            counts = Counter(groups[name] for name in names)
            assert len(counts) == 5
            assert set(counts.values()) <= {fewest, fewest + 2}
        assert len({groups[name] for name in splits.development}) == 4


class TestSplits:
    def test_round_trip(self, tmp_path):
        splits = Splits(("b", "a"), ("c",), (), ("d",))
        splits.write(tmp_path)
        assert (tmp_path / "labeled.txt").read_text() == "b\na\n"
        assert Splits.read(tmp_path) == splits

    def test_one_use_per_case(self):
        with pytest.raises(InputError, match="case a: split is labeled and test"):
            Splits(("a",), (), (), ("a",))
