"""What a training says of its validation, and where people read it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evaluation.probing import row
from tests.fabricate import put_base
from tests.models.test_rendering_tools import CALL, HERMES, TURNS
from tests.pipeline.large_project import write_large
from tests.tiny import write_tokenizer
from tests.tiny_project import settings
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.models.rendering import Renderer
from tunesmith.pipeline.training import forbidden_answers, row_scores, validation_notices
from tunesmith.services.runs.training import train
from tunesmith.store.store import Store
from tunesmith.training.settings import TrainSettings


def _notices(rows: int, scorer: Any = "exact_match", **settings: Any) -> list[str]:
    held = [row(f"request {n}", "answer") for n in range(rows)]
    task = TaskSettings(scorers=[scorer])  # type: ignore[arg-type]
    context: Any = SimpleNamespace(
        dataset=SimpleNamespace(examples=lambda _split: held),
        project=SimpleNamespace(settings=SimpleNamespace(task=task)),
    )
    return validation_notices(context, TrainSettings(**settings))


def test_it_says_what_validation_rows_are_missing() -> None:
    assert _notices(0, budget=60) == [
        "no validation rows: it ends with the budget or after 20 epochs, and the last weights are kept"
    ]
    assert _notices(0, epochs=3) == ["no validation rows: the last weights are kept"]
    assert _notices(10, budget=60) == [
        "validating by the probability of the expected answers: 10 validation rows are too few to choose by exact_match"
    ]
    assert _notices(10, budget=60, validate_by="loss") == [], "the settings say so"
    assert _notices(40, budget=60) == []
    judge = {"name": "quality", "judge": {"url": "http://127.0.0.1:9/v1", "model": "judge"}}
    assert _notices(40, judge, budget=60) == [
        "validating by the probability of the expected answers: quality is a judge: a model scores it, not a function"
    ]


def _asked(folder: Path, rows: list[Example], answer: str) -> tuple[list[float], list[int]]:
    """The base's scores of rows of which it answers each so, and the most tokens it was given for each."""
    store = Store(folder / "store")
    candidate = Candidate(name="tuned", base=put_base(store), max_tokens=64)
    given: list[int] = []

    def generate(asked: list[Generation]) -> list[Completion]:
        given.extend(each.max_tokens for each in asked)
        return [Completion(answer, "stop", 1, 1) for _ in asked]

    engine = SimpleNamespace(base=candidate.base, generate=generate)
    project = SimpleNamespace(settings=SimpleNamespace(task=TaskSettings()), schema=None, root=folder)
    context: Any = SimpleNamespace(
        store=store,
        dataset=SimpleNamespace(digest="sha256:0"),
        project=project,
        sharded=None,
        model=SimpleNamespace(engine=lambda: engine),
        renderer=Renderer(folder),
    )
    return row_scores(context, candidate, rows, folder)(None, len(rows)), given


def test_calls_are_scored_while_training_in_the_form_of_a_row(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, HERMES)
    rows = [row("x", "y").model_copy(update={"messages": TURNS[:2]})]
    assert _asked(tmp_path, rows, CALL)[0] == [1.0]


def test_answers_are_timed_that_are_as_long_as_the_expected_ones(tmp_path: Path) -> None:
    """The base alone seldom stops before the limit, so that too few answers would seem to fit into a budget."""
    write_tokenizer(tmp_path, HERMES)
    answers = ["yes", "open the door of the garden", "word " * 200]
    _, given = _asked(tmp_path, [row("x", answer) for answer in answers], "never ends")
    encode = Renderer(tmp_path).tokenizer.encode
    assert given[:2] == [len(encode(answer)) + 1 for answer in answers[:2]], "with the token that ends a turn"
    assert given[2] == 64, "what the candidate allows"


def test_a_metric_that_cannot_run_stops_a_training_before_it_begins(tmp_path: Path) -> None:
    """Validation by the loss instead would hide it until the evaluation, after the training."""
    data = {**settings()["data"], "split": {"validation": 0.2, "test": 0.2, "group_by": "template"}}  # type: ignore[dict-item]
    project = write_large(tmp_path / "p", value="1.0", data=data)
    (tmp_path / "p" / "scorer.py").write_text("def score(answer, reference, request:\n")
    with pytest.raises(UsageError, match=r"scorer.py cannot be run: SyntaxError"):
        train(project)
    (tmp_path / "p" / "scorer.py").unlink()
    with pytest.raises(UsageError, match="there is no file"):
        train(project)


def test_it_says_which_answers_decoding_cannot_give() -> None:
    schema = {"type": "object", "properties": {"who": {"type": "string"}, "at": {"type": "string", "format": "time"}}}
    held = [row("for Ann", '{"who": "Ann"}'), row("for Bob", '{"who": "Eve"}'), row("at 10", '{"at": "10:30"}')]
    project = SimpleNamespace(settings=SimpleNamespace(server=None))
    context: Any = SimpleNamespace(dataset=SimpleNamespace(examples=lambda _split: held), project=project)
    facts: dict[str, Any] = {"name": "c", "base": "b", "max_tokens": 9}
    copying = Candidate(**facts, answer_schema=json.dumps(schema), copied=("who",))
    counts, notices = forbidden_answers(context, copying, "train")
    assert counts == {"undecodable": 1, "uncopied": 1}
    assert notices[0].startswith(f"decoding cannot give 1 of 3 train answers, such as that of row {held[2].id}: ")
    assert notices[1].startswith("copied fields: 1 of 3 train answers hold a value that is not words of the request")
    turns = (*row("for Ann", '{"who": "Eve"}').messages, *held[0].messages)
    talk = [held[0].model_copy(update={"messages": turns})]
    context.dataset = SimpleNamespace(examples=lambda _split: talk)
    assert forbidden_answers(context, copying, "train")[0]["uncopied"] == 0
    counts, notices = forbidden_answers(context, copying, "train", earlier=True)
    assert counts["uncopied"] == 1, "an answer that is learned, though another one is last"
    assert notices[0].startswith("copied fields: 1 of 2 train answers")
    context.dataset = SimpleNamespace(examples=lambda _split: held)
    del held[1]
    counts, notices = forbidden_answers(context, copying, "train")
    assert (counts["uncopied"], len(notices)) == (0, 1), "nothing is said of copied fields where all can be given"
    ordered = Candidate(**facts, answer_schema=json.dumps({**schema, "minProperties": 1}))
    assert forbidden_answers(context, ordered, "train")[1][0] == (
        "keys keep the schema's order: the answer: minProperties is not supported"
    )
    assert forbidden_answers(context, Candidate(**facts), "train") == ({}, [])
    project.settings.server = "vllm"
    assert forbidden_answers(context, copying, "train") == ({}, [])
