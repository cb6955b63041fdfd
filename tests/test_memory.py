from __future__ import annotations

import pytest

from tfmtseg import memory


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A folder that stands for the container's, with 6 GB of 8 in use, 5 of them a file cache."""
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "_CONTAINERS", ((str(tmp_path), *names),))
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("6000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\ninactive_file 5000000000\n")
    return tmp_path


def test_a_container_has_less_than_the_machine(container):
    assert memory.available_memory_gb() == pytest.approx(min(7.0, machine()), abs=0.5)
    (container / "memory.stat").write_text("inactive_file 0\n")
    (container / "memory.max").write_text("5000000000\n")  # lowered meanwhile
    assert memory.available_memory_gb() == 0


def test_a_container_without_limit(container):
    (container / "memory.max").write_text("max\n")
    assert memory.available_memory_gb() == pytest.approx(machine(), abs=0.5)


def machine() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 / 1e9
