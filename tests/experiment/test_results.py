"""The tables in which results are kept."""

from __future__ import annotations

import dataclasses

import pytest

from tfmtseg.errors import InputError
from tfmtseg.experiment.results import Results
from tfmtseg.metrics.scores import CaseScores


def test_written_and_read_back_to_the_last_digit(make_results, tmp_path):
    results = make_results({"encdec": 0.1, "sscpcseg": 0.2}, num_seeds=2)
    results.write(tmp_path)
    assert Results.read(tmp_path) == results
    assert Results.read(tmp_path / "none") == Results({}, {})
    head = (tmp_path / "cases.csv").read_text().splitlines()[:2]
    assert head[0] == "arm,num_labeled,seed,case,class,dice,hd95_mm,empty_prediction,empty_truth"
    assert head[1].startswith("shape_prior,3,0,p0_1,a,0.")


def test_the_order_of_finishing_does_not_matter(make_results, tmp_path):
    results = make_results({"encdec": 0.1, "sscpcseg": 0.2}, num_seeds=2)
    turned = Results(*(dict(reversed(part.items())) for part in (results.runs, results.scores)))
    for name, content in (("one", results), ("other", turned)):
        content.write(tmp_path / name)
    for file in ("runs.csv", "cases.csv"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("one", "other"))
        assert one == other


def test_a_run_that_was_not_written_to_its_end_is_not_there(make_results, tmp_path):
    """cases.csv is written first, so a break leaves cases without their run."""
    results = make_results({"encdec": 0.1, "sscpcseg": 0.2}, counts=(3,), num_seeds=1)
    results.write(tmp_path)
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    (tmp_path / "runs.csv").write_text("\n".join(x for x in lines if "sscpcseg" not in x) + "\n")
    again = Results.read(tmp_path)
    assert set(again.runs) == set(again.scores) == {("shape_prior", 3, 0), ("encdec", 3, 0)}


def test_looking_up(make_results):
    results = make_results({"encdec": 0.1, "sscpcseg": 0.2}, num_seeds=2, subjects=3)
    assert results.counts() == results.counts("encdec") == [3, 6, 0]
    assert results.seeds("encdec", 6) == [0, 1]
    assert results.regions == ("a", "b")
    assert results.dice("encdec", 6, [0, 1]).shape == (2, 6)


def test_other_test_cases_are_refused_before_a_run(make_results):
    results = make_results({"encdec": 0.0})
    results.check_test_cases(results.cases[::-1])
    Results({}, {}).check_test_cases(["another"])
    with pytest.raises(InputError, match="--data_dir: test cases is others, must be those of the"):
        results.check_test_cases(results.cases[1:])


def test_other_test_or_labelled_cases_are_refused(make_results):
    results = make_results({"encdec": 0.1}, counts=(3,), num_seeds=1)
    run = dataclasses.replace(results.runs["encdec", 3, 0], arm="sscpcseg")
    scores, prior = (results.scores[arm, 3, 0] for arm in ("encdec", "shape_prior"))
    assert len(results.with_run(run, scores, prior).runs) == 3
    with pytest.raises(InputError, match="run sscpcseg, 3 labelled, seed 0: test cases is others"):
        results.with_run(run, scores[:-1], prior)
    with pytest.raises(InputError, match="labelled cases is others"):
        results.with_run(run, scores, (*prior[:-1], scores[-1]))


@pytest.mark.parametrize("file", ["runs.csv", "cases.csv"])
@pytest.mark.parametrize("damage", ["a column", "a line"])
def test_damaged_tables(make_results, tmp_path, file, damage):
    make_results({"encdec": 0.0}, num_seeds=1).write(tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    if damage == "a column":  # as of an earlier version
        lines = [line.rpartition(",")[0] for line in lines]
    else:
        lines.insert(1, "<<<<<<< HEAD")
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(
        InputError, match=rf"{tmp_path}: runs\.csv or cases\.csv is damaged .* Fix: "
    ):
        Results.read(tmp_path)


def test_classes_of_another_run(make_results):
    results = make_results({"encdec": 0.0}, num_seeds=1, counts=(3,))
    scores = [
        CaseScores(case.case, {"a": case.regions["a"]}) for case in results.scores["encdec", 3, 0]
    ]
    run = dataclasses.replace(results.runs["encdec", 3, 0], arm="cpcseg")
    with pytest.raises(InputError, match="classes is others"):
        results.with_run(run, scores, results.scores["shape_prior", 3, 0])
