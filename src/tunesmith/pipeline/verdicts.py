"""The stages `evaluate` and `gate`: scores of all candidates on the test rows, and the verdict on one candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.digests import digest_bytes, digest_of
from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope
from tunesmith.evaluation.evaluate import evaluate as score_answers
from tunesmith.evaluation.gates.test_set_uses import record_evaluation
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.lines import encode_lines
from tunesmith.evaluation.metrics.declared import function_digests
from tunesmith.evaluation.policy.requests import policy_items
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.style.shares import REVISION as STYLE_REVISION
from tunesmith.pipeline.answers import answers, judged
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.probes import check_probes, general, policy, risks, style
from tunesmith.project import Project
from tunesmith.records.body import Part
from tunesmith.records.evaluation import EvaluationBody, VerdictBody


def evaluation(context: PipelineContext, names: Sequence[str] | None = None) -> str:
    """Digest of the evaluation of the named candidates. names: None for all of the project's candidates."""
    project, settings, task = context.project, context.project.settings, context.project.settings.task
    chosen = _in_order(context, names)
    check_probes(context)
    requests = policy_items(settings.policy, project.root)  # before anything slow
    parents = {"dataset": context.dataset.digest, **{f"answers:{name}": answers(context, name) for name in chosen}}
    parents |= general(context, chosen) | risks(context, chosen)
    parents |= {
        f"judged:{scorer.name}:{name}": judged(context, name, parents[f"answers:{name}"], scorer)
        for scorer in task.judges
        for name in chosen
    }
    parents |= policy(context, chosen, requests) | style(context)
    endpoints = {name: each.endpoint for name, each in settings.candidates.items() if each.endpoint}
    tokens = {name: each.price for name, each in endpoints.items() if each.price and name in chosen}
    inputs = {
        "parents": parents,
        "policy": {name: check.rules.model_dump(mode="json") for name, check in settings.policy.items()},
        "style": STYLE_REVISION if "style" in parents else None,
        "prices": settings.prices.model_dump(mode="json") if settings.prices else None,
        "tokens": {name: price.model_dump(mode="json") for name, price in tokens.items()},
        "functions": function_digests(task.scorers, project.root),
        "task": _task_inputs(task),
        "schema": project.schema,
    }

    def score(_work: Path) -> str:
        return score_answers(
            context.store,
            parents,
            task=task,
            answer_schema=project.schema,
            root=project.root,
            prices=settings.prices,
            tokens=tokens,
            policy=settings.policy,
        )

    digest = context.stages.run("evaluate", "evaluate", inputs, score)
    record_evaluation(context.store, digest, context.stages.acting)
    return _keep_latest(context, "evaluation", digest)


def verdict(context: PipelineContext, name: str | None = None) -> str:
    """Digest of the verdict on a candidate. name: None for the candidate that the project would release."""
    if name is not None:
        context.settings_of(name)  # before anything is answered or trained
    measured = evaluation(context)
    of = name or subject(context, measured)
    gates = context.project.settings.gates
    inputs = {
        "evaluation": measured,
        "candidate": of,
        "gates": {key: gate.model_dump(mode="json") for key, gate in gates.items()},
    }

    def decide(_work: Path) -> str:
        return judge(context.store, evaluation=measured, candidate=of, gates=gates, actor=context.stages.acting)

    return _keep_latest(context, "verdict", context.stages.run(f"gate {of}", "gate", inputs, decide))


def latest(project: Project, kind: Literal["evaluation", "verdict"], scope: Scope = Scope()) -> str | None:
    """Digest of the record that the project's last `evaluate` or `gate` for a scope gave, made then or before; None
    for none. For all tenants and regions that may also be the store's newest record, of a project by another name.
    """
    digest = project.store.recall_memo(_latest_key(project, kind, scope))
    if digest is None and scope.unlimited:
        digest = next(reversed(project.store.records_of(kind)), None)
    return digest


def changed_since(project: Project, verdict: str) -> list[str]:
    """What differs in the project from a verdict: "gate NAME", "policy check NAME" for its rules, "policy requests"."""
    record = project.store.record(verdict, kind="verdict")
    policy = EvaluationBody.read(project.store, record.parents["evaluation"]).policy
    judged: Mapping[str, Part] = {gate.name: gate.settings for gate in VerdictBody.of(record).gates}
    gates = {name: gate.rule for name, gate in project.settings.gates.items()}
    asked = policy.checks if policy else {}
    checks = {name: check.rules for name, check in project.settings.policy.items()}
    changed = [
        f"{kind} {name}"
        for kind, then, now in (("gate", judged, gates), ("policy check", asked, checks))
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if policy and asked and checks and policy.requests != _digest_of_requests(project):
        changed.append("policy requests")
    return changed


def _digest_of_requests(project: Project) -> str | None:
    """Digest of the requests of all policy checks as answers records keep them; None where they cannot be read."""
    try:
        return digest_bytes(encode_lines(policy_items(project.settings.policy, project.root)))
    except UsageError:
        return None


def _keep_latest(context: PipelineContext, kind: str, digest: str) -> str:
    """A stage whose inputs did not change makes no record, so the newest record need not be the last result."""
    key = _latest_key(context.project, kind, context.scope)
    if context.store.recall_memo(key) != digest:
        context.store.keep_memo(key, digest)
    return digest


def _latest_key(project: Project, kind: str, scope: Scope) -> str:
    return digest_of({"latest": kind, "project": project.settings.name, **scope.stated()})


def subject(context: PipelineContext, measured: str) -> str:
    """The candidate to release: `release:`, else the only tuned one, else the best by the primary metric.

    measured: digest of the evaluation. Raises UsageError where none can be released.
    """
    settings = context.project.settings
    if settings.release is not None:
        return settings.release
    tuned = settings.tuned
    if len(tuned) == 1:
        return tuned[0]
    body = EvaluationBody.read(context.store, measured)
    # An endpoint's weights are not in the store, so it can be measured but not released. A version is registered.
    own = [name for name, each in settings.candidates.items() if each.endpoint is None and each.version is None]
    if not own:
        what = "all candidates are endpoints or registered versions, which cannot be released"
        raise UsageError(what, where="candidates", fix="add a candidate that answers here")
    return max(own, key=lambda name: (body.mean(name), name))


def _in_order(context: PipelineContext, names: Sequence[str] | None) -> list[str]:
    """The candidates' names, untrained ones first. Raises UsageError for an unknown name."""
    known = context.project.settings.candidates
    for name in names or ():
        context.settings_of(name)
    # A prompt file that is missing should fail before a slow training, not after it.
    return sorted(names or known, key=lambda name: known[name].adapted)


def _task_inputs(task: TaskSettings) -> dict[str, Any]:
    """The task settings that an evaluation depends on. The judge stage depends on the judges' endpoints."""
    stated = task.model_dump(mode="json")
    for scorer in stated["scorers"]:
        if isinstance(scorer, dict):
            scorer.pop("judge", None)
    return stated
