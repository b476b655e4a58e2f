"""Pages from templates, under headers that let a browser run nothing but the console's own files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.digests import digest_bytes, short
from tunesmith.core.text import wording
from tunesmith.core.text.display import json_text, printable
from tunesmith.core.text.wording import count, duration, gigabytes
from tunesmith.core.values import ScopedView, View
from tunesmith.services.actions import audit_words
from tunesmith.services.evaluations import style_sheets

FILES = {file.name: file for file in (Path(__file__).parent / "static").iterdir()} | style_sheets()
# No inline script or style, nothing of another host, no frame around the pages, no form that sends elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The pages that the navigation names.
PAGES = (
    ("/", "Home"),
    ("/console/jobs", "Jobs"),
    ("/console/evidence", "Evidence"),
    ("/console/versions", "Versions"),
    ("/console/rollouts", "Rollouts"),
    ("/console/rows", "Rows"),
    ("/console/operations", "Operations"),
)
PRIVATE = {**HEADERS, "Cache-Control": "no-store"}


def html(template: str, data: Mapping[str, Any], status: int = 200) -> HTMLResponse:
    """A page, or a part of one."""
    return private(rendered(template, data), status)


def private(page: str, status: int = 200) -> HTMLResponse:
    """An answer that no cache keeps."""
    return HTMLResponse(page, status, PRIVATE)


@cache
def has_template(template: str) -> bool:
    """Whether there is such a template."""
    return template in _environment().list_templates()


def rendered(template: str, data: Mapping[str, Any]) -> str:
    """The text of a part, or of the page that a template with a title makes.

    Text in data is escaped, and hidden characters in it become code points.
    """
    made = _environment().get_template(template).make_module(dict(data))
    if not hasattr(made, "title"):
        return str(made)
    return _environment().get_template("base.html.jinja").render({**data, **vars(made), "content": made})


@cache
def asset(name: str) -> str:
    """The URL of a static file. It changes with the file, so that browsers may keep what they have."""
    return f"/console/static/{name}?v={digest_bytes(FILES[name].read_bytes())[7:19]}"


def moment(at: float | str | None) -> str:
    """A time to the minute: 2026-01-31 10:45 UTC. at: seconds since 1970, or ISO 8601; None gives a dash."""
    return "–" if at is None else _time(at).strftime("%Y-%m-%d %H:%M UTC")


def when(at: float | str | None) -> Markup | str:
    """A time as an element, whose text `console.js` makes "12 min ago" where it is near."""
    if at is None:
        return "–"
    at_time = _time(at)
    full = at_time.strftime("%Y-%m-%d %H:%M:%S UTC")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(at_time.isoformat(), full, moment(at))


def _time(at: float | str) -> datetime:
    time = datetime.fromtimestamp(at, UTC) if isinstance(at, float | int) else datetime.fromisoformat(at)
    return time.astimezone(UTC)


def many(number: int, noun: str) -> str:
    """A number of things: 1 entry, 1,200 entries."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count(number)} {noun if number == 1 else plural}"


def scope(of: ScopedView) -> str:
    """Whom a thing with a tenant and a region is for: all tenants and regions; tenant acme, region eu."""
    return of.scope.said.removeprefix(", ") or "all tenants and regions"


def pages(total: int, most: int) -> int:
    """How many pages a list has that shows so many things on each."""
    return max(1, -(-total // most))


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash for None or NaN."""
    return "–" if share is None or math.isnan(share) else wording.percent(share)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunesmith.server.console", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    filters = (audit_words, count, duration, gigabytes, json_text, many, moment, percent, scope, short, when)
    environment.filters.update({each.__name__: each for each in filters})
    parts = vars(environment.get_template("parts.html.jinja").module)
    environment.globals.update(parts, asset=asset, pages=PAGES)
    return environment


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


Points = Mapping[float, float | None]  # x -> y, None for a gap
# share: from 0 to 1, shown as a percentage. log: logarithmic, values above 0.
Scale = Literal["linear", "share", "log", "count"]
# The colours by what is drawn, the same in every chart: the new version and what was tuned have the first.
CANARY, STABLE, GOOD, BAD = 1, 2, 3, 4


@dataclass(frozen=True)
class Line:
    """One line. colour: from 1 to 4, of the style sheet's --chart-1 to --chart-4; 0 for a grey one."""

    label: str
    points: Points
    colour: int
    dashed: bool = False


class DrawnLine(View):
    """A line with a value for each x of its chart, None for a gap."""

    label: str
    colour: int
    dashed: bool
    values: tuple[float | None, ...]


class Chart(View):
    """A chart as the page has it. says: its lines in words. at: the values of x."""

    title: str
    x: str
    y: str
    scale: Scale
    says: str
    at: tuple[float, ...]
    lines: tuple[DrawnLine, ...]


def chart(title: str, lines: Sequence[Line], *, x: str, y: str, scale: Scale = "linear") -> Chart:
    """A chart of lines over the same span of x.

    x, y: what the axes show, with its unit. An x named "time" is in seconds since 1970.
    """
    at = tuple(sorted({place for line in lines for place in line.points}))
    drawn = tuple(DrawnLine.of(one, label=printable(one.label), values=tuple(map(one.points.get, at))) for one in lines)
    said = " ".join(_said(line, x, scale) for line in lines)
    return Chart(title=printable(title), x=x, y=printable(y), scale=scale, says=said, at=at, lines=drawn)


def _said(line: Line, x: str, scale: Scale) -> str:
    """A line in words: where it begins and ends."""
    known = [(place, value) for place, value in sorted(line.points.items()) if value is not None]
    if not known:
        return printable(f"{line.label}: no value.")

    def said(place: float, value: float) -> str:
        shown = f"{value:.1%}" if scale == "share" else f"{value:.4g}"
        where = f"{datetime.fromtimestamp(place, UTC):%Y-%m-%d %H:%M} UTC" if x == "time" else f"{x} {place:g}"
        return f"{shown} at {where}"

    ends = dict.fromkeys((said(*known[0]), said(*known[-1])))
    return printable(f"{line.label}: {', '.join(ends)}.")
