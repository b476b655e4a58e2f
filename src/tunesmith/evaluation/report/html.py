"""The report as one self-contained HTML page, for an approver and for a statistician.

Text from models and data sets is untrusted: the template escapes it, invisible and reordering characters are written
out, and the page's content security policy forbids scripts and external resources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.digests import short
from tunesmith.evaluation.report import evidence_plots, plots, risk_plots, wording
from tunesmith.evaluation.report.data import report_data
from tunesmith.store.store import Store


def report_html(
    store: Store,
    evaluation: str,
    verdict: str | None = None,
    version: str | None = None,
    trail: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page for an evaluation and, where given, its verdict and version (all by digest).

    trail: audit entries, oldest first: {at, actor, action, subject, detail}. The same records and trail give the same
    bytes. Raises Inconclusive for scores that are not consistent.
    """
    return render(report_data(store, evaluation, verdict, version, trail))


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
    environment.filters.update(
        count=wording.count,
        detail_text=wording.detail_text,
        duration=wording.duration,
        gigabytes=wording.gigabytes,
        money=wording.money,
        signed_money=wording.signed_money,
        moment=wording.moment,
        p_value=wording.p_value,
        percent=wording.percent,
        points=wording.points,
        short=short,
    )
    environment.globals.update(
        expected=wording.expected,
        duration=wording.duration,
        gigabytes=wording.gigabytes,
        plots=plots,
        evidence_plots=evidence_plots,
        risk_plots=risk_plots,
    )
    return environment


def _shown(value: Any) -> Any:
    """Make text safe to show. Every expression of the template passes through here."""
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
