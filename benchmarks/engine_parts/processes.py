"""A measurement is a process of its own; contenders take turns; a figure is the median of its rounds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ENGINE = Path(__file__).parents[1] / "engine.py"
# What glibc's malloc is told by the environment: keep freed pages. Tunesmith says so itself.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
Figures = dict[str, Any]


class Contender(NamedTuple):
    """Who is measured. measure: name of a function of engine.MEASURES; told: what it is given."""

    name: str
    measure: Callable[[], Figures]


class Failed(Exception):
    """A measurement that ended with an error."""


def measured(kind: str, told: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Figures:
    """Run MEASURES[kind] on what it is told, in a process. Raises Failed."""
    return run([sys.executable, str(ENGINE), "--measure", kind], told, environment)


def run(command: Sequence[str], told: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Figures:
    """Run a command with a file of what it is told; the last line that it prints is what it found. Raises Failed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "told.json"
        path.write_text(json.dumps(told))
        done = subprocess.run(
            [*command, str(path)],
            env=os.environ | dict(environment or {}),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise Failed(f"{' '.join(command[-2:])} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turn(contenders: Sequence[Contender], rounds: int) -> dict[str, Figures]:
    """The medians of what each contender found. One that fails is left out and said so."""
    found: dict[str, list[Figures]] = {each.name: [] for each in contenders}
    for _ in range(rounds):
        for each in contenders:
            if each.name not in found:
                continue
            try:
                found[each.name].append(each.measure())
            except Failed as failure:
                print(f"  {each.name} FAILED and is left out: {failure}", flush=True)
                del found[each.name]
    return {name: median(runs) for name, runs in found.items()}


def median(runs: Sequence[Figures]) -> Figures:
    """Of each number; what is no number is the first run's."""
    first = runs[0]
    return {
        key: statistics.median(run[key] for run in runs) if isinstance(value, int | float) else value
        for key, value in first.items()
    }


def installed(name: str) -> str | None:
    """A package's version in this environment."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
