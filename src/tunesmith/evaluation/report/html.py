"""The evidence as HTML: the report, one self-contained page, and its sections for the console's page of an evaluation.

Text from models and data sets is untrusted: the template escapes it, invisible and reordering characters are written
out, and the content security policy of both pages forbids inline scripts and resources of others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.digests import short
from tunesmith.core.text import wording
from tunesmith.evaluation.report import evidence_plots, plots
from tunesmith.evaluation.report.evidence import EvidenceReport


def render(found: EvidenceReport) -> str:
    """The report."""
    return _filled("report.html.jinja", found, whole=True, requests="")


def render_sections(found: EvidenceReport, requests: str) -> str:
    """The report's sections. requests: address of the console's requests by candidates, with a query."""
    return _filled("evidence.html.jinja", found, whole=False, requests=requests)


def _filled(template: str, found: EvidenceReport, **more: Any) -> str:
    by_name = {row.name: row for row in found.candidates}
    return _environment().get_template(template).render(**dict(found), by_name=by_name, **more)


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
    environment.filters.update(short=short)
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
