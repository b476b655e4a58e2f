"""The size of the files that ship with the console."""

from __future__ import annotations

from console_parts.asking import Console
from engine_parts.report import Line
from service_parts.kept import Found
from tunesmith.server.console.rendering import FILES

_MOST = 300_000


def measure(_where: Console) -> Found:
    """One line. Needs no server."""
    sizes = {name: file.stat().st_size for name, file in sorted(FILES.items())}
    total = sum(sizes.values())
    line = Line("shipped files", f"{total / 1000:.0f} KB", shown="-", wanted="< 300 KB", reached=total < _MOST)
    return Found([line], sizes)
