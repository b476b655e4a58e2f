"""The benchmark of learning keeps what it measured, and says what is left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import shared_cores
from engine_parts.report import Line
from learning_parts import few, keys, parts, shown
from learning_parts.kept import Figures, Kept
from learning_parts.ours import Bench, defaults
from tasks import Grouped, _task
from tests.test_benchmark_tasks import _made
from tunesmith.services.starting import new_project


def _measured() -> Figures:
    return {"score": 0.5}


def _never() -> Figures:
    raise AssertionError("this was measured before")


def test_a_figure_is_measured_once_for_each_setting_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "results" / "learning.jsonl"
    assert Kept(path, 1, "this").figures("a", {"rows": 1}, 1, _measured) == {"score": 0.5}
    again = Kept(path, 0, "this")
    assert again.figures("a", {"rows": 1}, 1, _never) == {"score": 0.5}
    assert again.figures("a", {"rows": 2}, 1, _measured) is None, "the time is up"
    assert Kept(path, 0, "another").figures("a", {"rows": 1}, 1, _measured) is None, "another machine"
    assert again.left == ["a: about 1 min"]


def test_half_a_line_is_skipped_and_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "learning.jsonl"
    Kept(path, 1, "this").figures("a", {}, 1, _measured)
    path.write_bytes(path.read_bytes() + b'{"key": "x", "fou')
    Kept(path, 1, "this").figures("b", {}, 1, _measured)
    known = Kept(path, 0, "this")
    assert known.figures("a", {}, 1, _never) == known.figures("b", {}, 1, _never) == {"score": 0.5}


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "learning.jsonl", 1, "this")
    assert kept.figures("peer", {}, 1, _measured, "it is not installed") is None
    assert kept.left == ["peer: it is not installed"]


def test_the_time_to_a_score_is_that_of_the_first_budget_that_reaches_it(tmp_path: Path, monkeypatch: Any) -> None:
    kept = Kept(tmp_path / "learning.jsonl", 1, "this")
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


def test_a_share_that_is_enough_whatever_more_time_reaches_needs_no_more_time(tmp_path: Path, monkeypatch: Any) -> None:
    bench = Bench(Kept(tmp_path / "learning.jsonl", 1, "this"), {"snips": _made()}, tmp_path, tmp_path, tmp_path)

    def line(*means: float | None) -> Line:
        found = iter([None if mean is None else {"mean": mean, "low": 0, "high": 1, "n": 9} for mean in means])
        monkeypatch.setattr(parts, "project", lambda *_: next(found))
        return parts.init(bench)[0]

    enough = line(0.4, 0.81, None)
    assert (enough.shown, enough.verdict()) == ("at least 68%", "yes")
    assert line(0.4, 0.79, None).verdict() == "not measured: see below"
    assert line(None, 0.9, None).verdict() == "not measured: see below"
    assert (line(0.4, 0.6, 0.8).shown, line(0.4, 0.6, 0.8).verdict()) == ("50%", "NO")


def test_the_stand_in_is_chosen_by_held_out_rows_and_named(tmp_path: Path, monkeypatch: Any) -> None:
    kept = Kept(tmp_path / "learning.jsonl", 1, "this")
    bench = Bench(kept, dict.fromkeys(few.SHORT_TASKS, _made()), tmp_path, tmp_path, tmp_path)

    def stand_in(_bench: Bench, _name: str, _task: Any, _split: Any, rate: float) -> Figures:
        held = {2e-4: 0.1, 6e-4: 0.6, 2e-3: 0.2}[rate]
        return {"held": held, "score": 0.75 if held == 0.6 else 0.99, "scores": [1.0, 1.0, 1.0, 0.0]}

    monkeypatch.setattr(few, "stand_in", stand_in)
    monkeypatch.setattr(few, "trained", lambda *_: {"score": 0.5, "scores": [1.0, 0.0, 1.0, 0.0]})
    monkeypatch.setattr(few, "peer", lambda *_, **_rate: None)
    at_100, near, at_1000 = few.few(bench)
    assert at_100.verdict() == near.verdict() == "not measured: see below"
    assert (at_1000.ours, at_1000.peer, at_1000.verdict()) == ("50.0%", "75.0%", "NO")
    assert "in our engine, no dropout" in at_1000.against
    assert at_1000.shown is not None
    assert at_1000.shown.startswith("-25.0 ±")


def test_keys_in_an_order_are_the_same_answer() -> None:
    rows = [
        Grouped(f"put {n} by {n + 100} on it", json.dumps({"artist": str(n + 100), "track": str(n)}), str(n))
        for n in range(60)
    ]
    task = _task("t", "slots", "p", rows, test=10, metric="exact_match", licence="MIT")
    schema = keys.ordered(task, task.rows[0], keys.SCHEMA)
    request = keys.ordered(task, task.rows[0], keys.REQUEST)
    assert (list(json.loads(schema[1])), list(json.loads(request[1]))) == (["artist", "track"], ["track", "artist"])
    assert json.loads(schema[1]) == json.loads(request[1])


def test_scores_are_shown_with_what_their_number_leaves_open() -> None:
    assert shown.mean_of([1.0, 1.0, 1.0, 0.0] * 5).startswith("75.0% [")
    assert shown.difference([([1.0, 0.0], [0.0, 0.0]), ([1.0, 1.0], [1.0, 1.0])]) == "+25.0 ± 34.6"


def test_processes_that_take_turns_lose_nothing() -> None:
    assert shared_cores.Compared([4.0, 100.0], [2.0, 50.0]).share == 1.0
    assert shared_cores.Compared([4.0, 4.0], [1.0, 2.0]).share == 0.75


def test_the_defaults_are_those_of_init() -> None:
    assert defaults() == new_project.default_training()
    assert defaults("80m") == {**new_project.default_training(), "budget": "80m"}
