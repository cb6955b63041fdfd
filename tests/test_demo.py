from __future__ import annotations

import pytest

from tfmtseg import demo
from tfmtseg.errors import InputError


def test_an_earlier_demo_gives_way(tmp_path):
    folder = tmp_path / "demo"
    demo._start_afresh(folder)
    (folder / "encdec").mkdir()
    (folder / "encdec" / "weights").touch()
    (folder / "report.html").touch()
    demo._start_afresh(folder)
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]


@pytest.mark.parametrize("earlier", [True, False])
def test_what_no_demo_made_is_left_alone(tmp_path, earlier):
    folder = tmp_path / "demo"
    if earlier:
        demo._start_afresh(folder)
    (folder / "my_run").mkdir(parents=True)
    with pytest.raises(InputError, match="content is my_run"):
        demo._start_afresh(folder)
    assert (folder / "my_run").is_dir()
