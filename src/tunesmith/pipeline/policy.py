"""The stages that answer the requests of policy checks, and those of the style gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.candidates.asking import TOGETHER, ask_rows, keep_answers
from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.core.digests import digest_bytes
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.gates.settings import Style
from tunesmith.evaluation.lines import ITEMS, encode_lines
from tunesmith.evaluation.policy.outcomes import SUITE, judge_policy
from tunesmith.evaluation.policy.requests import PolicyItem
from tunesmith.evaluation.policy.settings import PolicyCheck
from tunesmith.evaluation.probes.suites import drawn
from tunesmith.evaluation.style import shares
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import decoding_inputs


def policy(context: PipelineContext, names: Sequence[str], items: Sequence[PolicyItem]) -> dict[str, str]:
    """The candidates' answers to the policy's requests, and what its judges said: the evaluation's parents by role."""
    checks = context.project.settings.policy
    given = {name: policy_answers(context, name, items) for name in names} if checks else {}
    judged = {
        f"policy-judged:{check}:{name}": _judged(context, name, answers, check, settings, items)
        for check, settings in checks.items()
        if settings.judge is not None
        for name, answers in given.items()
    }
    return {f"policy:{name}": answers for name, answers in given.items()} | judged


def policy_answers(context: PipelineContext, name: str, items: Sequence[PolicyItem]) -> str:
    """Digest of a candidate's answers to the policy's requests, asked as it serves: with its prompt and its schema."""
    digest = candidate(context, name)
    asked = load_candidate(context.store, digest)
    engine, encoded = context.engine_of(asked), encode_lines(items)
    inputs = {
        "candidate": digest,
        "requests": digest_bytes(encoded),
        "engine": engine,
        "together": TOGETHER,
        **decoding_inputs(context, asked),
        # Answers of before are empty where the endpoint refused in a field of its own.
        **({} if asked.endpoint is None else {"refusals": True}),
    }

    def ask(work: Path) -> str:
        if asked.endpoint is not None:
            context.progress.say(f"{name}: sending {len(items)} policy requests to {asked.endpoint.url}")
        title = f"{name} answers {len(items)} policy requests"
        answers = ask_rows(answerer(context, asked), items, work, title, context.progress)
        body = answers.body(SUITE, engine=engine)
        return keep_answers(context.store, {"candidate": digest}, answers.lines, body, {ITEMS: encoded})

    return context.stages.run(f"policy {name}", "policy", inputs, ask)


def _judged(
    context: PipelineContext, name: str, given: str, check: str, settings: PolicyCheck, items: Sequence[PolicyItem]
) -> str:
    """Digest of a judge's replies about a candidate's answers to one check."""
    judge = settings.judge
    assert judge is not None
    inputs = {"answers": given, "check": check, "model": judge.model, "url": judge.url, "rubric": settings.rubric}

    def ask(work: Path) -> str:
        context.progress.say(f"{check}: sending policy requests and answers to {judge.url}")
        return judge_policy(context.store, check, settings, given, items, work, context.progress)

    return context.stages.run(f"{check} judges {name}", "judge", inputs, ask)


def style(context: PipelineContext) -> dict[str, str]:
    """The bare base model's answers to held-out rows, at most as many as the gates ask: the evaluation's parent.

    Bare: without a candidate's prompt, shots, retrieval or constraint, with the longest answers of the candidates that
    ask the base. A row's own system turn stays.
    """
    settings = context.project.settings
    gates = [gate for gate in settings.gates.values() if isinstance(gate, Style)]
    if not gates:
        return {}
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
        answers = ask_rows(answerer(context, bare), rows, work, title, context.progress)
        body = answers.body(shares.SUITE, engine=context.engine_kind, rows=most)
        return keep_answers(store, parents, answers.lines, body)

    return {"style": context.stages.run("style", "style", inputs, ask)}
