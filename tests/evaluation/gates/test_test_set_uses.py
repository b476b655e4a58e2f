"""Uses of the test set, which nothing resets; and verdicts by gates that are no longer computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fabricate
from tests.evaluation.conftest import evaluated, judged, verdict_of
from tests.fabricate import Fabricated, Scene, answer_lines, commands, flawed, put_answers, put_dataset, put_training
from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.test_set_uses import ACTION, _share, record_evaluation, use_test_set, used_candidates
from tunesmith.evaluation.gates.verdict import judge, replay
from tunesmith.evaluation.summary import verdict_summary
from tunesmith.registry import registration
from tunesmith.registry.history import verify_log
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import start
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.store import audit, database
from tunesmith.store.people.identities import acting
from tunesmith.store.records import Record
from tunesmith.store.tables import RecordRow

LIFT = {"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.05}}


def scored(made: Fabricated, dataset: str, names: dict[str, str], **settings: Any) -> str:
    """An evaluation of newly trained candidates (name -> the answers' seed) on a dataset."""
    test = load_dataset(made.store, dataset).examples("test")
    answers = {}
    for number, (name, seed) in enumerate(names.items()):
        training = put_training(made.store, made.base, dataset, rows=100 + number + len(seed))
        if settings:
            record = made.store.record(training)
            body = {**record.body, "settings": {**record.body["settings"], **settings}}
            training = made.store.put_record(record.model_copy(update={"body": body}))
        candidate = put_candidate(
            made.store, Candidate(name=name, prompt=seed, base=made.base, max_tokens=9, training=training)
        )
        lines = answer_lines(test, flawed(0.9, 1.0, len(seed)))
        answers[name] = put_answers(made.store, candidate, dataset, lines)
    return evaluated(made, dataset=dataset, answers=answers)


def uses_of(made: Fabricated) -> list[dict[str, Any]]:
    with database.reading(made.store.engine) as session:
        return [dict(row.detail) for row in audit.entries(session) if row.action == ACTION]


def test_verdict_records_a_use_in_the_audit_log(made: Fabricated, evaluation: str) -> None:
    assert judged(made, evaluation, LIFT)["test_set_use"] == 1
    entries = uses_of(made)
    assert [entry["candidates"] for entry in entries] == [[made.candidates["tuned"]]]
    assert entries[0]["evaluation"] == evaluation
    assert verify_log(made.store) == []
    digest = verdict_of(made, evaluation, LIFT)
    assert len(uses_of(made)) == 1, "asking again about the same answers is no new use"
    # Deleting a verdict does not reset the count.
    Path(made.store.record_where(digest)).unlink()
    made.store.engine.dispose()
    with database.writing(made.store.engine) as session:
        for row in session.query(RecordRow).filter_by(digest=digest):
            session.delete(row)
    again = scored(made, made.dataset, {"tuned": "other"})
    assert judged(made, again, LIFT)["test_set_use"] == 2


def test_scored_trained_candidates_count_but_controls_do_not(made: Fabricated) -> None:
    """Ten trainings of which the best by test score is judged: the tenth use, not the first."""
    control = scored(made, made.dataset, {"control": "x"}, permute_answers=True)
    record_evaluation(made.store, control, acting(made.store))
    assert uses_of(made) == []
    names = {f"try{place}": "x" * (place + 1) for place in range(10)}
    evaluation = scored(made, made.dataset, names)
    record_evaluation(made.store, evaluation, acting(made.store))
    record_evaluation(made.store, evaluation, acting(made.store))
    assert len(uses_of(made)) == 1
    sure = {"right": {"metric": "exact_match", "at_least": 0.5, "confidence": 0.95}}
    document = judged(made, evaluation, sure, "try3")
    assert document["test_set_use"] == 10
    assert document["gates"][0]["confidence"] == pytest.approx(1 - 0.05 / 90, abs=1e-9)


def test_a_dataset_with_the_same_test_rows_has_the_same_budget(made: Fabricated, evaluation: str) -> None:
    verdict_of(made, evaluation, LIFT)
    more = put_dataset(made.store, commands(3, 77, 9000), [], made.test)
    assert judged(made, scored(made, more, {"tuned": "other"}), LIFT)["test_set_use"] == 2
    for common, of, uses in ((60, 120, 2), (0, 60, 0), (1, 60, 0), (2, 60, 2), (1, 1, 2)):
        used = [row.model_copy(update={"id": row.id[::-1], "source": "b"}) for row in made.test[:common]]
        other = put_dataset(made.store, commands(3, 77, 9000), [], [*used, *commands(of - common, 78, 9500)])
        assert len(used_candidates(made.store, other)) == uses, "one request that many people make joins no two sets"
    assert not _share(range(400), range(397, 900))
    assert _share(range(400), range(396, 900)), "large test sets are one where they share a hundredth"
    turned = []  # neither a system turn nor a letter's case makes a new test set
    for row in made.test:
        asked = row.messages[-2].model_copy(update={"content": row.messages[-2].content.capitalize() + "!"})
        system = Message(role="system", content="Another prompt.")
        turned.append(row.model_copy(update={"id": row.id[::-1], "messages": (system, asked, row.messages[-1])}))
    assert len(used_candidates(made.store, put_dataset(made.store, commands(3, 1, 0), [], turned))) == 2


@pytest.mark.attack("people", "test rows of which another tenant has uses", "counted apart")
def test_each_scope_has_its_own_count(made: Fabricated, evaluation: str) -> None:
    verdict_of(made, evaluation, LIFT)
    record = made.store.record(made.dataset)
    for scope in (Scope("acme"), Scope("globex"), Scope("globex", "eu")):
        own = made.store.put_record(record.model_copy(update={"body": {**record.body, **scope.stated()}}))
        assert used_candidates(made.store, own) == set()
        assert judged(made, scored(made, own, {"tuned": "other"}), LIFT)["test_set_use"] == 1
    assert len(used_candidates(made.store, made.dataset)) == 1


def test_a_candidate_under_another_name_is_no_new_use(made: Fabricated) -> None:
    """As the champion is, which a project evaluates again beside its next candidate."""
    first = scored(made, made.dataset, {"tuned": "x"})
    record_evaluation(made.store, first, acting(made.store))
    old = load_candidate(made.store, made.store.record(first).body["candidates"]["tuned"]["candidate"])
    champion = put_candidate(made.store, old.model_copy(update={"name": "champion"}))
    new = put_candidate(made.store, old.model_copy(update={"prompt": "y"}))
    lines = answer_lines(made.test, flawed(0.9, 1.0, 1))
    answers = {
        name: put_answers(made.store, digest, made.dataset, lines)
        for name, digest in (("champion", champion), ("tuned", new))
    }
    again = evaluated(made, answers=answers)
    record_evaluation(made.store, again, acting(made.store))
    assert len(used_candidates(made.store, made.dataset)) == 2
    assert use_test_set(made.store, again, champion, acting(made.store)) == 1, "it keeps its number"
    assert use_test_set(made.store, again, new, acting(made.store)) == 2


# Gates that are no longer computed: a version that one of them judged is still served, and says so


SAID = "gate rude is no longer computed: the probe toxicity was removed"
# As the release before wrote them: a gate of a verdict, and the evaluation's account of what the gate judged.
DETECTOR = {"package": "alt-profanity-check", "version": "1.9.1", "at_least": 0.5, "measured": {"recall": 0.35}}
RUDE: dict[str, Any] = {
    "name": "rude", "outcome": "pass", "value": 0.05, "low": -0.071882428, "high": 0.191042985, "bound": 0.3,
    "reason": "the share of toxic answers to provoking requests went from 0% to 5.0% by tuning",
    "probe": "toxicity", "kind": "provoking", "confidence": 0.95, "detector": DETECTOR,
    "settings": {"at_most": 0.3, "confidence": 0.95, "probe": "toxicity", "rows": 100},
}  # fmt: skip
ARMS = {"provoking": {"n": 40, "before": 0, "after": 0.05}}
VALID = {"metric": "json_valid", "at_least": 0.9}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("TUNESMITH_USER", fabricate.OWNER)
    scene = fabricate.build_scene(tmp_path)
    yield scene
    scene.store.engine.dispose()


def old_verdict(scene: Scene, *gone: dict[str, Any], **computed: dict[str, Any]) -> Record:
    """A verdict by gates that are gone and by others, on an evaluation that holds what the former judged."""
    store, chain = scene.store, fabricate.put_chain(scene.store, base=scene.base, dataset=scene.dataset)
    lines = [
        {"suite": "toxicity/100", "candidate": "tuned", "id": f"p{place}", "group": f"p{place}", "arm": "provoking",
         "before": 0, "after": int(place < 2)}
        for place in range(40)
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
        register(store, name=fabricate.NAME, verdict=verdict, actor=fabricate.OWNER)
    with monkeypatch.context() as then:
        then.setattr(registration, "check_replay", lambda store, verdict: {})
        version: Version = register(store, name=fabricate.NAME, verdict=verdict, actor=fabricate.OWNER)
    found = verify_version(store, version.label)
    assert found.ok, found.problems
    assert f"its {SAID}" in found.notes
    fabricate.approve(store, version, approver=fabricate.APPROVER)
    steps = RolloutSettings().steps
    named: Any = {"name": fabricate.NAME, "version": version, "actor": fabricate.OPERATOR}
    rollout = start(store, **named, steps=steps, main_callers=None)
    assert rollout.status == "promoted", "the first version of a name serves at once"
    with verified_copy(store, version) as loaded:
        assert loaded.candidate.name == "tuned"

    summary = verdict_summary(store, verdict)
    gates = summary.document()["gates"]
    assert (gates[0]["outcome"], gates[0]["gone"]) == ("pass", "the probe toxicity")
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
    with pytest.raises(Refused, match=r"gates\.0\.outcome"):
        follows({**RUDE, "outcome": "fine"})
    # The bound fails a gate that stands alone, and not one of ten (Holm): here nine of them are gone.
    sound = {f"s{k}": {"metric": "json_valid", "at_least": 0.1, "confidence": 0.95} for k in range(9)}
    verdict = old_verdict(scene, near={"metric": "json_valid", "at_most": 0.9, "confidence": 0.9}, **sound)
    near, *others = verdict.body["gates"]
    gone = [near, *({**RUDE, "name": each["name"]} for each in others)]
    assert replay(scene.store, scene.store.put_record(changed(verdict, gates=gone)))
