"""The matrix of requests by candidates: its first view."""

from __future__ import annotations

import time

from console_parts.asking import Console, page
from engine_parts.report import Line
from service_parts.kept import Found


def measure(where: Console) -> Found:
    """Lines for the first view, if nobody has looked before."""
    first = _first_view(where)
    lines = [
        Line("the matrix, first view after the server's start", f"{first['seconds']:.2f} s"),
        Line("processor time and memory of it", f"{first['cpu']:.2f} s, {first['memory'] / 1e6:.0f} MB"),
    ]
    return Found(lines, {"first view": first})


def _first_view(where: Console) -> dict[str, float]:
    cookie = where.cookie()
    page(where, cookie, "/")  # what the server imports late
    used, held, began = where.cpu(), where.memory(), time.perf_counter()
    page(where, cookie, f"/console/evidence/{where.made.evaluation}/matrix")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu": where.cpu() - used, "memory": where.memory() - held}
