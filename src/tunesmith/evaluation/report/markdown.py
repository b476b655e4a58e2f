"""The report as Markdown, short enough for a pull request. Untrusted text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunesmith.core.digests import short
from tunesmith.core.text.wording import money, percent, visible
from tunesmith.evaluation.report.evidence import EvidenceReport, StyleReport
from tunesmith.records.evaluation import CheckResults

_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


def report_markdown(data: EvidenceReport) -> str:
    """The report without examples and charts."""
    verdict, advice = data.verdict, data.advice
    title = data.version.label if data.version else data.focus
    lines = [f"## {_text(title)}: {_text(advice.headline)}", ""]
    if verdict:
        lines += [f"Verdict: **{_MARKS[verdict.verdict]}**", ""]
    if data.version and data.version.takes:
        lines += [_text(data.version.takes), ""]
    lines += [_text(advice.summary), ""]
    lines += [f"- {_text(sentence)}" for sentence in advice.reasons]
    lines += [f"- ⚠️ {_text(sentence)}" for sentence in advice.cautions]
    lines += ["", *_candidates(data)]
    if verdict and verdict.gates:
        lines += [
            "",
            *_table(("gate", "outcome", "why"), ((g.name, g.outcome, g.reason) for g in verdict.gates)),
        ]
    lines += _behaviour(data)
    lines += ["", *_risks(data)]
    lines += ["", f"{data.n} held-out requests in {data.groups} groups; {data.confidence:.0%} intervals. "]
    lines[-1] += f"Evaluation `{short(data.evaluation)}`" + (
        f", verdict `{short(verdict.digest)}`." if verdict else "."
    )
    return "\n".join(lines) + "\n"


def _behaviour(data: EvidenceReport) -> list[str]:
    """The policy checks by candidates, and the shares of answers in the references' style."""
    policy, style, names = data.policy, data.style, [row.name for row in data.candidates]
    lines: list[str] = []
    if policy:
        heads = ("policy check", "every answer", *names)
        rows = ((check.name, check.rule, *(_kept(check.cells.get(name)) for name in names)) for check in policy.checks)
        lines += ["", *_table(heads, rows)]
        for name, reason in sorted(policy.unusable.items()):
            lines += ["", f"{_text(name)}: {_text(reason)}."]
    if isinstance(style, StyleReport):
        lines += ["", _text(style.sentence), ""]
        for name in names:
            share = style.candidates[name].share
            said = f"{percent(share.mean)} [{percent(share.low)}, {percent(share.high)}]" if share else "unclear"
            lines.append(f"- In the references' style, {_text(name)}: {_text(said)}")
    elif style:
        lines += ["", f"Style was not measured: {_text(style.unusable)}."]
    return lines


def _kept(cell: CheckResults | None) -> str:
    if cell is None:
        return "not measured"
    said = f"{cell.n - cell.broke - cell.undecided} of {cell.n}" if cell.n else "no evidence"
    doubts = ((cell.broke, "broke it"), (cell.undecided, "decide nothing"), (cell.leaked, "leaked"))
    extra = [f"{count} {word}" for count, word in doubts if count]
    return f"{said} ({', '.join(extra)})" if extra else said


def _risks(data: EvidenceReport) -> Iterable[str]:
    """The risk probes before and after tuning, and which were not measured."""
    found = data.risks
    if found.exposure:
        yield f"- {_text(found.exposure.sentence)}"
    for row in found.bias:
        yield f"- {_text(row.asked)}: {_text(row.sentence)}"
    if found.unmeasured:
        yield f"- Not measured: {_text(', '.join(found.unmeasured))}."


def _candidates(data: EvidenceReport) -> Iterable[str]:
    metrics, currency = data.metrics, data.currency
    heads = [
        "candidate",
        "how",
        *metrics,
        "prompt tokens",
        "s per 1,000",
        *([f"{currency} per 1,000"] if currency else []),
    ]
    rows = []
    for row in data.candidates:
        price = row.price
        measured = [
            f"{percent(found.mean)} [{found.low * 100:.1f}, {found.high * 100:.1f}]"
            for found in (row.metrics[metric] for metric in metrics)
        ]
        rows.append(
            [
                f"**{_text(row.name)}**" if row.role == "focus" else _text(row.name),
                row.how,
                *measured,
                f"{price.prompt_tokens_per_1000 / 1000:,.0f}",
                f"{price.seconds_per_1000:,.0f}",
                *([money(price.money_per_1000)] if currency else []),
            ]
        )
    return _table(heads, rows, escaped=(0,))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], escaped: tuple[int, ...] = ()) -> list[str]:
    names = [_text(head) for head in heads]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [cell if place in escaped else _text(cell) for place, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(text: str) -> str:
    """The text in one line, with all Markdown escaped."""
    plain = " ".join(visible(text).split())
    return re.sub(r"([\\`*\[\]<>|!~#@])|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", plain)
