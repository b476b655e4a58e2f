"""Gates and verdicts: what passes, what must never pass, and that a verdict replays to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import TASK
from tests.fabricate import PROMPT, SCHEMA, Fabricated, add, fabricate, flawed, put_probe, put_training
from tunesmith.candidates.candidate import Candidate, RemoteModel
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES, Gates
from tunesmith.evaluation.gates.verdict import judge, replay
from tunesmith.evaluation.summary import verdict_summary
from tunesmith.store.store import Store

STANDARD = {
    "lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.05, "confidence": 0.95},
    "valid": {"metric": "json_valid", "at_least": 0.9},
    "forgetting": {"suite": "general", "drop_at_most": 0.03},
}


def gates(**chosen: Any) -> Gates:
    return GATES.validate_python(chosen)


def judged(made: Fabricated, evaluation: str, chosen: Gates, name: str = "tuned") -> dict[str, Any]:
    return verdict_summary(
        made.store, judge(made.store, evaluation=evaluation, candidate=name, gates=chosen)
    ).document()


def outcome(made: Fabricated, evaluation: str, name: str = "tuned", **gate: Any) -> tuple[str, dict[str, Any]]:
    document = judged(made, evaluation, gates(g=gate), name)
    assert document["verdict"] == document["gates"][0]["outcome"]
    return document["verdict"], document["gates"][0]


def again(made: Fabricated, **changed: Any) -> str:
    arguments: dict[str, Any] = {"answers": made.answers, "probes": made.probes, "task": TASK, "answer_schema": SCHEMA}
    return evaluate(made.store, dataset=made.dataset, **{**arguments, **changed})


def test_a_good_candidate_passes_with_its_numbers(made: Fabricated, evaluation: str) -> None:
    document = judged(made, evaluation, GATES.validate_python(STANDARD))
    assert document["verdict"] == "pass"
    assert [gate["name"] for gate in document["gates"]] == ["lift", "valid", "forgetting"]
    for gate in document["gates"]:
        assert set(gate) >= {"name", "outcome", "value", "low", "high", "bound", "reason"}
        assert gate["low"] <= gate["value"] <= gate["high"]
    lift = document["gates"][0]
    assert lift["over"] == "rag"
    assert lift["low"] >= 0.05 == lift["bound"]
    assert "differs from rag by +" in lift["reason"]


def test_the_untuned_candidate_does_not_lift_over_the_tuned(made: Fabricated, evaluation: str) -> None:
    verdict, gate = outcome(made, evaluation, "rag", metric="exact_match", over="tuned", at_least=0.05)
    assert verdict == "fail"
    assert gate["high"] < 0.05


def test_best_untuned_leaves_the_judged_one_out(made: Fabricated, evaluation: str) -> None:
    _, gate = outcome(made, evaluation, "rag", metric="exact_match", over="best-untuned", at_least=0.05)
    assert gate["over"] == "few-shot"


@pytest.mark.parametrize(
    ("at_least", "expected"), [(-0.1, "pass"), (0.0, "inconclusive"), (0.02, "inconclusive"), (0.1, "fail")]
)
def test_all_ties(made: Fabricated, at_least: float, expected: str) -> None:
    add(made, Candidate(name="same", prompt="x", base=made.base, max_tokens=9), flawed(0.34, 0.93, 13), 1, 1)
    evaluation = again(made)
    assert outcome(made, evaluation, "same", metric="exact_match", over="rag", at_least=at_least)[0] == expected


@pytest.mark.parametrize("n", [1, 2, 5, 19])
@pytest.mark.parametrize("at_least", [-1.0, 0.0, 0.05])
def test_wins_on_a_handful_of_rows_never_pass(tmp_path: Path, n: int, at_least: float) -> None:
    made = fabricate(tmp_path, n=n, per_group=1)
    add(made, Candidate(name="rag", prompt=PROMPT, base=made.base, max_tokens=9), lambda row: "no", 1, 1)
    add(made, Candidate(name="tuned", prompt=PROMPT, base=made.base, max_tokens=9, training=made.training),
        lambda row: row.answer, 1, 1)  # fmt: skip
    evaluation = again(made)
    verdict, gate = outcome(made, evaluation, metric="exact_match", over="rag", at_least=at_least)
    assert verdict == "inconclusive"
    assert "at least 20 are needed" in gate["reason"]
    assert outcome(made, evaluation, metric="exact_match", at_least=0.5)[0] == "inconclusive"


def test_many_rows_of_few_groups_never_pass(tmp_path: Path) -> None:
    made = fabricate(tmp_path, n=120, per_group=12)
    verdict, gate = outcome(made, again(made), metric="exact_match", over="best-untuned", at_least=0.0)
    assert verdict == "inconclusive"
    assert "weigh as much as 10.0" in gate["reason"]


def test_no_gates_pass_nothing(made: Fabricated, evaluation: str) -> None:
    document = judged(made, evaluation, {})
    assert document["verdict"] == "inconclusive"
    assert document["gates"] == []
    assert "no gates" in document["reason"]


def test_thresholds(made: Fabricated, evaluation: str) -> None:
    mean = made.store.record(evaluation).body["candidates"]["tuned"]["metrics"]["exact_match"]["mean"]
    assert outcome(made, evaluation, metric="exact_match", at_least=mean)[0] == "pass"
    assert outcome(made, evaluation, metric="exact_match", at_least=mean + 0.001)[0] == "fail"
    assert outcome(made, evaluation, metric="exact_match", at_most=mean)[0] == "pass"
    assert outcome(made, evaluation, metric="exact_match", at_most=mean - 0.001)[0] == "fail"
    assert outcome(made, evaluation, metric="exact_match", at_least=mean, confidence=0.95)[0] == "inconclusive"
    assert outcome(made, evaluation, metric="exact_match", at_least=0.5, confidence=0.95)[0] == "pass"
    assert outcome(made, evaluation, metric="exact_match", at_most=0.5, confidence=0.95)[0] == "fail"
    verdict, gate = outcome(made, evaluation, metric="json_valid", at_least=0.999, confidence=0.95)
    assert verdict == "inconclusive", "all right on 60 groups is not 99.9% for sure"
    assert "times as many test rows" in gate["reason"]


def test_any_failure_fails_and_any_doubt_withholds(made: Fabricated, evaluation: str) -> None:
    fine = {"metric": "exact_match", "at_least": 0.1}
    doubtful = {"metric": "json_valid", "at_least": 0.999, "confidence": 0.95}
    wrong = {"metric": "exact_match", "at_most": 0.1}
    assert judged(made, evaluation, gates(a=fine, b=doubtful))["verdict"] == "inconclusive"
    assert judged(made, evaluation, gates(a=fine, b=doubtful, c=wrong))["verdict"] == "fail"
    assert judged(made, evaluation, gates(a=fine))["verdict"] == "pass"


def test_forgetting(made: Fabricated, evaluation: str) -> None:
    assert outcome(made, evaluation, suite="general", drop_at_most=0.03)[0] == "pass"
    harsh = again(made, probes={**made.probes, "tuned": put_probe(made.store, made.base, made.training, 2.5)})
    assert outcome(made, harsh, suite="general", drop_at_most=0.03)[0] == "fail"
    drop = made.store.record(harsh).body["probes"]["general"]["drops"]["tuned"]["mean"]
    assert outcome(made, harsh, suite="general", drop_at_most=drop)[0] == "inconclusive"
    unprobed = again(made, probes={})
    verdict, gate = outcome(made, unprobed, suite="general", drop_at_most=0.03)
    assert verdict == "inconclusive"
    assert gate["value"] is None
    assert outcome(made, unprobed, "rag", suite="general", drop_at_most=0.0)[0] == "pass", "the base's own weights"


def test_risks_of_tuning_are_unknown_of_an_endpoint_and_absent_from_a_baseline(made: Fabricated) -> None:
    common: dict[str, Any] = {"base": made.base, "max_tokens": 9}
    remote = RemoteModel(url="https://gpt.example/v1", model="big")
    add(made, Candidate(name="gpt", prompt=PROMPT, endpoint=remote, **common), flawed(0.97, 1.0, 15), 1, 1)
    floor = Candidate(name="nearest", method="nearest", dataset=made.dataset, **common)
    add(made, floor, flawed(0.2, 1.0, 16), 0, 1)
    evaluation = again(made)
    for gate in ({"suite": "general", "drop_at_most": 0.03}, {"probe": "canaries", "at_most": 3.5, "repeats": 16}):
        verdict, found = outcome(made, evaluation, "gpt", **gate)
        assert (verdict, found["value"]) == ("inconclusive", None)
        assert "of whose weights nothing is known" in found["reason"]
        verdict, found = outcome(made, evaluation, "nearest", **gate)
        assert verdict == "pass"
        assert "without a language model" in found["reason"]


def test_what_must_not_drop(made: Fabricated, evaluation: str) -> None:
    verdict, gate = outcome(made, evaluation, metric="exact_match", not_below="rag", drop_at_most=0.02)
    assert verdict == "pass"
    assert gate["not_below"] == "rag"
    assert gate["high"] <= 0.02 == gate["bound"]
    verdict, gate = outcome(made, evaluation, "rag", metric="exact_match", not_below="tuned", drop_at_most=0.1)
    assert verdict == "fail"
    assert gate["low"] > 0.1
    best = {"metric": "exact_match", "not_below": "best-untuned", "drop_at_most": 0.0}
    assert outcome(made, evaluation, "rag", **best)[0] == "pass"
    add(made, Candidate(name="same", prompt="x", base=made.base, max_tokens=9), flawed(0.34, 0.93, 13), 1, 1)
    again_with = again(made)
    kept = {"metric": "exact_match", "not_below": "rag"}
    assert outcome(made, again_with, "same", **kept, drop_at_most=0.0)[0] == "inconclusive", "all ties are no proof"
    assert outcome(made, again_with, "same", **kept, drop_at_most=0.1)[0] == "pass"
    assert "with itself" in outcome(made, evaluation, "rag", **kept, drop_at_most=0.1)[1]["reason"]
    with pytest.raises(UsageError, match="not a candidate"):
        outcome(made, evaluation, metric="exact_match", not_below="rags", drop_at_most=0.1)


def test_a_failure_holds_for_the_number_of_gates(made: Fabricated, evaluation: str) -> None:
    """A bound just above the interval fails a gate that stands alone, not one of ten (Holm); a clear failure does."""
    high = outcome(made, evaluation, "rag", metric="exact_match", at_least=0.9, confidence=0.95)[1]["high"]
    near = {"metric": "exact_match", "at_least": high + 0.005, "confidence": 0.95}
    clear = {"metric": "exact_match", "at_least": 0.95, "confidence": 0.95}
    sound = {f"s{k}": {"metric": "exact_match", "at_least": 0.01, "confidence": 0.95} for k in range(9)}
    assert outcome(made, evaluation, "rag", **near)[0] == "fail"
    among = judged(made, evaluation, GATES.validate_python({"near": near, **sound}), "rag")
    assert among["verdict"] == "inconclusive", "never a pass"
    assert "with 10 gates" in among["gates"][0]["reason"]
    assert among["gates"][0]["high"] == pytest.approx(high), "the interval that is shown stays its own"
    assert judged(made, evaluation, GATES.validate_python({"clear": clear, **sound}), "rag")["verdict"] == "fail"
    both = judged(made, evaluation, GATES.validate_python({"near": near, "clear": clear}), "rag")
    outcomes = [gate["outcome"] for gate in both["gates"]]
    assert outcomes == ["fail", "fail"], "stepping down: the clear failure leaves the near one its whole level"
    certain = {"metric": "exact_match", "at_least": high + 0.005}
    assert judged(made, evaluation, GATES.validate_python({"c": certain, **sound}), "rag")["verdict"] == "fail", (
        "a bound on the measured rows themselves has no luck to correct"
    )


def test_without_an_untuned_candidate_there_is_no_lift(made: Fabricated) -> None:
    alone = again(made, answers={"tuned": made.answers["tuned"]})
    verdict, gate = outcome(made, alone, metric="exact_match", over="best-untuned", at_least=0.05)
    assert verdict == "inconclusive"
    assert "no untuned candidate" in gate["reason"]


def test_names_that_are_not_there(made: Fabricated, evaluation: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'tuned'"):
        judge(made.store, evaluation=evaluation, candidate="tunde", gates={})
    valid_only = again(made, task=TASK.model_copy(update={"scorers": ("json_valid",)}))
    with pytest.raises(UsageError, match="not measured"):
        outcome(made, valid_only, metric="exact_match", at_least=0.5)
    with pytest.raises(UsageError, match="not a candidate"):
        outcome(made, evaluation, metric="exact_match", over="few-shots", at_least=0.5)


def test_a_verdict_replays_without_the_database(made: Fabricated, evaluation: str, tmp_path: Path) -> None:
    digest = judge(made.store, evaluation=evaluation, candidate="tuned", gates=GATES.validate_python(STANDARD))
    assert judge(made.store, evaluation=evaluation, candidate="tuned", gates=GATES.validate_python(STANDARD)) == digest
    for folder in ("records", "blobs"):
        shutil.copytree(made.store.root / folder, tmp_path / "copy" / folder)
    copy = Store(tmp_path / "copy", url="sqlite:////nowhere/at/all.db")
    assert replay(copy, digest)


def test_test_rows_changed_after_the_run_judge_nothing(tmp_path: Path) -> None:
    """Neither in place, nor as a dataset version of their own under answers to the earlier one."""
    made = fabricate(tmp_path, n=40)
    evaluation = again(made)
    record = made.store.record(made.dataset)
    easier = made.store.read_blob(record.blobs["test.jsonl"]).replace(b"kitchen", b"bedroom")
    blobs = {**record.blobs, "test.jsonl": made.store.put_bytes(easier)}
    other = made.store.put_record(record.model_copy(update={"blobs": blobs}))
    with pytest.raises(Inconclusive, match="are to dataset"):
        evaluate(made.store, dataset=other, answers=made.answers, probes={}, task=TASK, answer_schema=SCHEMA)
    path = made.store.blob_path(record.blobs["test.jsonl"])
    path.chmod(0o600)
    path.write_bytes(easier)
    with pytest.raises(Refused, match="do not have that digest"):
        judge(made.store, evaluation=evaluation, candidate="tuned", gates=GATES.validate_python(STANDARD))
    with pytest.raises(Refused, match="do not have that digest"):
        again(made)
    made.store.engine.dispose()


def test_a_verdict_that_does_not_follow_from_its_scores(made: Fabricated, evaluation: str) -> None:
    digest = judge(made.store, evaluation=evaluation, candidate="zero-shot", gates=GATES.validate_python(STANDARD))
    honest = made.store.record(digest)
    assert honest.body["verdict"] == "fail"
    flattering = [{**gate, "outcome": "pass"} for gate in honest.body["gates"]]
    forged = honest.model_copy(update={"body": {**honest.body, "verdict": "pass", "gates": flattering}})
    assert not replay(made.store, made.store.put_record(forged))


def test_trying_again_and_again_raises_the_bar(made: Fabricated, evaluation: str) -> None:
    lift = gates(lift=STANDARD["lift"])
    first = judged(made, evaluation, lift)
    assert (first["test_set_use"], first["gates"][0]["confidence"]) == (1, 0.95)
    ends = [first["gates"][0]["low"]]
    for attempt in range(2, 5):
        training = put_training(made.store, made.base, made.dataset, rows=attempt)
        add(made, Candidate(name="tuned", prompt="x", base=made.base, max_tokens=9, training=training),
            flawed(0.93, 1.0, 14), 1, 1)  # fmt: skip
        document = judged(made, again(made, probes={}), lift)
        assert document["test_set_use"] == attempt
        ends.append(document["gates"][0]["low"])
    assert ends == sorted(ends, reverse=True), "the same scores mean less at every further try"
    assert ends[0] - ends[-1] > 0.02
    assert judged(made, evaluation, lift)["test_set_use"] == 1, "asking again about the first candidate is no new use"


def tampered(made: Fabricated, evaluation: str, lines: Sequence[Any], **body: Any) -> str:
    record = made.store.record(evaluation)
    encoded = b"\n".join(line if isinstance(line, bytes) else canonical(line) for line in lines)
    blob = made.store.put_bytes(encoded)
    return made.store.put_record(
        record.model_copy(update={"blobs": {"scores.jsonl": blob}, "body": {**record.body, **body}})
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"NaN", "NaN is not JSON"),
        (b"Infinity", "Infinity is not JSON"),
        (b"true", "not a finite number"),
        (b"null", "not a finite number"),
        (b'"1"', "not a finite number"),
        (b"1.01", "outside 0 to 1"),
        (b"-0.5", "outside 0 to 1"),
        (b"[]", "not a finite number"),
        (b"", "not a score"),
    ],
)
def test_values_that_are_no_scores(made: Fabricated, evaluation: str, value: bytes, message: str) -> None:
    lines = made.store.read_blob(made.store.record(evaluation).blobs["scores.jsonl"]).splitlines()
    number = next(i for i, line in enumerate(lines) if json.loads(line)["candidate"] == "tuned")
    head, _, _ = lines[number].rpartition(b":")
    lines[number] = head + b":" + value + b"}"
    document = judged(made, tampered(made, evaluation, lines), GATES.validate_python(STANDARD))
    assert document["verdict"] == "inconclusive"
    for gate in document["gates"]:
        assert gate["value"] is None
        assert message in gate["reason"]
        assert f"line {number + 1}" in gate["reason"]


def test_rows_that_are_missing_doubled_or_moved(made: Fabricated, evaluation: str) -> None:
    raw = made.store.read_blob(made.store.record(evaluation).blobs["scores.jsonl"]).splitlines()
    lines = [json.loads(line) for line in raw]
    last = next(i for i, line in reversed(list(enumerate(lines))) if line["metric"] == "exact_match")
    better = {**lines[last], "value": 1 - lines[last]["value"]}
    cases: list[tuple[list[Any], str]] = [
        ([], "in the record but not in the scores"),
        ([*lines, lines[0]], "scored twice"),
        (lines[:last] + lines[last + 1 :], "not measured on the same rows"),
        ([*lines[:last], {**lines[last], "id": "else"}, *lines[last + 1 :]], "not measured on the same rows"),
        ([*lines[:last], {**lines[last], "group": "else"}, *lines[last + 1 :]], "different groups"),
        ([*lines[:last], better, *lines[last + 1 :]], "does not follow from its scores"),
        ([line for line in lines if line["candidate"] != "rag"], "in the record but not in the scores"),
        ([*lines, {**lines[0], "candidate": "ghost"}], "not measured on the same rows"),
        ([*lines, {**lines[0], "note": "x"}], "exactly the keys"),
        ([*lines, 7], "exactly the keys"),
        ([*lines, {**lines[0], "id": ""}], "not a name"),
    ]
    for changed, message in cases:
        document = judged(made, tampered(made, evaluation, changed), GATES.validate_python(STANDARD))
        assert document["verdict"] == "inconclusive", message
        assert all(message in gate["reason"] for gate in document["gates"]), (message, document["gates"])
