"""Answers to an evaluation: the numbers, answers that are not evidence, and two candidates side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests import fabricate
from tests.attack_table import Happened
from tests.attacks.twins import MADE
from tests.evaluation.conftest import TASK, evaluated, verdict_of
from tests.fabricate import Fabricated, answer_lines, commands, put_answers, put_dataset, put_training
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.access import Labels
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import load_dataset
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.evaluation.answers import check_held_out
from tunesmith.evaluation.compare import compare, side_of_candidate, side_of_digest
from tunesmith.evaluation.gates.settings import GATES, check_gates
from tunesmith.evaluation.metrics.declared import scorer_digests
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import PriceSettings, TaskSettings
from tunesmith.evaluation.summary import evaluation_summary
from tunesmith.registry.registration import register
from tunesmith.services.evaluations import leaderboard
from tunesmith.store.people.identities import acting
from tunesmith.store.records import Record


def replaced(made: Fabricated, **changed: Any) -> dict[str, str]:
    """The answers with those of `tuned` replaced by right ones, of a record with other facts."""
    lines = answer_lines(made.test, lambda row: row.answer)
    return {**made.answers, "tuned": put_answers(made.store, made.candidates["tuned"], made.dataset, lines, **changed)}


def with_lines(made: Fabricated, digest: str, lines: list[Any]) -> str:
    """An answers record with other lines."""
    written = (line if isinstance(line, bytes) else canonical(line) for line in lines)
    blob = made.store.put_bytes(b"".join(line + b"\n" for line in written))
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
    turned = {**made.answers, "tuned": with_lines(made, made.answers["tuned"], lines[::-1])}
    again = made.store.record(evaluated(made, answers=turned)).body["candidates"]["tuned"]
    assert again["metrics"] == stated["metrics"], "however the answers were written"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "1 of 120 rows have no answer"),
        (lambda lines: [*lines, lines[0]], "is there twice"),
        (lambda lines: [*lines, {**lines[0], "id": "else"}], "rows that were not asked"),
        (lambda lines: [{**lines[0], "text": None}, *lines[1:]], "no text"),
        (lambda lines: [{**lines[0], "finish": "error"}, *lines[1:]], "no text or no finish reason"),
        (lambda lines: [{**lines[0], "prompt_tokens": True}, *lines[1:]], "not a count"),
        (lambda lines: [{**lines[0], "completion_tokens": -1}, *lines[1:]], "not a count"),
        (lambda lines: [["id"], *lines[1:]], "the line: Input should be a valid dictionary"),
        (lambda lines: [b'{"id": "c", "id": "c"}', *lines[1:]], "appears twice"),
    ],
)
def test_answers_that_are_no_evidence(made: Fabricated, change: Any, message: str) -> None:
    lines = change(answer_lines(made.test, lambda row: row.answer))
    broken = with_lines(made, made.answers["tuned"], lines)
    with pytest.raises(Inconclusive, match=message):
        evaluated(made, answers={**made.answers, "tuned": broken})


def test_answers_of_another_split_dataset_kind_or_time(made: Fabricated) -> None:
    other, none = (put_dataset(made.store, commands(30, 1, 0), [], test) for test in (commands(60, 9, 5000), []))
    for changed, error, said in (
        ({"answers": replaced(made, seconds=-1.0)}, Inconclusive, "seconds"),
        ({"answers": replaced(made, suite="validation")}, Inconclusive, "not to 'test'"),
        ({"dataset": other}, Inconclusive, "another dataset version"),
        ({"dataset": none}, Inconclusive, "no test rows"),
        ({"answers": {"tuned": made.training}}, UsageError, "is a training"),
        ({"answers": {**made.answers, "few-shot": made.answers["rag"]}}, UsageError, "are those of 'rag'"),
        ({"answers": {}}, UsageError, "no candidate to evaluate"),
    ):
        with pytest.raises(error, match=said):
            evaluated(made, **changed)


def test_test_rows_that_a_candidate_saw(made: Fabricated) -> None:
    """In training, with its group in what is retrieved, in the prompt, and at the beginning of a longer row."""
    row, (other, *_) = made.test[0], commands(1, 77, 8000)
    more = (Message(role="user", content="and the window"), Message(role="assistant", content="done"))
    longer = row.model_copy(update={"id": "other", "group": "other", "messages": (*row.messages, *more)})
    unlearned = (*row.messages[:-1], row.messages[-1].model_copy(update={"weight": 0}), *more)
    plain = Candidate(name="rag", prompt=fabricate.PROMPT, base=made.base, max_tokens=9)

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
        broken = with_lines(made, made.probes["tuned"], [{**json.loads(first), "scores": scores}, *others])
        with pytest.raises(Inconclusive, match=said):
            evaluated(made, probes={**made.probes, "tuned": broken})


def test_a_scorer_that_does_not_fit_names_the_row(made: Fabricated) -> None:
    said = Message(role="assistant", content="on it")
    plain = [row.model_copy(update={"messages": (*row.messages[:-1], said)}) for row in made.test]
    dataset = put_dataset(made.store, commands(30, 1, 0), [], plain)
    digest = put_candidate(made.store, Candidate(name="zero", prompt=fabricate.PROMPT, base=made.base, max_tokens=9))
    answers = {"zero": put_answers(made.store, digest, dataset, answer_lines(plain, lambda row: row.answer))}
    with pytest.raises(UsageError, match="field_f1 needs references") as caught:
        evaluated(made, dataset=dataset, answers=answers)
    assert str(caught.value.where).startswith("test row ")
    only = evaluated(made, dataset=dataset, answers=answers, task=TaskSettings(scorers=("exact_match",)))
    assert made.store.record(only).body["candidates"]["zero"]["metrics"]["exact_match"]["mean"] == 1


# Two candidates side by side


def test_differences_are_second_minus_first(made: Fabricated, evaluation: str) -> None:
    sides = [side_of_candidate(made.store, evaluation, name) for name in ("rag", "tuned")]
    forth, back = compare(made.store, *sides).document(), compare(made.store, *reversed(sides)).document()
    columns = read_scores(made.store, made.store.record(evaluation))
    for metric in TASK.scorers:
        gaps = columns["tuned", metric].values - columns["rag", metric].values
        found, mirrored = forth["metrics"][metric], back["metrics"][metric]
        counts = [int((gaps > 0).sum()), int((gaps < 0).sum()), int((gaps == 0).sum())]
        assert [found[key] for key in ("wins", "losses", "ties")] == counts
        assert [mirrored[key] for key in ("losses", "wins", "mcnemar")] == [*counts[:2], found["mcnemar"]]
        assert found["difference"]["mean"] == pytest.approx(gaps.mean())
        assert mirrored["difference"]["low"] == pytest.approx(-found["difference"]["high"], abs=1e-6)
    assert forth["metrics"]["exact_match"]["mcnemar"] < 1e-6
    assert forth["metrics"]["field_f1"]["mcnemar"] is None, "graded scores are not McNemar's"
    itself = compare(made.store, sides[0], sides[0]).document()["metrics"]["exact_match"]
    assert [itself[key] for key in ("wins", "losses", "mcnemar", "sign_flip")] == [0, 0, 1.0, 1.0]
    assert itself["difference"]["low"] < 0.0 < itself["difference"]["high"]


def test_over_two_evaluations_of_one_dataset_and_of_two(made: Fabricated, evaluation: str) -> None:
    candidate = Candidate(name="later", prompt=fabricate.PROMPT, base=made.base, max_tokens=9)
    fabricate.add(made, candidate, fabricate.flawed(0.5, 0.9, 21), 1, 1)
    task = TASK.model_copy(update={"scorers": ("exact_match",)})
    later = evaluated(made, answers={"later": made.answers["later"]}, task=task)
    first = side_of_digest(made.store, evaluation, made.candidates["tuned"], "home@v1")
    second = side_of_digest(made.store, later, made.candidates["later"], "home@v2")
    document = compare(made.store, first, second).document()
    assert list(document["metrics"]) == ["exact_match"]
    assert document["first"]["label"] == "home@v1"
    assert document["metrics"]["exact_match"]["difference"]["high"] < 0
    rows = commands(40, 9, 5000)
    other = put_dataset(made.store, commands(20, 1, 0), [], rows)
    given = put_answers(made.store, made.candidates["zero-shot"], other, answer_lines(rows, lambda row: "{}"))
    elsewhere = evaluated(made, dataset=other, answers={"zero-shot": given})
    with pytest.raises(Inconclusive, match="was measured on dataset"):
        compare(made.store, first, side_of_candidate(made.store, elsewhere, "zero-shot"))
    with pytest.raises(UsageError, match="did you mean 'few-shot'"):
        side_of_candidate(made.store, evaluation, "fewshot")
    with pytest.raises(UsageError, match="has no candidate"):
        side_of_digest(made.store, evaluation, made.training, "home@v1")


def test_scores_of_different_scorers_are_not_compared(made: Fabricated, tmp_path: Path) -> None:
    """The function's file changed between two evaluations: a metric of the same name, and another measure."""
    scorers = ["exact_match", {"name": "brief", "function": "mine.py:brief"}]
    task = TaskSettings.model_validate({"scorers": scorers, "primary": "brief"})
    found: list[str] = []
    for most in (20, 60, 60):
        (tmp_path / "mine.py").write_text(f"def brief(answer, *_):\n    return float(len(answer) < {most})\n")
        found.append(evaluated(made, task=task, root=tmp_path, seed=len(found)))
        verdict = verdict_of(made, found[-1], {"right": {"metric": "exact_match", "at_least": 0.0}})
        register(made.store, name="home", verdict=verdict, actor=acting(made.store))
    sides = [side_of_candidate(made.store, digest, "tuned") for digest in found]
    different = compare(made.store, *sides[:2])
    assert (list(different.metrics), different.changed_scorers) == (["exact_match"], ("brief",))
    assert list(compare(made.store, *sides[1:]).metrics) == ["exact_match", "brief"]
    boards = {tuple(sorted(row.version for row in board.versions)): board for board in leaderboard(made.store).boards}
    assert set(boards) == {("home@v1",), ("home@v2", "home@v3")}
    assert boards["home@v1",].evaluation == found[0]


def test_a_scorer_s_digest_covers_what_decides_a_score() -> None:
    def digests(schema: Any = fabricate.SCHEMA, model: str = "m", label: str = "", **settings: Any) -> dict[str, str]:
        judge = {"url": "http://127.0.0.1:1/v1", "model": model, **settings}
        labels = {"name": "kind", "label": label, "calibrate": bool(settings)}
        scorers = ["json_valid", "exact_match", {"name": "j", "judge": judge}, labels]
        return scorer_digests(TaskSettings.model_validate({"scorers": scorers}).scorers, schema, Path())

    first = digests()
    assert digests(retries=1) == first, "neither how a judge is reached nor calibration decides a score"
    for changed, metric in (({"schema": None}, "json_valid"), ({"model": "n"}, "j"), ({"label": "intent"}, "kind")):
        found = digests(**changed)  # type: ignore[arg-type]
        assert {name for name in first if found[name] != first[name]} == {metric}


# Task and gates in the project file: what they mean, and what is refused by name


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "exact_match", "ovre": "best-untuned", "at_least": 0.05}, "ovre"),
        ({"metric": "exact_match", "at_least": 0.1, "at_most": 0.2}, "one of them"),
        ({"metric": "exact_match", "over": "x"}, "at_least"),
        ({"suite": "generall", "drop_at_most": 0.1}, "general"),
        ({}, "metric"),
    ],
)
def test_gates_that_are_refused(gate: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GATES.validate_python({"g": gate})


def test_task() -> None:
    task = TaskSettings.model_validate({"schema": "answer.json", "scorers": ["json_valid", "exact_match"]})
    assert str(task.schema_path) == "answer.json"
    assert task.leading == "exact_match"
    assert TaskSettings(scorers=("json_valid", "field_f1")).leading == "json_valid"
    assert TaskSettings(scorers=("json_valid", "field_f1"), primary="field_f1").leading == "field_f1"
    assert TaskSettings().scorers == ("exact_match",)
    for price in (-1.0, 1e13, float("nan")):
        with pytest.raises(ValidationError):
            PriceSettings(machine_hour=price)
        for prices in ({"prompt": price, "answer": 1.0}, {"prompt": 1.0, "answer": price}):
            with pytest.raises(ValidationError):
                TokenPrice.model_validate(prices)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"scorers": ["json_vald"]}, "did you mean 'json_valid'"),
        ({"scorers": ["json_valid", "json_valid"]}, "twice"),
        ({"scorers": ["json_valid"], "primary": "exact_match"}, "not among scorers"),
        ({"scorers": [{"name": "date", "pattern": "(?=a)b"}]}, "not a regular expression that is supported"),
        ({"scorers": [{"name": "exact_match", "label": ""}]}, "built-in scorer"),
        ({"scorers": [{"name": "x", "label": "a", "calibrate": True}]}, "labels and nothing else"),
        ({"scorers": [{"name": "mine", "function": "mine.txt:f"}]}, "pattern"),
        ({"scorers": [{"name": "j", "judge": {"url": "http://u:p@h/v1", "model": "m"}}]}, "secret"),
    ],
)
def test_tasks_that_are_refused(task: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskSettings.model_validate(task)


def test_a_figure_of_labels_needs_a_scorer_that_classifies() -> None:
    gates = GATES.validate_python({"even": {"figure": "macro_f1", "metric": "exact_match", "at_least": 0.8}})
    check_gates(gates, ["exact_match", "intent"], [], ["exact_match"])
    check_gates(gates, ["exact_match"], [])
    for metrics, labels, said in (
        (["exact_match", "intent", "room"], ["intent", "room"], "scorers with labels: intent, room"),
        (["exact_match"], [], "no scorer has labels"),
        (["json_valid"], None, "not measured"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            check_gates(gates, metrics, [], labels)
        assert caught.value.where == "gates.even.metric"
