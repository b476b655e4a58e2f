"""The benchmark of learning keeps what it measured, and says what is left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from learning_parts import parts
from learning_parts.kept import Figures, Kept
from learning_parts.ours import Bench
from tests.test_benchmark_tasks import _made


def _measured() -> Figures:
    return {"score": 0.5}


def _never() -> Figures:
    raise AssertionError("this was measured before")


def test_a_figure_is_measured_once_for_each_setting_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "results" / "learning.jsonl"
    assert Kept(path, 1, 2).figures("a", {"rows": 1}, 1, _measured) == {"score": 0.5}
    again = Kept(path, 0, 2)
    assert again.figures("a", {"rows": 1}, 1, _never) == {"score": 0.5}
    assert again.figures("a", {"rows": 2}, 1, _measured) is None, "the time is up"
    assert Kept(path, 0, 1).figures("a", {"rows": 1}, 1, _measured) is None, "other threads, another machine"
    assert again.left == ["a: about 1 min"]


def test_half_a_line_is_skipped_and_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "learning.jsonl"
    Kept(path, 1, 2).figures("a", {}, 1, _measured)
    path.write_bytes(path.read_bytes() + b'{"key": "x", "fou')
    Kept(path, 1, 2).figures("b", {}, 1, _measured)
    known = Kept(path, 0, 2)
    assert known.figures("a", {}, 1, _never) == known.figures("b", {}, 1, _never) == {"score": 0.5}


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "learning.jsonl", 1, 2)
    assert kept.figures("peer", {}, 1, _measured, "it is not installed") is None
    assert kept.left == ["peer: it is not installed"]


def test_the_time_to_a_score_is_that_of_the_first_budget_that_reaches_it(tmp_path: Path, monkeypatch: Any) -> None:
    kept = Kept(tmp_path / "learning.jsonl", 1, 2)
    bench = Bench(kept, {"t": _made()}, tmp_path, tmp_path, tmp_path)
    monkeypatch.setattr(parts, "peer", lambda *_: {"score": 0.6, "seconds": 600.0, "cpu_seconds": 500.0})
    asked = []

    def trained(_bench: Bench, name: str, *_: Any) -> Figures:
        asked.append(name)
        seconds = float(name.split()[-2])
        if seconds < 30:
            return {"refused": "the budget is too short"}
        return {"score": 0.6 if seconds >= 60 else 0.5, "seconds": seconds, "cpu_seconds": 2 * seconds}

    monkeypatch.setattr(parts, "trained", trained)
    line = parts._time_to(bench, "TRL", "t", _made())
    assert len(asked) == 3
    assert line.ours == "1.0 (60.0%)"
    assert line.ratio == 120 / 500, "the worse of clock and processor time"
    assert line.verdict() == "NO"
