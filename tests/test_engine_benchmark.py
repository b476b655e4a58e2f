"""The engine's benchmark: its table says what was reached and what could not be measured, and its rule of noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name == "leakage" or name.split(".")[0] == "engine_parts"]:
        del sys.modules[name]


def test_a_line_says_whether_its_goal_is_reached() -> None:
    from engine_parts.report import Line, table

    lines = [
        Line("faster", "20", "a peer 1.0", "2", 10.0, 8.0),
        Line("slower", "20", "a peer 1.0", "5", 4.0, 8.0),
        Line("lighter", "1", "a peer 1.0", "4", 0.25, 0.4, most=True),
        Line("heavier", "2", "a peer 1.0", "4", 0.5, 0.4, most=True),
        Line("told alone", "2", "a peer 1.0", "4", 0.5),
        Line("absent", lacks="a peer is not installed"),
    ]
    shown = table(lines).splitlines()
    ends = ["reached", "yes", "NO", "yes", "NO", "-", "not measured: a peer is not installed"]
    assert [row.endswith(end) for row, end in zip(shown, ends, strict=True)] == [True] * 7
    assert "10.00x  >= 8x" in shown[1]
    assert "<= 0.4x" in shown[4]


@pytest.mark.parametrize(
    ("ours", "peer", "said"),
    [
        ([0.30, 0.40, 0.50], [0.31, 0.40, 0.49], "equal within noise"),
        ([0.10, 0.20, 0.30], [0.31, 0.40, 0.49], "better"),
        ([0.50, 0.60, 0.70], [0.31, 0.40, 0.49], "WORSE"),
    ],
)
def test_a_difference_counts_beyond_the_peers_own_seeds(ours: list[float], peer: list[float], said: str) -> None:
    from engine_parts.curve import compared

    assert compared(ours, peer, lower_is_better=True).said == said
    turned = {"better": "WORSE", "WORSE": "better"}.get(said, said)
    assert compared(ours, peer, lower_is_better=False).said == turned


def test_a_contender_that_fails_is_left_out_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    from engine_parts.processes import Contender, Failed, Figures, in_turn, run

    def broken() -> Figures:
        return run([sys.executable, "-c", "raise SystemExit('no such model')"], {})

    told = "import json, sys; print('noise'); print(json.dumps({'x': json.load(open(sys.argv[1]))['n']}))"
    order: list[int] = []

    def works() -> Figures:
        order.append(len(order))
        return run([sys.executable, "-c", told], {"n": [5, 1, 3][len(order) - 1]})

    found = in_turn([Contender("works", works), Contender("broken", broken)], 3)
    assert found == {"works": {"x": 3}}
    said = capsys.readouterr().out
    assert said.count("broken FAILED and is left out") == 1
    assert "no such model" in said
    with pytest.raises(Failed):
        broken()


def test_what_is_read_says_what_each_part_measures() -> None:
    from engine_parts.parts import PARTS

    text = (BENCHMARKS / "README.md").read_text()
    assert [name for name in PARTS if f"| `{name}` |" not in text] == []


def test_a_peer_without_an_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    from engine_parts import lines, parts, rows
    from engine_parts.environments import LLAMAFACTORY, VLLM, python

    assert python(LLAMAFACTORY) is None
    half = tmp_path / "peers" / "vllm" / "bin"
    half.mkdir(parents=True)
    (half / "python").touch()
    assert python(VLLM) is None, "an environment that was not finished is none"
    monkeypatch.setattr(parts, "CORPUS", tmp_path)
    monkeypatch.setattr(parts, "snips_rows", lambda *_, **__: rows.restaurants(8))
    monkeypatch.setattr(parts, "installed", lambda _: None)
    told = {"examples_per_second": 1.0, "peak_gb": 1.0, "first": 1.0, "last": 1.0}
    monkeypatch.setattr(parts, "measured", lambda *_: json.loads(json.dumps(told)))
    monkeypatch.setattr(lines, "installed", lambda _: None)
    speed, memory = parts.short(parts.Told(1, 4))
    assert "TRL is not installed" in speed.verdict()
    behind = parts.shared  # the same of a part that TRL alone stands beside
    monkeypatch.setattr(parts, "measured", lambda *_: {**told, "flops": 1.0})
    assert [line.verdict() for line in behind(parts.Told(1, 8))][:3] == [f"not measured: {lines.NO_TRL}"] * 3
    assert "llamafactory 0.9.5 is not installed (python benchmarks/engine.py --install-peers)" in memory.verdict()
