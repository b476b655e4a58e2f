"""The service's benchmark: each part at toy size, what it counts as a fault, and its results outlive the run."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_OWN = ("engine_parts", "service_parts")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]


def test_the_load_generator_counts_requests_and_those_that_fail() -> None:
    from service_parts.load import generate
    from service_parts.run_bare import Instant

    async def asked(**told: object) -> dict[str, float]:
        server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            return await generate({"url": url, "token": "t", "body": {}, "connections": 3, "seconds": 30, **told})

    found = asyncio.run(asked(requests=40, must_have="intent"))
    assert (found["requests"], found["failed"]) == (40, 0)
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert asyncio.run(asked(requests=40, must_have="not there"))["failed"] == 40
    on_time = asyncio.run(asked(requests=20, rate=100.0))
    assert on_time["per_second"] == pytest.approx(100, rel=0.3)


@pytest.mark.slow
def test_the_benchmarks_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service_parts.gateway import ask, ours

    monkeypatch.setenv("TUNESMITH_USER", "ann")
    with ours(tmp_path) as told:
        found = ask({**told, "seconds": 60.0, "requests": 50})
    assert (found["requests"], found["failed"]) == (50, 0), found


def test_a_parts_result_is_kept_until_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_parts.report import Line, markdown
    from service_parts import kept

    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    first, second = Line("a", "1", "peer", "2", 0.5, 0.6), Line("b", "3", shown="-", wanted="0", reached=True)
    kept.keep("service", "one", kept.Found([first], {"per_second": 1}), 2.0)
    kept.keep("service", "two", kept.Found([first], {}), 2.0)
    kept.keep("service", "two", kept.Found([second], {}), 3.0)
    assert [kept.lines_of(entry) for entry in kept.read("service").values()] == [[first], [second]]
    assert json.loads((tmp_path / "service.json").read_text())["two"]["seconds"] == 3
    assert markdown([first, second]).splitlines()[2:] == [
        "| a | 1 | peer | 2 | 0.50x | >= 0.6x | NO |",
        "| b | 3 | - | - | - | 0 | yes |",
    ]


def test_the_soaks_clients_count_wrong_answers() -> None:
    from service_parts import run_bare, run_clients

    said = json.dumps({"intent": "client 0 request 1", "weights": "those of v1"})
    body = json.dumps({"model": "home@v1", "choices": [{"message": {"content": said}}]}).encode()

    class OneAnswer(run_bare.Instant):
        def data_received(self, data: bytes) -> None:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def asked(weights: str) -> dict[str, Any]:
        server = await asyncio.get_running_loop().create_server(OneAnswer, "127.0.0.1", 0)
        told = {"ports": [server.sockets[0].getsockname()[1]], "token": "t", "seconds": 0.3}
        async with server:
            return await run_clients.main({**told, "weights": {"home@v1": weights}})

    found = asyncio.run(asked("those of v1"))
    assert found["wrong"] == found["answers"]["200"] - 1 >= 7, found  # one answer is that to its request
    found = asyncio.run(asked("those of v2"))
    assert found["wrong"] == found["answers"]["200"] >= 8, found


def test_windows_that_are_not_compared_in_whole_have_not_drifted() -> None:
    from service_parts import drifting
    from tunesmith.monitoring.drift import _distance

    draw = np.random.default_rng(1)

    def rows(count: int, similar: float) -> list[dict[str, float]]:
        nearest = draw.normal(similar, 0.1, count).round(2)
        return [{"characters": float(draw.integers(10, 60)), "nearest": float(one)} for one in nearest]

    measured = rows(400, 0.8)
    requests = drifting.requests_of(measured, measured, rows(300, 0.3))
    shares = np.linspace(0.0, 0.1, 12)
    windows = np.stack([drifting._drawn(requests, draw, np.full(drifting.WINDOW, share)) for share in shares])
    distances = drifting._distances(windows[:, :, 1], requests.measured[:, 1])
    assert distances == pytest.approx([_distance(one[:, 1], requests.measured[:, 1]) for one in windows])
    drifted = [bool(drifting._drifted(requests, window)) for window in windows]
    may = drifting._may_drift(requests, windows)
    assert drifted[-1]
    assert not may[0]
    assert all(may[place] for place, found in enumerate(drifted) if found)
    noticed = drifting._noticed(requests, draw)
    assert noticed["after_20_percent"] in range(drifting.EVERY, 2 * drifting.WINDOW, drifting.EVERY)
    assert drifting._false_alarms(requests, draw, 3) == {"windows": 3, "computed_in_whole": 3, "alarms": 0}


_TOY: dict[str, tuple[dict[str, float], tuple[float, ...]]] = {  # part -> the module's settings, what measure is given
    "large_registry": ({"TIMES": 2, "MOST_MS": 60_000}, (120,)),
    "promoting": ({"REQUESTS": 60, "MOST_SECONDS": 600}, ()),
    "uploading": ({"SHARE": 0.0, "ROUNDS": 1}, (1 << 20,)),
    "soak": ({"KILL_EVERY": 3.0}, (0.4,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", _TOY)
def test_a_part_reaches_its_goals_at_toy_size(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (settings, given) = importlib.import_module(f"service_parts.{part}"), _TOY[part]
    monkeypatch.setenv("TUNESMITH_USER", "ann")
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    found = module.measure(*given)
    assert [line.what for line in found.lines if line.verdict() != "yes"] == [], found
    if part == "soak":
        assert len(found.figures["kills"]) >= 5, found.figures
        assert found.figures["clients"]["answers"]["200"] > 0
        assert found.figures["jobs"]["added"] > 0


@pytest.mark.slow
def test_jobs_are_done_once_while_workers_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service_parts import queued_jobs
    from tests.postgresql_server import postgresql_server

    monkeypatch.setenv("TUNESMITH_USER", "ann")
    monkeypatch.setattr(queued_jobs, "KILL_EVERY", 2.0)
    with postgresql_server(tmp_path / "sql") as url:
        found = queued_jobs._ours(tmp_path, url, 300)
    assert (found["unfinished"], found["lost"], found["twice"]) == (0, 0, 0), found
