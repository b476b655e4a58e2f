"""The stages that ask other things than the rows: general questions, risk probes, policy requests, and style."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tunesmith.candidates.asking import TOGETHER, ask_rows, keep_answers
from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.candidates.settings import CandidateSettings
from tunesmith.core.digests import digest_bytes
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.answers import BASE, of_base
from tunesmith.evaluation.gates.settings import Forgetting, Probe, Style
from tunesmith.evaluation.lines import ITEMS, encode_lines
from tunesmith.evaluation.policy.outcomes import SUITE, judge_policy
from tunesmith.evaluation.policy.requests import PolicyItem
from tunesmith.evaluation.policy.settings import PolicyCheck
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.probes.measuring import encode_items
from tunesmith.evaluation.probes.numbers import general_digest, general_questions
from tunesmith.evaluation.probes.suites import Suite, ask, digest_path, drawn, probe_context
from tunesmith.evaluation.scores import GENERAL
from tunesmith.evaluation.style import shares
from tunesmith.pipeline.candidates import answerer, candidate, load_adapter, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import decoding_inputs
from tunesmith.records.evaluation import AnswersBody


def general(context: PipelineContext, names: Sequence[str]) -> dict[str, str]:
    """The general suite's answers where a gate needs them, of tuned candidates and their bases, by parent's role."""
    settings = context.project.settings
    if not any(isinstance(gate, Forgetting) for gate in settings.gates.values()):
        return {}
    tuned = [name for name in names if settings.candidates[name].adapted]
    bare = {name: BASE if settings.base_of(name) == settings.base else of_base(name) for name in tuned}
    asked = [(each, name, each != name) for name in tuned for each in (bare[name], name)]
    return {f"probe:{title}": probe(context, title, name, bare=untuned) for title, name, untuned in asked}


def probe(context: PipelineContext, title: str, name: str, *, bare: bool) -> str:
    """Digest of the answers to the general suite under a candidate's weights. bare: under its base's weights. title: of
    the stage."""
    trained, own = None if bare else training(context, name), context.of(context.settings_of(name).base)
    inputs = {
        "base": own.digest,
        "training": trained,
        "suite": general_digest(),
        "engine": own.engine_kind,
    }

    def measure(_work: Path) -> str:
        adapter = load_adapter(context, trained)
        questions = general_questions()
        began = time.perf_counter()
        asked = [Question(question.messages, question.choices) for question in questions]
        scores = own.engine.choose(asked, adapter, context.progress)
        seconds = time.perf_counter() - began
        lines = [{"id": question.id, "scores": each} for question, each in zip(questions, scores, strict=True)]
        parents = {"base": own.digest} | ({"training": trained} if trained else {})
        body = AnswersBody(suite=GENERAL, n=len(lines), seconds=seconds, engine=own.engine_kind)
        return keep_answers(context.store, parents, lines, body)

    return context.stages.run(f"probe {title}", "probe", inputs, measure, for_all=bare)


def check_probes(context: PipelineContext) -> None:
    """Raise UsageError for a probe whose file cannot be read, before any slow training."""
    for gate in context.project.settings.gates.values():
        if isinstance(gate, Probe) and gate.path is not None:
            digest_path(context.project.root / gate.path)


def risks(context: PipelineContext, names: Sequence[str]) -> dict[str, str]:
    """Answers to the risk probes of all gates: the evaluation's parents by role."""
    settings = context.project.settings
    gates: dict[str, Probe] = {}
    for gate in settings.gates.values():
        if isinstance(gate, Probe):
            gates.setdefault(gate.suite, gate)
    parents: dict[str, str] = {}
    for key, gate in gates.items():
        suite = suite_of(key)
        for name in names:
            if _has_risk(context, settings.candidates[name], suite):
                if suite.before:
                    parents[f"before:{key}:{name}"] = risk(context, gate, name, before=True)
                parents[f"risk:{key}:{name}"] = risk(context, gate, name)
    return parents


def risk(context: PipelineContext, gate: Probe, name: str, *, before: bool = False) -> str:
    """Digest of a candidate's answers to a probe's items. before: answer with the base's weights instead."""
    store, suite, dataset = context.store, suite_of(gate.suite), context.dataset
    digest = candidate(context, name)
    asked = load_candidate(store, digest)
    path = None if gate.path is None else context.project.root / gate.path
    parents = {"base": asked.base}
    if suite.own:  # its items are rows, put as the candidate's prompt puts them
        parents |= {"dataset": dataset.digest, "candidate": digest}
    trained = None if before else asked.training
    engine = context.engine_of(asked)
    inputs = {
        "suite": gate.suite,
        "parents": parents,
        "training": trained,
        "candidate": digest if suite.own else None,
        "file": None if path is None else digest_path(path),
        "engine": engine,
        "revision": suite.revision,
        **(decoding_inputs(context, asked) if suite.own else {}),
    }

    def measure(_work: Path) -> str:
        ready = answerer(context, asked)
        privacy = context.project.settings.data.privacy
        probed = probe_context(store, dataset, asked, ready.composer, gate.rows, path, privacy)
        items = suite.items(probed)
        began = time.perf_counter()
        own = context.on(asked.base)
        scorer = own.engine if asked.asks_base else None
        lines = ask(ready.responder, scorer, own.renderer, trained, items, asked, context.progress)
        body = AnswersBody(
            suite=gate.suite,
            engine=engine,
            n=len(items),
            seconds=time.perf_counter() - began,
            revision=suite.revision,
            left_out=suite.count_left_out(probed),
        )
        made = parents | ({"training": trained} if trained else {})
        return keep_answers(store, made, lines, body, {ITEMS: encode_items(items)})

    when = "before" if before else "after"
    return context.stages.run(f"risk {gate.probe} {name} {when}", "risk", inputs, measure)


def _has_risk(context: PipelineContext, settings: CandidateSettings, suite: Suite) -> bool:
    """Whether a suite applies to a candidate. Endpoints cannot be released, so no probe is sent to them."""
    weights = context.project.settings.candidates[settings.weights] if settings.weights else settings
    if settings.endpoint is not None:
        return False
    return suite.untuned if weights.train is None else not weights.train.permute_answers


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
    bare, own = Candidate(name=BASE, base=context.of().digest, max_tokens=room), context.of()
    digest = put_candidate(store, bare)
    parents = {"candidate": digest, "dataset": dataset.digest}
    inputs = {**parents, "rows": most, "engine": own.engine_kind, "together": TOGETHER}

    def ask(work: Path) -> str:
        rows = drawn(dataset.examples("test"), most)
        title = f"the bare base model answers {len(rows)} rows"
        answers = ask_rows(answerer(context, bare), rows, work, title, context.progress)
        body = answers.body(shares.SUITE, engine=own.engine_kind, rows=most)
        return keep_answers(store, parents, answers.lines, body)

    return {"style": context.stages.run("style", "style", inputs, ask)}
