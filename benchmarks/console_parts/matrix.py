"""The matrix of requests by candidates: its first view, and how it scrolls in a Chromium."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Page, sync_playwright
from tests.browser import chromium

from console_parts.asking import Console, middle_and_p95, page
from engine_parts.report import Line
from service_parts.kept import Found

READING, FAST = 12, 120  # pixels a frame
FRAMES = 300
_LONGEST_MS = 50.0  # a longer frame is a pause that people see
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
# Scrolls so many pixels a frame. Gives the frames' lengths in ms, and in how many a row in sight was not there yet.
_SCROLL = """([pixels, frames]) => new Promise((resolve) => {
  const scroller = document.querySelector(".matrix"), bodies = [...scroller.querySelectorAll("tbody")];
  const head = scroller.querySelector("thead").offsetHeight;
  const height = (bodies.at(-1).offsetTop - bodies[0].offsetTop) / (bodies.length - 1) || bodies[0].offsetHeight;
  const taken = [];
  let missing = 0, last = performance.now();
  requestAnimationFrame(function frame(now) {
    taken.push(now - last);
    last = now;
    const first = Math.floor(scroller.scrollTop / height);
    const until = Math.floor((scroller.scrollTop + scroller.clientHeight - head) / height);
    missing += bodies.slice(first, until + 1).some((body) => body.className === "empty");
    scroller.scrollTop += pixels;
    if (taken.length <= frames) requestAnimationFrame(frame);
    else resolve({ taken: taken.slice(1), missing });
  });
})"""


def measure(where: Console, frames: int = FRAMES) -> Found:
    """Lines for the first view, if nobody has looked before, and for both speeds."""
    figures: dict[str, Any] = {"first view": _first_view(where)}
    with _opened(where) as shown:
        for what, pixels in (("reading", READING), ("fast", FAST)):
            shown.evaluate("document.querySelector('.matrix').scrollTop = 0")
            shown.wait_for_selector(".matrix tbody:nth-of-type(3):not(.empty) tr", state="attached")  # those near
            found = shown.evaluate(_SCROLL, [pixels, frames])
            _, p95 = middle_and_p95(found["taken"])
            longest = max(found["taken"])
            figures[what] = {"longest_ms": longest, "p95_ms": p95, "frames": frames, "missing": found["missing"]}
    first = figures["first view"]
    lines = [
        Line("the matrix, first view after the server's start", f"{first['seconds']:.2f} s"),
        Line("processor time and memory of it", f"{first['cpu']:.2f} s, {first['memory'] / 1e6:.0f} MB"),
    ]
    return Found([*lines, *(_line(what, figures[what]) for what in ("reading", "fast"))], figures)


def _first_view(where: Console) -> dict[str, float]:
    cookie = where.cookie()
    page(where, cookie, "/")  # what the server imports late
    used, held, began = where.cpu(), where.memory(), time.perf_counter()
    page(where, cookie, f"/console/evidence/{where.made.evaluation}/matrix")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu": where.cpu() - used, "memory": where.memory() - held}


@contextlib.contextmanager
def _opened(where: Console) -> Iterator[Page]:
    """The page of the matrix in a browser."""
    name, _, secret = where.cookie().partition("=")
    address = f"http://127.0.0.1:{where.port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=_FLAGS)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.add_cookies([{"name": name, "value": secret, "url": address}])
        shown = context.new_page()
        shown.set_default_timeout(300_000)
        shown.goto(f"{address}/console/evidence/{where.made.evaluation}/requests")
        shown.wait_for_selector(".matrix tbody tr")
        yield shown
        browser.close()


def _line(what: str, found: dict[str, Any]) -> Line:
    speed = {"reading": READING, "fast": FAST}[what]
    said = f"longest frame {found['longest_ms']:.0f} ms, p95 {found['p95_ms']:.0f} ms, rows missing in "
    return Line(
        f"scrolling it at {what} speed, {speed} px a frame",
        f"{said}{found['missing']} of {found['frames']} frames",
        shown="-",
        wanted=f"none longer than {_LONGEST_MS:g} ms, no row missing",
        reached=found["longest_ms"] <= _LONGEST_MS and not found["missing"],
    )
