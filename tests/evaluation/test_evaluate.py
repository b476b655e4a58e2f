"""Answers to an evaluation: the numbers, and every way in which answers are not evidence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.attack_table import Happened
from tests.attacks.twins import MADE
from tests.evaluation.conftest import TASK
from tests.fabricate import (
    PROMPT,
    SCHEMA,
    Fabricated,
    add,
    answer_lines,
    commands,
    put_answers,
    put_dataset,
    put_probe,
    put_training,
)
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.access import Labels
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import load_dataset
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.evaluation.answers import check_held_out
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.summary import evaluation_summary
from tunesmith.store.records import Record


def run(made: Fabricated, **changed: Any) -> str:
    arguments: dict[str, Any] = {
        "dataset": made.dataset, "answers": made.answers, "probes": made.probes, "task": TASK, "answer_schema": SCHEMA,
    }  # fmt: skip
    return evaluate(made.store, **{**arguments, **changed})


def replaced(made: Fabricated, lines: Any, **changed: Any) -> dict[str, str]:
    """The answers with those of `tuned` replaced."""
    return {**made.answers, "tuned": put_answers(made.store, made.candidates["tuned"], made.dataset, lines, **changed)}


def test_the_document_scripts_rely_on(made: Fabricated, evaluation: str) -> None:
    document = evaluation_summary(made.store, evaluation).document()
    assert document["evaluation"] == evaluation
    assert document["n"] == 120
    assert document["groups"] == 60
    assert document["primary"] == "exact_match"
    assert set(document["candidates"]) == {"zero-shot", "few-shot", "rag", "tuned"}
    for measured in document["candidates"].values():
        assert list(measured) == ["json_valid", "exact_match", "field_f1"]
        for found in measured.values():
            assert set(found) == {"mean", "low", "high"}
            assert 0.0 <= found["low"] <= found["mean"] <= found["high"] <= 1.0
    assert document["tuned"] == {"few-shot": False, "rag": False, "tuned": True, "zero-shot": False}
    json.dumps(document, allow_nan=False)


def test_means_and_prices_are_those_of_the_answers(made: Fabricated, evaluation: str) -> None:
    stated = made.store.record(evaluation).body["candidates"]["tuned"]
    lines = [json.loads(line) for line in made.store.read_blob(
        made.store.record(made.answers["tuned"]).blobs["answers.jsonl"]).splitlines()]  # fmt: skip
    answers = {line["id"]: line for line in lines}
    right = [json.loads(row.answer) == json.loads(answers[row.id]["text"]) for row in made.test]
    assert stated["metrics"]["exact_match"]["mean"] == round(sum(right) / len(right), 9)
    assert stated["prompt_tokens"] == sum(line["prompt_tokens"] for line in lines)
    assert stated["price"]["prompt_tokens_per_1000"] == pytest.approx(1000 * stated["prompt_tokens"] / len(lines))
    assert stated["price"]["seconds_per_1000"] == pytest.approx(25.0)
    assert stated["cut"] == 0


def test_the_same_answers_give_the_same_record(made: Fabricated, evaluation: str) -> None:
    assert run(made, answers=dict(reversed(made.answers.items()))) == evaluation
    assert run(made, seed=1) != evaluation


def test_scores_are_kept_by_example_and_read_back(made: Fabricated, evaluation: str) -> None:
    columns = read_scores(made.store, made.store.record(evaluation))
    assert set(columns) == {(name, metric) for name in made.answers for metric in TASK.scorers} | {
        ("base", "general"), ("tuned", "general"),
    }  # fmt: skip
    assert columns["tuned", "exact_match"].ids == tuple(row.id for row in made.test)
    assert np.isin(columns["tuned", "exact_match"].values, (0.0, 1.0)).all()


def test_forgetting_is_measured_by_pairs(made: Fabricated) -> None:
    worse = {**made.probes, "tuned": put_probe(made.store, made.base, made.training, 2.5)}
    mild, harsh = (made.store.record(run(made, probes=p)).body["probes"]["general"] for p in (made.probes, worse))
    assert mild["scores"]["base"] == harsh["scores"]["base"]
    assert mild["drops"]["tuned"]["high"] < 0.03
    assert harsh["drops"]["tuned"]["low"] > 0.1
    expected = harsh["scores"]["base"]["mean"] - harsh["scores"]["tuned"]["mean"]
    assert harsh["drops"]["tuned"]["mean"] == pytest.approx(expected)


def test_without_probes_nothing_is_said_of_forgetting(made: Fabricated) -> None:
    assert made.store.record(run(made, probes={})).body["probes"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "1 of 120 rows have no answer"),
        (lambda lines: [], "120 of 120 rows have no answer"),
        (lambda lines: [*lines, lines[0]], "answered twice"),
        (lambda lines: [*lines[:-1], lines[0]], "answered twice"),
        (lambda lines: [*lines, {**lines[0], "id": "else"}], "rows that were not asked"),
        (lambda lines: [{**lines[0], "text": None}, *lines[1:]], "no text"),
        (lambda lines: [{**lines[0], "text": 1}, *lines[1:]], "no text"),
        (lambda lines: [{**lines[0], "finish": "error"}, *lines[1:]], "no text or no finish reason"),
        (lambda lines: [{**lines[0], "prompt_tokens": True}, *lines[1:]], "not a count"),
        (lambda lines: [{**lines[0], "prompt_tokens": -1}, *lines[1:]], "not a count"),
        (lambda lines: [{**lines[0], "completion_tokens": 1.5}, *lines[1:]], "not a count"),
        (lambda lines: [["id"], *lines[1:]], "not an answer with an id"),
    ],
)
def test_answers_that_are_no_evidence(made: Fabricated, change: Any, message: str) -> None:
    lines = change(answer_lines(made.test, lambda row: row.answer))
    record = made.store.record(made.answers["tuned"])
    blob = made.store.put_bytes(b"".join(canonical(line) + b"\n" for line in lines))
    broken = made.store.put_record(record.model_copy(update={"blobs": {"answers.jsonl": blob}}))
    with pytest.raises(Inconclusive, match=message):
        run(made, answers={**made.answers, "tuned": broken})


def test_a_time_that_is_no_number(made: Fabricated) -> None:
    with pytest.raises(Inconclusive, match="seconds"):
        run(made, answers=replaced(made, answer_lines(made.test, lambda row: row.answer), seconds=-1.0))


def test_answers_to_another_split_or_dataset(made: Fabricated) -> None:
    lines = answer_lines(made.test, lambda row: row.answer)
    with pytest.raises(Inconclusive, match="not to the test rows"):
        run(made, answers=replaced(made, lines, suite="validation"))
    other = put_dataset(made.store, commands(30, 1, 0), [], commands(60, 9, 5000))
    with pytest.raises(Inconclusive, match="are to dataset"):
        run(made, dataset=other)


def test_a_dataset_without_test_rows(made: Fabricated) -> None:
    empty = put_dataset(made.store, commands(30, 1, 0), [], [])
    with pytest.raises(Inconclusive, match="no test rows"):
        run(made, dataset=empty)


def test_a_held_out_row_in_training(made: Fabricated) -> None:
    leaky = put_dataset(made.store, [*commands(30, 1, 0), made.test[0]], [], commands(5, 9, 5000))
    training = put_training(made.store, made.base, leaky)
    add(
        made,
        Candidate(name="tuned", prompt=PROMPT, base=made.base, max_tokens=9, training=training),
        lambda row: "",
        1,
        1,
    )
    with pytest.raises(Refused, match="learned from the training row") as caught:
        run(made, probes={})
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("place", ["rows", "shots"])
def test_a_held_out_row_at_the_beginning_of_what_a_candidate_saw(made: Fabricated, place: str) -> None:
    row = made.test[0]
    more = (Message(role="user", content="and the window"), Message(role="assistant", content="done"))
    longer = row.model_copy(update={"id": "other", "group": "other", "messages": (*row.messages, *more)})
    candidate = Candidate(name="rag", base=made.base, max_tokens=9)
    if place == "rows":
        candidate = candidate.model_copy(update={"dataset": put_dataset(made.store, [longer])})
    else:
        candidate = candidate.model_copy(update={"shots": (longer.messages,)})
    with pytest.raises(Refused, match="test row"):
        check_held_out(made.store, load_dataset(made.store, made.dataset), made.test, "rag", candidate)
    unlearned = [turn.model_copy(update={"weight": 0}) if turn == row.messages[-1] else turn for turn in row.messages]
    shown = put_dataset(made.store, [longer.model_copy(update={"messages": (*unlearned, *more)})])
    candidate = Candidate(name="rag", base=made.base, max_tokens=9, dataset=shown)
    check_held_out(made.store, load_dataset(made.store, made.dataset), made.test, "rag", candidate)


def test_a_held_out_group_in_what_is_retrieved(made: Fabricated) -> None:
    twin = commands(1, 77, 8000)[0].model_copy(update={"group": made.test[0].group})
    leaky = put_dataset(made.store, [twin], [], commands(5, 9, 5000))
    add(made, Candidate(name="rag", prompt=PROMPT, base=made.base, max_tokens=9, dataset=leaky), lambda row: "", 1, 1)
    with pytest.raises(Refused, match="shares its group"):
        run(made)


def test_a_test_row_shown_in_the_prompt(made: Fabricated) -> None:
    shots = (made.test[3].messages,)
    add(
        made, Candidate(name="few-shot", prompt=PROMPT, base=made.base, max_tokens=9, shots=shots), lambda row: "", 1, 1
    )
    with pytest.raises(Refused, match="shows a test row"):
        run(made)


@pytest.mark.attack("leakage", "twins of test rows in shots, training rows, passages")
@pytest.mark.parametrize("place", ["shots", "rows", "passages"])
def test_twins_of_test_rows_that_a_candidate_saw(made: Fabricated, place: str, happened: Happened) -> None:
    rows = made.test[:5]
    plain = Candidate(name="rag", base=made.base, max_tokens=9)
    for make in MADE.values():
        for row in rows:
            asked = tuple(turn.model_copy(update={"content": make(turn.content)}) for turn in row.request)
            seen = (*asked, row.messages[-1])
            if place == "shots":
                candidate = plain.model_copy(update={"shots": (seen,)})
            elif place == "rows":
                twin = row.model_copy(update={"id": "other", "group": "other", "messages": seen})
                candidate = plain.model_copy(update={"dataset": put_dataset(made.store, [twin])})
            else:
                text = f"Notes. {asked[-1].content} The answer is {make(row.answer)}."
                passage = Passage(id="p", source="notes.txt", title="", text=text, labels=Labels())
                blobs = {PASSAGES: made.store.put_bytes(passage.model_dump_json().encode())}
                documents = made.store.put_record(Record(kind="documents", blobs=blobs, body={}))
                candidate = plain.model_copy(update={"documents": documents})
            with pytest.raises(Refused, match="test row"):
                check_held_out(made.store, load_dataset(made.store, made.dataset), rows, "rag", candidate)
    happened("refused", len(MADE) * len(rows))


def test_names_must_be_the_candidates_own(made: Fabricated) -> None:
    with pytest.raises(UsageError, match="are those of 'rag'"):
        run(made, answers={**made.answers, "few-shot": made.answers["rag"]})
    with pytest.raises(UsageError, match="no candidate to evaluate"):
        run(made, answers={})


def test_probes_must_be_of_the_same_weights(made: Fabricated) -> None:
    with pytest.raises(UsageError, match="general suite needs answers"):
        run(made, probes={"tuned": made.probes["tuned"]})
    with pytest.raises(UsageError, match="general suite needs answers"):
        run(made, probes={**made.probes, "rag": made.probes["base"]})
    with pytest.raises(Inconclusive, match="other weights"):
        run(made, probes={**made.probes, "tuned": made.probes["base"]})
    with pytest.raises(Inconclusive, match="answers to 'test'"):
        run(made, probes={**made.probes, "base": made.answers["rag"]})


@pytest.mark.parametrize(
    ("scores", "message"),
    [([-1.0, -2.0], "of 4 choices"), ([-1.0, -2.0, True, -1.0], "not a log-probability"), (None, "of 4 choices"),
     ([-1.0, -2.0, 0.5, -1.0], "not a log-probability"), (["-1", -2.0, -1.0, -1.0], "not a log-probability")],
)  # fmt: skip
def test_probes_that_are_no_evidence(made: Fabricated, scores: Any, message: str) -> None:
    record = made.store.record(made.probes["tuned"])
    lines = made.store.read_blob(record.blobs["answers.jsonl"]).splitlines()
    first = {**json.loads(lines[0]), "scores": scores}
    blob = made.store.put_bytes(b"\n".join([canonical(first), *lines[1:]]))
    broken = made.store.put_record(record.model_copy(update={"blobs": {"answers.jsonl": blob}}))
    with pytest.raises(Inconclusive, match=message):
        run(made, probes={**made.probes, "tuned": broken})


def test_a_scorer_that_does_not_fit_names_the_row(made: Fabricated) -> None:
    plain = [row.model_copy(update={"messages": (*row.messages[:-1], row.messages[-1].model_copy(
        update={"content": "on it"}))}) for row in made.test]  # fmt: skip
    dataset = put_dataset(made.store, commands(30, 1, 0), [], plain)
    digest = put_candidate(made.store, Candidate(name="zero", prompt=PROMPT, base=made.base, max_tokens=9))
    answers = {"zero": put_answers(made.store, digest, dataset, answer_lines(plain, lambda row: row.answer))}
    with pytest.raises(UsageError, match="field_f1 needs references") as caught:
        run(made, dataset=dataset, answers=answers, probes={})
    assert caught.value.where is not None
    assert caught.value.where.startswith("test row ")
    only = TaskSettings(scorers=("exact_match",))
    found = run(made, dataset=dataset, answers=answers, probes={}, task=only)
    assert made.store.record(found).body["candidates"]["zero"]["metrics"]["exact_match"]["mean"] == 1


def test_the_wrong_kind_of_record_is_refused(made: Fabricated) -> None:
    other = made.store.put_record(Record(kind="training", parents={}, body={}))
    with pytest.raises(UsageError, match="is a training"):
        run(made, answers={"tuned": other})
