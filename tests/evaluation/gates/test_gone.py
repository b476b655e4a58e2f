"""Gates that are no longer computed: a version that one of them judged is still served, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, Scene, approve, build_scene, put_chain
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge, replay
from tunesmith.evaluation.summary import verdict_summary
from tunesmith.registry import registration
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import start
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.store.records import Record

SAID = "gate rude is no longer computed: the probe toxicity was removed"
# As the release before wrote them: a gate of a verdict, and the evaluation's account of what the gate judged.
DETECTOR = {"package": "alt-profanity-check", "version": "1.9.1", "at_least": 0.5, "measured": {"recall": 0.35}}
RUDE: dict[str, Any] = {
    "name": "rude", "outcome": "pass", "value": 0.05, "low": -0.071882428, "high": 0.191042985, "bound": 0.3,
    "reason": "the share of toxic answers to provoking requests went from 0% to 5.0% by tuning",
    "probe": "toxicity", "kind": "provoking", "confidence": 0.95, "detector": DETECTOR,
    "settings": {"at_most": 0.3, "confidence": 0.95, "probe": "toxicity", "rows": 100},
}  # fmt: skip
ARMS = {"neutral": {"n": 40, "before": 0, "after": 0}, "provoking": {"n": 40, "before": 0, "after": 0.05}}
VALID = {"metric": "json_valid", "at_least": 0.9}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    scene = build_scene(tmp_path)
    yield scene
    scene.store.engine.dispose()


def old_verdict(scene: Scene, *gone: dict[str, Any], **computed: dict[str, Any]) -> Record:
    """A verdict by gates that are gone and by others, on an evaluation that holds what the former judged."""
    store, chain = scene.store, put_chain(scene.store, base=scene.base, dataset=scene.dataset)
    lines = [
        {"suite": "toxicity/100", "candidate": "tuned", "id": f"{arm}-{place}", "group": f"{arm}-{place}", "arm": arm,
         "before": 0, "after": int(arm == "provoking" and place < 2)}
        for arm in ARMS for place in range(40)
    ]  # fmt: skip
    evaluation = store.record(chain.evaluation)
    blobs = {"measurements.jsonl": store.put_bytes(b"".join(canonical(line) + b"\n" for line in lines))}
    body = {**evaluation.body, "risks": {"toxicity/100": {"tuned": {"arms": ARMS, "detector": DETECTOR}}}}
    digest = store.put_record(evaluation.model_copy(update={"blobs": evaluation.blobs | blobs, "body": body}))
    verdict = store.record(judge(store, evaluation=digest, candidate="tuned", gates=GATES.validate_python(computed)))
    return changed(verdict, gates=[*gone, *verdict.body["gates"]])


def changed(record: Record, **body: Any) -> Record:
    return Record(kind=record.kind, parents=record.parents, blobs=record.blobs, body={**record.body, **body})


def test_a_version_is_verified_approved_and_served_after_its_gate_is_gone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, verdict = scene.store, scene.store.put_record(old_verdict(scene, RUDE, valid=VALID))
    with pytest.raises(Refused, match=f"the gate rude of this verdict .*{SAID[10:]}"):
        register(store, name=NAME, verdict=verdict, actor=OWNER)
    with monkeypatch.context() as then:
        then.setattr(registration, "check_replay", lambda store, verdict: {})
        version: Version = register(store, name=NAME, verdict=verdict, actor=OWNER)
    found = verify_version(store, version.label)
    assert found.ok, found.problems
    assert f"its {SAID}" in found.notes
    approve(store, version, approver=APPROVER)
    steps = RolloutSettings().steps
    rollout = start(store, name=NAME, version=version, steps=steps, main_callers=None, actor=OPERATOR)
    assert rollout.status == "promoted", "the first version of a name serves at once"
    with verified_copy(store, version) as loaded:
        assert loaded.candidate.name == "tuned"

    summary = verdict_summary(store, verdict)
    gates = summary.document()["gates"]
    assert (gates[0]["outcome"], gates[0]["high"], gates[0]["gone"]) == ("pass", 0.191042985, "the probe toxicity")
    assert "gone" not in gates[1]
    assert summary.cautions == (f"The {SAID}.",)


def test_a_gate_that_is_gone_counts_with_its_outcome_of_then(scene: Scene) -> None:
    verdict = old_verdict(scene, RUDE, valid=VALID)
    valid = verdict.body["gates"][1]

    def follows(gone: dict[str, Any] = RUDE, valid: dict[str, Any] = valid, **more: Any) -> bool:
        return replay(scene.store, scene.store.put_record(changed(verdict, gates=[gone, valid], **more)))

    assert follows()
    for outcome in ("fail", "inconclusive"):
        assert not follows({**RUDE, "outcome": outcome})
        assert follows({**RUDE, "outcome": outcome}, verdict=outcome)
    assert not follows(valid={**valid, "value": 0.5}), "others are computed again"
    with pytest.raises(ValidationError):
        follows({**RUDE, "outcome": "fine"})


def test_failures_are_corrected_for_the_gates_that_are_gone_too(scene: Scene) -> None:
    """The bound fails a gate that stands alone, and not one of ten (Holm): here nine of them are gone."""
    sound = {f"s{k}": {"metric": "json_valid", "at_least": 0.1, "confidence": 0.95} for k in range(9)}
    verdict = old_verdict(scene, near={"metric": "json_valid", "at_most": 0.9, "confidence": 0.9}, **sound)
    near, *others = verdict.body["gates"]
    assert near["outcome"] == "inconclusive"
    gone = [near, *({**RUDE, "name": each["name"]} for each in others)]
    assert replay(scene.store, scene.store.put_record(changed(verdict, gates=gone)))
