"""The stages `probe` and `risk`: answers to the general questions and to the items of risk probes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tunesmith.candidates.asking import keep_answers
from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.settings import CandidateSettings
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.gates.settings import Forgetting, Probe
from tunesmith.evaluation.lines import ITEMS
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.probes.measuring import encode_items
from tunesmith.evaluation.probes.numbers import general_digest, general_questions
from tunesmith.evaluation.probes.suites import Suite, ask, digest_path, probe_context
from tunesmith.evaluation.scores import GENERAL
from tunesmith.pipeline.candidates import answerer, candidate, load_adapter, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import decoding_inputs
from tunesmith.records.evaluation import AnswersBody


def general(context: PipelineContext, names: Sequence[str]) -> dict[str, str]:
    """The general suite's answers where a gate needs them, of the base and tuned candidates, by the parent's role."""
    settings = context.project.settings
    if not any(isinstance(gate, Forgetting) for gate in settings.gates.values()):
        return {}
    tuned = [name for name in names if settings.candidates[name].adapted]
    return {f"probe:{name or BASE}": probe(context, name) for name in (None, *tuned)} if tuned else {}


def probe(context: PipelineContext, name: str | None) -> str:
    """Digest of the answers to the general suite under a candidate's weights. name: None for the base's weights."""
    trained = None if name is None else training(context, name)
    inputs = {
        "base": context.base.digest,
        "training": trained,
        "suite": general_digest(),
        "engine": context.engine_kind,
    }

    def measure(_work: Path) -> str:
        adapter = load_adapter(context, trained)
        questions = general_questions()
        began = time.perf_counter()
        asked = [Question(question.messages, question.choices) for question in questions]
        scores = context.engine.choose(asked, adapter, context.progress)
        seconds = time.perf_counter() - began
        lines = [{"id": question.id, "scores": each} for question, each in zip(questions, scores, strict=True)]
        parents = {"base": context.base.digest} | ({"training": trained} if trained else {})
        body = AnswersBody(suite=GENERAL, n=len(lines), seconds=seconds, engine=context.engine_kind)
        return keep_answers(context.store, parents, lines, body)

    return context.stages.run(f"probe {name or BASE}", "probe", inputs, measure, for_all=name is None)


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
    parents = {"base": context.base.digest}
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
        scorer = context.engine if asked.asks_base else None
        lines = ask(ready.responder, scorer, context.renderer, trained, items, asked, context.progress)
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
