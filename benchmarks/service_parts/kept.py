"""What a part found, and files of results: one entry a part, so that parts can be measured one by one."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine_parts.report import Line, markdown, table

RESULTS = Path(__file__).parents[1] / "results"


class Found(NamedTuple):
    """A part's lines of the table, and the figures behind them: JSON."""

    lines: Sequence[Line]
    figures: dict[str, Any]


def machine() -> str:
    """Processor, cores, Python."""
    name = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as cpu:
        name = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")), name)
    return f"{len(os.sched_getaffinity(0))} cores of {name}, Python {platform.python_version()}"


def read(name: str) -> dict[str, Any]:
    """Part -> its entry, of the benchmark of this name."""
    file = RESULTS / f"{name}.json"
    entries: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return entries


def keep(name: str, part: str, found: Found, seconds: float) -> None:
    """Keep what a part found in place of what it found before. load: other work on the machine when it ended."""
    entry = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 2),
        "seconds": round(seconds),
        "lines": [line._asdict() for line in found.lines],
        "figures": found.figures,
    }
    written = RESULTS / f"{name}.partial"
    written.write_text(json.dumps({**read(name), part: entry}, indent=1) + "\n")
    written.replace(RESULTS / f"{name}.json")


def lines_of(entry: dict[str, Any]) -> list[Line]:
    """The lines of an entry."""
    return [Line(**line) for line in entry["lines"]]


def measured(name: str, part: str, measure: Callable[[], Found]) -> None:
    """Measure a part, keep what was found, and print it."""
    print(f"{part} ...", flush=True)
    began = time.perf_counter()
    found = measure()
    seconds = time.perf_counter() - began
    keep(name, part, found, seconds)
    print(table(found.lines), f"  [{part}: {seconds:.0f} s]", sep="\n", flush=True)


def print_table(name: str, parts: Iterable[str]) -> None:
    """Print what is kept of these parts, and the same as Markdown."""
    entries = read(name)
    lines: list[Line] = []
    for part in parts:
        lines += lines_of(entries[part]) if part in entries else [Line(part, lacks=f"--only {part}")]
    print(f"\n{table(lines)}\n\nThe same as Markdown:\n\n{markdown(lines)}")
