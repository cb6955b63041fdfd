"""Lists of cases."""

from __future__ import annotations

import pytest

from tfmtseg.data.cases import read_case_list, write_case_list
from tfmtseg.errors import InputError


def test_as_published(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("BRATS_446\n\n  BRATS_001 \r\nBRATS_020")
    assert read_case_list(path) == ("BRATS_446", "BRATS_001", "BRATS_020")


def test_round_trip(tmp_path):
    write_case_list(tmp_path / "list.txt", ["b", "a é"])
    assert read_case_list(tmp_path / "list.txt") == ("b", "a é")


def test_repeated(tmp_path):
    (tmp_path / "list.txt").write_text("a\nb\na\n")
    with pytest.raises(InputError, match=r"list\.txt: case list is naming a twice"):
        read_case_list(tmp_path / "list.txt")


def test_missing(tmp_path):
    with pytest.raises(InputError, match="unreadable"):
        read_case_list(tmp_path / "list.txt")
