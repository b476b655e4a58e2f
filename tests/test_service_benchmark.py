"""The service's benchmark: its load generator counts what fails, and its results outlive the run."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

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
