"""The stage `style`: the bare base model's answers to held-out requests, from which the house's style is told."""

from __future__ import annotations

from pathlib import Path

from tunesmith.candidates.asking import TOGETHER, ask_rows, keep_answers
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.gates.settings import Style
from tunesmith.evaluation.probes.context import drawn
from tunesmith.evaluation.style.evidence import SUITE
from tunesmith.pipeline.candidates import answerer
from tunesmith.pipeline.context import PipelineContext


def style(context: PipelineContext) -> str | None:
    """Digest of the bare base model's answers to held-out rows, at most as many as the gates ask; None without a gate.

    Bare: without a candidate's prompt, shots, retrieval or constraint, with the longest answers of the candidates that
    ask the base. A row's own system turn stays.
    """
    settings = context.project.settings
    gates = [gate for gate in settings.gates.values() if isinstance(gate, Style)]
    if not gates:
        return None
    store, dataset, most = context.store, context.dataset, max(gate.rows for gate in gates)
    asking = [each for each in settings.candidates.values() if each.asks_base] or settings.candidates.values()
    room = max(each.max_tokens for each in asking)
    bare = Candidate(name=BASE, base=context.base.digest, max_tokens=room)
    digest = put_candidate(store, bare)
    parents = {"candidate": digest, "dataset": dataset.digest}
    inputs = {**parents, "rows": most, "engine": context.engine_kind, "together": TOGETHER}

    def ask(work: Path) -> str:
        rows = drawn(dataset.examples("test"), most)
        title = f"the bare base model answers {len(rows)} rows"
        found = ask_rows(answerer(context, bare), rows, work, title, context.progress)
        body = found.body(SUITE) | {"engine": context.engine_kind, "rows": most}
        return keep_answers(store, parents, found.lines, body)

    return context.stages.run("style", "style", inputs, ask)
