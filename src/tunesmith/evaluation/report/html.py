"""The report as one self-contained HTML page, for an approver and for a statistician.

Text from models and data sets is untrusted: the template escapes it, invisible and reordering characters are written
out, and the page's content security policy forbids scripts and external resources.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.digests import short
from tunesmith.core.text import wording
from tunesmith.evaluation.report import evidence_plots, plots
from tunesmith.store.audit_words import audit_words


def render(data: Mapping[str, Any]) -> str:
    """The page. data: as report_data returns it."""
    by_name = {row["name"]: row for row in data["candidates"]}
    return _environment().get_template("report.html.jinja").render(**data, by_name=by_name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunesmith.evaluation.report", "page"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = ("count", "detail_text", "duration", "gigabytes", "money", "signed_money", "moment", "p_value", "percent")
    environment.filters.update({name: getattr(wording, name) for name in (*filters, "points")})
    environment.filters.update(short=short, audit_words=audit_words)
    environment.globals.update(
        expected=wording.expected,
        duration=wording.duration,
        gigabytes=wording.gigabytes,
        plots=plots,
        evidence_plots=evidence_plots,
    )
    return environment


def _shown(value: Any) -> Any:
    """Make text safe to show. Every expression of the template passes through here."""
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
