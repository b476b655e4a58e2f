"""The console's benchmark goes through all its parts at toy size, so that a stranger can run it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_OWN = ("console", "console_parts", "engine_parts", "service_parts")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]


def test_every_part_finds_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from console_parts import assets, matrix, pages, viewers
    from console_parts.asking import console
    from console_parts.many import Size, make

    monkeypatch.setenv("TUNESMITH_USER", "ann")
    made = make(tmp_path, Size(versions=3, requests=50, rows=120))
    with console(made, tmp_path / "work") as where:
        scrolled = matrix.measure(where, frames=20)
        shown = pages.measure(where, count=1)
        watched = viewers.measure(where, viewers=3, changes=2)
        sizes = assets.measure(where)
    assert all(each["median"] > 0 for each in shown.figures.values())
    assert scrolled.figures["fast"]["longest_ms"] > 0
    assert len(watched.figures["last_heard_s"]) == 2
    assert sizes.lines[0].reached, "the shipped files are too large"
