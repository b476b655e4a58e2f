"""The evidence as pages: the report as HTML and as Markdown, and its sections for the console's page of an evaluation.

Text from models and data sets is untrusted: every expression of the templates is escaped, invisible and reordering
characters are written out, and the content security policy of both HTML pages forbids inline scripts and resources of
others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.digests import short
from tunesmith.core.text import wording
from tunesmith.evaluation.probes.catalog import PROBES, suite_of
from tunesmith.evaluation.report import plots
from tunesmith.evaluation.report.behaviour import CHANCE_BITS
from tunesmith.evaluation.report.evidence import EvidenceReport


def _html(value: Any) -> Any:
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(value: Any) -> Markup:
    """The text in one line, with all Markdown escaped."""
    if isinstance(value, Markup):
        return value
    plain = " ".join(wording.visible(str(value)).split())
    return Markup(re.sub(r"([\\`*\[\]<>|!~#@])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", plain))  # noqa: S704


def render(evidence: EvidenceReport) -> str:
    """The report."""
    return _filled("report.html.jinja", evidence, whole=True, requests="")


def render_sections(evidence: EvidenceReport, requests: str) -> str:
    """The report's sections. requests: address of the console's requests by candidates, with a query."""
    return _filled("evidence.html.jinja", evidence, whole=False, requests=requests)


def report_markdown(evidence: EvidenceReport) -> str:
    """The report without examples and charts, short enough for a pull request."""
    return _filled("report.md.jinja", evidence, written=_markdown)


def _filled(template: str, evidence: EvidenceReport, *, written: Callable[[Any], Any] = _html, **more: Any) -> str:
    by_name = {row.name: row for row in evidence.candidates}
    return _environment(written).get_template(template).render(**dict(evidence), by_name=by_name, **more)


@cache
def _environment(written: Callable[[Any], Any]) -> Environment:
    """written: makes the value of an expression safe to show."""
    environment = Environment(
        loader=PackageLoader("tunesmith.evaluation.report", "page"),
        autoescape=True,
        finalize=written,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = ("count", "detail_text", "duration", "gigabytes", "money", "signed_money", "moment", "p_value", "percent")
    environment.filters.update({name: getattr(wording, name) for name in (*filters, "points")})
    environment.filters.update(short=short, whole="{:.0%}".format)
    environment.globals.update(
        expected=wording.expected,
        duration=wording.duration,
        gigabytes=wording.gigabytes,
        plots=plots,
        chance_bits=CHANCE_BITS,
        chart_of=lambda probe: suite_of(probe).chart,
        units={name: kind.unit for name, kind in PROBES.items()},
    )
    return environment
