"""How tests are spread over processes, and what a run says at its end.

pytest-xdist's `worksteal` gives each process an equal number of tests in the order of collection; a process that has
done its own takes half of another's. The files are ordered by their seconds in tests/durations.json so that all
processes get about the same time from the beginning. `pytest --keep-durations` writes that file anew.
"""

import json
import os
import resource
from collections import Counter, defaultdict
from pathlib import Path

import pytest

_KEPT = Path(__file__).with_name("durations.json")
_UNKNOWN = 0.1  # seconds of a test that has no entry yet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-durations", action="store_true", help="write the seconds of each file to durations.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1))
    known: dict[str, float] = json.loads(_KEPT.read_text()) if _KEPT.exists() else {}
    files: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[_name(item.nodeid)].append(item)
    seconds = {name: known.get(name, _UNKNOWN * len(found)) for name, found in files.items()}
    names = ordered(seconds, {name: len(found) for name, found in files.items()}, workers)
    items[:] = [item for name in names for item in files[name]]


def ordered(seconds: dict[str, float], tests: dict[str, int], workers: int) -> list[str]:
    """The files in an order whose `workers` parts of equally many tests take about equally long.

    The longest files go to the process that has the least to do, the others to the one that has the fewest tests.
    """
    time, count = [0.0] * workers, [0] * workers
    parts: list[list[str]] = [[] for _ in range(workers)]
    most, limit = sum(tests.values()) / workers, sum(seconds.values()) / workers
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        free = [k for k in range(workers) if count[k] + tests[name] <= most] or list(range(workers))
        chosen = min(free, key=lambda k: (time[k] + seconds[name] > limit, time[k], count[k]))
        parts[chosen].append(name)
        time[chosen] += seconds[name]
        count[chosen] += tests[name]
    return [name for part in parts for name in part]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The processor time, and why tests were skipped."""
    kinds = pytest.TestReport | pytest.CollectReport
    reports = [each for listed in terminalreporter.stats.values() for each in listed if isinstance(each, kinds)]
    skipped: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[_name(report.nodeid)] += getattr(report, "duration", 0.0)
        if report.skipped and isinstance(report.longrepr, tuple):
            skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(each.ru_utime + each.ru_stime for each in used) / 60
    terminalreporter.write_line(f"processor time: {minutes:.1f} minutes, with all processes that the tests started")
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"skipped: {count} tests: {reason}")
    if config.getoption("--keep-durations") and "PYTEST_XDIST_WORKER" not in os.environ:
        _KEPT.write_text(json.dumps({name: round(seconds[name], 1) for name in sorted(seconds)}, indent=0) + "\n")


def _name(nodeid: str) -> str:
    return nodeid.partition("::")[0]
