"""Gates and verdicts: what passes, what must never pass, and that a verdict replays to the same bytes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import STANDARD, TASK, evaluated, judged, outcome, verdict_of
from tests.fabricate import PROMPT, Fabricated, add, fabricate, flawed, put_probe
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.evaluation.gates.verdict import replay
from tunesmith.evaluation.report.data import report_data
from tunesmith.records.candidate import RemoteModel
from tunesmith.store.store import Store


def add_plain(made: Fabricated, name: str, answer: Any, **more: Any) -> None:
    add(made, Candidate(name=name, prompt=PROMPT, base=made.base, max_tokens=9, **more), answer, 1, 1)


def test_a_good_candidate_passes_with_its_numbers(made: Fabricated, evaluation: str) -> None:
    document = judged(made, evaluation, STANDARD)
    assert document["verdict"] == "pass"
    assert [gate["name"] for gate in document["gates"]] == ["lift", "valid", "forgetting"]
    assert all(gate["low"] <= gate["value"] <= gate["high"] for gate in document["gates"])
    lift = document["gates"][0]
    assert (lift["over"], lift["bound"]) == ("rag", 0.05)
    assert lift["low"] >= 0.05
    assert "differs from rag by +" in lift["reason"]
    empty = judged(made, evaluation, {})
    assert (empty["verdict"], empty["gates"]) == ("inconclusive", [])


def test_a_lift_over_a_better_candidate_fails_and_best_untuned_leaves_the_judged_one_out(
    made: Fabricated, evaluation: str
) -> None:
    lift = {"metric": "exact_match", "at_least": 0.05}
    gate = outcome(made, evaluation, "rag", **lift, over="tuned")
    assert (gate["outcome"], gate["high"] < 0.05) == ("fail", True)
    assert outcome(made, evaluation, "rag", **lift, over="best-untuned")["over"] == "few-shot"
    gate = outcome(made, evaluated(made, answers={"tuned": made.answers["tuned"]}), **lift, over="best-untuned")
    assert gate["outcome"] == "inconclusive"
    assert "no untuned candidate" in gate["reason"]


def test_a_lift_in_either_of_two_metrics_suffices_and_a_sure_loss_in_one_fails(
    made: Fabricated, evaluation: str
) -> None:
    either = {"metric": "json_valid", "or_metric": "exact_match", "over": "rag"}
    assert outcome(made, evaluation, metric="json_valid", over="rag", at_least=0.05)["outcome"] != "pass"
    found = outcome(made, evaluation, **either, at_least=0.05)
    alone = outcome(made, evaluation, metric="exact_match", over="rag", at_least=0.05, confidence=0.975)
    assert (found["outcome"], found["metric"], found["low"]) == ("pass", "exact_match", alone["low"])
    assert "; or: json_valid differs from rag by" in found["reason"]
    by_validity = evaluated(made, task=TASK.model_copy(update={"primary": "json_valid"}))
    passed = verdict_of(made, by_validity, {"lift": {**either, "at_least": 0.05}})
    shown = report_data(made.store, by_validity, passed)
    assert (shown.primary, shown.rival, shown.advice.headline) == ("exact_match", "rag", "Release tuned.")
    assert report_data(made.store, by_validity).primary == "json_valid"
    worse = outcome(made, evaluation, "few-shot", metric="json_valid", over="rag", at_least=-0.2)
    assert worse["outcome"] == "pass"
    found = outcome(made, evaluation, "few-shot", **either, at_least=-0.2)
    assert (found["outcome"], found["metric"]) == ("inconclusive", "exact_match")
    assert found["high"] < 0, "what is lost for sure is shown"
    assert outcome(made, evaluation, "few-shot", **either, at_least=0.2)["outcome"] == "fail"


def test_all_ties(made: Fabricated) -> None:
    add_plain(made, "same", flawed(0.34, 0.93, 13))
    digest = evaluated(made)
    for at_least, expected in ((-0.1, "pass"), (0.0, "inconclusive"), (0.02, "inconclusive"), (0.1, "fail")):
        gate = outcome(made, digest, "same", metric="exact_match", over="rag", at_least=at_least)
        assert gate["outcome"] == expected
    kept = {"metric": "exact_match", "not_below": "rag"}
    assert outcome(made, digest, "same", **kept, drop_at_most=0.0)["outcome"] == "inconclusive", "ties are no proof"
    assert outcome(made, digest, "same", **kept, drop_at_most=0.1)["outcome"] == "pass"


@pytest.mark.parametrize(
    ("n", "per_group", "weight"), [(1, 1, "1.0"), (19, 1, "19.0"), (120, 12, "10.0")], ids=["1", "19", "10 groups"]
)
def test_wins_on_a_handful_of_rows_or_groups_never_pass(tmp_path: Path, n: int, per_group: int, weight: str) -> None:
    made = fabricate(tmp_path, n=n, per_group=per_group)
    add_plain(made, "rag", lambda row: "no")
    add_plain(made, "tuned", lambda row: row.answer, training=made.training)
    digest = evaluated(made)
    for at_least in (-1.0, 0.05):
        gate = outcome(made, digest, metric="exact_match", over="rag", at_least=at_least)
        assert gate["outcome"] == "inconclusive"
        assert f"weigh as much as {weight}" in gate["reason"]
        assert "at least 20 are needed" in gate["reason"]
    assert outcome(made, digest, metric="exact_match", at_least=0.5)["outcome"] == "inconclusive"


def test_thresholds(made: Fabricated, evaluation: str) -> None:
    mean = made.store.record(evaluation).body["candidates"]["tuned"]["metrics"]["exact_match"]["mean"]
    sure = {"confidence": 0.95}
    for gate, expected in (
        ({"at_least": mean}, "pass"),
        ({"at_least": mean + 0.001}, "fail"),
        ({"at_most": mean}, "pass"),
        ({"at_most": mean - 0.001}, "fail"),
        ({"at_least": mean, **sure}, "inconclusive"),
        ({"at_least": 0.5, **sure}, "pass"),
        ({"at_most": 0.5, **sure}, "fail"),
    ):
        assert outcome(made, evaluation, metric="exact_match", **gate)["outcome"] == expected, gate
    doubtful = {"metric": "json_valid", "at_least": 0.999, "confidence": 0.95}
    found = outcome(made, evaluation, **doubtful)
    assert found["outcome"] == "inconclusive", "all right on 60 groups is not 99.9% for sure"
    assert "times as many test rows" in found["reason"]
    fine, wrong = ({"metric": "exact_match", key: 0.1} for key in ("at_least", "at_most"))
    assert judged(made, evaluation, {"a": fine, "b": doubtful})["verdict"] == "inconclusive", "any doubt withholds"
    assert judged(made, evaluation, {"a": fine, "b": doubtful, "c": wrong})["verdict"] == "fail", "any failure fails"


def test_forgetting(made: Fabricated, evaluation: str) -> None:
    harsh = evaluated(made, probes={**made.probes, "tuned": put_probe(made.store, made.base, made.training, 2.5)})
    for digest, expected in ((evaluation, "pass"), (harsh, "fail")):
        assert outcome(made, digest, suite="general", drop_at_most=0.03)["outcome"] == expected
    mild, stated = (made.store.record(digest).body["probes"]["general"] for digest in (evaluation, harsh))
    assert mild["scores"]["base"] == stated["scores"]["base"]
    assert mild["drops"]["tuned"]["high"] < 0.03
    drop = stated["drops"]["tuned"]["mean"]
    assert drop == pytest.approx(stated["scores"]["base"]["mean"] - stated["scores"]["tuned"]["mean"])
    assert outcome(made, harsh, suite="general", drop_at_most=drop)["outcome"] == "inconclusive"
    unprobed = evaluated(made)
    assert made.store.record(unprobed).body["probes"] == {}
    gate = outcome(made, unprobed, suite="general", drop_at_most=0.03)
    assert (gate["outcome"], gate["value"]) == ("inconclusive", None)
    untuned = outcome(made, unprobed, "rag", suite="general", drop_at_most=0.0)
    assert untuned["outcome"] == "pass", "the base's own weights"


def test_risks_of_tuning_are_unknown_of_an_endpoint_and_absent_from_a_baseline(made: Fabricated) -> None:
    remote = RemoteModel(url="https://gpt.example/v1", model="big")
    add_plain(made, "gpt", flawed(0.97, 1.0, 15), endpoint=remote)
    add_plain(made, "nearest", flawed(0.2, 1.0, 16), method="nearest", dataset=made.dataset)
    digest = evaluated(made)
    for gate in ({"suite": "general", "drop_at_most": 0.03}, {"probe": "canaries", "at_most": 3.5, "repeats": 16}):
        found = outcome(made, digest, "gpt", **gate)
        assert (found["outcome"], found["value"]) == ("inconclusive", None)
        assert "of whose weights nothing is known" in found["reason"]
        found = outcome(made, digest, "nearest", **gate)
        assert found["outcome"] == "pass"
        assert "without a language model" in found["reason"]


def test_what_must_not_drop(made: Fabricated, evaluation: str) -> None:
    def found(name: str, rival: str, at_most: float) -> dict[str, Any]:
        return outcome(made, evaluation, name, metric="exact_match", not_below=rival, drop_at_most=at_most)

    gate = found("tuned", "rag", 0.02)
    assert (gate["outcome"], gate["not_below"], gate["bound"]) == ("pass", "rag", 0.02)
    assert gate["high"] <= 0.02
    gate = found("rag", "tuned", 0.1)
    assert gate["outcome"] == "fail"
    assert gate["low"] > 0.1
    assert found("rag", "best-untuned", 0.0)["outcome"] == "pass"
    assert "with itself" in found("rag", "rag", 0.1)["reason"]


def test_a_failure_holds_for_the_number_of_gates(made: Fabricated, evaluation: str) -> None:
    """A bound just above the interval fails a gate that stands alone, not one of ten (Holm); a clear failure does."""
    sure = {"metric": "exact_match", "confidence": 0.95}
    high = outcome(made, evaluation, "rag", **sure, at_least=0.9)["high"]
    near, clear = {**sure, "at_least": high + 0.005}, {**sure, "at_least": 0.95}
    sound = {f"s{k}": {**sure, "at_least": 0.01} for k in range(9)}
    assert outcome(made, evaluation, "rag", **near)["outcome"] == "fail"
    among = judged(made, evaluation, {"near": near, **sound}, "rag")
    assert among["verdict"] == "inconclusive", "never a pass"
    assert "with 10 gates" in among["gates"][0]["reason"]
    assert among["gates"][0]["high"] == pytest.approx(high), "the interval that is shown stays its own"
    assert judged(made, evaluation, {"clear": clear, **sound}, "rag")["verdict"] == "fail"
    both = judged(made, evaluation, {"near": near, "clear": clear}, "rag")
    outcomes = [gate["outcome"] for gate in both["gates"]]
    assert outcomes == ["fail", "fail"], "stepping down: the clear failure leaves the near one its whole level"
    certain = {"metric": "exact_match", "at_least": high + 0.005}
    verdict = judged(made, evaluation, {"c": certain, **sound}, "rag")["verdict"]
    assert verdict == "fail", "a bound on the measured rows themselves has no luck to correct"


def test_names_that_are_not_there(made: Fabricated, evaluation: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'tuned'"):
        verdict_of(made, evaluation, {}, "tunde")
    for gate, said in (
        ({"metric": "chrf", "at_least": 0.5}, "not measured"),
        ({"metric": "exact_match", "or_metric": "chrf", "over": "rag", "at_least": 0.5}, "not measured"),
        ({"metric": "exact_match", "over": "few-shots", "at_least": 0.5}, "not a candidate"),
        ({"metric": "exact_match", "not_below": "rags", "drop_at_most": 0.1}, "not a candidate"),
    ):
        with pytest.raises(UsageError, match=said):
            outcome(made, evaluation, **gate)


def test_a_verdict_replays_without_the_database_and_a_forged_one_does_not(
    made: Fabricated, evaluation: str, tmp_path: Path
) -> None:
    digest = verdict_of(made, evaluation, STANDARD, "zero-shot")
    assert verdict_of(made, evaluation, STANDARD, "zero-shot") == digest
    for folder in ("records", "blobs"):
        shutil.copytree(made.store.root / folder, tmp_path / "copy" / folder)
    assert replay(Store(tmp_path / "copy", url="sqlite:////nowhere/at/all.db"), digest)
    honest = made.store.record(digest)
    assert honest.body["verdict"] == "fail"
    flattering = [{**gate, "outcome": "pass"} for gate in honest.body["gates"]]
    forged = honest.model_copy(update={"body": {**honest.body, "verdict": "pass", "gates": flattering}})
    assert not replay(made.store, made.store.put_record(forged))


def test_test_rows_changed_after_the_run_judge_nothing(made: Fabricated, evaluation: str) -> None:
    """Neither in place, nor as a dataset version of their own under answers to the earlier one."""
    record = made.store.record(made.dataset)
    easier = made.store.read_blob(record.blobs["test.jsonl"]).replace(b"kitchen", b"bedroom")
    blobs = {**record.blobs, "test.jsonl": made.store.put_bytes(easier)}
    with pytest.raises(Inconclusive, match="another dataset version"):
        evaluated(made, dataset=made.store.put_record(record.model_copy(update={"blobs": blobs})))
    path = made.store.blob_path(record.blobs["test.jsonl"])
    path.chmod(0o600)
    path.write_bytes(easier)
    for again in (lambda: verdict_of(made, evaluation), lambda: evaluated(made)):
        with pytest.raises(Refused, match="do not have that digest"):
            again()


def check_tampered(made: Fabricated, evaluation: str, lines: Sequence[Any], *said: str) -> None:
    """No gate of an evaluation with these lines as its scores is judged, and each says why."""
    record = made.store.record(evaluation)
    blob = made.store.put_bytes(b"\n".join(line if isinstance(line, bytes) else canonical(line) for line in lines))
    forged = made.store.put_record(record.model_copy(update={"blobs": {"scores.jsonl": blob}}))
    document = judged(made, forged, STANDARD)
    assert document["verdict"] == "inconclusive", said
    for gate in document["gates"]:
        assert gate["value"] is None
        assert all(each in gate["reason"] for each in said), (said, gate["reason"])


def test_scores_that_are_none_or_of_missing_doubled_or_moved_rows(made: Fabricated, evaluation: str) -> None:
    raw = made.store.read_blob(made.store.record(evaluation).blobs["scores.jsonl"]).splitlines()
    lines: list[Any] = [json.loads(line) for line in raw]
    last = next(i for i, line in reversed(list(enumerate(lines))) if line["metric"] == "exact_match")

    def with_last(**keys: Any) -> list[Any]:
        return [*lines[:last], {**lines[last], **keys}, *lines[last + 1 :]]

    head, _, _ = raw[last].rpartition(b":")
    for value, message in (
        (b"NaN", "NaN is not JSON"),
        (b"true", "valid number"),
        (b"1.01", "less than or equal to 1"),
        (b"-0.5", "greater than or equal to 0"),
        (b"", "not JSON"),
        (b'1,"value":1', "appears twice"),
    ):
        changed = [*raw[:last], head + b":" + value + b"}", *raw[last + 1 :]]
        check_tampered(made, evaluation, changed, message, f"line {last + 1}")
    for changed, message in (
        ([], "in the record but not in the scores"),
        ([*lines, lines[0]], "is there twice"),
        (lines[:last] + lines[last + 1 :], "not measured on the same rows"),
        (with_last(id="else"), "not measured on the same rows"),
        (with_last(group="else"), "different groups"),
        (with_last(value=1 - lines[last]["value"]), "does not follow from its scores"),
        ([line for line in lines if line["candidate"] != "rag"], "in the record but not in the scores"),
        ([*lines, {**lines[0], "candidate": "ghost"}], "not measured on the same rows"),
        ([*lines, {**lines[0], "note": "x"}], "Extra inputs"),
        ([*lines, {**lines[0], "id": ""}], "at least 1 character"),
    ):
        check_tampered(made, evaluation, changed, message)
