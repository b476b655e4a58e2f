"""Two candidates side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import TASK
from tests.fabricate import PROMPT, SCHEMA, Fabricated, add, commands, flawed, put_answers, put_dataset
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.compare import compare, side_of_candidate, side_of_digest
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.metrics.declared import scorer_digests
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.registry.leaderboard import leaderboard
from tunesmith.registry.registration import register
from tunesmith.store.people.identities import acting


def test_differences_are_second_minus_first(made: Fabricated, evaluation: str) -> None:
    sides = [side_of_candidate(made.store, evaluation, name) for name in ("rag", "tuned")]
    forth, back = compare(made.store, *sides).document(), compare(made.store, *reversed(sides)).document()
    columns = read_scores(made.store, made.store.record(evaluation))
    for metric in TASK.scorers:
        gaps = columns["tuned", metric].values - columns["rag", metric].values
        found, mirrored = forth["metrics"][metric], back["metrics"][metric]
        assert found["difference"]["mean"] == pytest.approx(gaps.mean())
        assert (found["wins"], found["losses"]) == ((gaps > 0).sum(), (gaps < 0).sum())
        assert found["wins"] + found["losses"] + found["ties"] == 120
        assert (mirrored["wins"], mirrored["losses"]) == (found["losses"], found["wins"])
        assert mirrored["difference"]["low"] == pytest.approx(-found["difference"]["high"], abs=1e-6)
        assert mirrored["mcnemar"] == found["mcnemar"]
    assert forth["metrics"]["exact_match"]["mcnemar"] < 1e-6
    assert forth["metrics"]["field_f1"]["mcnemar"] is None, "graded scores are not McNemar's"
    assert forth["primary"] == "exact_match"


def test_a_candidate_is_like_itself(made: Fabricated, evaluation: str) -> None:
    side = side_of_candidate(made.store, evaluation, "rag")
    found = compare(made.store, side, side).document()["metrics"]["exact_match"]
    assert (found["wins"], found["losses"], found["mcnemar"], found["sign_flip"]) == (0, 0, 1.0, 1.0)
    assert found["difference"]["low"] < 0.0 < found["difference"]["high"]


def test_over_two_evaluations_of_one_dataset(made: Fabricated, evaluation: str) -> None:
    add(made, Candidate(name="later", prompt=PROMPT, base=made.base, max_tokens=9), flawed(0.5, 0.9, 21), 1, 1)
    later = evaluate(
        made.store,
        dataset=made.dataset,
        answers={"later": made.answers["later"]},
        probes={},
        task=TASK.model_copy(update={"scorers": ("exact_match",)}),
        answer_schema=SCHEMA,
    )
    first = side_of_digest(made.store, evaluation, made.candidates["tuned"], "home@v1")
    second = side_of_digest(made.store, later, made.candidates["later"], "home@v2")
    document = compare(made.store, first, second).document()
    assert list(document["metrics"]) == ["exact_match"]
    assert document["first"]["label"] == "home@v1"
    assert document["metrics"]["exact_match"]["difference"]["high"] < 0


def test_scores_of_different_scorers_are_not_compared(made: Fabricated, tmp_path: Path) -> None:
    """The function's file changed between two evaluations: a metric of the same name, and another measure."""
    scorers = ["exact_match", {"name": "brief", "function": "mine.py:brief"}]
    task = TaskSettings.model_validate({"scorers": scorers, "primary": "brief"})
    gates = GATES.validate_python({"right": {"metric": "exact_match", "at_least": 0.0}})
    found = []
    for most in (20, 60, 60):
        (tmp_path / "mine.py").write_text(f"def brief(answer, *_):\n    return float(len(answer) < {most})\n")
        stated: dict[str, Any] = {
            "probes": {},
            "task": task,
            "answer_schema": SCHEMA,
            "root": tmp_path,
            "seed": len(found),
        }
        found.append(evaluate(made.store, dataset=made.dataset, answers=made.answers, **stated))
        verdict = judge(made.store, evaluation=found[-1], candidate="tuned", gates=gates)
        register(made.store, name="home", verdict=verdict, actor=acting(made.store))
    sides = [side_of_candidate(made.store, digest, "tuned") for digest in found]
    different = compare(made.store, *sides[:2])
    assert (list(different.metrics), different.changed_scorers) == (["exact_match"], ("brief",))
    assert list(compare(made.store, *sides[1:]).metrics) == ["exact_match", "brief"]
    boards = {tuple(sorted(row.version for row in board.versions)): board for board in leaderboard(made.store).boards}
    assert set(boards) == {("home@v1",), ("home@v2", "home@v3")}
    assert boards["home@v1",].evaluation == found[0]
    old = made.store.record(found[0])
    older = old.model_copy(update={"body": {key: old.body[key] for key in old.body if key != "scorers"}})
    side = side_of_candidate(made.store, made.store.put_record(older), "tuned")
    assert list(compare(made.store, side, sides[0]).metrics) == ["exact_match", "brief"]
    assert list(compare(made.store, side, sides[1]).metrics) == ["exact_match"], "as its functions' digests say"


@pytest.mark.parametrize(
    ("changed", "alike"),
    [
        ({"calibrate": True}, True),
        ({"label": "intent"}, False),
    ],
)
def test_a_scorer_s_digest_covers_what_decides_a_score(changed: dict[str, Any], alike: bool) -> None:
    def digest(**settings: Any) -> str:
        task = TaskSettings.model_validate({"scorers": [{"name": "kind", "label": "", **settings}]})
        return scorer_digests(task.scorers, SCHEMA, Path())["kind"]

    assert (digest() == digest(**changed)) is alike


def test_a_changed_schema_or_judge_is_another_scorer() -> None:
    def digests(schema: Any, model: str, **settings: Any) -> dict[str, str]:
        judge = {"url": "http://127.0.0.1:1/v1", "model": model, **settings}
        task = TaskSettings.model_validate({"scorers": ["json_valid", "exact_match", {"name": "j", "judge": judge}]})
        return scorer_digests(task.scorers, schema, Path())

    first = digests(SCHEMA, "m")
    assert digests(SCHEMA, "m", retries=1) == first
    assert digests(None, "m") == {**first, "json_valid": digests(None, "m")["json_valid"]}
    assert digests(None, "m")["json_valid"] != first["json_valid"]
    assert digests(SCHEMA, "n")["j"] != first["j"]


def test_over_two_datasets_nothing_is_said(made: Fabricated, evaluation: str) -> None:
    other = put_dataset(made.store, commands(20, 1, 0), [], commands(40, 9, 5000))
    rows = [{"id": row.id, "text": "{}", "finish": "stop", "prompt_tokens": 1, "completion_tokens": 1}
            for row in commands(40, 9, 5000)]  # fmt: skip
    answers = {"zero-shot": put_answers(made.store, made.candidates["zero-shot"], other, rows)}
    elsewhere = evaluate(made.store, dataset=other, answers=answers, probes={}, task=TASK, answer_schema=SCHEMA)
    sides = side_of_candidate(made.store, evaluation, "rag"), side_of_candidate(made.store, elsewhere, "zero-shot")
    with pytest.raises(Inconclusive, match="was measured on dataset"):
        compare(made.store, *sides).document()


def test_names_that_are_not_there(made: Fabricated, evaluation: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'few-shot'"):
        side_of_candidate(made.store, evaluation, "fewshot")
    with pytest.raises(UsageError, match="has no candidate"):
        side_of_digest(made.store, evaluation, made.training, "home@v1")
