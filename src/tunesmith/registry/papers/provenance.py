"""Provenance: in-toto statements about how a version was trained (SLSA) and how it was tested."""

from __future__ import annotations

from pydantic_core import to_jsonable_python

from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.registry.papers.card import label_of
from tunesmith.registry.papers.facts import Draft
from tunesmith.registry.signing.attestations import digest_set, stated

_PROVENANCE = "https://slsa.dev/provenance/v1"
_TEST = "https://in-toto.io/attestation/test-result/v0.1"
_BUILD = "urn:tunesmith:training:v1"
_RESULTS = {
    "pass": ("passedTests", "PASSED"), "inconclusive": ("warnedTests", "WARNED"), "fail": ("failedTests", "FAILED"),
}  # fmt: skip
_MEASURED = "urn:tunesmith:measured"  # our field of a test result, which its specification allows


def statements(draft: Draft) -> list[JsonObject]:
    """The statements: how the weights were trained, what the evaluation measured, what the gates said."""
    label = label_of(draft)
    files = draft.take("subject", "version.blobs")
    subjects = {label: draft.digest("version"), **{f"{label}/{name}": digest for name, digest in files.items()}}
    made = [stated(subjects, _TEST, _evaluation(draft)), stated(subjects, _TEST, _verdict(draft))]
    if draft.has("training"):
        weights = {f"{label}/{name}": digest for name, digest in draft.take("weights", "training.blobs").items()}
        made.insert(0, stated(weights, _PROVENANCE, _slsa(draft)))
    return made


def _slsa(draft: Draft) -> JsonObject:
    used = [_named(f"base/{name}", file.digest) for name, file in draft.take("base", "base.files").items()]
    used += [_named(f"dataset/{name}", digest) for name, digest in draft.take("rows", "dataset.blobs").items()]
    used += [_record(draft, kind) for kind in ("base", "dataset", "documents") if draft.has(kind)]
    settings, environment = draft.take("settings", "training.settings"), draft.take("machine", "training.environment")
    inside = {"engine": draft.take("engine", "training.engine"), "environment": to_jsonable_python(environment)}
    run = {"invocationId": draft.digest("training")}
    return {
        "buildDefinition": {
            "buildType": _BUILD, "externalParameters": to_jsonable_python(settings), "internalParameters": inside,
            "resolvedDependencies": used,
        },
        "runDetails": {"builder": {"id": "urn:tunesmith"}, "metadata": run, "byproducts": [_record(draft, "training")]},
    }  # fmt: skip


def _evaluation(draft: Draft) -> JsonObject:
    """A test whose result says that it was carried out; the scores and their intervals are beside it."""
    metrics = draft.take("measured", "evaluation.candidates.*.metrics")
    scores = draft.take("scores", "evaluation.blobs")
    return {
        "result": "PASSED",
        "configuration": [_record(draft, "evaluation"), *(_named(name, digest) for name, digest in scores.items())],
        "passedTests": [f"measured {metric}" for metric in metrics],
        _MEASURED: to_jsonable_python(metrics),
    }


def _verdict(draft: Draft) -> JsonObject:
    gates = draft.take("gates", "verdict.gates")
    return {
        "result": _RESULTS[draft.take("result", "verdict.verdict")][1],
        "configuration": [_record(draft, kind) for kind in ("verdict", "evaluation")],
        **{name: [gate.name for gate in gates if gate.outcome == how] for how, (name, _) in _RESULTS.items()},
    }


def _record(draft: Draft, kind: str) -> JsonObject:
    return _named(f"{kind} record", draft.digest(kind))


def _named(name: str, digest: str) -> JsonObject:
    return {"name": name, "digest": digest_set(digest)}
