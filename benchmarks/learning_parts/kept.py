"""What benchmarks keep between runs: JSON lines, and figures named by the digest of their settings and the machine."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_of

Figures = dict[str, Any]


class Kept:
    """Figures by name and settings. New ones are measured while there is time."""

    def __init__(self, path: Path, minutes: float, machine: str) -> None:
        """path: of the file, which grows. minutes: no measurement begins after so many. machine: whose figures."""
        self._path, self._until, self.machine = path, time.monotonic() + 60 * minutes, machine
        self._known: dict[tuple[str, str], Figures] = {
            (line["key"], line["machine"]): line["found"] for line in read_lines(path)
        }
        self.left: list[str] = []  # what was asked for and is neither known nor measured
        self.command = ""  # measures what is measured now, and is kept with it

    def figures(
        self,
        name: str,
        settings: Mapping[str, Any],
        minutes: float,
        measure: Callable[[], Figures],
        lacks: str | None = None,
    ) -> Figures | None:
        """What is known under the name and settings, or what measure() finds, which is kept; None where the time is up.

        settings: all that the figures depend on, apart from the machine. minutes: how long measuring takes, about.
        lacks: why it cannot be measured now.
        """
        if (known := self.known(name, settings)) is not None:
            return known
        if lacks or time.monotonic() > self._until:
            left = f"{name}: {lacks or f'about {minutes:.0f} min'}"
            if left not in self.left:
                self.left.append(left)
            return None
        print(f"measuring {name}, about {minutes:.0f} min", flush=True)
        found = measure()
        key = digest_of({"name": name, **settings})
        line = {
            "key": key,
            "name": name,
            "machine": self.machine,
            "command": self.command,
            "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "settings": dict(settings),
            "found": found,
        }
        append_line(self._path, line)
        self._known[key, self.machine] = found
        return found

    def known(self, name: str, settings: Mapping[str, Any]) -> Figures | None:
        """What is known of this machine under the name and settings."""
        return self._known.get((digest_of({"name": name, **settings}), self.machine))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none where it does not exist. A line that a killed run left half-written is skipped."""
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else (), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}, line {number} is not whole and is skipped", file=sys.stderr)
    return found


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a JSON line, durable before this returns. A killed run may have left half a line before it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("ab+") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        before = b"" if stream.read(1) in (b"", b"\n") else b"\n"
        stream.write(before + json.dumps(line, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def machine(threads: int) -> str:
    """The processor and the number of threads that compute.

    The family tells processors apart that give the same name: "AMD EPYC" in a virtual machine is Zen 4 (family 25) or
    Zen 5 (26), which multiplies twice as fast.
    """
    path = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in (path.read_text().splitlines() if path.exists() else [])]
    known = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    family = f" (family {known['cpu family']})" if "cpu family" in known else ""
    flags = known.get("flags", "").split()
    units = next((said for flag, said in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")) if flag in flags), "")
    return f"{known.get('model name', platform.machine())}{family}{units and f' with {units}'}, threads: {threads}"
