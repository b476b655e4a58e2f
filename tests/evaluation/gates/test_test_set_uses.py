"""Uses of the test set: each is in the audit log; neither a new dataset nor a deleted verdict resets the count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import evaluated, judged, verdict_of
from tests.fabricate import (
    Fabricated,
    add,
    answer_lines,
    commands,
    flawed,
    put_answers,
    put_dataset,
    put_training,
)
from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.core.messages import Message
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.gates.test_set_uses import (
    ACTION,
    _share,
    record_evaluation,
    use_test_set,
    used_candidates,
)
from tunesmith.registry.history import verify_log
from tunesmith.store import audit, database
from tunesmith.store.people.identities import acting
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
    verdict_of(made, evaluation, LIFT)
    assert len(uses_of(made)) == 1, "asking again about the same answers is no new use"


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
    old = load_dataset(made.store, made.dataset)
    more = put_dataset(made.store, [*old.examples("train"), *commands(3, 77, 9000)], [], made.test)
    assert more != made.dataset
    again = scored(made, more, {"tuned": "other"})
    assert judged(made, again, LIFT)["test_set_use"] == 2
    renamed = [row.model_copy(update={"id": row.id[::-1], "source": "b"}) for row in made.test[:60]]
    part = put_dataset(made.store, old.examples("train"), [], [*renamed, *commands(60, 78, 9500)])
    assert len(used_candidates(made.store, part)) == 2, "some of its test requests were used, under other ids"
    fresh = put_dataset(made.store, old.examples("train"), [], commands(60, 79, 9900))
    assert len(used_candidates(made.store, fresh)) == 0


def test_a_request_that_many_people_make_does_not_join_two_test_sets(made: Fabricated, evaluation: str) -> None:
    verdict_of(made, evaluation, LIFT)
    train = load_dataset(made.store, made.dataset).examples("train")
    for common, of, uses in ((1, 60, 0), (2, 60, 1), (1, 1, 1)):
        used = [row.model_copy(update={"id": row.id[::-1]}) for row in made.test[:common]]
        other = put_dataset(made.store, commands(3, 77, 9000), [], [*used, *commands(of - common, 78, 9500)])
        assert len(used_candidates(made.store, other)) == uses
    assert not _share(range(400), range(397, 900))
    assert _share(range(400), range(396, 900)), "large test sets are one where they share a hundredth"
    turned = []  # neither a system turn nor a letter's case makes a new test set
    for row in made.test:
        asked = row.messages[-2].model_copy(update={"content": row.messages[-2].content.capitalize() + "!"})
        system = Message(role="system", content="Another prompt.")
        turned.append(row.model_copy(update={"id": row.id[::-1], "messages": (system, asked, row.messages[-1])}))
    assert len(used_candidates(made.store, put_dataset(made.store, train, [], turned))) == 1


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


def test_deleting_a_verdict_does_not_reset_the_count(made: Fabricated, evaluation: str) -> None:
    digest = verdict_of(made, evaluation, LIFT)
    Path(made.store.record_where(digest)).unlink()
    made.store.engine.dispose()
    with database.writing(made.store.engine) as session:
        for row in session.query(RecordRow).filter_by(digest=digest):
            session.delete(row)
    add(made, Candidate(name="tuned", prompt="y", base=made.base, max_tokens=9,
                        training=put_training(made.store, made.base, made.dataset, rows=9)),
        flawed(0.93, 1.0, 3), 1, 1)  # fmt: skip
    again = evaluated(made)
    assert use_test_set(made.store, again, made.candidates["tuned"], acting(made.store)) == 2
