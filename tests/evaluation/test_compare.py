"""Two candidates side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import TASK, evaluated, verdict_of
from tests.fabricate import PROMPT, SCHEMA, Fabricated, add, answer_lines, commands, flawed, put_answers, put_dataset
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.compare import compare, side_of_candidate, side_of_digest
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
    itself = compare(made.store, sides[0], sides[0]).document()["metrics"]["exact_match"]
    assert [itself[key] for key in ("wins", "losses", "mcnemar", "sign_flip")] == [0, 0, 1.0, 1.0]
    assert itself["difference"]["low"] < 0.0 < itself["difference"]["high"]


def test_over_two_evaluations_of_one_dataset_and_of_two(made: Fabricated, evaluation: str) -> None:
    add(made, Candidate(name="later", prompt=PROMPT, base=made.base, max_tokens=9), flawed(0.5, 0.9, 21), 1, 1)
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
    def digests(schema: Any = SCHEMA, model: str = "m", label: str = "", **settings: Any) -> dict[str, str]:
        judge = {"url": "http://127.0.0.1:1/v1", "model": model, **settings}
        labels = {"name": "kind", "label": label, "calibrate": bool(settings)}
        scorers = ["json_valid", "exact_match", {"name": "j", "judge": judge}, labels]
        return scorer_digests(TaskSettings.model_validate({"scorers": scorers}).scorers, schema, Path())

    first = digests()
    assert digests(retries=1) == first, "neither how a judge is reached nor calibration decides a score"
    for changed, metric in (({"schema": None}, "json_valid"), ({"model": "n"}, "j"), ({"label": "intent"}, "kind")):
        found = digests(**changed)  # type: ignore[arg-type]
        assert {name for name in first if found[name] != first[name]} == {metric}
