"""Answers to an evaluation: the numbers, and every way in which answers are not evidence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.attack_table import Happened
from tests.attacks.twins import MADE
from tests.evaluation.conftest import TASK, evaluated
from tests.fabricate import (
    PROMPT,
    Fabricated,
    answer_lines,
    commands,
    put_answers,
    put_dataset,
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
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.summary import evaluation_summary
from tunesmith.store.records import Record


def replaced(made: Fabricated, **changed: Any) -> dict[str, str]:
    """The answers with those of `tuned` replaced by right ones, of a record with other facts."""
    lines = answer_lines(made.test, lambda row: row.answer)
    return {**made.answers, "tuned": put_answers(made.store, made.candidates["tuned"], made.dataset, lines, **changed)}


def with_lines(made: Fabricated, digest: str, lines: list[bytes]) -> str:
    """An answers record with other lines."""
    blob = made.store.put_bytes(b"".join(line + b"\n" for line in lines))
    record = made.store.record(digest)
    return made.store.put_record(record.model_copy(update={"blobs": {"answers.jsonl": blob}}))


def test_means_prices_and_scores_are_those_of_the_answers(made: Fabricated, evaluation: str) -> None:
    stated = made.store.record(evaluation).body["candidates"]["tuned"]
    blob = made.store.record(made.answers["tuned"]).blobs["answers.jsonl"]
    lines = [json.loads(line) for line in made.store.read_blob(blob).splitlines()]
    answers = {line["id"]: line for line in lines}
    right = [json.loads(row.answer) == json.loads(answers[row.id]["text"]) for row in made.test]
    assert stated["metrics"]["exact_match"]["mean"] == round(sum(right) / len(right), 9)
    assert stated["prompt_tokens"] == sum(line["prompt_tokens"] for line in lines)
    assert stated["price"]["prompt_tokens_per_1000"] == pytest.approx(1000 * stated["prompt_tokens"] / len(lines))
    assert stated["price"]["seconds_per_1000"] == pytest.approx(25.0)
    assert stated["cut"] == 0
    columns = read_scores(made.store, made.store.record(evaluation))
    general = {("base", "general"), ("tuned", "general")}
    assert set(columns) == {(name, metric) for name in made.answers for metric in TASK.scorers} | general
    assert columns["tuned", "exact_match"].ids == tuple(row.id for row in made.test)
    assert np.array_equal(columns["tuned", "exact_match"].values, right)
    document = evaluation_summary(made.store, evaluation).document()
    assert [document[key] for key in ("evaluation", "n", "groups", "primary")] == [evaluation, 120, 60, "exact_match"]
    assert list(document["candidates"]["tuned"]) == ["json_valid", "exact_match", "field_f1"]
    assert document["tuned"] == {"few-shot": False, "rag": False, "tuned": True, "zero-shot": False}
    json.dumps(document, allow_nan=False)
    same = {"answers": dict(reversed(made.answers.items())), "probes": made.probes}
    assert evaluated(made, **same) == evaluation
    assert evaluated(made, **same, seed=1) != evaluation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "1 of 120 rows have no answer"),
        (lambda lines: [*lines, lines[0]], "answered twice"),
        (lambda lines: [*lines, {**lines[0], "id": "else"}], "rows that were not asked"),
        (lambda lines: [{**lines[0], "text": None}, *lines[1:]], "no text"),
        (lambda lines: [{**lines[0], "finish": "error"}, *lines[1:]], "no text or no finish reason"),
        (lambda lines: [{**lines[0], "prompt_tokens": True}, *lines[1:]], "not a count"),
        (lambda lines: [{**lines[0], "prompt_tokens": -1}, *lines[1:]], "not a count"),
        (lambda lines: [{**lines[0], "completion_tokens": 1.5}, *lines[1:]], "not a count"),
        (lambda lines: [["id"], *lines[1:]], "not an answer with an id"),
    ],
)
def test_answers_that_are_no_evidence(made: Fabricated, change: Any, message: str) -> None:
    lines = change(answer_lines(made.test, lambda row: row.answer))
    broken = with_lines(made, made.answers["tuned"], [canonical(line) for line in lines])
    with pytest.raises(Inconclusive, match=message):
        evaluated(made, answers={**made.answers, "tuned": broken})


def test_answers_of_another_split_dataset_kind_or_time(made: Fabricated) -> None:
    with pytest.raises(Inconclusive, match="seconds"):
        evaluated(made, answers=replaced(made, seconds=-1.0))
    with pytest.raises(Inconclusive, match="not to the test rows"):
        evaluated(made, answers=replaced(made, suite="validation"))
    with pytest.raises(Inconclusive, match="are to dataset"):
        evaluated(made, dataset=put_dataset(made.store, commands(30, 1, 0), [], commands(60, 9, 5000)))
    with pytest.raises(Inconclusive, match="no test rows"):
        evaluated(made, dataset=put_dataset(made.store, commands(30, 1, 0), [], []))
    with pytest.raises(UsageError, match="is a training"):
        evaluated(made, answers={"tuned": made.store.put_record(Record(kind="training", parents={}, body={}))})
    with pytest.raises(UsageError, match="are those of 'rag'"):
        evaluated(made, answers={**made.answers, "few-shot": made.answers["rag"]})
    with pytest.raises(UsageError, match="no candidate to evaluate"):
        evaluated(made, answers={})


def test_test_rows_that_a_candidate_saw(made: Fabricated) -> None:
    """In training, with its group in what is retrieved, in the prompt, and at the beginning of a longer row."""
    row, (other, *_) = made.test[0], commands(1, 77, 8000)
    more = (Message(role="user", content="and the window"), Message(role="assistant", content="done"))
    longer = row.model_copy(update={"id": "other", "group": "other", "messages": (*row.messages, *more)})
    unlearned = (*row.messages[:-1], row.messages[-1].model_copy(update={"weight": 0}), *more)
    plain = Candidate(name="rag", prompt=PROMPT, base=made.base, max_tokens=9)

    def check(*rows: Any, **seen: Any) -> None:
        dataset = put_dataset(made.store, rows, [], commands(5, 9, 5000)) if rows else None
        if seen.pop("learned", False):
            seen = {"training": put_training(made.store, made.base, str(dataset))}
        candidate = plain.model_copy(update={"dataset": None if "training" in seen else dataset, **seen})
        check_held_out(made.store, load_dataset(made.store, made.dataset), made.test, "rag", candidate)

    check(longer.model_copy(update={"messages": unlearned}))
    for rows, seen, said in (
        ([*commands(30, 1, 0), row], {"learned": True}, "learned from the training row"),
        ([other.model_copy(update={"group": row.group})], {}, "shares its group"),
        ([], {"shots": (made.test[3].messages,)}, "shows a test row"),
        ([longer], {}, "test row"),
        ([], {"shots": (longer.messages,)}, "test row"),
    ):
        with pytest.raises(Refused, match=said) as caught:
            check(*rows, **seen)
        assert caught.value.exit_code == 3


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


def test_probes_must_be_of_the_same_weights_and_probabilities(made: Fabricated) -> None:
    for probes in ({"tuned": made.probes["tuned"]}, {**made.probes, "rag": made.probes["base"]}):
        with pytest.raises(UsageError, match="general suite needs answers"):
            evaluated(made, probes=probes)
    with pytest.raises(Inconclusive, match="other weights"):
        evaluated(made, probes={**made.probes, "tuned": made.probes["base"]})
    with pytest.raises(Inconclusive, match="answers to 'test'"):
        evaluated(made, probes={**made.probes, "base": made.answers["rag"]})
    blob = made.store.record(made.probes["tuned"]).blobs["answers.jsonl"]
    first, *others = made.store.read_blob(blob).splitlines()
    for scores, said in (([-1.0, -2.0], "of 4 choices"), (["-1", -2.0, -1.0, -1.0], "not a log-probability")):
        broken = with_lines(made, made.probes["tuned"], [canonical({**json.loads(first), "scores": scores}), *others])
        with pytest.raises(Inconclusive, match=said):
            evaluated(made, probes={**made.probes, "tuned": broken})


def test_a_scorer_that_does_not_fit_names_the_row(made: Fabricated) -> None:
    said = Message(role="assistant", content="on it")
    plain = [row.model_copy(update={"messages": (*row.messages[:-1], said)}) for row in made.test]
    dataset = put_dataset(made.store, commands(30, 1, 0), [], plain)
    digest = put_candidate(made.store, Candidate(name="zero", prompt=PROMPT, base=made.base, max_tokens=9))
    answers = {"zero": put_answers(made.store, digest, dataset, answer_lines(plain, lambda row: row.answer))}
    with pytest.raises(UsageError, match="field_f1 needs references") as caught:
        evaluated(made, dataset=dataset, answers=answers)
    assert str(caught.value.where).startswith("test row ")
    only = evaluated(made, dataset=dataset, answers=answers, task=TaskSettings(scorers=("exact_match",)))
    assert made.store.record(only).body["candidates"]["zero"]["metrics"]["exact_match"]["mean"] == 1
